"""Saving: an ordinary Hugging Face folder, zeros in place, that any other tool loads; never pickle."""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..checks import InputTypeError, fail
from ..kernels.linear import PackedLinear
from .load import Loaded
from .packed import packed_linears, unpack, unpacked_state
from .tensor_files import Later, write_shards

# Keys by which other tools would take plain weights for packed ones.
FOREIGN_KEYS = ("sparsity_config", "compression_config")


def save(loaded: Loaded, folder: str | Path, *, extra: Mapping[str, object] | None = None, force: bool = False) -> Path:
    """Write the model to ``folder``, complete or not at all: to a temporary folder beside it first, then moved.

    A Hugging Face model becomes what ``AutoModelForCausalLM.from_pretrained`` loads: safetensors, configuration,
    generation configuration and tokenizer. Any other module becomes its state as ``model.safetensors`` with a
    ``paucity.json``. Weights that are packed in memory are written dense, zeros in place: of a Hugging Face model one
    tensor at a time.

    Args:
        loaded: what to save; it is not changed.
        folder: must be absent or empty; its parents are made.
        extra: JSON-able, written to ``paucity.json`` as ``extra``.
        force: replace ``folder`` if it is there; what it held goes only when the new one is complete.

    Returns:
        ``folder`` as a path.

    Raises:
        InputError: if ``folder`` is a file, not empty or the working directory, or ``extra`` cannot be written as JSON.
        OSError: if it cannot be written, such as to a full disk; nothing is left of it, and ``folder`` is as it was.
    """
    target = check_folder("save", folder, force=force)
    hugging_face = isinstance(loaded.model, PreTrainedModel)
    record = {"source": loaded.source, "class": type(loaded.model).__name__, "extra": dict(extra or {})}
    try:
        text = json.dumps(record, indent=2)
    except (TypeError, ValueError) as error:
        raise InputTypeError(f"save: extra must be JSON-able, got {error}.") from error

    with whole_folder(target) as temporary:
        if isinstance(loaded.model, PreTrainedModel):
            _save_hugging_face(loaded, temporary)
        elif packed_linears(loaded.model):
            dense = copy.deepcopy(loaded.model)
            unpack(dense)
            save_model(dense, str(temporary / "model.safetensors"))
        else:
            save_model(loaded.model, str(temporary / "model.safetensors"))
        if extra or not hugging_face:
            (temporary / "paucity.json").write_text(text + "\n", encoding="utf-8")
    return target


def check_folder(function: str, folder: str | Path, *, force: bool) -> Path:
    """``folder`` as a path; InputError if it is a file, not empty without ``force``, or where the process works."""
    target = Path(folder)
    if Path.cwd().is_relative_to(target.resolve()):  # it is replaced by another: whoever works in it would lose it
        raise fail(function, "folder", "not be the working directory or one above it", target)
    if target.is_file():
        raise fail(function, "folder", "be absent or an empty folder", f"the file {target}")
    if not force and target.is_dir() and any(target.iterdir()):
        raise fail(function, "folder", "be absent or empty", target)
    return target


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place at the end; what fails leaves ``target`` as it was.

    Of a link the folder that it leads to is replaced.

    Raises:
        OSError: also where safetensors could not write.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        yield temporary
        if target.is_dir() and any(target.iterdir()):
            _replace(temporary, target)
        else:
            os.replace(temporary, target)
    except SafetensorError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{target} could not be written: {error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def save_configuration(loaded: Loaded, folder: Path) -> None:
    """All of a Hugging Face folder but the weights: configuration, generation configuration and tokenizer."""
    model = loaded.model
    assert isinstance(model, PreTrainedModel)
    model.save_pretrained(folder, state_dict={})
    for empty in folder.glob("*.safetensors"):
        empty.unlink()
    _complete(loaded, folder)


def _save_hugging_face(loaded: Loaded, folder: Path) -> None:
    model: PreTrainedModel = loaded.model
    if not packed_linears(model):
        model.save_pretrained(folder)
        return _complete(loaded, folder)
    save_configuration(loaded, folder)
    entries = _dense_entries(model)
    files = write_shards(folder, entries, "model")
    if len(set(files.values())) > 1:
        size = sum(entry.nbytes for entry in entries.values())
        index = {"metadata": {"total_size": size}, "weight_map": files}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _dense_entries(model: PreTrainedModel) -> dict[str, Tensor | Later]:
    """The dense model by the names that its files have, which may differ from those of its parameters."""
    state = dict(unpacked_state(model))
    packed = {name: module for name, module in state.items() if isinstance(module, PackedLinear)}
    ignored = model._keys_to_ignore_on_save or ()
    held = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor) and name not in ignored}
    stand_in = {name: _stand_in(module) for name, module in packed.items()}
    names = {id(tensor): name for name, tensor in stand_in.items()}
    converted = revert_weight_conversion(model, remove_tied_weights_from_state_dict(held, model) | stand_in)
    entries: dict[str, Tensor | Later] = {}
    for name, tensor in converted.items():
        if tensor.device.type != "meta":
            entries[name] = tensor
        elif id(tensor) in names:
            module = packed[names[id(tensor)]]
            entries[name] = Later(tensor.shape, tensor.dtype, partial(_weight, module))
        else:  # the files hold this weight in other pieces than the model
            dense = {key: module.weight for key, module in packed.items()}
            return dict(revert_weight_conversion(model, remove_tied_weights_from_state_dict(held, model) | dense))
    return entries


def _weight(packed: PackedLinear) -> Tensor:
    return packed.weight


def _stand_in(packed: PackedLinear) -> Tensor:
    """Shape and dtype of the dense weight, without memory."""
    shape = (packed.out_features, packed.in_features)
    return torch.empty(shape[::-1] if packed.transposed else shape, dtype=packed.dtype, device="meta")


def _complete(loaded: Loaded, folder: Path) -> None:
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in FOREIGN_KEYS}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replace(new: Path, target: Path) -> None:
    """Put ``new`` in the place of the folder ``target``, which goes when the new one is there."""
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent)) / target.name
    try:
        target.rename(aside)
        new.rename(target)
    except BaseException:
        if aside.exists():
            aside.rename(target)
        aside.parent.rmdir()
        raise
    shutil.rmtree(aside.parent, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
