"""What a unit is worth: a head, a neuron, a neuron of an expert.

- ``magnitude``: the L2 norm of all its weights (a group's keys and values count for each of its heads in equal parts).
- ``activation``: Wanda's score, ``|W_ij| * ||x_j||``, summed over its entries of the projection that it ends in; for
  neurons this is Wanda-sp of An et al. 2023 (FLAP), https://arxiv.org/abs/2312.11983.
- ``taylor``: how much the loss would change without it, to first order: ``|sum x * dL/dx|`` over its outputs, as in
  Michel et al. 2019, https://arxiv.org/abs/1905.10650, Eq. 4; averaged over the batches. It is computed as
  ``|sum W * dL/dW|`` over its columns of the projection that it ends in, which is the same number.
- ``random``: the control.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_int, fail
from ...models.sites import Site, find_sites
from .units import Slot, Units

SCORES = ("magnitude", "activation", "taylor", "random")
NEEDS_NORMS, NEEDS_GRADIENTS = ("activation", "cfsp"), ("taylor",)


def output_sites(model: nn.Module, found: Sequence[Units]) -> list[Site]:
    """The projections that the units end in."""
    names = {units.output.parameter for units in found}
    return [site for site in find_sites(model) if site.name in names]


def magnitude_unit_score(model: nn.Module, units: Units) -> Tensor:
    """float32 of the shape ``units.sizes``."""
    total = torch.zeros(units.sizes)
    for slot in units.slots:
        squares = model.get_parameter(slot.parameter).detach().float().square()
        if units.kind == "expert_neurons":
            each = squares.sum(3 - slot.dim).cpu()
            total += sum(each[:, entries(units.sizes)].sum(-1) for _, entries in slot.sets)
            continue
        line = squares.sum([dim for dim in range(squares.ndim) if dim != slot.dim]).cpu()
        for name, entries in slot.sets:
            part = line[entries(units.sizes)].sum(-1)
            total += (part / units.sizes[1]).unsqueeze(1) if name == "group" else part.view(units.sizes)
    return total.sqrt()


def activation_unit_score(model: nn.Module, units: Units, norm: Tensor) -> Tensor:
    """float32 of the shape ``units.sizes``; ``norm`` ``[in]`` (``[experts, in]``) of the projection they end in."""
    columns = _columns(model.get_parameter(units.output.parameter).detach().float().abs(), units.output)
    return _gathered(columns.sum(-2).cpu() * norm.float().cpu(), units)


def taylor_unit_scores(model: nn.Module, found: Sequence[Units], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Float32 of the shape ``units.sizes`` by the module of the units, from a backward pass over each batch.

    Args:
        model: a causal language model; set it to eval mode before.
        found: units of one kind.
        batches: ``input_ids [B, T]`` int64, at least 2 tokens long; the loss is that of the next token.

    Raises:
        InputError: if there is no batch, one is too short, or a gradient is not finite.
    """
    if not batches:
        raise fail("taylor_unit_scores", "batches", "hold at least one batch of tokens", "none")
    for batch in batches:
        check_int("taylor_unit_scores", "length of batches", batch.shape[1], 2)
    weights = {units.module: model.get_parameter(units.output.parameter) for units in found}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    totals = {units.module: torch.zeros(units.sizes) for units in found}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            with torch.enable_grad():
                gradients = torch.autograd.grad(_loss(model, batch), list(weights.values()), allow_unused=True)
            for units, gradient in zip(found, gradients, strict=True):
                if gradient is None:  # experts that no token was routed to
                    continue
                product = weights[units.module].detach().float() * gradient.float()
                columns = _columns(product, units.output).sum(-2).cpu()
                totals[units.module] += _gathered(columns, units).abs() / len(batches)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
    for name, total in totals.items():
        if not bool(total.isfinite().all()):
            raise fail("taylor_unit_scores", "batches", "give finite gradients", f"NaN or infinity at {name}")
    return totals


def unit_scores(
    model: nn.Module,
    found: Sequence[Units],
    score: str,
    *,
    norms: Mapping[str, Tensor] | None = None,
    batches: Sequence[Tensor] = (),
    seed: int = 0,
) -> dict[str, Tensor]:
    """Scores of the units by their module; ``norms`` for ``activation``, ``batches`` for ``taylor``."""
    if score == "taylor":
        return taylor_unit_scores(model, found, batches)
    if score == "random":
        generator = torch.Generator().manual_seed(seed)
        return {units.module: torch.rand(units.sizes, generator=generator) for units in found}
    if score == "magnitude":
        return {units.module: magnitude_unit_score(model, units) for units in found}
    assert norms is not None  # gathered for this score
    return {units.module: activation_unit_score(model, units, norms[units.output.parameter]) for units in found}


def _columns(weight: Tensor, slot: Slot) -> Tensor:
    """``[..., out, in]`` of a projection's weight as it is stored."""
    return weight if slot.dim == weight.ndim - 1 else weight.mT


def _gathered(line: Tensor, units: Units) -> Tensor:
    """Values by entry ``[in]`` (``[experts, in]``), summed over the entries of each unit."""
    (_, entries), *_ = units.output.sets
    return line[..., entries(units.sizes)].sum(-1).view(units.sizes)


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    ids = ids.to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
