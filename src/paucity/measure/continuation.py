"""How well a model predicts the end of long texts: what came before is read in one pass, the end in that pass or after.

A sparse prefill shows when the end is read with the prompt; sparse decoding when it is read token by token from the
cache. Both predict the same tokens, so that the two can be compared. No paper: bits per byte as in
`paucity.measure.quality`.
"""

import random

from torch import nn, tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from ..checks import InputTypeError, check_choice, check_int, fail
from .quality import Quality, summary
from .retrieval import MODES
from .tokens import Progress, check_context, device_of, encode, evaluating, forward, leading_ids


def continuation(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    length: int,
    num_tokens: int = 64,
    num_windows: int = 16,
    mode: str = "teacher_forced",
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Quality:
    """Quality over the last ``num_tokens`` of random windows of ``text``.

    Args:
        model: a causal language model of the transformers library.
        tokenizer: the model's.
        text: where the windows come from; they may overlap.
        length: tokens of a window, what the tokenizer puts before a text included.
        num_tokens: tokens that are predicted, the last of a window.
        num_windows: windows.
        mode: "teacher_forced" reads a window in one pass; "generate" prefills all but the end and reads that token by
            token from the cache, as decoding does, whatever the model itself would have said.
        seed: of the windows; the same seed gives every model the same ones.
        on_progress: called with (windows done, ``num_windows``).

    Raises:
        InputError: if ``mode`` is unknown, ``num_tokens`` not below ``length``, or ``length`` more than the text has
            or the model's context.
    """
    function = "continuation"
    check_choice(function, "mode", mode, MODES)
    check_int(function, "num_windows", num_windows)
    check_int(function, "num_tokens", num_tokens)
    check_int(function, "length", length, num_tokens + 1)
    check_context(function, "length", model, length)
    if not isinstance(text, str):
        raise InputTypeError(f"{function}: text must be a string, got {type(text).__name__}.")
    lead, ids, rng = leading_ids(tokenizer), encode(tokenizer, text), random.Random(seed)
    room = length - len(lead)
    if room > len(ids):
        raise fail(function, "text", f"have at least {room} tokens", len(ids))
    nats, num_bytes = [], 0
    with evaluating(model):
        for done in range(num_windows):
            start = rng.randint(0, len(ids) - room)
            window = [*lead, *ids[start : start + room]]
            nats.append(_nats(model, window, num_tokens, mode))
            num_bytes += len(tokenizer.decode(window[-num_tokens:]).encode())
            if on_progress is not None:
                on_progress(done + 1, num_windows)
    return summary(nats, [num_tokens] * num_windows, num_bytes, length, num_tokens, seed)


def _nats(model: nn.Module, window: list[int], num_tokens: int, mode: str) -> float:
    """Nats of the last ``num_tokens`` of a window."""
    ids = tensor([window], device=device_of(model))
    wanted = ids[0, -num_tokens:]
    if mode == "teacher_forced":
        logits, _ = forward(model, ids[:, :-1], keep=num_tokens)
        return float(cross_entropy(logits[0].float(), wanted, reduction="sum"))
    logits, cache = forward(model, ids[:, :-num_tokens], keep=1, use_cache=True)
    total = 0.0
    for i, token in enumerate(wanted):
        total += float(cross_entropy(logits[0, -1:].float(), token[None]))
        if i + 1 < num_tokens:
            logits, cache = forward(model, token[None, None], keep=1, cache=cache, use_cache=True)
    return total
