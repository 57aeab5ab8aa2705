"""A causal language model of which only some parts are in memory: the others are read from its files when asked for."""

import ctypes
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from ..checks import InputError, fail
from .load import _HUB_ID, _TOKENIZER_FILES, _UNREADABLE, _first_line, byte_tokenizer

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"


def model_folder(source: str | Path) -> Path:
    """The folder with the files of a model: ``embedded``, a folder, or a hub id, which is downloaded whole.

    Raises:
        InputError: if there is no such thing, or it cannot be reached.
    """
    if source == "embedded":
        from .embedded import folder

        return Path(str(folder()))
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if isinstance(source, Path) or not _HUB_ID.fullmatch(str(source)):
        raise fail("prune", "source", "be 'embedded', a hub id or a folder that exists", source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:
        constraint = "be 'embedded', a folder that exists or a hub id that can be reached"
        raise fail("prune", "source", f"{constraint} ({_first_line(error)})", source) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder; of one without, every byte of a text is a token.

    Raises:
        InputError: if it cannot be read, or the vocabulary is too small for bytes.
    """
    try:
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except _UNREADABLE as error:
        raise fail("prune", "source", "have a readable tokenizer", f"{folder} ({_first_line(error)})") from error
    return byte_tokenizer(config.get_text_config(decoder=True).vocab_size)


class NotStreamable(InputError):
    """A model whose files cannot be read block by block; the message says why."""


class Streamed:
    """A model whose parameters have no memory until they are `fill`-ed, and none again after `drop`.

    Attributes:
        model: in eval mode; buffers are there, parameters are not.
        stored: the name that a parameter has in the files, None where it lies there in other pieces.
        files: file by name of the parameter.
        tied: names of parameters that are another one's, by that one's name.

    Raises:
        InputError: if the folder has no safetensors or cannot be read.
        NotStreamable: if its tensors are not the model's parameters one to one (some mixtures of experts are stored in
            other pieces than they run in).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except _UNREADABLE as error:
            raise fail(
                "prune", "source", "be a readable Hugging Face folder", f"{folder} ({_first_line(error)})"
            ) from error
        assert isinstance(model, PreTrainedModel)
        self.model: PreTrainedModel = model.eval()
        files = _files(folder)
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self.stored = {name: _stored_name(model, name) for name in names}
        self.files = {name: files[stored] for name, stored in self.stored.items() if stored in files}
        self.tied = _tied(model, set(names) - set(self.files))
        odd = {*names} - {*self.files, *self.tied} | {*files} - {self.stored[name] or "" for name in self.files}
        if odd:
            some = ", ".join(sorted(odd)[:3]) + (" ..." if len(odd) > 3 else "")
            raise NotStreamable(f"{len(odd)} tensors in its files are not parameters one to one ({some})")

    def fill(self, names: Iterable[str], folder: Path | None = None, file: str | None = None) -> None:
        """Read parameters from the model's own files, or from ``file`` in another folder."""
        for name in names:
            path = self.folder / self.files[name] if file is None or folder is None else folder / file
            self.put(name, read_tensor(path, self.stored[name] or name))

    def put(self, name: str, tensor: Tensor) -> None:
        """Give a parameter its memory, and those that are tied to it."""
        set_module_tensor_to_device(self.model, name, "cpu", value=tensor, dtype=tensor.dtype)
        for other, of in self.tied.items():
            if of == name:
                owner, _, attribute = other.rpartition(".")
                setattr(self.model.get_submodule(owner), attribute, self.model.get_parameter(name))

    def drop(self, names: Iterable[str]) -> None:
        """Take the memory of parameters away."""
        for name in names:
            set_module_tensor_to_device(self.model, name, "meta")


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file.

    Raises:
        InputError: if the file is damaged or does not hold it.
    """
    try:
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, FileNotFoundError) as error:
        raise fail("prune", "source", f"hold {name} in {path.name}", _first_line(error)) from error
    return tensor


def give_back() -> None:
    """Hand memory that is free within this process back to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _files(folder: Path) -> dict[str, str]:
    try:
        if (folder / _INDEX).is_file():
            files: dict[str, str] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            return files
        if (folder / _WHOLE).is_file():
            with safe_open(folder / _WHOLE, "pt") as file:
                return dict.fromkeys(file.keys(), _WHOLE)
    except (SafetensorError, KeyError, ValueError) as error:
        raise fail("prune", "source", "have readable safetensors", f"{folder} ({_first_line(error)})") from error
    raise fail("prune", "source", "hold its weights as safetensors", folder)


def _stored_name(model: PreTrainedModel, name: str) -> str | None:
    """What the files call a parameter, None where it is not one tensor there."""
    parameter = model.get_parameter(name)
    found = revert_weight_conversion(model, {name: parameter.detach().to("meta")})
    if [tensor.shape for tensor in found.values()] != [parameter.shape]:
        return None
    stored: str = next(iter(found))
    return stored


def _tied(model: PreTrainedModel, missing: set[str]) -> dict[str, str]:
    """Parameters without a tensor of their own, as the model's configuration ties them."""
    keys: Any = getattr(model, "_tied_weights_keys", None) or {}
    ties = model.config.get_text_config(decoder=True).tie_word_embeddings
    return {name: keys[name] for name in missing if name in keys} if ties and isinstance(keys, dict) else {}
