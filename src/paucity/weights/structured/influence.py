"""What the blocks of a model do to the calibration tokens, gathered in one forward pass.

A block that hardly turns its hidden states can go, or can be pruned harder: block influence of ShortGPT, Men et al.
2024, https://arxiv.org/abs/2403.03853, Eq. 1 (one minus the cosine of what goes in and what comes out), and the angular
distance of CFSP, Wang et al. 2024, https://arxiv.org/abs/2409.13199 (arc cosine over pi, in [0, 1]). Both are means
over tokens here, so that they do not depend on how much text there is. The norms of the inputs of any sites come from
the same pass.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import InputError, fail
from ...models.calibration import as_batches
from ...models.hooks import input_norms
from ...models.sites import Site
from .blocks import block_paths


@dataclass
class Statistics:
    """Of one pass.

    Attributes:
        norms: ``{site.name: [in]}`` float32, ``[experts, in]`` for experts; ones where nothing but zeros was seen.
        cosine: ``1 - cos`` of input and output of every block, averaged over tokens.
        angular: ``arccos(cos) / pi`` of the same.
        num_tokens: read.
        notes: what the user should know.
    """

    norms: dict[str, Tensor]
    cosine: list[float]
    angular: list[float]
    num_tokens: int
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def gather(model: nn.Module, sites: Sequence[Site], calibration: Sequence[Tensor]) -> Statistics:
    """Run the model over the calibration tokens once, in eval mode, and leave it in the mode that it was in.

    Args:
        model: of transformers.
        sites: at least one, whose inputs' norms are wanted.
        calibration: ``input_ids [B, T]`` int64.

    Raises:
        InputError: if there are no batches, a token is not in the vocabulary, or an activation is not finite.
    """
    batches = [batch for batch in as_batches("gather", model, calibration) if isinstance(batch, Tensor)]
    if not batches:
        raise fail("gather", "calibration", "hold at least one batch of tokens", "none")
    paths = block_paths(model)
    totals = torch.zeros(2, len(paths), dtype=torch.float64)
    tokens = torch.zeros(len(paths), dtype=torch.float64)

    def add(index: int, inputs: Tensor, output: Tensor) -> None:
        cosine = _cosine(inputs.flatten(0, -2), output.flatten(0, -2))
        totals[0, index] += (1 - cosine).double().sum().cpu()
        totals[1, index] += _angle(cosine).double().sum().cpu()
        tokens[index] += len(cosine)

    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        for index, path in enumerate(paths):
            handle = model.get_submodule(path).register_forward_hook(_Watch(index, add), with_kwargs=True)
            stack.callback(handle.remove)
        try:
            norms = input_norms(model.eval(), sites, batches)
        finally:
            for module, mode in modes:
                module.training = mode
    notes = [_fill_unseen(site, norms) for site in sites]
    means = totals / tokens.clamp_min(1)
    if not bool(means.isfinite().all()):
        raise InputError("gather: calibration must give finite activations, got NaN or infinity between blocks.")
    num_tokens = sum(batch.numel() for batch in batches)
    return Statistics(norms, means[0].tolist(), means[1].tolist(), num_tokens, [note for note in notes if note])


def block_influence(inputs: Tensor, output: Tensor, *, metric: str = "cosine") -> Tensor:
    """How far each hidden state is turned.

    Args:
        inputs: ``[..., hidden]``, any float dtype.
        output: of the same shape.
        metric: ``cosine`` (1 - cos, in [0, 2]) or ``angular`` (arccos(cos) / pi, in [0, 1]).

    Returns:
        float32 ``[...]``; a state of zeros counts as turned by a cosine of a half, as in CFSP's code.
    """
    cosine = _cosine(inputs, output)
    return 1 - cosine if metric == "cosine" else _angle(cosine)


def _cosine(inputs: Tensor, output: Tensor) -> Tensor:
    a, b = inputs.detach().float(), output.detach().float()
    product = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return torch.where((a == 0).all(-1) | (b == 0).all(-1), 0.5, product).clamp(-1, 1)


def _angle(cosine: Tensor) -> Tensor:
    return cosine.arccos() / torch.pi


def _fill_unseen(site: Site, norms: dict[str, Tensor]) -> str:
    """Norms must be finite; where nothing but zeros came, the weights alone decide."""
    norm = norms[site.name]
    if not bool(norm.isfinite().all()):
        raise fail("gather", "calibration", "give finite activations", f"NaN or infinity at the input of {site.module}")
    unseen = norm.amax(-1, keepdim=True) == 0
    norms[site.name] = norm.masked_fill(unseen, 1)
    count = int(unseen.sum())
    return f"{site.name}: nothing but zeros was seen by {count} of {unseen.numel()} inputs." if count else ""


class _Watch:
    """A forward hook that hands over what goes into a block and what comes out."""

    def __init__(self, index: int, add: Any) -> None:
        self.index, self.add = index, add

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = args[0] if args else kwargs["hidden_states"]
        self.add(self.index, inputs, output[0] if isinstance(output, tuple) else output)
