"""Where the heads, neurons and experts of a model lie, in every architecture whose projections `find_sites` knows.

Fused projections have layouts of their own: GPT-2's ``c_attn`` and Phi-3's ``qkv_proj`` hold all queries, then all
keys, then all values; GPT-NeoX's ``query_key_value`` holds query, key and value head by head; ``gate_up`` holds all
gates, then all ups.

Not found, and refused with the reason: projections that are no ``nn.Linear`` or ``Conv1D`` (quantised or wrapped
layers), tied ones, fused layouts of other architectures, norms over all heads together or one for each, attention with
a gate or sinks of its own, experts that interleave gate and up or have biases, projections of other names (BERT's
``self.query`` and ``intermediate.dense``, ModernBERT's, T5's, CodeGen's, GPT-J's ``fc_in``). What a layout does not
tell, such as heads in pairs, `shrink` finds out by trying.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...checks import fail
from ...models.blocks import block_path
from ...models.sites import Site, experts_are_transposed, find_sites, weight_view
from ...models.text_config import text_config
from .units import Entries, Sizes, Slot, Units


def _run(width: int, offset: Callable[[Sizes], int], per: Callable[[Sizes], int], stride: int | None = None) -> Entries:
    """Unit ``u`` of ``per(sizes)`` has ``width`` entries from ``offset(sizes) + u * stride``."""

    def entries(sizes: Sizes) -> Tensor:
        start = offset(sizes) + torch.arange(per(sizes)) * (width if stride is None else stride)
        return start.unsqueeze(1) + torch.arange(width)

    return entries


def _zero(_: Sizes) -> int:
    return 0


def _queries(sizes: Sizes) -> int:
    return sizes[0] * sizes[1]


def _last(sizes: Sizes) -> int:
    return sizes[-1]


def _first(sizes: Sizes) -> int:
    return sizes[0]


def find_units(model: nn.Module, kind: str) -> list[Units]:
    """All units of ``heads``, ``neurons`` (also of shared experts), ``expert_neurons`` or ``experts``, in model order.

    Raises:
        InputError: if the model has none, or one that cannot be removed, with the reason.
    """
    sites = [site for site in find_sites(model) if site.layer is not None]
    anchor = {"heads": "o", "neurons": "down"}.get(kind, "expert_down")
    maker = {"heads": _heads, "neurons": _neurons, "expert_neurons": _expert_neurons, "experts": _experts}[kind]
    found = [maker(model, site, _siblings(sites, site)) for site in sites if site.kind == anchor]
    if not found:
        raise fail("find_units", "model", f"have {kind.replace('_', ' ')} of a known layout", type(model).__name__)
    return found


def _siblings(sites: list[Site], anchor: Site) -> dict[str, Site]:
    """The sites of the same network: those that share the anchor's parent, or its block where it has no parent."""
    parent = anchor.module.rpartition(".")[0] if not anchor.kind.startswith("expert") else anchor.module
    router = parent.rpartition(".")[0] + ".gate"
    return {s.kind: s for s in sites if s.module.rpartition(".")[0] == parent or s.module in (parent, router)}


def _linear(model: nn.Module, site: Site) -> tuple[int, int, nn.Module]:
    """(dim of outputs, dim of inputs as stored, module) of a plain projection."""
    owner = model.get_submodule(site.module)
    if type(owner) not in (nn.Linear, Conv1D):
        raise fail("find_units", site.module, "be an nn.Linear or Conv1D to be cut", type(owner).__name__)
    if site.tied:
        raise fail("find_units", site.name, "not be tied to another module's weight to be cut", "a tied weight")
    return (1, 0, owner) if type(owner) is Conv1D else (0, 1, owner)


def _slots(model: nn.Module, site: Site, sets: tuple[tuple[str, Entries], ...], *, output: bool = False) -> list[Slot]:
    """Slots of a projection's weight and, where its outputs are shared out, of its bias."""
    rows, columns, owner = _linear(model, site)
    slots = [Slot(site.module, "weight", columns if output else rows, sets, output)]
    if not output and getattr(owner, "bias", None) is not None:
        slots.append(Slot(site.module, "bias", 0, sets))
    return slots


