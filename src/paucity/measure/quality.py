"""How well a causal language model predicts a text: perplexity and bits per byte over sliding windows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..checks import InputTypeError, check_int, check_ndim, fail
from .stats import Estimate, ratio_interval
from .tokens import Progress, check_context, device_of, encode, evaluating, forward, leading_ids


@dataclass(frozen=True)
class Quality:
    """How well a text was predicted.

    Attributes:
        nats_per_token: mean negative log-likelihood, natural logarithm.
        perplexity: its exponential.
        bits_per_byte: nats / ln 2 / UTF-8 bytes of the text predicted; comparable between tokenizers. None where only
            token ids were given.
        num_tokens: tokens predicted, each once.
        num_bytes: UTF-8 bytes of the text that these tokens are.
        window_nats: summed nats of each window, for paired comparisons.
        window_tokens: tokens predicted in each window.
    """

    nats_per_token: Estimate
    perplexity: Estimate
    bits_per_byte: Estimate | None
    num_tokens: int
    num_bytes: int | None
    length: int
    stride: int
    window_nats: tuple[float, ...]
    window_tokens: tuple[int, ...]


def perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    length: int = 1024,
    stride: int = 512,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Quality:
    """Perplexity of all tokens but the first, each predicted once from at least ``length - stride`` tokens before it.

    The first window alone predicts from its very start, with less. A window is one forward pass of ``length`` tokens.

    Args:
        model: a causal language model of the transformers library, or one that is called like it.
        ids: int64 ``[T]`` or ``[1, T]``.
        length: tokens a window holds.
        stride: tokens by which windows advance, which is what each window after the first predicts.
        seed: of the bootstrap over windows.
        on_progress: called with (windows done, windows in all).

    Raises:
        InputError: if there are fewer than two ids, ``stride`` exceeds ``length``, or ``length`` the model's context.
    """
    check_ndim("perplexity", "ids", ids, 1, 2)
    if ids.ndim == 2 and ids.shape[0] != 1:
        raise fail("perplexity", "ids", "hold one sequence", f"shape {list(ids.shape)}")
    flat = ids.flatten()
    if len(flat) < 2:
        raise fail("perplexity", "ids", "hold at least 2 tokens", len(flat))
    return _evaluate("perplexity", model, flat, 1, length, stride, None, seed, on_progress)


def bits_per_byte(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    length: int = 1024,
    stride: int = 512,
    max_tokens: int | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Quality:
    """Bits per UTF-8 byte of ``text``, windowed as `perplexity` does.

    BOS comes first where the tokenizer puts one, and every token of the text is predicted. Where it puts none, the
    first token has nothing before it, and its bytes are not counted either. A tokenizer that maps parts of the text to
    an unknown token makes the figure too good.

    Args:
        model: a causal language model of the transformers library, or one that is called like it.
        tokenizer: the model's.
        text: what to predict.
        length: tokens a window holds.
        stride: tokens by which windows advance.
        max_tokens: tokens of the text to use, from its start, rounded down to whole characters; None is all.
        seed: of the bootstrap over windows.
        on_progress: called with (windows done, windows in all).

    Raises:
        InputError: if ``text`` is empty or one token without BOS, and as `perplexity` does.
    """
    if not isinstance(text, str):
        raise InputTypeError(f"bits_per_byte: text must be a string, got {type(text).__name__}.")
    if max_tokens is not None:
        check_int("bits_per_byte", "max_tokens", max_tokens, 2)
    if not text.strip():
        raise fail("bits_per_byte", "text", "hold more than white space", f"{len(text)} characters")
    lead = leading_ids(tokenizer)
    first = max(len(lead), 1)
    ids, num_bytes = _covered(tokenizer, text, max_tokens, skipped=first - len(lead))
    if len(lead) + len(ids) <= first:
        raise fail("bits_per_byte", "text", "be longer than one token", f"{len(ids)} tokens")
    sequence = torch.tensor([*lead, *ids])
    return _evaluate("bits_per_byte", model, sequence, first, length, stride, num_bytes, seed, on_progress)


def relative_change(baseline: Quality, changed: Quality, *, seed: int = 0) -> Estimate:
    """``changed / baseline - 1`` in nats (so in bits per byte), with a bootstrap over the windows paired.

    As both models read the same windows, the interval is far narrower than those of the two figures.

    Raises:
        InputError: if the two were not measured over the same windows.
    """
    if baseline.window_tokens != changed.window_tokens:
        got = f"{len(changed.window_tokens)} windows of {changed.num_tokens} tokens"
        raise fail("relative_change", "changed", "be measured over the windows of baseline", got)
    return ratio_interval(changed.window_nats, baseline.window_nats, seed=seed).mapped(lambda ratio: ratio - 1)


def _covered(
    tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int | None, *, skipped: int
) -> tuple[list[int], int]:
    """Ids of the first tokens of ``text`` and the UTF-8 bytes of all of them but the first ``skipped``."""
    if not tokenizer.is_fast:  # no offsets: what was left out is measured by decoding it
        ids = encode(tokenizer, text)
        kept = ids[:max_tokens]
        counted = text if len(kept) == len(ids) and not skipped else tokenizer.decode(kept[skipped:])
        return kept, len(counted.encode())
    encoding = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
    end = len(ids) if max_tokens is None else min(max_tokens, len(ids))
    while 0 < end < len(ids) and offsets[end][0] < offsets[end - 1][1]:  # never half a character
        end -= 1
    start_char = offsets[skipped - 1][1] if skipped and end else 0
    end_char = len(text) if end == len(ids) else offsets[end - 1][1] if end else 0
    return ids[:end], len(text[start_char:end_char].encode())


def _evaluate(
    function: str,
    model: nn.Module,
    ids: Tensor,
    first: int,
    length: int,
    stride: int,
    num_bytes: int | None,
    seed: int,
    on_progress: Progress | None,
) -> Quality:
    """Quality over the tokens ``ids[first:]``."""
    check_int(function, "length", length)
    check_int(function, "stride", stride)
    if stride > length:
        raise fail(function, "stride", f"be at most length ({length})", stride)
    check_context(function, "length", model, min(length, len(ids) - 1))
    ends = [*range(min(length, len(ids) - 1), len(ids) - 1, stride), len(ids) - 1]
    starts = [first - 1, *ends[:-1]]
    if ends[0] <= starts[0]:
        raise fail(function, "length", f"be at least {first}", length)
    nats, device = [], device_of(model)
    with evaluating(model):
        for done, (start, end) in enumerate(zip(starts, ends, strict=True), 1):
            window = ids[max(0, end - length) : end + 1].to(device)
            logits, _ = forward(model, window[None, :-1], keep=end - start)
            loss = nn.functional.cross_entropy(logits[0].float(), window[start - end :], reduction="sum")
            nats.append(float(loss))
            if on_progress is not None:
                on_progress(done, len(ends))
    return summary(nats, [b - a for a, b in pairwise([first - 1, *ends])], num_bytes, length, stride, seed)


def summary(
    nats: Sequence[float], tokens: Sequence[int], num_bytes: int | None, length: int, stride: int, seed: int
) -> Quality:
    """`Quality` of windows with summed ``nats`` over ``tokens`` each, and the bytes of all of them."""
    mean = ratio_interval(nats, tokens, seed=seed)
    bits = None
    if num_bytes is not None:
        factor = sum(tokens) / num_bytes / math.log(2)
        bits = mean.mapped(lambda value: value * factor)
    return Quality(
        nats_per_token=mean,
        perplexity=mean.mapped(lambda value: math.exp(value) if value < 700 else math.inf),
        bits_per_byte=bits,
        num_tokens=sum(tokens),
        num_bytes=num_bytes,
        length=length,
        stride=stride,
        window_nats=tuple(nats),
        window_tokens=tuple(tokens),
    )
