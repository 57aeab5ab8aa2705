"""Places in a model by name: what a module gives or takes, or a part of a transformer and its layer.

A place is named by the path of a module (its output; ``PATH.input`` is its input, ``PATH.input.H`` one head's part of
it) or, in a transformer, by what it is and its layer: ``residual.2`` is what block 2 gives, ``mlp.2`` and
``attention.2`` what its MLP and its attention give, ``heads.2`` is the output of all query heads side by side before
the output projection (with grouped queries, too, there is one for each query head), ``heads.2.1`` one of them, and
``patches.2`` is ``residual.2`` without class tokens. Attention to another sequence has no such name.

In a model of several towers these names are those of its language model, and each other tower's begin with its path
(``vision_tower.encoder.residual.2``); where none is (encoder and decoder), all do.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from ..checks import InputTypeError, fail
from .blocks import block_path
from .sites import Site, find_sites

KINDS = ("attention", "heads", "mlp", "patches", "residual")
"""What a place in a transformer is called."""

# Paths within a block that `sites` has no kind for: output projections, and MLPs (the group is the whole of one).
_ATTENTION = re.compile(
    r"attention\.(output\.dense|attn\.o|out_lin)|layer\.0\.SelfAttention\.o|attn\.(proj|Wo)"  # BERT, T5, timm ...
)
_MLP = re.compile(r"(output\.dense)|(layer\.\d\.DenseReluDense)\.wo|(ffn)\.lin2|(mlp)\.Wo")
_CROSS = re.compile(r"encoder_attn|cross_?att|multihead_attn")
_NESTED = re.compile(r"\w+\.\d+\.")  # blocks within a block, as in the stages of Swin
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "heads")


@dataclass(frozen=True)
class Hook:
    """A place in a model.

    Attributes:
        name: as it was asked for.
        module: path of the module, ``""`` is the model.
        end: which side of it.
        head: (index, number of heads) where only one head's part of the width is wanted.
        patches: whether class tokens, which stand before the patches, are left out.
    """

    name: str
    module: str
    end: Literal["input", "output"] = "output"
    head: tuple[int, int] | None = None
    patches: bool = False


def find_hook(model: nn.Module, name: str) -> Hook:
    """The place called ``name``; see the top of this file.

    Raises:
        InputError: if the model has no such place, or several; the nearest names are listed.
    """
    if not isinstance(name, str):
        raise InputTypeError(f"find_hook: hook must be a string, got {type(name).__name__}.")
    paths = {path for path, _ in model.named_modules() if path}
    if name in paths:
        return Hook(name, name)
    path, _, end = name.rpartition(".")
    if path in paths and end in ("input", "output"):
        return Hook(name, path, "input" if end == "input" else "output")
    places = find_places(model)
    if name in places:
        return places[name]
    if end.isdigit():
        owner, _, side = path.rpartition(".")
        whole = Hook(path, owner, "input") if owner in paths and side == "input" else places.get(path)
        if whole is not None and whole.end == "input":
            count = num_heads(model, whole)
            if int(end) < count:
                return Hook(name, whole.module, "input", (int(end), count))
            raise fail("find_hook", "hook", f"name a head from 0 to {count - 1}", name)
    towers = [place for place in places if place.endswith(f".{name}")]
    if towers:
        raise fail("find_hook", "hook", f"name one of the model's towers ({', '.join(towers)})", name)
    choices = [*places, *sorted(paths)]
    near = difflib.get_close_matches(name, choices, n=5, cutoff=0.3) or choices[:5]
    raise fail("find_hook", "hook", "be the name of a place in the model", f"{name}; the nearest are {', '.join(near)}")


def find_places(model: nn.Module) -> dict[str, Hook]:
    """The places of a transformer by name, in the order of its layers; what two modules of a layer claim is none."""
    found: dict[tuple[str, str], dict[tuple[str, Literal["input", "output"]], None]] = {}
    for site in find_sites(model):
        if site.layer is not None:
            tower = ".".join(block_path(site).split(".")[:-2])
            for kind, module, end in _parts(site):
                found.setdefault((tower, f"{kind}.{site.layer}"), {})[module, end] = None
    towers = list(dict.fromkeys(tower for tower, _ in found))
    several = len(towers) > 1
    short = _language_model(model, towers) if several else towers[0] if towers else None
    seeing = _shares_most(patch_convolution(model), towers) if several else short
    places = {}
    for (tower, place), modules in found.items():
        patches = place.startswith("patches")
        if len(modules) == 1 and (tower == seeing or not patches):
            name = place if tower == short or not tower else f"{tower}.{place}"
            places[name] = Hook(name, *next(iter(modules)), patches=patches)
    return places


def num_heads(model: nn.Module, hook: Hook) -> int:
    """Query heads of the attention whose output projection takes what is at ``hook``.

    Raises:
        InputError: if the model does not say.
    """
    width = next((value for name in ("in_features", "nx") if (value := _integer(_at(model, hook.module), name))), None)
    parts = hook.module.split(".")
    for length in range(len(parts) - 1, -1, -1):
        owner = _at(model, ".".join(parts[:length]))
        within = (value for module in owner.modules() for name in _COUNTS if (value := _integer(module, name)))
        size = _integer(owner, "head_dim")
        by_size = width // size if width and size and width % size == 0 else None
        config: Any = getattr(owner, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        count = next(within, None) or by_size or _integer(config, "num_attention_heads")
        if count:
            return count
    raise fail("find_hook", "model", "say how many heads it has", type(model).__name__)


def mlp_input(model: nn.Module, mlp: Hook) -> str:
    """Name of the place where the MLP of a layer begins: its input, or that of its first projections in the block.

    Args:
        model: any transformer.
        mlp: its ``mlp.L``.

    Raises:
        InputError: if the MLP is its last projection alone and no other of the block's is known.
    """
    sites = find_sites(model)
    last = next((site for site in sites if site.module == mlp.module and not site.kind.startswith("expert")), None)
    if last is None:
        return f"{mlp.module}.input"
    block = block_path(last)
    for site in sites:
        first = site.kind in ("up", "gate", "gate_up") or site.module == f"{block}.intermediate.dense"
        if first and block_path(site) == block:
            return f"{site.module}.input"
    raise fail("mlp_input", "model", "have an MLP with a known first projection", mlp.module)


def patch_convolution(model: nn.Module) -> str | None:
    """Path of the convolution that cuts pictures into patches, the first whose stride is its kernel; None without."""
    for path, module in model.named_modules():
        if isinstance(module, _ConvNd) and module.stride == module.kernel_size and max(module.stride) > 1:
            return str(path)
    return None


def _parts(site: Site) -> Iterator[tuple[str, str, Literal["input", "output"]]]:
    """What a site tells about its block: kind of place, module, and side."""
    block = block_path(site)
    yield "residual", block, "output"
    yield "patches", block, "output"
    inner = site.module.removeprefix(f"{block}.")
    mlp = _MLP.fullmatch(inner)
    if (site.kind == "o" and not _CROSS.search(inner)) or _ATTENTION.fullmatch(inner):
        yield "attention", site.module, "output"
        yield "heads", site.module, "input"
    elif mlp and mlp.lastindex:
        yield "mlp", f"{block}.{mlp[mlp.lastindex]}", "output"
    elif site.kind in ("down", "expert_down") and not _NESTED.match(inner):
        yield "mlp", f"{block}.{inner.split('.')[0]}", "output"  # an expert is in a part of the block as a lone MLP is


def _language_model(model: nn.Module, towers: list[str]) -> str | None:
    """The tower that writes text after what all others read."""
    if not isinstance(model, PreTrainedModel) or getattr(model.config, "is_encoder_decoder", False):
        return None
    decoder: nn.Module = model.get_decoder()
    path = next((path for path, module in model.named_modules() if path and module is decoder), None)
    inside = [tower for tower in towers if path is not None and f"{tower}.".startswith(f"{path}.")]
    return inside[0] if len(inside) == 1 else None


def _shares_most(path: str | None, towers: list[str]) -> str | None:
    """The tower whose path begins most as ``path`` does."""

    def shared(tower: str) -> int:
        parts = zip(tower.split("."), str(path).split("."), strict=False)
        return next((number for number, (a, b) in enumerate(parts) if a != b), len(tower.split(".")))

    return None if path is None else max(towers, key=shared)


def _at(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path)


def _integer(owner: Any, name: str) -> int | None:
    value = getattr(owner, name, None)
    return value if isinstance(value, int) and value > 0 else None
