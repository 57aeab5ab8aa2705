"""GQSA: groups along the rows of a weight are pruned, the others held in 4 bits, then trained in two stages.

Paper: Zeng et al. 2024, https://arxiv.org/abs/2412.17560, section 3. A weight's saliency is ``w_ij^2 / [H^-1]_jj^2``
with the damped Hessian ``H`` of the layer's squared output error; the groups of 16 with the lowest sums go. Stage 1
(BQPO) trains the values, scales and zero points of one block at a time towards the output of the dense block, its mask
fixed; stage 2 (E2E-OQP) trains the scales alone by the language-model loss, the numbers frozen. The same code without
pruning (``sparsity=0``, ``bits=2``) is the paper's W2 baseline.

Chosen here: the groups of a row compete, which errs less than those of a layer (``scope``). The dense block sees the
dense model's hidden states and the one in training those of the compressed model, as in EfficientQAT
(https://arxiv.org/abs/2407.11062); where a model's blocks do not simply follow each other, both see the latter. Its
learning rates (1e-5 for weights, 1e-4 for scales, 1e-5 end to end) were for 4096 sequences and billions of parameters;
the defaults here are for about a hundred sequences and a few millions. Zero points are not trained in stage 2. Not
implemented: the paper's GPU engine (`paucity.kernels.linear.packed_linear` multiplies with the stored form), embeddings
and output heads.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checks import check_choice, check_divides, check_ndim, check_range, check_shape, fail
from ..measure.tokens import Progress, evaluating
from ..models.blocks import sites_by_block
from ..models.calibration import as_batches
from ..models.load import Loaded
from ..models.sites import Site, find_sites
from ..ops.select import block_topk_mask
from .gqsa_applied import AppliedGroups
from .gqsa_work import Work
from .layerwise import restore
from .matrices import as_matrices, num_matrices
from .statistics import InputGram, InputNorm, inverse_factor
from .wanda import wanda_score

Scope = Literal["row", "layer"]
Saliency = Literal["hessian", "wanda"]


class GqsaOptions(BaseModel):
    """Options of ``gqsa``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sparsity: float = Field(default=0.5, ge=0, lt=1, description="fraction of the groups removed")
    group_size: int = Field(default=16, ge=2, multiple_of=2, description="weights of a group, which share a scale")
    bits: int = Field(default=4, ge=2, le=4, description="of a weight that stays")
    saliency: Saliency = Field(default="hessian", description="hessian, or wanda: (|w| * norm of the input)^2")
    scope: Scope = Field(default="row", description="whether the groups of a layer compete, or those of a row")
    sites: tuple[str, ...] = ("linear",)
    damping: float = Field(default=0.01, gt=0, description="added to the Hessian, times its mean diagonal")
    block_epochs: int = Field(default=2, ge=0, description="stage 1: passes over the calibration for each block")
    weight_lr: float = Field(default=2e-3, ge=0, description="stage 1: of the weights")
    scale_lr: float = Field(default=2e-4, ge=0, description="stage 1: of scales and zero points")
    e2e_steps: int = Field(default=64, ge=0, description="stage 2: steps; 0 for a model that is no language model")
    e2e_lr: float = Field(default=3e-4, ge=0, description="stage 2: of the scales")
    batch_size: int = Field(default=2, ge=1, description="sequences a step, in both stages")
    seed: int = Field(default=0, description="of the order of the sequences")


def options_for(method: str) -> type[BaseModel]:
    """The options of ``gqsa``."""
    check_choice("options_for", "method", method, ("gqsa",))
    return GqsaOptions


def gqsa_saliency(weight: Tensor, gram: Tensor, *, damping: float = 0.01) -> Tensor:
    """Importance ``w_ij^2 / [H^-1]_jj^2`` with ``H = gram + damping * mean(diag(gram)) * I``; higher is kept.

    Args:
        weight: ``[rows, cols]``, any float dtype.
        gram: ``[cols, cols]`` float32, ``X^T X`` of the inputs over the calibration tokens.
        damping: above 0; raised tenfold as often as the factorisation needs it.

    Returns:
        ``[rows, cols]`` float32, detached.

    Raises:
        InputError: if a shape does not match, or the gram matrix is not finite.
    """
    name = "gqsa_saliency"
    check_ndim(name, "weight", weight, 2)
    check_shape(name, "gram", gram, weight.shape[1], weight.shape[1])
    check_range(name, "damping", damping, 0, open_low=True)
    if not bool(gram.isfinite().all()):
        raise fail(name, "gram", "be finite", "others")
    return _saliency(weight, inverse_factor(gram.float(), damping)[0])


def gqsa_mask(saliency: Tensor, *, group_size: int = 16, sparsity: float, scope: Scope = "row") -> Tensor:
    """Keep-mask of groups, bool ``[..., rows, cols / group_size]``; the groups of a matrix or of a row compete."""
    block = (group_size,) if scope == "row" else (1, group_size)
    return block_topk_mask(saliency, block=block, sparsity=sparsity)[..., ::group_size]


