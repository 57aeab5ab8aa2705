"""Token windows of a text, for methods that look at what runs through the model before they choose."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checks import InputTypeError, check_int, fail


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
    prefix = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    tokens = torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=torch.int64)
    size = length - len(prefix)
    if tokens.numel() < size:
        got = f"{tokens.numel()} tokens ({len(text)} characters)"
        raise fail("calibration_batches", "text", f"have at least {size} tokens for windows of {length}", got)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(tokens.numel() - size + 1, (num_samples,), generator=generator).tolist()
    head = torch.tensor(prefix, dtype=torch.int64)
    return [torch.cat([head, tokens[start : start + size]]).unsqueeze(0) for start in starts]


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``tokenizer`` puts its beginning-of-sequence token before a text (GPT-2's has one and does not)."""
    ids = tokenizer.encode("a")
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id
