"""Where a model can be made sparse: every weight, under one set of kinds for all architectures.

A site is one weight parameter. Its kind comes from one table of module names, so that a query projection is ``q`` in
every model; a layer that no table row knows is ``linear``, ``conv`` or ``embedding`` by its class. Orientation is
normalised by `weight_view`, never in the model.

Layouts that differ from one ``[out, in]`` matrix per projection:

- GPT-2's ``Conv1D`` stores ``[in, out]``.
- ``qkv`` stacks the three projections along ``out``: GPT-2 and Phi-3 one after the other (all of q, then k, then v),
  GPT-NeoX head by head (q, k, v of head 0, then of head 1 ...).
- ``gate_up`` (Phi-3) stacks the rows of gate, then those of up.
- Experts of Mixtral, Qwen2-MoE and Qwen3-MoE are two fused parameters of one module: ``gate_up_proj``
  ``[num_experts, 2 * intermediate, hidden]``, where the first half of the rows is gate and the second is up, and
  ``down_proj`` ``[num_experts, hidden, intermediate]``. The output of one expert is
  ``down @ (act(gate @ x) * (up @ x))``. GPT-OSS, Aria and Llama 4 store ``[num_experts, in, out]``.

Not found: biases, the fused input projection of ``nn.MultiheadAttention``, transposed convolutions, quantised weights.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checks import InputError, check_choice, fail
from .packed import packed_linears

# Name of the owning module -> kind. `parent.name` goes before `name`; a numbered list element counts as `*`.
_MODULES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "attention.wq": "q",
    "attention.wk": "k",
    "attention.wv": "v",
    "attention.wo": "o",
    "attention.dense": "o",
    "self_attention.dense": "o",
    "self_attn.dense": "o",
    "attn.c_proj": "o",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    "attn.c_attn": "qkv",
    "gate_proj": "gate",
    "feed_forward.w1": "gate",
    "up_proj": "up",
    "feed_forward.w3": "up",
    "mlp.fc1": "up",
    "*.fc1": "up",
    "mlp.c_fc": "up",
    "dense_h_to_4h": "up",
    "down_proj": "down",
    "feed_forward.w2": "down",
    "mlp.fc2": "down",
    "*.fc2": "down",
    "mlp.c_proj": "down",
    "dense_4h_to_h": "down",
    "gate_up_proj": "gate_up",
    "mlp.gate": "router",
    "block_sparse_moe.gate": "router",
    "router": "router",
    "shared_expert_gate": "router",
    "project_in": "projection",
    "project_out": "projection",
    "wpe": "position_embedding",
    "embed_positions": "position_embedding",
    "position_embeddings": "position_embedding",
    "lm_head": "lm_head",
    "embed_out": "lm_head",
    "head": "head",
    "classifier": "head",
}

# Name of a three-dimensional parameter -> kind.
_EXPERTS = {"gate_up_proj": "expert_gate_up", "down_proj": "expert_down"}

# Class of the owning module -> kind, where the name says nothing.
_CLASSES: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Linear, "linear"),
    (Conv1D, "linear"),
    (nn.Conv1d, "conv"),
    (nn.Conv2d, "conv"),
    (nn.Conv3d, "conv"),
    (nn.Embedding, "embedding"),
)

GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "o", "qkv"),
    "mlp": ("gate", "up", "down", "gate_up"),
    "experts": ("expert_gate_up", "expert_down"),
}
GROUPS["linear"] = (*GROUPS["attention"], *GROUPS["mlp"], *GROUPS["experts"], "linear")
"""Names for several kinds. ``linear`` is every weight matrix that computes inside the blocks, the default for pruning:
routers, embeddings and the output head stay out. In a module without known names it is every ``nn.Linear``."""

CONVOLUTIONS = ("pointwise", "depthwise", "spatial")
"""Names for some sites of kind ``conv``: 1x1 kernels over all channels, kernels over one channel each, and others."""

KINDS = tuple(dict.fromkeys([*_MODULES.values(), *_EXPERTS.values(), *(kind for _, kind in _CLASSES), "norm"]))
"""Every kind of site. ``router`` includes the gate of a shared expert; ``projection`` leads to or from an embedding."""

BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)(?:\.|$)")
"""Where the path of a module enters a block, and its number."""


@dataclass(frozen=True)
class Site:
    """One weight of a model.

    Attributes:
        name: full name of the parameter, e.g. ``model.layers.0.self_attn.q_proj.weight``.
        module: path of the module that owns it, ``""`` for the model itself.
        kind: one of `KINDS`.
        layer: index of its block, None outside the blocks.
        tied: whether another module (an output head) uses the same parameter.
    """

    name: str
    module: str
    kind: str
    layer: int | None
    tied: bool = False


def find_sites(model: nn.Module, kinds: str | Collection[str] | None = None) -> list[Site]:
    """The sites of ``model`` in the order of its modules, each parameter once.

    Args:
        model: any module.
        kinds: kinds or names of `GROUPS` or `CONVOLUTIONS`, all kinds if None. A group needs one of its kinds in the
            model.

    Raises:
        InputError: if a kind is unknown, or not in the model.
    """
    sites = _all_sites(model)
    if kinds is None:
        return sites
    names = {site.name: {site.kind, _convolution(model, site)} for site in sites}
    present = {name for each in names.values() for name in each if name}
    wanted: set[str] = set()
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        check_choice("find_sites", "kinds", kind, {*KINDS, *GROUPS, *CONVOLUTIONS})
        members = present.intersection(GROUPS.get(kind, (kind,)))
        if not members:
            has = ", ".join(sorted(present)) or "none"
            if packed_linears(model):
                has += "; packed layers are none, until paucity.weights.unpack makes them dense"
            raise fail("find_sites", "kinds", f"be in the model (it has {has})", kind)
        wanted |= members
    return [site for site in sites if names[site.name] & wanted]


def weight_view(model: nn.Module, site: Site) -> Tensor:
    """The weight of ``site``, detached, sharing memory with the model: writing to it changes the model.

    Returns:
        ``[out, in]``; ``[num_experts, out, in]`` for experts; ``[out, in / groups, *kernel]`` for a convolution;
        ``[num_embeddings, dim]`` for an embedding; ``[dim]`` for a norm.

    Raises:
        InputError: if the model has no such parameter.
    """
    try:
        owner, weight = model.get_submodule(site.module), model.get_parameter(site.name).detach()
    except AttributeError:
        raise InputError(f"weight_view: site must be in the model, got {site.name}.") from None
    transposed = isinstance(owner, Conv1D) or (weight.ndim == 3 and experts_are_transposed(owner))
    return weight.mT if transposed else weight


def experts_are_transposed(owner: nn.Module) -> bool:
    """Whether the stacks of experts in ``owner`` are ``[num_experts, in, out]``."""
    return bool(getattr(owner, "is_transposed", type(owner).__name__ == "Llama4TextExperts"))  # which does not say so


def _convolution(model: nn.Module, site: Site) -> str | None:
    """Which of `CONVOLUTIONS` a site of kind ``conv`` is."""
    if site.kind != "conv":
        return None
    weight, module = weight_view(model, site), model.get_submodule(site.module)
    if getattr(module, "groups", 1) > 1 and weight.shape[1] == 1:
        return "depthwise"
    return "pointwise" if weight[0, 0].numel() == 1 and getattr(module, "groups", 1) == 1 else "spatial"


def _all_sites(model: nn.Module) -> list[Site]:
    found: dict[int, Site] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            kind = _kind(path, module, name.rpartition(".")[2], parameter)
            if kind is None:
                continue
            first = found.get(id(parameter))
            if first is None:
                block = BLOCK.search(path)
                found[id(parameter)] = Site(name, path, kind, int(block[1]) if block else None)
            else:
                # A head that comes before its embedding gives the place to it.
                site = replace(first, name=name, module=path, kind=kind) if first.kind == "lm_head" else first
                found[id(parameter)] = replace(site, tied=True)
    return list(found.values())


def _kind(path: str, module: nn.Module, parameter_name: str, parameter: Tensor) -> str | None:
    if parameter.ndim == 3 and parameter_name in _EXPERTS:
        return _EXPERTS[parameter_name]
    if parameter_name != "weight":
        return None
    if parameter.ndim == 1:
        return "norm" if "Norm" in type(module).__name__ else None
    if parameter.ndim == 2:
        *_, parent, name = ("", "", *path.split("."))
        by_name = _MODULES.get(f"{'*' if parent.isdigit() else parent}.{name}") or _MODULES.get(name)
        if by_name:
            return by_name
    return next((kind for cls, kind in _CLASSES if isinstance(module, cls)), None)