def apply_step(
    loaded: Loaded,
    method: str,
    options: BaseModel,
    calibration: Iterable[Any],
    on_progress: Progress | None = None,
) -> AppliedGroups:
    """Compress ``loaded.model`` in place by `gqsa`.

    Raises:
        InputError: as `gqsa`.
    """
    check_choice("apply_step", "method", method, ("gqsa",))
    return gqsa(loaded, calibration, GqsaOptions.model_validate(options.model_dump()), on_progress=on_progress)


def gqsa(
    loaded: Loaded | nn.Module,
    calibration: Iterable[Any],
    options: GqsaOptions | None = None,
    *,
    on_progress: Progress | None = None,
) -> AppliedGroups:
    """Prune, quantise and train the weights of a model by groups, in place.

    Stage 1 holds, besides the model, one block in float32 and the hidden states of the calibration twice; stage 2 the
    compressed weights once more and the activations of one sequence.

    Args:
        loaded: the model.
        calibration: a list or a DataLoader, as `paucity.models.calibration.as_batches` takes them.
        options: see `GqsaOptions`.
        on_progress: called with (work done, work in all).

    Returns:
        What undoes it, and the stored form of the weights.

    Raises:
        InputError: if there is no calibration, the group size does not divide a weight's inputs, a weight or an
            activation is not finite, or stage 2 is asked of something that is no language model. Then the weights are
            as before.
    """
    options = options or GqsaOptions()
    model = loaded.model if isinstance(loaded, Loaded) else loaded
    sites = find_sites(model, options.sites)
    batches = [batch[0] if isinstance(batch, tuple) else batch for batch in as_batches("gqsa", model, calibration)]
    _check(model, sites, options, batches)
    blocks = sites_by_block(sites)
    steps = options.block_epochs * -(-len(batches) // options.batch_size)
    done, total = 0, len(blocks) * (1 + steps + options.e2e_steps)

    def advance(work: int) -> None:
        nonlocal done
        done += work
        if on_progress is not None:
            on_progress(done, total)

    dense = {site.name: model.get_parameter(site.name).detach().clone() for site in sites}
    statistic = InputGram if options.saliency == "hessian" else InputNorm
    work = Work(model, options, batches, statistic, partial(_choose, options), advance)
    try:
        with evaluating(model), torch.enable_grad():
            errors = work.stage_1(blocks)
            loss = work.stage_2(len(blocks)) if options.e2e_steps else None
    except BaseException:
        restore(model, dense)
        raise
    packed = {name: weight.packed() for name, weight in work.weights.items()}
    stacks = [site.name for site in sites if site.kind == "conv" or num_matrices(model, site) > 1]
    applied = AppliedGroups(model, packed, options.bits, dense, {}, stacks)
    count = sum(weight.shape.numel() for weight in packed.values())
    applied.state().update(
        method="gqsa",
        options=options.model_dump(mode="json"),
        sparsity=1 - sum(weight.codes.numel() * 2 for weight in packed.values()) / max(1, count),
        bits_per_weight=8 * applied.nbytes() / max(1, count),
        calibration_tokens=sum(batch.numel() for batch in batches),
        blocks={path: list(pair) for path, pair in errors.items()},
        loss=None if loss is None else list(loss),
        notes=work.notes,
    )
    return applied


def _choose(options: GqsaOptions, stack: Tensor, statistics: Sequence[InputNorm]) -> Tensor:
    """Groups kept of ``stack [matrices, rows, cols]``."""
    scores = [
        _saliency(weight, inputs.inverse_factor(options.damping)[0].to(weight.device))
        if isinstance(inputs, InputGram)
        else wanda_score(weight, inputs.norm.to(weight.device)).square()
        for weight, inputs in zip(stack, statistics, strict=True)
    ]
    return gqsa_mask(torch.stack(scores), group_size=options.group_size, sparsity=options.sparsity, scope=options.scope)


def _saliency(weight: Tensor, factor: Tensor) -> Tensor:
    inverse = factor.square().sum(0)  # the diagonal of factor^T factor
    return (weight.detach().float() / inverse).square()


def _check(model: nn.Module, sites: Sequence[Site], options: GqsaOptions, batches: Sequence[Tensor]) -> None:
    if len(batches) == 0:
        raise fail("gqsa", "calibration", "hold at least one batch of tokens", "none")
    if options.e2e_steps and not (isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None):
        raise fail("gqsa", "e2e_steps", "be 0 for a model that is no language model", options.e2e_steps)
    if options.e2e_steps and any(batch.shape[-1] < 2 for batch in batches):
        raise fail("gqsa", "calibration", "hold sequences of at least 2 tokens to train the scales", "a single token")
    for site in sites:
        if model.get_parameter(site.name).ndim < 2:
            raise fail("gqsa", "sites", "be weight matrices", site.name)
        stack = as_matrices(model, site)
        check_divides("gqsa", "group_size", options.group_size, stack.shape[-1], f"the inputs of {site.name}")
        if not bool(stack.isfinite().all()):
            raise fail("gqsa", "model", "have finite weights", f"NaN or infinity in {site.name}")
