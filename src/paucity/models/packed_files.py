"""Models with packed weights on disk: safetensors and one JSON index, read back onto the kernels.

A folder holds the files of a Hugging Face model but for its weights, ``packed.safetensors`` (or several,
``packed-00001-of-0000N.safetensors``) and ``paucity_packed.json``. A packed weight is the tensors of its format
(`PackedNM.tensors` and the like) under the path of its layer; all else is under its name in the ``state_dict``. What is
tied, and a layer that stands at several paths, is there once. The index has the version, the class of the model, the
format of each packed layer, the bytes of each file, which tensor is where and which names share one: nothing of how the
weights became sparse is needed. Contents are checked for consistency, as far as formats allow; there are no checksums.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from ..checks import InputError, InputTypeError, fail
from ..kernels.linear.module import FORMATS, PackedLinear
from .load import PACKED_INDEX, Loaded, load
from .packed import packed_in_place_of, packed_linears, replace_modules
from .save import check_folder, save_configuration, whole_folder
from .tensor_files import write_shards

VERSION = 1


class _Layer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["bitmask", "blocks", "groups", "nm"]


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["paucity.packed"] = "paucity.packed"
    version: int = VERSION
    architecture: str
    layers: dict[str, _Layer] = Field(min_length=1)
    files: dict[str, int]
    tensors: dict[str, str]
    shared: dict[str, str] = {}


@dataclass(frozen=True)
class Saved:
    """What was written.

    Attributes:
        folder: where.
        num_bytes: of the files with weights.
        dense_bytes: that the same weights take with zeros in place.
    """

    folder: Path
    num_bytes: int
    dense_bytes: int


def save_packed(loaded: Loaded, folder: str | Path, *, force: bool = False) -> Saved:
    """Write a model with packed layers as it is in memory; `load_packed` and `paucity.load` read it.

    Written to a temporary folder beside ``folder`` first, then moved. A module that is no Hugging Face model can be
    saved, too; `load_packed` then needs a module of the same architecture.

    Args:
        loaded: what to save.
        folder: must be absent or empty; its parents are made.
        force: replace ``folder`` if it is there; what it held goes only when the new one is complete.

    Raises:
        InputError: if no layer is packed, or ``folder`` is a file, not empty or the working directory.
        OSError: if it cannot be written, such as to a full disk; nothing is left of it, and ``folder`` is as it was.
    """
    name, model = "save_packed", loaded.model
    target = check_folder(name, folder, force=force)
    packed = packed_linears(model)
    if not packed:
        raise fail(name, "loaded", "hold packed layers (paucity.weights.pack makes them)", "none")
    entries, shared = _entries(model)
    with whole_folder(target) as temporary:
        if isinstance(model, PreTrainedModel):
            save_configuration(loaded, temporary)
        files = write_shards(temporary, entries, "packed")
        index = _Index(
            architecture=type(model).__name__,
            layers={path: _Layer.model_validate({"format": module.format}) for path, module in packed.items()},
            files={file: (temporary / file).stat().st_size for file in sorted(set(files.values()))},
            tensors=files,
            shared=shared,
        )
        (temporary / PACKED_INDEX).write_text(index.model_dump_json(indent=2) + "\n", encoding="utf-8")
    parts = sum(tensor.nbytes for module in packed.values() for tensor in module.packed.tensors().values())
    dense = sum(module.in_features * module.out_features * module.dtype.itemsize for module in packed.values())
    rest = sum(tensor.nbytes for tensor in entries.values()) - parts
    return Saved(target, sum(index.files.values()), dense + rest)


def load_packed(folder: str | Path, model: nn.Module | None = None) -> Loaded:
    """The model that `save_packed` wrote, on the kernels, in eval mode.

    Args:
        folder: what was written.
        model: a dense module of the architecture that was saved, which is changed in place; None makes the Hugging Face
            model that the folder's configuration names.

    Raises:
        InputError: if there is no such folder, it was written by a later version, a file is absent, damaged or of
            another size than it had, or the weights are not those of the architecture; ``model`` is as it was then.
    """
    if model is None:
        _read_index(Path(folder))
        return load(Path(folder))
    return Loaded(read_packed(Path(folder), model).eval(), None, str(folder))


def read_packed(folder: Path, model: nn.Module | None = None) -> nn.Module:
    """The module alone; as `load_packed`."""
    index = _read_index(folder)
    if model is None:
        model = _skeleton(folder, index.architecture)
    elif type(model).__name__ != index.architecture:
        raise fail("load_packed", "model", f"be a {index.architecture}, as {folder} says", type(model).__name__)
    tensors = _read_tensors(folder, index)
    layers, packed_names = {}, set[str]()
    for path, layer in index.layers.items():
        _linear_at(model, path, folder)
        prefix = f"{path}."
        parts = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        parts.pop("bias", None)
        packed_names |= {prefix + part for part in parts}
        try:
            layers[path] = PackedLinear(FORMATS[layer.format].from_tensors(parts))
        except InputError as error:
            raise _damaged(folder, f"{path}: {error}") from error
    rest = {name: tensor for name, tensor in tensors.items() if name not in packed_names}
    for name, first in index.shared.items():
        if first in layers:
            layers[name] = layers[first]
        elif first in rest:
            rest[name] = rest[first]
        else:
            raise _damaged(folder, f"{name} shared with {first}, which it lacks")
    for path, packed in layers.items():
        linear = _linear_at(model, path, folder)
        wanted = list(linear.weight.shape[::-1] if isinstance(linear, Conv1D) else linear.weight.shape)
        if [packed.out_features, packed.in_features] != wanted:
            found = f"{[packed.out_features, packed.in_features]} for {path}"
            raise fail("load_packed", "folder", f"hold weights of the architecture ({wanted})", found)
    _fill(model, rest, {f"{path}.weight" for path in layers}, folder)
    replace_modules(model, {path: packed_in_place_of(_linear_at(model, path, folder), layers[path]) for path in layers})
    return model


def _entries(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors by the names that they have on disk, each once; names and packed paths that stand for the same."""
    packed = packed_linears(model, everywhere=True)
    skip = {f"{path}.{part}" for path, module in packed.items() for part, _ in module.named_buffers()}
    entries, shared, seen = dict[str, Tensor](), dict[str, str](), dict[int, str]()
    for path, module in packed.items():
        if (first := seen.setdefault(id(module), path)) != path:
            shared[path] = first
        else:
            entries |= {f"{path}.{part}": tensor for part, tensor in module.packed.tensors().items()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in skip:
            continue
        if not isinstance(tensor, Tensor):
            raise InputTypeError(f"save_packed: the state of the model must be tensors, got {type(tensor)} as {name}.")
        if (first := seen.setdefault(id(tensor), name)) != name:
            shared[name] = first
        else:
            entries[name] = tensor.detach()
    return entries, shared


def _read_index(folder: Path) -> _Index:
    path = folder / PACKED_INDEX
    constraint = f"be one that save_packed wrote (with a {PACKED_INDEX})"
    if not path.is_file():
        raise fail("load_packed", "folder", constraint, folder)
    try:
        index = _Index.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "no UTF-8"}
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise fail("load_packed", "folder", constraint, f"{path} ({where}: {first['msg']})") from error
    if index.version != VERSION:
        raise fail("load_packed", "folder", f"have version {VERSION} of the format", f"version {index.version}")
    return index


