"""Which drafted tokens are kept so that what comes out is what the model alone would give.

Papers: Leviathan et al. 2023, https://arxiv.org/abs/2211.17192, Alg. 1. With ``q`` the distribution that a token was
drafted from and ``p`` the model's, it is kept with chance ``min(1, p(x) / q(x))``; the first that is not kept is
replaced by a draw from ``max(0, p - q)``, normalised, and where all are kept one more is drawn from ``p``. Greedy
decoding is the case in which both put everything on one token: a token is kept if it is the model's own choice.
"""

import torch
from torch import Tensor

from ...checks import check_ndim, check_shape


def accept_greedy(drafted: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafted tokens are the likeliest ones, and the likeliest after them.

    Args:
        drafted: int64 ``[B, k]``.
        logits: ``[B, k + 1, vocab]``, of the model before each drafted token and after the last.

    Returns:
        int64 ``[B]`` each.
    """
    check_ndim("accept_greedy", "drafted", drafted, 2)
    check_shape("accept_greedy", "logits", logits, len(drafted), drafted.shape[1] + 1, None)
    choice = logits.argmax(-1)
    count = (choice[:, :-1] == drafted).long().cumprod(1).sum(1)
    return count, choice.gather(1, count.unsqueeze(1)).squeeze(1)


def accept_sampled(
    drafted: Tensor, draft_prob: Tensor, prob: Tensor, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """How many drafted tokens are kept, and the token after them, so that all follow ``prob``.

    Args:
        drafted: int64 ``[B, k]``, drawn from ``draft_prob``.
        draft_prob: ``[B, k, vocab]``.
        prob: ``[B, k + 1, vocab]``, of the model before each drafted token and after the last.
        generator: for what is drawn.

    Returns:
        int64 ``[B]`` each.
    """
    check_ndim("accept_sampled", "drafted", drafted, 2)
    batch, size = drafted.shape
    check_shape("accept_sampled", "prob", prob, batch, size + 1, None)
    check_shape("accept_sampled", "draft_prob", draft_prob, batch, size, prob.shape[2])
    index = drafted.unsqueeze(2)
    drawn = torch.rand(drafted.shape, generator=generator, device=prob.device, dtype=prob.dtype)
    kept = drawn * draft_prob.gather(2, index).squeeze(2) < prob[:, :-1].gather(2, index).squeeze(2)
    count = kept.long().cumprod(1).sum(1)
    rows = torch.arange(batch, device=prob.device)
    wanted = prob[rows, count]
    offered = torch.cat([draft_prob, torch.zeros_like(prob[:, :1])], dim=1)[rows, count]
    rest = (wanted - offered).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, wanted)
    return count, torch.multinomial(rest, 1, generator=generator).squeeze(1)
