"""LeMo: long fine-tuning in which each layer computes with the informative tokens of the text alone.

Paper: Wang et al. 2025, https://arxiv.org/abs/2501.09767 (its published version is called Jenga). Activations, not
weights, fill the memory of long fine-tuning, and a token that takes part in a layer at all leaves all of its
activations there. So each layer drops tokens from its attention and, by a choice of its own, from its MLP:

- *Token elimination* (Sec. 4.2): blocks of 64 tokens have scores (`paucity.attention.lemo_layer`); those below the
  layer's threshold (`LeMo.fit`, Algorithm 1) are neither queries nor keys. What stays keeps its order and its
  positions. The output of a dropped token is zero: the residual stream carries it on unchanged, with the gradient 1,
  and the next layer chooses anew. At the MLP, whose activations are the score, dropped tokens are computed and then
  left out of the backward: the paper's words allow that, and its code does it with neurons. ``mlp="both"`` drops them
  from the forward too; the small model of this package does not bear that.
- *Pattern prediction* (Sec. 4.3): small networks tell the scores from what goes into the module
  (`paucity.attention.lemo_predict`). Without them (`apply` of options alone) scores are computed exactly, which costs
  time but no lasting memory, and the threshold is that of Algorithm 1, Step 1, for the text at hand: the mean of its
  blocks.
- *Peak cutting* (Sec. 4.4): the loss of ``model(..., labels=...)`` is taken segment by segment, gradients included;
  ``logits`` are then those of the last position alone.

A choice sees the whole text, as in the paper: which blocks stay depends on later tokens, so the loss while training is
no honest likelihood. Attention among those that stay is causal. As the paper measures its models, so do ours: LeMo acts
while ``model.training``, and a model in eval mode is dense.

Not here: kernels that read chosen tokens in place and add to the residual in place (tokens are gathered and scattered,
in memory that does not last), and recovering a layer's input from its output (norms are computed again in the backward
instead, as in the authors' code). That code keeps the first half of the layers and the last one whole, keeps a fixed
share of the blocks, and drops neurons, not tokens, in the MLP's backward; here it is as in the paper. Mixtures of
experts, and layers whose MLP is no module of its own (OPT), need ``mlp="off"``. Install LeMo before adapters (PEFT).
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from ..checks import check_int, fail
from ..models.segmented import SegmentedLoss
from ..models.sites import find_sites
from .install import attention_modules
from .lemo_layer import Layer

if TYPE_CHECKING:
    from .lemo_fit import Fitted
    from .lemo_predict import Predictor

ATTRIBUTE = "lemo_layer"
SITES = ("attention", "mlp")
Seen = Callable[[str, int, Tensor, Tensor], None]
"""Told of (site, layer, what goes into the module ``[B, T, C]``, its exact scores: ``[B, n, n]`` or ``[B, n]``)."""


class LeMo(BaseModel):
    """Options of ``lemo``.

    Attributes:
        block_size: tokens in a block.
        attention_sparsity: share of the blocks that attention drops: fitted, mean over layers and texts; without a fit,
            of every layer and text. None is what thresholds at the mean score drop, as in the paper (38 % there).
        mlp_sparsity: the same for the MLPs (51 % in the paper's models).
        attention: whether attention drops tokens.
        mlp: where MLPs do: ``backward`` alone (dropped tokens go through the MLP and leave nothing there), in ``both``
            passes (they skip it), or ``off``.
        layers: which layers do; None is all.
        segment: positions of which logits are there at once in ``model(..., labels=...)``; None leaves the loss alone.
        recompute_norms: compute the norms of these layers again in the backward, instead of keeping their output.
        in_eval: act in eval mode too, to look at the model as it is trained.
        rank: of the predictors.
        steps: of their training.
        learning_rate: of their training.
        prune_every: steps between the elastic prunings of predictors; 0 is never.
        zero_share: neurons of a predictor that are zero more often go at the first pruning; 0.05 less at the next.
        refinements: rounds of Algorithm 1, Step 2.
        epsilon: its finite difference, in standard deviations of the layer's scores.
        eta: its step in such deviations, by which the threshold of the most sensitive layer moves.
        seed: of the predictors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    block_size: int = Field(64, ge=1)
    attention_sparsity: float | None = Field(None, ge=0, lt=1)
    mlp_sparsity: float | None = Field(None, ge=0, lt=1)
    attention: bool = True
    mlp: Literal["backward", "both", "off"] = "backward"
    layers: list[int] | None = Field(None, min_length=1)
    segment: int | None = Field(2048, ge=1)
    recompute_norms: bool = True
    in_eval: bool = False
    rank: int = Field(64, ge=1)
    steps: int = Field(400, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    prune_every: int = Field(100, ge=0)
    zero_share: float = Field(0.8, gt=0, le=1)
    refinements: int = Field(2, ge=0)
    epsilon: float = Field(0.5, gt=0)
    eta: float = Field(0.5, ge=0)
    seed: int = 0

    @model_validator(mode="after")
    def _something(self) -> "LeMo":
        if not self.attention and self.mlp == "off":
            raise fail("lemo", "mlp", "not be off where attention drops nothing either", self.mlp)
        return self

    def sparsity(self, site: str) -> float | None:
        """The one asked for at ``attention`` or ``mlp``."""
        return self.attention_sparsity if site == "attention" else self.mlp_sparsity

    def fit(self, model: nn.Module, batches: Sequence[Tensor]) -> "Fitted":
        """Train the predictors and find the thresholds; the model is left as it was. See `paucity.attention.lemo_fit`.

        Args:
            model: a Hugging Face causal language model.
            batches: token ids ``[B, T]`` int64 without padding, as long as the texts to come.

        Raises:
            InputError: as `apply` does, or if there are no batches of at least two blocks.
        """
        from .lemo_fit import fit

        return fit(model, batches, self)


def apply(model: nn.Module, how: "LeMo | Fitted") -> "AppliedLeMo":
    """Let the layers of ``model`` drop tokens while it trains.

    Args:
        model: a Hugging Face causal language model.
        how: what `LeMo.fit` returned; options alone use exact scores.

    Raises:
        InputError: if the model has no causal attention of transformers' interface, drops tokens already, lacks one of
            the layers, or a layer has no MLP that can be told; while it runs, if a layer gets a cache with tokens, a
            mask of an unknown kind or inputs that cannot be taken apart by token.
    """
    fitted = None if isinstance(how, LeMo) else how
    options = how if isinstance(how, LeMo) else how.options
    modules = attention_modules(model)
    if any(hasattr(module, ATTRIBUTE) for module in modules.values()):
        raise fail("apply", "model", "drop no tokens yet", "one that does; remove it first")
    wanted = list(modules) if options.layers is None else sorted(set(options.layers))
    for layer in wanted:
        check_int("apply", "layers", layer, 0)
        if layer not in modules:
            raise fail("apply", "layers", f"be among the {len(modules)} attention layers", layer)
    paths = {id(module): path for path, module in model.named_modules()}
    downs = [site.module.rpartition(".") for site in find_sites(model) if site.kind == "down"]
    mlps = (
        {}
        if options.mlp == "off"
        else {mlp.rpartition(".")[0]: (model.get_submodule(mlp), name) for mlp, _, name in downs}
    )
    blocks = {layer: paths[id(modules[layer])].rpartition(".")[0] for layer in wanted}
    for layer, block in blocks.items():
        if options.mlp != "off" and block not in mlps:
            raise fail("apply", "mlp", f"be off where layer {layer} has no MLP module", options.mlp)
    applied = AppliedLeMo(model, options, fitted)
    for layer, block in blocks.items():
        applied.install(layer, modules[layer], mlps.get(block), model.get_submodule(block))
    return applied


class AppliedLeMo:
    """LeMo in force on a model.

    Attributes:
        options: those asked for.
        seen: by site; where it is set, layers compute everything there and tell it their exact scores.
    """

    def __init__(self, model: nn.Module, options: LeMo, fitted: "Fitted | None") -> None:
        self.model, self.options, self.fitted = model, options, fitted
        self.thresholds = {} if fitted is None else dict(fitted.thresholds)
        self.seen: dict[str, Seen] = {}
        self.layers: dict[int, Layer] = {}
        self._norms: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        self._loss: SegmentedLoss | None = None
        if options.segment is not None:  # first: it may refuse the model
            self._loss = SegmentedLoss(model, options.segment, when=lambda: self.active(model))
        if "use_cache" in inspect.signature(model.forward).parameters:
            self._handles.append(model.register_forward_pre_hook(self._before, with_kwargs=True))

    def install(self, layer: int, attention: nn.Module, mlp: tuple[nn.Module, str] | None, block: nn.Module) -> None:
        """Put the hooks on one layer; what `apply` does."""
        site = self.layers[layer] = Layer(self, layer, attention, *(mlp or (None, "")))
        setattr(attention, ATTRIBUTE, site)
        self._handles.append(attention.register_forward_pre_hook(site.before_attention, with_kwargs=True))
        self._handles.append(attention.register_forward_hook(site.after_attention))
        if mlp is not None:
            self._handles.append(mlp[0].register_forward_pre_hook(site.before_mlp))
            self._handles.append(mlp[0].register_forward_hook(site.after_mlp))
        if self.options.recompute_norms:
            for norm in block.children():
                if "Norm" in type(norm).__name__ and "forward" not in vars(norm):
                    norm.forward = partial(_recomputed, norm, norm.forward)
                    self._norms.append(norm)

    def active(self, module: nn.Module) -> bool:
        """Whether tokens are dropped now."""
        return module.training or self.options.in_eval

    def remove(self) -> None:
        """Take everything off the model: it is as it was, but for what training did to its weights."""
        for handle in self._handles:
            handle.remove()
        for norm in self._norms:
            vars(norm).pop("forward", None)
        for site in self.layers.values():
            if hasattr(site.attention, ATTRIBUTE):
                delattr(site.attention, ATTRIBUTE)
        if self._loss is not None:
            self._loss.remove()
        self._handles, self._norms, self._loss = [], [], None

    def reset(self) -> None:
        """Start measuring density anew."""
        for site in self.layers.values():
            site.counts.clear()

    def density(self) -> dict[str, float]:
        """Tokens computed as a share of those that are no padding, by ``layers.<i>.attention`` and ``layers.<i>.mlp``.

        The recomputation of gradient checkpointing counts again, which changes no share.
        """
        return {
            f"layers.{layer}.{name}": site.counts[name][0] / site.counts[name][1]
            for layer, site in sorted(self.layers.items())
            for name in SITES
            if name in site.counts
        }

    def state(self) -> dict[str, Any]:
        """Method, options and thresholds; predictors are saved by `Fitted.save`."""
        thresholds = {f"layers.{layer}.{site}": value for (site, layer), value in sorted(self.thresholds.items())}
        return {"method": "lemo", "options": self.options.model_dump(mode="json"), "thresholds": thresholds}

    def predictor(self, site: str, layer: int) -> "Predictor | None":
        """What tells the scores of ``attention`` or ``mlp`` of a layer; None where they are computed."""
        return None if self.fitted is None else self.fitted.predictors.get((site, layer))

    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return (args, {**kwargs, "use_cache": False}) if self.active(model) else None


def _recomputed(norm: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not (norm.training and torch.is_grad_enabled()):
        return forward(x)
    out: Tensor = checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False)
    return out