def _read_tensors(folder: Path, index: _Index) -> dict[str, Tensor]:
    for file, size in index.files.items():
        path = folder / file
        if path.parent != folder or not path.is_file():
            raise _damaged(folder, f"{file}, which is not there")
        if path.stat().st_size != size:
            raise _damaged(folder, f"{file} with {path.stat().st_size:,} bytes instead of {size:,}")
    tensors: dict[str, Tensor] = {}
    for file in index.files:
        names = [name for name, at in index.tensors.items() if at == file]
        try:
            with safe_open(folder / file, "pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(folder, f"{file}: {str(error).splitlines()[0]}") from error
    if missing := sorted(set(index.tensors) - set(tensors)):
        raise _damaged(folder, f"no file with {missing[0]}")
    return tensors


def _skeleton(folder: Path, architecture: str) -> nn.Module:
    """A model of the folder's configuration whose weights were never written to: they take no memory."""
    cls: Any = getattr(transformers, architecture, None)
    known = isinstance(cls, type) and issubclass(cls, PreTrainedModel)
    if not known or not (folder / "config.json").is_file():
        wanted = "be of a Hugging Face model; for another one pass `model`"
        raise fail("load_packed", "folder", wanted, f"{architecture} in {folder}")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        with no_init_weights():
            model: PreTrainedModel = cls._from_config(config)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise _damaged(folder, f"config.json: {(str(error).splitlines() or [''])[0]}") from error
    model.tie_weights()
    built: nn.Module = model
    return built


def _linear_at(model: nn.Module, path: str, folder: Path) -> nn.Linear | Conv1D:
    try:
        linear = model.get_submodule(path)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear | Conv1D):
        found = f"{folder} with a packed {path}"
        raise fail("load_packed", "folder", f"hold weights of the architecture ({type(model).__name__})", found)
    return linear


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], packed: set[str], folder: Path) -> None:
    """Give the model all that is not packed, after a check that it is all there and fits."""
    places = {name: place for name, place in model.state_dict(keep_vars=True).items() if name not in packed}
    given = {id(place) for name, place in places.items() if name in tensors}
    wrong = [f"{name}, which it lacks" for name, place in places.items() if id(place) not in given]
    wrong += [f"{name}, which has no place in it" for name in tensors if name not in places]
    held: dict[tuple[int, str], tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name not in places:
            continue
        owner, _, attribute = name.rpartition(".")
        twin, same = held.setdefault((id(model.get_submodule(owner)), attribute), (name, tensor))
        if same is not tensor:
            wrong.append(f"{name} apart from {twin}, with which it is one module there")
        if tensor.shape != places[name].shape:
            wrong.append(f"{name} of shape {list(tensor.shape)} instead of {list(places[name].shape)}")
    if wrong:
        constraint = f"hold the weights of the architecture ({type(model).__name__})"
        raise fail("load_packed", "folder", constraint, f"{folder} with {wrong[0]}")
    filled: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        place = places[name]
        if filled.setdefault(id(place), tensor) is tensor:
            place.data = tensor
        else:  # tied in the architecture, apart in the folder
            owner, _, attribute = name.rpartition(".")
            own = nn.Parameter(tensor, place.requires_grad) if isinstance(place, nn.Parameter) else tensor
            setattr(model.get_submodule(owner), attribute, own)


def _damaged(folder: Path, what: str) -> InputError:
    return fail("load_packed", "folder", "be whole", f"{folder} ({what})")
