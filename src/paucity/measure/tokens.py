"""What the measurements ask of a model and its tokenizer, whichever they are."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..checks import check_ndim, fail

Progress = Callable[[int, int], object]
"""Called with (done, total) as a measurement goes on."""


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of ``text`` without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokenizer puts before a text, such as BOS; empty where it puts none."""
    plain, full = encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    starts = (i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    return full[: next(starts, 0)]


def line_end_ids(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> frozenset[int]:
    """Those of ``ids`` whose text ends with a line feed, alone or merged with a bracket or the like before it."""
    return frozenset(i for i in set(ids) if tokenizer.decode([i]).endswith("\n"))


def context_length(model: nn.Module) -> int | None:
    """Number of positions that the model was made for; None where its configuration does not say."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def check_context(function: str, argument: str, model: nn.Module, length: int) -> None:
    """Raise InputError where ``length`` tokens are more than the model was made for."""
    limit = context_length(model)
    if limit is not None and length > limit:
        raise fail(function, argument, f"be at most the model's context of {limit} tokens", length)


def check_batch(function: str, argument: str, ids: Tensor, least: int = 2) -> None:
    """Raise InputError unless ``ids`` is ``[B, T]`` with a row and at least ``least`` tokens in it."""
    check_ndim(function, argument, ids, 2)
    if not len(ids) or ids.shape[1] < least:
        raise fail(function, argument, f"have a row of at least {least} tokens", f"shape {list(ids.shape)}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode of before is restored, module by module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter; the CPU where it has none."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def forward(
    model: nn.Module, ids: Tensor, *, keep: int, cache: Any = None, use_cache: bool = False
) -> tuple[Tensor, Any]:
    """One forward pass.

    Args:
        model: a causal language model.
        ids: int64 ``[B, T]``, without padding.
        keep: number of last positions whose logits are wanted; models that can skip the others do.
        cache: what an earlier call returned, holding the tokens before ``ids``.
        use_cache: whether a cache is wanted back.

    Returns:
        (logits ``[B, keep, vocab]``, cache or None).
    """
    known = inspect.signature(model.forward).parameters
    options = {"use_cache": use_cache, "past_key_values": cache, "logits_to_keep": keep}
    if "input_ids" in known:  # a wrapper that takes anything is given everything
        options = {name: value for name, value in options.items() if name in known}
    output = model(input_ids=ids, **options)
    return output.logits[:, -keep:], getattr(output, "past_key_values", None)
