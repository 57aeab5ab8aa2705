"""How far two models agree token by token: what the mean loss of a text, and so perplexity, averages away.

Paper: Dutta et al. 2024, https://arxiv.org/abs/2407.09141: a compressed model can have the baseline's accuracy and loss
while its answers have flipped both ways; the divergence of its distributions (KL, in nats) and flips show it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..checks import InputTypeError, check_int, fail
from .stats import Estimate, ratio_interval
from .tokens import Progress, check_context, device_of, encode, evaluating, forward, leading_ids

_ROWS = 256  # of logits that are made float32 at a time


@dataclass(frozen=True)
class Agreement:
    """Two models on the same tokens, each given the true ones before it.

    Attributes:
        same_top: share of tokens for which both hold the same token likeliest.
        divergence: mean KL(baseline ‖ changed) in nats.
        nats: mean loss of (baseline, changed), in nats per token.
        loss_change: ``changed / baseline - 1`` of that loss, which is that of bits per byte.
        perplexity_change: ``changed / baseline - 1`` of perplexity.
        lost: share of tokens that only the baseline has right.
        gained: share of tokens that only the changed model has right.
        num_tokens: compared.
    """

    same_top: Estimate
    divergence: Estimate
    nats: tuple[Estimate, Estimate]
    loss_change: Estimate
    perplexity_change: Estimate
    lost: float
    gained: float
    num_tokens: int


def agreement(
    baseline: nn.Module,
    changed: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    length: int = 512,
    max_tokens: int = 16384,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Agreement:
    """Compare two models over stretches of ``text``, one after the other; intervals are bootstraps over the stretches.

    Args:
        baseline: a causal language model of the transformers library, such as the dense one.
        changed: another with the same vocabulary.
        tokenizer: of both.
        text: what both predict.
        length: tokens of a stretch, what the tokenizer puts before a text included.
        max_tokens: of the text that are used, from its start.
        seed: of the bootstrap.
        on_progress: called with (stretches done, stretches in all).

    Raises:
        InputError: if the text is too short, ``length`` beyond the context of a model, or the vocabularies differ.
    """
    if not isinstance(text, str):
        raise InputTypeError(f"agreement: text must be a string, got {type(text).__name__}.")
    check_int("agreement", "length", length, 3)
    check_int("agreement", "max_tokens", max_tokens, 2)
    for model in (baseline, changed):
        check_context("agreement", "length", model, length)
    lead, ids = leading_ids(tokenizer), encode(tokenizer, text)[:max_tokens]
    each = length - len(lead)
    pieces = [[*lead, *ids[at : at + each]] for at in range(0, len(ids), each)]
    pieces = [piece for piece in pieces if len(piece) > max(len(lead), 1)]
    if not pieces:
        raise fail("agreement", "text", "have at least 2 tokens", len(ids))
    rows: list[list[float]] = []
    with evaluating(baseline), evaluating(changed):
        for done, piece in enumerate(pieces, 1):
            rows.append(_compare(baseline, changed, piece, len(piece) - max(len(lead), 1)))
            if on_progress is not None:
                on_progress(done, len(pieces))
    tokens, same, divergence, was, now, lost, gained = (list(column) for column in zip(*rows, strict=True))
    total = sum(tokens)
    rise = ratio_interval([b - a for a, b in zip(was, now, strict=True)], tokens, seed=seed)
    return Agreement(
        same_top=ratio_interval(same, tokens, seed=seed),
        divergence=ratio_interval(divergence, tokens, seed=seed),
        nats=(ratio_interval(was, tokens, seed=seed), ratio_interval(now, tokens, seed=seed)),
        loss_change=ratio_interval(now, was, seed=seed).mapped(lambda ratio: ratio - 1),
        perplexity_change=rise.mapped(lambda nats: math.expm1(nats) if nats < 700 else math.inf),
        lost=sum(lost) / total,
        gained=sum(gained) / total,
        num_tokens=int(total),
    )


def _compare(baseline: nn.Module, changed: nn.Module, piece: Sequence[int], count: int) -> list[float]:
    """Sums over the last ``count`` tokens: tokens, same, divergence, both losses, lost and gained."""
    sides = []
    for model in (baseline, changed):
        ids = torch.tensor([list(piece)], device=device_of(model))
        sides.append(forward(model, ids[:, :-1], keep=count)[0][0])
    one, other = sides[0], sides[1].to(sides[0].device)
    if one.shape != other.shape:
        raise fail("agreement", "changed", f"have a vocabulary of {one.shape[-1]} tokens", other.shape[-1])
    wanted = torch.tensor(list(piece[-count:]), device=one.device)
    sums = torch.zeros(6, dtype=torch.float64)
    for at in range(0, count, _ROWS):
        sums += _sums(one[at : at + _ROWS].float(), other[at : at + _ROWS].float(), wanted[at : at + _ROWS])
    return [float(count), *sums.tolist()]


def _sums(one: Tensor, other: Tensor, wanted: Tensor) -> Tensor:
    """Of rows of logits ``[T, vocab]``: same, divergence, both losses, lost and gained."""
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    # One logit that is no number makes its row NaN: no token is the likeliest then. 0 * inf is no divergence.
    first, second = (side.argmax(-1).masked_fill(side[:, 0].isnan(), -1) for side in (p, q))
    divergence = (p.exp() * (p - q)).masked_fill(p.exp() == 0, 0).sum()
    losses = (-side.gather(-1, wanted[:, None]).sum() for side in (p, q))
    lost, gained = (first == wanted) & (second != wanted), (first != wanted) & (second == wanted)
    parts = (((first == second) & (first >= 0)).sum(), divergence, *losses, lost.sum(), gained.sum())
    return torch.stack([part.double().cpu() for part in parts])