def _counts(model: nn.Module, path: str, names: Mapping[str, str]) -> dict[str, list[tuple[str, str]]]:
    module, found = model.get_submodule(path), dict[str, list[tuple[str, str]]]()
    for name, what in names.items():
        if isinstance(getattr(module, name, None), int):
            found.setdefault(what, []).append((path, name))
    return found


def _heads(model: nn.Module, o: Site, near: dict[str, Site]) -> Units:
    path = o.module.rpartition(".")[0]
    module = model.get_submodule(path)
    dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    if not isinstance(dim, int):
        raise fail("find_units", path, "say its head_dim", type(module).__name__)
    wide = weight_view(model, o).shape[1]
    _check_attention(model, path, dim)
    heads = wide // dim
    if {"q", "k", "v"} <= set(near):
        shapes = [weight_view(model, near[kind]).shape[0] for kind in "qkv"]
        groups = shapes[1] // dim
        if shapes[0] != wide or shapes[1] != shapes[2] or shapes[1] % dim or wide % dim or heads % max(groups, 1):
            raise fail("find_units", path, "project to whole heads, all of one size", f"sizes {[*shapes, wide]}")
        slots = _slots(model, near["q"], (("query", _run(dim, _zero, _queries)),))
        for kind in "kv":
            slots += _slots(model, near[kind], (("group", _run(dim, _zero, _first)),))
    elif "qkv" in near:
        sets, groups = _fused(model, near["qkv"], heads, dim)
        slots = _slots(model, near["qkv"], sets)
    else:
        if any(site.tied for site in near.values()):
            raise fail("find_units", path, "have projections of their own to be cut", "tied weights")
        raise fail("find_units", path, "have query, key and value projections of a known layout", sorted(near))
    slots += _slots(model, o, (("query", _run(dim, _zero, _queries)),), output=True)
    names = {"num_heads": "heads", "num_attention_heads": "heads", "num_key_value_heads": "groups"}
    names |= {"num_kv_heads": "groups", "num_key_value_groups": "per_group", "split_size": "width"}
    return Units(
        "heads",
        block_path(o),
        o.layer or 0,
        path,
        (groups, heads // groups),
        tuple(slots),
        _counts(model, path, names),
        head_dim=dim,
    )


def _fused(model: nn.Module, site: Site, heads: int, dim: int) -> tuple[tuple[tuple[str, Entries], ...], int]:
    kind, rows = getattr(text_config(model), "model_type", ""), weight_view(model, site).shape[0]
    if kind == "gpt_neox":
        return (("query", _run(3 * dim, _zero, _queries)),), heads
    if kind not in ("gpt2", "phi3"):
        raise fail("find_units", site.module, "be fused as in GPT-2, GPT-NeoX or Phi-3 to be cut", kind)
    groups = (rows // dim - heads) // 2
    keys = _run(dim, lambda sizes: dim * _queries(sizes), _first)
    values = _run(dim, lambda sizes: dim * (_queries(sizes) + sizes[0]), _first)
    return (("query", _run(dim, _zero, _queries)), ("group", keys), ("group", values)), groups


def _check_attention(model: nn.Module, path: str, dim: int) -> None:
    """Whatever else an attention module holds must be about one head."""
    module = model.get_submodule(path)
    for name, parameter in module.named_parameters():
        owner = module.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, nn.Linear | Conv1D) and tuple(parameter.shape) != (dim,):
            shape = list(parameter.shape)
            raise fail("find_units", path, "hold nothing that spans all heads", f"{name} of shape {shape}")
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and any(True for _ in child.parameters()):
            raise fail("find_units", path, "hold nothing that spans all heads", f"{name}, a list of modules")


def _neurons(model: nn.Module, down: Site, near: dict[str, Site]) -> Units:
    size, path = weight_view(model, down).shape[1], down.module.rpartition(".")[0]
    each: tuple[tuple[str, Entries], ...] = (("neurons", _run(1, _zero, _last)),)
    slots: list[Slot] = []
    for kind in ("gate", "up"):
        if kind in near:
            slots += _slots(model, near[kind], each)
    if "gate_up" in near:
        both = (*each, ("neurons", _run(1, _last, _last)))
        slots += _slots(model, near["gate_up"], both)
    if not slots:
        raise fail("find_units", path, "have an up projection of a known name", sorted(near))
    slots += _slots(model, down, each, output=True)
    if path != block_path(down):
        cut = {slot.module for slot in slots}
        inside = [name for name, _ in model.get_submodule(path).named_parameters()]
        alien = [name for name in inside if f"{path}.{name}".rpartition(".")[0] not in cut]
        if alien:
            raise fail("find_units", path, "hold nothing but projections of known names", ", ".join(alien))
    shared = "shared_expert" in path.rsplit(".", 1)[-1]
    keys = ("shared_expert_intermediate_size",) if shared else ("ffn_dim", "n_inner", "intermediate_size")
    names = {"intermediate_size": "neurons", "ffn_dim": "neurons"}
    attributes = _counts(model, path, names)
    return Units(
        "neurons", block_path(down), down.layer or 0, path, (size,), tuple(slots), attributes, _key(model, keys)
    )


def _expert_neurons(model: nn.Module, down: Site, near: dict[str, Site]) -> Units:
    _check_stack(model, down)
    experts, _, size = weight_view(model, down).shape
    each = ("expert_neurons", _run(1, _zero, _last))
    slots = (
        Slot(down.module, "gate_up_proj", 1, (each, ("expert_neurons", _run(1, _last, _last)))),
        Slot(down.module, "down_proj", 2, (each,), output=True),
    )
    attributes = _counts(model, down.module, {"intermediate_dim": "neurons", "intermediate_size": "neurons"})
    key = _key(model, ("moe_intermediate_size", "intermediate_size"))
    where = (block_path(down), down.layer or 0, down.module)
    return Units("expert_neurons", *where, (experts, size), slots, attributes, key)


def _experts(model: nn.Module, down: Site, near: dict[str, Site]) -> Units:
    _check_stack(model, down)
    each = (("experts", _run(1, _zero, _first)),)
    if "router" not in near:
        raise fail("find_units", down.module, "have a router beside it", sorted(near))
    router = near["router"]
    slots = (
        Slot(down.module, "gate_up_proj", 0, each),
        Slot(down.module, "down_proj", 0, each, output=True),
        Slot(router.module, "weight", 0, each),
    )
    owner = model.get_submodule(router.module)
    extra = [name for name, _ in (*owner.named_parameters(), *owner.named_buffers()) if name != "weight"]
    if extra:
        raise fail("find_units", router.module, "route by one matrix to be cut", f"also {', '.join(extra)}")
    counts = _counts(model, down.module, {"num_experts": "experts"})
    for path in (router.module, router.module.rpartition(".")[0]):
        for what, pairs in _counts(model, path, {"num_experts": "experts"}).items():
            counts.setdefault(what, []).extend(pairs)
    key = _key(model, ("num_experts", "num_local_experts"))
    where = (block_path(down), down.layer or 0, down.module)
    return Units("experts", *where, (len(weight_view(model, down)),), slots, counts, key)


def _check_stack(model: nn.Module, down: Site) -> None:
    owner = model.get_submodule(down.module)
    mixed = not getattr(owner, "is_concatenated", True) or not getattr(owner, "has_gate", True)
    if mixed or experts_are_transposed(owner) or getattr(owner, "has_bias", False):
        raise fail("find_units", down.module, "stack gates before ups, without biases, to be cut", type(owner).__name__)


def _key(model: nn.Module, names: tuple[str, ...]) -> str:
    """The first of ``names`` that the configuration has."""
    config = text_config(model)
    return next((name for name in names if hasattr(config, name)), names[-1])
