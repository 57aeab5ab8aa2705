"""The buffer: against a naive one that keeps activations, from any start, and its bad input."""

import itertools
import time

import pytest
import torch

from paucity.checks import InputError
from paucity.dictionary.mixing import MixedSource, item_at
from paucity.dictionary.sources import TensorSource


def made(counts, capacity, seed=0, width=3):
    """Rows that say where they come from: item, row."""
    reads = []

    def read(item):
        reads.append(item)
        rows = torch.arange(counts[item])
        return torch.stack([torch.full_like(rows, item), rows, rows], 1)[:, :width].float()

    return MixedSource(read, counts, width, capacity=capacity, seed=seed), reads


def taken(source, size, number, start=0):
    return list(itertools.islice(source.batches(size, start=start), number))


@pytest.mark.parametrize("counts", [[1], [5, 3, 8, 2], [40, 0, 1, 7], [100, 2]])
@pytest.mark.parametrize("capacity", [2, 9, 64])
def test_it_starts_anywhere_with_the_same_batches(counts, capacity):
    whole = taken(made(counts, capacity)[0], 7, 12)
    for start in (0, 1, 5, 11):
        for wanted, found in zip(whole[start:], taken(made(counts, capacity)[0], 7, 12 - start, start), strict=True):
            assert torch.equal(wanted, found)


def test_rows_do_not_depend_on_the_size_of_a_batch():
    counts = [5, 3, 8, 2]
    small, large = taken(made(counts, 9)[0], 2, 30), taken(made(counts, 9)[0], 15, 4)
    assert torch.equal(torch.cat(small), torch.cat(large))


def test_every_row_comes_as_often_as_its_item_was_taken_up():
    counts = [5, 3, 8, 2]
    rows = torch.cat(taken(made(counts, 9)[0], 18, 50))  # 50 passes, but for what is in the buffer
    _, times = rows.unique(dim=0, return_counts=True)
    assert len(times) == 18
    assert times.min() >= 47
    assert times.max() <= 53


def test_half_a_buffer_of_shuffled_rows_is_given_at_a_time():
    """The naive buffer: fill with whole items, shuffle, give half away, fill again."""
    counts, capacity = [5, 3, 8, 2], 9
    source, _ = made(counts, capacity)
    stream = torch.cat(taken(source, 1, 12)).int().tolist()
    turns, held = iter(range(100)), []
    while len(held) < capacity:
        item = item_at(next(turns), 4, 0)
        held += [[item, row, row] for row in range(counts[item])]
    half = len(held) // 2
    given = stream[:half]
    assert all(row in held for row in given)
    assert given != held[:half]
    left = [row for row in held if row not in given]
    while len(left) < capacity:
        item = item_at(next(turns), 4, 0)
        left += [[item, row, row] for row in range(counts[item])]
    assert all(row in left for row in stream[half : half + len(left) // 2])


def test_a_late_start_reads_only_what_is_in_the_buffer():
    counts = [10] * 1000
    source, reads = made(counts, 100)
    taken(source, 10, 1, start=800)
    assert len(reads) < 120


def test_passes_differ_and_the_seed_decides():
    orders = [[item_at(turn, 20, seed) for turn in range(40)] for seed in (0, 1)]
    assert sorted(orders[0][:20]) == sorted(orders[0][20:]) == list(range(20))
    assert orders[0][:20] != orders[0][20:]
    assert orders[0] != orders[1]
    assert torch.equal(made([9, 9], 8, seed=3)[0].sample(9), made([9, 9], 8, seed=3)[0].sample(9))
    assert not torch.equal(made([9, 9], 8, seed=3)[0].sample(9), made([9, 9], 8, seed=4)[0].sample(9))


def test_items_of_one_row_cost_no_more_than_their_number():
    row = torch.zeros(1, 2)
    began = time.process_time()
    next(MixedSource(lambda item: row, [1] * 40_000, 2, capacity=40_000).batches(1))
    assert time.process_time() - began < 4  # quadratic where each searches all rows


def test_what_is_given_keeps_no_more_than_half_a_buffer():
    source, _ = made([50] * 8, 400)
    pieces = source._rows(0)
    assert [next(pieces).untyped_storage().nbytes() for _ in range(3)] == [200 * 3 * 4] * 3


def test_rows_in_memory_start_anywhere_for_any_seed():
    source = TensorSource(torch.arange(6.0)[:, None], seed=2**62)
    assert torch.equal(next(source.batches(2, start=2)), torch.cat(taken(source, 2, 3))[4:])
    with pytest.raises(InputError, match="start must be at least 0, got -1"):
        next(source.batches(2, start=-1))


def test_bad_input():
    with pytest.raises(InputError, match=r"counts must hold at least one row .*got 0 items"):
        made([], 8)
    with pytest.raises(InputError, match=r"counts must hold at least one row .*got 2 items"):
        made([0, 0], 8)
    with pytest.raises(InputError, match="capacity must be at least 2"):
        made([3], 1)
    with pytest.raises(InputError, match=r"activations of item 0 must have shape \[3, 5\], got \[3, 3\]"):
        next(MixedSource(lambda item: torch.ones(3, 3), [3], 5).batches(1))
    with pytest.raises(InputError, match="activations must be finite, got NaN or infinity in item 0"):
        next(MixedSource(lambda item: torch.full((3, 3), torch.nan), [3], 3).batches(1))
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        next(made([3], 8)[0].batches(0))
