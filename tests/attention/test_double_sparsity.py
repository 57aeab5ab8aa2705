"""Double Sparsity: calibration against loops over all tokens, labels in four bits, and files that hold the cache."""

import copy

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import DoubleSparsity, DoubleSparsityChannels, Prompt, apply
from paucity.attention.cache.mapped import Mapped
from paucity.attention.decode.double_sparsity_channels import dequantise, quantise
from paucity.attention.double_sparsity import channel_scores, product_sums
from paucity.checks import InputError

from .cached import grow, listed, random_layer
from .test_apply import model_of, tokens

CHANNELS = [[[1, 6, 2], [7, 0, 4]]]


def policy(**options):
    return DoubleSparsityChannels(
        **{"channels": CHANNELS, "num_keys": 5, "min_length": 0, "dense_layers": 0, "group_size": 4} | options
    )


@pytest.mark.parametrize("window", [None, 3])
def test_product_sums_match_loops_over_pairs(window):
    query, key = torch.randn(2, 4, 7, 5), torch.randn(2, 2, 7, 5)
    wanted = torch.zeros(2, 5, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            for t in range(7):
                for s in range(t + 1):
                    if window is None or t - s < window:
                        wanted[h // 2] += (query[b, h, t] * key[b, h // 2, s]).abs().double()
    torch.testing.assert_close(product_sums(query, key, window), wanted)


def test_every_calibration_text_counts():
    model, texts = model_of("llama"), [tokens(20), tokens(31, 2, seed=1)]
    whole = channel_scores(model, texts)
    apart = [channel_scores(model, [text]) for text in texts]
    for layer in (0, 1):
        torch.testing.assert_close(whole[layer], apart[0][layer] + apart[1][layer])
    found = DoubleSparsity(num_channels=3, dense_layers=1, num_keys=9).fit(model, texts)
    assert (found.dense_layers, found.num_keys) == (1, 9)
    for layer in (0, 1):
        assert found.channels[layer] == whole[layer].argsort(dim=-1, descending=True)[:, :3].tolist()


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("options", [{"num_keys": 5}, {"density": 0.4}, {"num_keys": 100}])
def test_select_matches_naive(bits, options):
    layer, first = random_layer([13, 9])
    query = torch.randn(2, 4, 1, 8)
    pages = policy(bits=bits, **options).select(query, layer.cached(first), Prompt(scale=0.5))
    assert pages.page_size == 1
    for b, length in enumerate((13, 9)):
        for h in range(2):
            at = CHANNELS[0][h]
            keys = layer.store.rectangle(layer.store.keys, layer.store.starts, layer.store.lengths)[b, h, 13 - length :]
            labels = keys[:, at] if bits == 16 else torch.cat([naive_labels(part) for part in keys[:, at].split(4)])
            weights = sum(torch.softmax(0.5 * labels @ query[b, 2 * h + g, 0, at], dim=0) for g in range(2))
            count = min(options.get("num_keys") or round(options["density"] * length), length)
            wanted = weights.argsort(descending=True)[:count].tolist()
            assert sorted(listed(pages.numbers[b, h])) == sorted(wanted)


def naive_labels(part):
    """Each channel of a group of keys on sixteen levels between its least and greatest value."""
    out = part.clone()
    for c in range(part.shape[1]):
        low, high = float(part[:, c].min()), float(part[:, c].max())
        step = (high - low) / 15
        for i in range(len(part)):
            out[i, c] = low + step * round((float(part[i, c]) - low) / step) if step else low
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 4, 7])
def test_labels_are_packed_and_close(dtype, channels):
    labels, counts = torch.randn(3, 6, channels).to(dtype), torch.ones(3, 6, dtype=torch.bool)
    counts[1, 4:], labels[1, 4:] = False, 1e4
    codes, low, step = quantise(labels, counts)
    assert codes.dtype == torch.uint8
    assert codes.shape == (3, 6, -(-channels // 2))
    error = (dequantise((codes, low, step), channels) - labels).abs().float()[counts]
    most = step.float().unsqueeze(-2).expand(3, 6, channels)[counts]
    assert (error <= 0.5 * most + 1e-5 + 0.05 * (dtype == torch.bfloat16)).all()
    assert step.max() < 1


def test_labels_grow_with_the_cache():
    layer, first = random_layer([6, 5])
    query = torch.randn(2, 4, 1, 8)
    for step in range(9):
        grow(layer, step)
        pages = policy().select(query, layer.cached(first), Prompt())
        fresh = copy.deepcopy(layer)
        fresh._forget()
        assert torch.equal(pages.numbers, policy().select(query, fresh.cached(first), Prompt()).numbers)


def test_a_cache_in_a_file_gives_the_same(tmp_path):
    here, there = (random_layer([200, 150])[0] for _ in range(2))
    first = torch.tensor([0, 50])
    near, far = policy(), policy(offload=str(tmp_path))
    before = there.store.num_bytes
    for step in range(70):  # past the room to grow in
        query = torch.randn(2, 4, 1, 8)
        for layer in (here, there):
            grow(layer, step)
        outs = [p.attend(query, one.cached(first), Prompt()).out for p, one in ((near, here), (far, there))]
        assert torch.equal(*outs)
    assert there.store.num_bytes < before / 4
    assert there.store.allocate == Mapped(str(tmp_path))
    assert list(tmp_path.iterdir()) == []  # no name is left behind
    twin = copy.deepcopy(there)
    twin.store.keys.zero_()
    assert there.store.keys.any()
    there.batch_select_indices(torch.tensor([1, 1]))
    here.batch_select_indices(torch.tensor([1, 1]))
    both = torch.tensor([50, 50])
    outs = [p.attend(query, one.cached(both), Prompt()).out for p, one in ((near, here), (far, there))]
    assert torch.equal(*outs)


def test_generation_from_a_file(tmp_path):
    model, ids = model_of("llama"), tokens(40)
    found = [DoubleSparsity(num_channels=4, dense_layers=0, num_keys=8, min_length=0, offload=folder).fit(model, [ids])
             for folder in (None, str(tmp_path))]  # fmt: skip
    out = []
    for one in found:
        applied = apply(model, one)
        out.append(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0))
        assert max(applied.density().values()) < 0.25
        applied.remove()
    assert torch.equal(*out)


def test_bad_input(tmp_path):
    model = model_of("llama")
    with pytest.raises(InputError, match="calibration must hold at least one text, got none"):
        DoubleSparsity().fit(model, [])
    with pytest.raises(InputError, match="num_channels must be at most 8, got 9"):
        DoubleSparsity(num_channels=9, dense_layers=0).fit(model, [tokens(9)])
    with pytest.raises(InputError, match="channels must have 2 layers, got 1"):
        apply(model, policy())
    with pytest.raises(InputError, match="channels must have 2 KV heads in every layer, got 3"):
        apply(model, policy(channels=[[[0]] * 3, [[0]]]))
    with pytest.raises(InputError, match=r"offload must be a folder, got .*absent"):
        apply(model, policy(channels=CHANNELS * 2, offload=str(tmp_path / "absent")))
    layer, first = random_layer([9])
    with pytest.raises(InputError, match="channels must be below 8, got 8"):
        policy(channels=[[[8], [0]]]).select(torch.randn(1, 4, 1, 8), layer.cached(first), Prompt())
    for wrong in ([[[0, 1], [0]]], [[[0, 0]]], [[]], [[[-1]]]):
        with pytest.raises(ValidationError, match="channels must"):
            policy(channels=wrong)
    with pytest.raises(InputError, match="cache must be on the CPU, got one on meta"):
        Mapped(str(tmp_path))(torch.empty(2, 2, device="meta"), 3)
    with pytest.raises(InputError, match="folder must take 32 bytes"):
        Mapped(str(tmp_path / "absent"))(torch.empty(2, 2), 4)
