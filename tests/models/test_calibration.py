import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from paucity.checks import InputError
from paucity.models.calibration import calibration_batches
from paucity.models.load import byte_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. " * 3


@pytest.fixture
def without_bos():
    vocab = {"<s>": 0, **{char: i + 1 for i, char in enumerate(sorted(set(TEXT)))}}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=[])), bos_token="<s>")


def test_windows_are_pieces_of_the_text():
    tokenizer = byte_tokenizer(257)
    batches = calibration_batches(tokenizer, TEXT, num_samples=20, length=11, seed=1)
    assert len(batches) == 20
    for batch in batches:
        assert batch.shape == (1, 11)
        assert batch.dtype == torch.int64
        assert batch[0, 0] == 256
        assert bytes(batch[0, 1:].tolist()).decode() in TEXT
    assert len({tuple(batch[0].tolist()) for batch in batches}) > 10


def test_no_bos_where_the_tokenizer_puts_none(without_bos):
    batches = calibration_batches(without_bos, TEXT, num_samples=5, length=9, seed=0)
    assert all(batch.shape == (1, 9) and (batch != 0).all() for batch in batches)


def test_seed_decides():
    draw = lambda seed: calibration_batches(byte_tokenizer(257), TEXT, num_samples=8, length=9, seed=seed)  # noqa: E731
    assert all(map(torch.equal, draw(4), draw(4)))
    assert not all(map(torch.equal, draw(4), draw(5)))


def test_both_ends_are_reached():
    batches = calibration_batches(byte_tokenizer(257), "abc", num_samples=50, length=3, seed=0)
    assert {bytes(batch[0, 1:].tolist()) for batch in batches} == {b"ab", b"bc"}
    (whole,) = calibration_batches(byte_tokenizer(257), "abc", num_samples=1, length=4, seed=0)
    assert whole.tolist() == [[256, *b"abc"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": ""}, r"text must have at least 7 tokens for windows of 8, got 0 tokens \(0 characters\)\."),
        ({"text": "é" * 3}, r"text must have at least 7 tokens for windows of 8, got 6 tokens \(3 characters\)\."),
        ({"text": ["a"]}, "text must be a string, got list"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"length": 1}, "length must be at least 2, got 1"),
    ],
)
def test_bad_input(options, message):
    options = {"text": TEXT, "num_samples": 1, "length": 8} | options
    text = options.pop("text")
    with pytest.raises(InputError, match=message):
        calibration_batches(byte_tokenizer(257), text, **options)
