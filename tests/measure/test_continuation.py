import pytest

from paucity.checks import InputError
from paucity.measure.continuation import continuation

TEXT = "".join(f"line {i} of a text\n" for i in range(100))


def test_both_ways_of_reading_predict_the_same(llama, tokenizer):
    options = {"length": 60, "num_tokens": 7, "num_windows": 3, "seed": 2}
    once = continuation(llama, tokenizer, TEXT, mode="teacher_forced", **options)
    steps = continuation(llama, tokenizer, TEXT, mode="generate", **options)
    assert steps.window_nats == pytest.approx(once.window_nats, rel=1e-4)
    assert once.window_tokens == (7, 7, 7)
    assert once.num_tokens == 21
    assert once.bits_per_byte.value == pytest.approx(steps.bits_per_byte.value, rel=1e-4)
    assert once != continuation(llama, tokenizer, TEXT, **options | {"seed": 3})


def test_only_the_end_is_predicted(llama, tokenizer):
    """Of one window as long as the text, the nats are those of the model's own loss on its last tokens."""
    ids = tokenizer(TEXT[:80], return_tensors="pt")["input_ids"]
    found = continuation(llama, tokenizer, TEXT[:80], length=ids.shape[1], num_tokens=5, num_windows=1)
    labels = ids.clone()
    labels[:, :-5] = -100
    assert found.nats_per_token.value == pytest.approx(llama(ids, labels=labels).loss.item(), rel=1e-4)


def test_bad_input(llama, tokenizer):
    with pytest.raises(InputError, match="length must be at least 65, got 64"):
        continuation(llama, tokenizer, TEXT, length=64)
    with pytest.raises(InputError, match="text must have at least"):
        continuation(llama, tokenizer, "short", length=100)
    with pytest.raises(InputError, match="mode must be one of generate, teacher_forced"):
        continuation(llama, tokenizer, TEXT, length=100, mode="both")
