"""Token windows of a text, for methods that look at what runs through the model before they choose."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import InputTypeError, check_int, fail
from ..measure.tokens import check_context, encode, leading_ids

Batch = Tensor | tuple[Tensor, Tensor]
"""What a model is calibrated with: ``input_ids [1, T]`` int64, or inputs of any other model, with labels or without."""


def as_batches(function: str, model: nn.Module, calibration: Iterable[Any]) -> list[Batch]:
    """Any calibration data as a list of batches that ``model`` takes, checked before any work.

    Args:
        function: in whose name errors speak.
        model: what will be run.
        calibration: a list or a DataLoader of tensors, of ``(inputs, labels)``, or of mappings with ``input_ids`` and
            perhaps ``attention_mask`` (of a language model: padding is cut off, rows become batches of their own).

    Raises:
        InputError: if a batch is empty, is no such thing, or holds token ids beyond the vocabulary, texts beyond the
            context, NaN or infinities.
    """
    batches: list[Batch] = []
    for entry in calibration:
        batches += _batches(function, entry)
    text = isinstance(model, PreTrainedModel)
    for batch in batches:
        inputs = batch[0] if isinstance(batch, tuple) else batch
        if not inputs.numel():
            raise fail(function, "calibration", "hold no empty batch", f"shape {list(inputs.shape)}")
        if inputs.is_floating_point():
            if not bool(inputs.isfinite().all()):
                raise fail(function, "calibration", "be finite", "a batch with NaN or infinity")
        elif text:
            _check_ids(function, model, inputs)
    return batches


def stacked(batches: Sequence[Tensor], *, most: int) -> list[Tensor]:
    """Neighbouring texts of equal length as one batch of up to ``most`` tokens, which runs faster than one by one.

    Args:
        batches: ``[B, T]`` int64 each; others (images) stay as they are.
        most: tokens of a batch; a longer text is a batch of its own.
    """
    found: list[Tensor] = []
    for batch in batches:
        last = found[-1] if found else None
        fits = last is not None and not batch.is_floating_point() and last.shape[1:] == batch.shape[1:]
        if fits and last is not None and last.numel() + batch.numel() <= most:
            found[-1] = torch.cat([last, batch])
        else:
            found.append(batch)
    return found


def _batches(function: str, entry: Any) -> list[Batch]:
    if isinstance(entry, Mapping) and "input_ids" in entry:
        ids, mask = torch.as_tensor(entry["input_ids"]), entry.get("attention_mask")
        ids = ids if ids.ndim == 2 else ids.unsqueeze(0)
        if mask is None:
            return [ids]
        rows = zip(ids, torch.as_tensor(mask).view(ids.shape).bool(), strict=True)
        return [row[kept].unsqueeze(0) for row, kept in rows if bool(kept.any())]
    if isinstance(entry, tuple | list) and len(entry) == 2 and all(isinstance(part, Tensor) for part in entry):
        return [(entry[0], entry[1])]
    if isinstance(entry, tuple | list) and len(entry) == 1 and isinstance(entry[0], Tensor):
        return [entry[0]]  # what a TensorDataset gives
    if isinstance(entry, Tensor):
        return [entry]
    wanted = "tensors, (inputs, labels) or mappings with input_ids"
    raise InputTypeError(f"{function}: calibration must hold {wanted}, got {type(entry).__name__}.")


def _check_ids(function: str, model: Any, ids: Tensor) -> None:
    if ids.ndim != 2:
        raise fail(function, "calibration", "hold input_ids [batch, tokens]", f"shape {list(ids.shape)}")
    size = model.get_input_embeddings().num_embeddings
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise fail(function, "calibration", f"hold token ids from 0 to {size - 1}", low if low < 0 else high)
    check_context(function, "length of calibration", model, ids.shape[1])


def calibration_batches(
    tokenizer: PreTrainedTokenizerBase, text: str, *, num_samples: int, length: int, seed: int = 0
) -> list[Tensor]:
    """Windows from random places of the tokenized text; they may overlap.

    Args:
        tokenizer: where it puts a beginning-of-sequence token before a text, each window starts with that token.
        text: of at least ``length`` tokens.
        num_samples: number of windows.
        length: tokens in a window, the beginning-of-sequence token included, at least 2.
        seed: of the places.

    Returns:
        ``num_samples`` tensors ``[1, length]``, int64, on the CPU.

    Raises:
        InputError: if the text is empty or too short, or a number is out of range.
    """
    check_int("calibration_batches", "num_samples", num_samples)
    check_int("calibration_batches", "length", length, low=2)
    if not isinstance(text, str):
        raise InputTypeError(f"calibration_batches: text must be a string, got {type(text).__name__}.")
    prefix = leading_ids(tokenizer)
    tokens = torch.tensor(encode(tokenizer, text), dtype=torch.int64)
    size = length - len(prefix)
    if tokens.numel() < size:
        got = f"{tokens.numel()} tokens ({len(text)} characters)"
        raise fail("calibration_batches", "text", f"have at least {size} tokens for windows of {length}", got)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(tokens.numel() - size + 1, (num_samples,), generator=generator).tolist()
    head = torch.tensor(prefix, dtype=torch.int64)
    return [torch.cat([head, tokens[start : start + size]]).unsqueeze(0) for start in starts]
