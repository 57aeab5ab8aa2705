"""Token windows of a text, for methods that look at what runs through the model before they choose."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checks import InputTypeError, check_int, fail
from ..measure.tokens import encode, leading_ids


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
