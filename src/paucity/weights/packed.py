"""Packed weights in a model: sparse linear layers hold what is left of them, and compute with it.

Paper: Mishra et al. 2021, https://arxiv.org/abs/2104.08378, section 3: 2:4 weights are stored as their values and where
these stand, and a kernel multiplies with them as they are. Here on the processor at hand, where decoding gains because
fewer bytes are read, and for any N:M, any zeros (a bit for each weight), whole blocks, and groups of 4-bit numbers.

Layers are ``nn.Linear`` and transformers' ``Conv1D``. Left dense: stacks of experts and convolutions, tied weights,
subclasses and layers whose forward somebody has replaced (they may read their weight in ways of their own). A packed
layer is frozen and no longer a site of `find_sites`: prune and train first, pack last.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checks import check_choice, check_nm, fail
from ..kernels.linear import PackedLinear
from ..kernels.linear.packed import Packed
from ..models.load import Loaded
from ..models.packed import packed_in_place_of, replace_modules, unpack
from ..models.sites import find_sites
from ..ops.formats import PackedBitmask, PackedBlocks, PackedGroups, PackedNM
from ..ops.formats.smallest import nm_pattern, smallest

Format = Literal["auto", "bitmask", "blocks", "groups", "nm"]
LEAST_GAIN = 1.1
"""A layer is packed where that makes it smaller by this factor at least; by less, it would not be faster either."""

__all__ = ["Packing", "pack", "unpack"]


@dataclass(frozen=True)
class Packing:
    """What became of the layers of a model.

    Attributes:
        packed: by path, the layers that are packed now.
        density: share of nonzeros of each of them.
        left: by path, why a layer stayed dense.
    """

    packed: dict[str, PackedLinear]
    density: dict[str, float]
    left: dict[str, str]

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed layers' weights as they are held."""
        return sum(layer.nbytes for layer in self.packed.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes that the same weights take densely."""
        return sum(x.in_features * x.out_features * x.dtype.itemsize for x in self.packed.values())


@torch.no_grad()
def pack(
    model: nn.Module | Loaded,
    format: Format = "auto",
    *,
    sites: Collection[str] | None = None,
    weights: Mapping[str, Packed] | None = None,
    keep_dense: bool = False,
    n: int | None = None,
    m: int | None = None,
    block: tuple[int, int] = (16, 16),
    group_size: int = 16,
) -> Packing:
    """Put packed layers in the places of the sparse linear layers of ``model``, in place.

    Weights come back bit for bit (``-0.0`` as ``0.0``), except of ``groups``, which rounds to 4 bits. A layer that
    packing would not make smaller by a tenth stays dense.

    Args:
        model: whose weights hold zeros.
        format: ``nm`` where the zeros obey an N:M pattern, ``blocks`` of zeros, a ``bitmask`` for any zeros, ``groups``
            of 4-bit numbers, of which groups of zeros are absent; ``auto`` takes the smallest of the exact ones, layer
            by layer.
        sites: kinds or groups of `paucity.models.sites`; None is every linear layer.
        weights: packed weights by parameter name, such as of GQSA, that are taken as they are in place of packing anew.
        keep_dense: keep the dense weights as well, for more than 16 tokens at a time (prompts), where unpacking costs
            time; memory is more than dense then.
        n: kept of every m; None finds the pattern. With m, and only for ``nm``.
        m: see n.
        block: rows and columns of the blocks of ``blocks``.
        group_size: of ``groups``.

    Returns:
        What was packed and what was not.

    Raises:
        InputError: if an argument is out of range, the model has no such site, a weight does not obey the N:M pattern
            that was asked for, a given weight is not that of its layer, or nothing is sparse enough. Then the model is
            as it was.
    """
    module = model.model if isinstance(model, Loaded) else model
    check_choice("pack", "format", format, get_args(Format))
    if (n is None) != (m is None) or (n is not None and format != "nm"):
        raise fail("pack", "n and m", "be given together, for the format nm", f"n={n}, m={m} and {format}")
    if n is not None and m is not None:
        check_nm("pack", n, m)
    given, packed, density, left = dict(weights or {}), dict[str, Packed](), dict[str, float](), dict[str, str]()
    chosen = _Choice(format, n, m, block, group_size)
    for path, name, reason in _candidates(module, sites):
        if reason:
            left[path] = reason
            continue
        linear = module.get_submodule(path)
        weight = _rows(linear)
        density[path] = int(weight.count_nonzero()) / max(1, weight.numel())
        found = _given(name, given.pop(name), weight) if name in given else chosen.of(path, weight)
        if isinstance(found, str):
            left[path] = found
        else:
            packed[path] = found
    if given:
        raise fail("pack", "weights", "be of linear layers that can be packed", next(iter(given)))
    if not packed:
        why = "; ".join(f"{path}: {reason}" for path, reason in list(left.items())[:1]) or "no linear layer"
        raise fail("pack", "model", "hold linear layers sparse enough to be smaller packed", f"none ({why})")
    made = {}
    for path, stored in packed.items():
        linear = module.get_submodule(path)
        assert isinstance(linear, nn.Linear | Conv1D)
        dense = _rows(linear).contiguous() if keep_dense else None
        made[path] = packed_in_place_of(linear, PackedLinear(stored, dense=dense))
    replace_modules(module, made)
    return Packing(made, {path: density[path] for path in made}, left)


class PackedOptions(BaseModel):
    """Options of ``packed``, a step that follows one that prunes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["auto", "bitmask", "blocks", "nm"] = "auto"
    sites: tuple[str, ...] | None = Field(default=None, description="every linear layer, if not given")
    keep_dense: bool = False


class AppliedPacked:
    """Packed layers in force on a model, with the dense ones kept beside them.

    Args:
        model: whose layers are packed.
        packing: what was packed.
        dense: the layers before by path.
        state: method, options, formats, bytes and notes.
    """

    def __init__(self, model: nn.Module, packing: Packing, dense: dict[str, nn.Module], state: dict[str, Any]) -> None:
        self.model, self.packing = model, packing
        self._dense, self._state = dense, state

    def remove(self) -> None:
        """Put the dense layers of before back in their places."""
        replace_modules(self.model, self._dense)
        self._dense = {}

    def density(self) -> dict[str, float]:
        """Share of nonzeros of each packed weight, by the name of the parameter that it was."""
        return {f"{path}.weight": density for path, density in self.packing.density.items()}

    def reset(self) -> None:
        """Nothing to reset: the density of weights is static."""

    def state(self) -> dict[str, Any]:
        """``{"method", "options", "formats", "packed_bytes", "dense_bytes", "notes"}``."""
        return self._state


def options_for(method: str) -> type[BaseModel]:
    """The options of ``packed``."""
    check_choice("options_for", "method", method, ("packed",))
    return PackedOptions


def apply_step(loaded: Loaded, method: str, options: BaseModel, calibration: list[Tensor]) -> AppliedPacked:
    """Pack the sparse layers of ``loaded.model``; no calibration is read.

    Raises:
        InputError: as `pack`.
    """
    check_choice("apply_step", "method", method, ("packed",))
    given = PackedOptions.model_validate(options.model_dump())
    before = dict(loaded.model.named_modules())
    packing = pack(loaded, given.format, sites=given.sites, keep_dense=given.keep_dense)
    formats = {path: repr(layer.packed) for path, layer in packing.packed.items()}
    share = packing.num_bytes / packing.dense_bytes
    notes = [f"{len(formats)} layers are packed, into {share:.0%} of their dense bytes."]
    for reason in dict.fromkeys(packing.left.values()):
        paths = [path for path, why in packing.left.items() if why == reason]
        notes.append(f"{paths[0]}{f' and {len(paths) - 1} more' if paths[1:] else ''} stays dense: {reason}.")
    state = {
        "method": method,
        "options": given.model_dump(mode="json"),
        "formats": formats,
        "packed_bytes": packing.num_bytes,
        "dense_bytes": packing.dense_bytes,
        "notes": notes,
    }
    return AppliedPacked(loaded.model, packing, {path: before[path] for path in packing.packed}, state)


@dataclass(frozen=True)
class _Choice:
    format: str
    n: int | None
    m: int | None
    block: tuple[int, int]
    group_size: int

    def of(self, path: str, weight: Tensor) -> Packed | str:
        """``weight`` packed, or why it stays dense."""
        if self.format == "nm":
            pattern = (self.n, self.m) if self.n is not None and self.m is not None else nm_pattern(weight)
            if pattern is None:
                return "its zeros obey no N:M pattern"
            packed: Packed = PackedNM.pack(weight, *pattern)
        elif self.format == "blocks":
            if weight.shape[0] % self.block[0] or weight.shape[1] % self.block[1]:
                return f"blocks of {self.block[0]}x{self.block[1]} do not divide it"
            packed = PackedBlocks.pack(weight, self.block)
        elif self.format == "groups":
            if weight.shape[1] % self.group_size or bool((weight != 0).all()):
                return "it has no zeros, or groups do not divide it"
            packed = PackedGroups.pack(weight, self.group_size)
        elif self.format == "bitmask":
            packed = PackedBitmask.pack(weight)
        else:
            packed = smallest(weight)
        return packed if packed.compression >= LEAST_GAIN else _no_gain(weight)


def _candidates(model: nn.Module, sites: Collection[str] | None) -> list[tuple[str, str, str]]:
    """Path, parameter name and why it must stay dense ("" where it need not) of each linear layer and stack."""
    found = []
    for site in find_sites(model, sites):
        owner = model.get_submodule(site.module)
        if type(owner) not in (nn.Linear, Conv1D):
            if site.kind not in ("norm", "conv", "embedding", "position_embedding"):
                found.append((site.module, site.name, f"{type(owner).__name__} is not a plain linear layer"))
        elif site.tied:
            found.append((site.module, site.name, "its weight is tied"))
        elif not site.module or "forward" in vars(owner):
            found.append((site.module, site.name, "its forward is not its own" if site.module else "it is the model"))
        elif owner._state_dict_hooks:  # a shrunk layer whose saved form is larger: packing would lose the hook
            found.append((site.module, site.name, "it is saved in another shape than it has"))
        elif not model.get_parameter(site.name).numel() or model.get_parameter(site.name).element_size() < 2:
            found.append((site.module, site.name, "it is empty, or of a dtype that only stores"))
        else:
            found.append((site.module, site.name, ""))
    return found


def _rows(linear: nn.Module) -> Tensor:
    weight = linear.get_parameter("weight").detach()
    return weight.t() if isinstance(linear, Conv1D) else weight


def _given(name: str, packed: Packed, weight: Tensor) -> Packed:
    if packed.shape != weight.shape or not torch.equal(packed.unpack(), weight):
        raise fail("pack", "weights", "be what the model's layers hold", f"another weight for {name}")
    return packed


def _no_gain(weight: Tensor) -> str:
    return f"{int(weight.count_nonzero()) / weight.numel():.0%} of it is not zero, so that packing gains too little"
