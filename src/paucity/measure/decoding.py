"""How well a model predicts a text when it reads it token by token, from the cache of a prompt.

One forward pass over a text never reads the cache. What decides over cached keys (sparse decoding, eviction) shows only
in steps with one token after a prompt, which is what is measured here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..checks import InputTypeError, check_int, fail
from .stats import Estimate, ratio_interval
from .tokens import Progress, check_context, device_of, encode, evaluating, forward, leading_ids

_BIT = 0.6931471805599453  # nats


@dataclass(frozen=True)
class Decoded:
    """How well the tokens after some prompts were predicted.

    Attributes:
        bits_per_byte: of the predicted text, with a bootstrap over the prompts.
        num_tokens: tokens predicted, all prompts together.
        num_bytes: UTF-8 bytes of these.
        context: tokens of each prompt.
        nats: summed nats of each prompt's tokens, for paired comparisons.
        bytes_each: bytes of each prompt's tokens.
        cache_bytes: memory of the largest cache, after the last token.
    """

    bits_per_byte: Estimate
    num_tokens: int
    num_bytes: int
    context: int
    nats: tuple[float, ...]
    bytes_each: tuple[int, ...]
    cache_bytes: int


def decoded_bits_per_byte(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    context: int = 2048,
    num_tokens: int = 64,
    num_prompts: int = 8,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Decoded:
    """Bits per UTF-8 byte of the tokens after prompts that are spread evenly over ``text``.

    A prompt is read at once; each of the tokens that follow is predicted from the cache and then put into it, alone.
    The first of them is predicted by the prompt itself and does not count.

    Args:
        model: a causal language model of the transformers library.
        tokenizer: the model's.
        text: what prompts and tokens are taken from.
        context: tokens of a prompt, special tokens before the text included.
        num_tokens: tokens predicted after each.
        num_prompts: prompts.
        seed: of the bootstrap.
        on_progress: called with (prompts done, ``num_prompts``).

    Raises:
        InputError: if a size is below 1, the text too short, or prompt and tokens are beyond the model's context.
    """
    function = "decoded_bits_per_byte"
    for name, value in (("context", context), ("num_tokens", num_tokens), ("num_prompts", num_prompts)):
        check_int(function, name, value)
    check_context(function, "context and num_tokens", model, context + num_tokens)
    if not isinstance(text, str):
        raise InputTypeError(f"{function}: text must be a string, got {type(text).__name__}.")
    lead, ids = leading_ids(tokenizer), encode(tokenizer, text)
    own = max(1, context - len(lead))
    need = own + num_tokens + 1
    if len(ids) < need:
        raise fail(function, "text", f"have at least {need} tokens", len(ids))
    starts = [(len(ids) - need) * i // max(1, num_prompts - 1) for i in range(num_prompts)]
    nats, sizes, held = [], [], 0
    with evaluating(model):
        for done, start in enumerate(starts, 1):
            prompt, after = [*lead, *ids[start : start + own]], ids[start + own : start + need]
            total, cache = _follow(model, torch.tensor([prompt]), torch.tensor([after]))
            nats.append(total)
            sizes.append(len(tokenizer.decode(after[1:]).encode()))
            held = max(held, cache_bytes(cache))
            if on_progress is not None:
                on_progress(done, num_prompts)
    bits = ratio_interval(nats, sizes, seed=seed).mapped(lambda value: value / _BIT)
    return Decoded(bits, num_tokens * num_prompts, sum(sizes), len(lead) + own, tuple(nats), tuple(sizes), held)


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a transformers cache holds, shared storages once."""
    seen: dict[int, int] = {}
    for layer in getattr(cache, "layers", ()):
        _storages(vars(layer), seen)
    return sum(seen.values())


def _storages(value: object, seen: dict[int, int]) -> None:
    """Storages of the tensors in nested containers and plain objects of ours."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, dict):
        for each in value.values():
            _storages(each, seen)
    elif isinstance(value, list | tuple):
        for each in value:
            _storages(each, seen)
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("paucity."):
        _storages(vars(value), seen)


def _follow(model: nn.Module, prompt: Tensor, after: Tensor) -> tuple[float, Any]:
    """Nats of ``after[1:]``, token by token, and the cache."""
    device = device_of(model)
    _, cache = forward(model, prompt.to(device), keep=1, use_cache=True)
    total, tokens = 0.0, after.to(device)
    for step in range(after.shape[1] - 1):
        logits, cache = forward(model, tokens[:, step : step + 1], keep=1, cache=cache, use_cache=True)
        total += float(nn.functional.cross_entropy(logits[0].float(), tokens[0, step + 1 : step + 2]))
    return total, cache


def relative_change(baseline: Decoded, changed: Decoded, *, seed: int = 0) -> Estimate:
    """``changed / baseline - 1`` in nats, with a bootstrap over the prompts paired.

    Raises:
        InputError: if the two were not measured over the same prompts.
    """
    if baseline.bytes_each != changed.bytes_each or baseline.context != changed.context:
        raise fail("relative_change", "changed", "be measured over the prompts of baseline", len(changed.nats))
    return ratio_interval(changed.nats, baseline.nats, seed=seed).mapped(lambda ratio: ratio - 1)
