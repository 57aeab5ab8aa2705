"""Tasks on a model's own tokens, whose answers are certain: which letter a word begins with.

Chanin et al. 2024 (https://arxiv.org/abs/2409.14507) ask for the first letters of single-token words, in prompts that
spell other words before; the activation is that of the word. Here too, with the words in an order that the seed draws.
"""

import random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checks import check_int, fail
from .tokens import encode, leading_ids

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def words(tokenizer: PreTrainedTokenizerBase, *, shortest: int = 3) -> list[str]:
    """Words of at least ``shortest`` Latin letters, either case, that are one token with a space before, in order."""
    check_int("words", "shortest", shortest)
    found = set()
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if text[:1] == " " and len(text) > shortest and text[1:].isascii() and text[1:].isalpha():
            found.add(text[1:])
    return sorted(word for word in found if len(encode(tokenizer, f" {word}")) == 1)


def first_letters(
    tokenizer: PreTrainedTokenizerBase, *, shown: int = 5, seed: int = 0
) -> tuple[Tensor, int, Tensor, list[str]]:
    """Prompts that spell ``shown`` words and then name one more.

    Returns:
        ids ``[n, T]`` int64, the position of the word in each, labels ``[n]`` (0 is ``a``), and the words, shuffled.

    Raises:
        InputError: if the tokenizer has no more words than are shown.
    """
    check_int("first_letters", "shown", shown, 0)
    known, rng = words(tokenizer), random.Random(seed)
    if len(known) <= shown:
        raise fail("first_letters", "tokenizer", f"have more than {shown} words of one token", len(known))
    rng.shuffle(known)
    lead, rows = leading_ids(tokenizer), []
    for word in known:
        others = rng.sample([other for other in rng.sample(known, shown + 1) if other != word], shown)
        text = [encode(tokenizer, f" {other}") + encode(tokenizer, f": {other[0].upper()}\n") for other in others]
        rows.append([*lead, *(token for part in text for token in part), *encode(tokenizer, f" {word}")])
    length = min(map(len, rows))  # what comes first is cut where letters take more than one token
    ids = torch.tensor([row[len(row) - length :] for row in rows])
    return ids, length - 1, torch.tensor([LETTERS.index(word[0].lower()) for word in known]), known
