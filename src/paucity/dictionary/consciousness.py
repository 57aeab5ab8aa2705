"""The consciousness prior as a layer: attention picks a few elements of a state, and they alone predict a future one.

Paper: Bengio 2017, https://arxiv.org/abs/1709.08568, Sections 2-3. Of the unconscious state ``h_t`` (many elements)
attention makes the conscious state ``c_t`` of a few elements and their names; the prior says that from so few a
statement about one future element can be made that is very probable: a factor graph over elements whose factors join
few of them. Training makes ``- log p(h_{t+1, target} | c_t)`` small.

The paper leaves the architecture open. Here each target element has its own attention, over names (learned keys) and
contents, which keeps exactly ``k`` elements; the prediction is a Gaussian whose mean and variance come from the values
of those ``k``, weighted, and their order by name. In training the ``k`` are drawn (Gumbel top-k, straight through), so
that others are tried. A target that cannot be predicted gets a large variance, and `statements` names those that can.

Not implemented: memory of past conscious states, a choice of when to predict, mapping to language, planning.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_int, check_range, check_shape
from ..kernels.select import topk
from ..ops.formats import Codes
from ..ops.relax import gumbel_topk


@dataclass(frozen=True, eq=False)
class Thought:
    """What is said of the future.

    Attributes:
        codes: ``[..., num_elements, k]``: for each target the elements that it is predicted from, and their weights.
        mean: ``[..., num_elements, width]``, predictions.
        log_variance: ``[..., num_elements, 1]``.
    """

    codes: Codes
    mean: Tensor
    log_variance: Tensor


class ConsciousnessBottleneck(nn.Module):
    """Predicts every element of the next state, each from ``k`` elements of this one.

    Args:
        num_elements: of a state.
        width: of an element.
        k: elements that a prediction may use.
        hidden: neurons of the predictor.
        temperature: of the relaxation in training.
        by_content: whether attention looks at what elements hold, besides which they are.

    Attributes:
        keys: ``[num_elements, hidden]``, names.
        queries: ``[num_elements, hidden]``, what each target asks for.
    """

    def __init__(
        self,
        num_elements: int,
        width: int,
        k: int = 2,
        *,
        hidden: int = 32,
        temperature: float = 1.0,
        by_content: bool = True,
    ) -> None:
        super().__init__()
        for name, value in {"num_elements": num_elements, "width": width, "hidden": hidden}.items():
            check_int("ConsciousnessBottleneck", name, value)
        check_int("ConsciousnessBottleneck", "k", k, 1, num_elements)
        check_range("ConsciousnessBottleneck", "temperature", temperature, 0, open_low=True)
        self.num_elements, self.width, self.k, self.temperature = num_elements, width, k, temperature
        self.keys = nn.Parameter(torch.randn(num_elements, hidden))
        self.queries = nn.Parameter(torch.zeros(num_elements, hidden))
        self.content = nn.Linear(width, hidden, bias=False) if by_content else None
        if self.content is not None:
            nn.init.zeros_(self.content.weight)
        self.inner = nn.Parameter(torch.empty(num_elements, k * width, hidden))
        self.inner_bias = nn.Parameter(torch.zeros(num_elements, hidden))
        self.outer = nn.Parameter(torch.empty(num_elements, hidden, width + 1))
        self.outer_bias = nn.Parameter(torch.zeros(num_elements, width + 1))
        nn.init.normal_(self.inner, std=(k * width) ** -0.5)
        nn.init.normal_(self.outer, std=hidden**-0.5)

    def logits(self, state: Tensor) -> Tensor:
        """Attention of every target to every element, ``[..., num_elements, num_elements]``, before the choice."""
        keys = self.keys if self.content is None else self.keys + self.content(state)
        found: Tensor = (self.queries @ keys.mT) / math.sqrt(self.keys.shape[1])
        return found.expand(*state.shape[:-2], -1, -1)

    def forward(self, state: Tensor, generator: torch.Generator | None = None) -> Thought:
        """Predictions from ``state [..., num_elements, width]``; drawn elements in training, the best otherwise."""
        check_shape("ConsciousnessBottleneck", "state", state, *state.shape[:-2], self.num_elements, self.width)
        logits = self.logits(state)
        if self.training:
            drawn = gumbel_topk(logits, k=self.k, temperature=self.temperature, hard=True, generator=generator)
            indices = topk(drawn.detach(), self.k)[1].long().sort(-1).values
            weights = drawn.gather(-1, indices)
        else:
            indices = topk(logits.detach(), self.k)[1].long().sort(-1).values
            weights = torch.ones_like(logits[..., : self.k])
        chosen = state.unsqueeze(-3).expand(*logits.shape, self.width)
        values = chosen.gather(-2, indices.unsqueeze(-1).expand(*indices.shape, self.width)) * weights.unsqueeze(-1)
        inner = F.gelu(torch.einsum("...nf,nfh->...nh", values.flatten(-2), self.inner) + self.inner_bias)
        outer = torch.einsum("...nh,nhw->...nw", inner, self.outer) + self.outer_bias
        return Thought(Codes(weights, indices, self.num_elements), outer[..., :-1], outer[..., -1:].clamp(-10, 10))

    def loss(self, state: Tensor, future: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``- log p(future | thought)`` in nats, mean over elements: a scalar.

        Args:
            state: ``[..., num_elements, width]``.
            future: the same, later.
            generator: of what is drawn in training.
        """
        check_shape("ConsciousnessBottleneck.loss", "future", future, *state.shape)
        thought = self(state, generator)
        return surprise(thought, future).mean()

    @torch.no_grad()
    def statements(self, state: Tensor, future: Tensor) -> list[dict[str, Any]]:
        """For each target what it is mostly predicted from, and how well, the best first; in eval mode.

        Returns:
            ``target``, ``elements`` (those most often chosen, ascending), ``surprise`` in nats for each dimension.
        """
        was = self.training
        self.eval()
        thought = self(state)
        self.train(was)
        nats = surprise(thought, future).reshape(-1, self.num_elements).mean(0)
        used = torch.zeros(self.num_elements, self.num_elements)
        rows = thought.codes.indices.reshape(-1, self.num_elements, self.k).cpu()
        used.scatter_add_(1, rows.transpose(0, 1).flatten(1), torch.ones(self.num_elements, len(rows) * self.k))
        found = [
            {"target": j, "elements": sorted(used[j].topk(self.k).indices.tolist()), "surprise": float(nats[j])}
            for j in range(self.num_elements)
        ]
        return sorted(found, key=lambda each: each["surprise"])


def surprise(thought: Thought, future: Tensor) -> Tensor:
    """``- log p`` of each element of ``future``, in nats for each of its dimensions: ``[..., num_elements]``."""
    error = (future - thought.mean).square() * (-thought.log_variance).exp()
    return ((error + thought.log_variance + math.log(2 * math.pi)) / 2).mean(-1)
