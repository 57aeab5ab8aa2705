"""Loading: the embedded model, a Hugging Face folder, a model of the hub, or a module that is already there."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..checks import InputError, InputTypeError, check_choice, check_int, fail

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""Names of the dtypes that a model can be loaded in."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
PACKED_INDEX = "paucity_packed.json"
"""What a folder with packed weights has, and no other."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_NUM_BYTES = 256
_END = "<|endoftext|>"

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf"}

# What a folder that cannot be read raises in transformers.
_UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, StrictDataclassError)


@dataclass
class Loaded:
    """A model with all that is known about it.

    Attributes:
        model: in eval mode.
        tokenizer: None where the source has none.
        source: what was asked for; for a module its class.
        notes: what the user should know, one sentence each.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    source: str
    notes: list[str] = field(default_factory=list)

    def need_tokenizer(self, function: str) -> PreTrainedTokenizerBase:
        """The tokenizer; InputError in the name of ``function`` where there is none."""
        if self.tokenizer is None:
            raise fail(function, "model", "come with a tokenizer to read text", f"{self.source} without one")
        return self.tokenizer


def load(
    source: str | Path | nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Loaded:
    """The model named by ``source``, in eval mode. Code that comes with a model is never run.

    Args:
        source: ``"embedded"`` (the shipped model), a Hugging Face folder, a hub id, or a module. A module is taken as
            it is: it is switched to eval mode, and converted in place where ``dtype`` or ``device`` asks for it.
            A folder with a configuration and no weights at all gives random ones, and a note. A folder of
            `paucity.models.packed_files.save_packed` comes back onto the kernels.
        tokenizer: instead of the one of the source. A folder without tokenizer files gets `byte_tokenizer`, and a
            note, if its vocabulary is large enough; else the tokenizer is None.
        dtype: one of `DTYPES`; None keeps that of the source. Rotary frequencies stay as precise as they are.
        device: as for ``torch.device``; None is the CPU for what is loaded here, and leaves a module where it is.

    Raises:
        InputError: if the source is no such thing, cannot be reached or read, lacks weights, or the dtype or device is
            unknown.
    """
    if dtype is not None:
        check_choice("load", "dtype", dtype, DTYPES)
    target = None if device is None else _device(device)
    if isinstance(source, nn.Module):
        loaded = Loaded(source, tokenizer, type(source).__name__)
    elif not isinstance(source, str | Path):
        raise InputTypeError(f"load: source must be a name, a folder or a module, got {type(source).__name__}.")
    elif source == "embedded":
        from .embedded import load_embedded  # the weights' package is read only when asked for

        model, own_tokenizer = load_embedded()
        loaded = Loaded(model, tokenizer or own_tokenizer, "embedded")
    elif isinstance(source, Path) or Path(source).exists() or not _HUB_ID.fullmatch(source):
        loaded = _from_folder(Path(source).expanduser(), tokenizer)
    else:
        loaded = _from_hub(source, tokenizer)
    _convert(loaded.model.eval(), target, None if dtype is None else DTYPES[dtype])
    return loaded


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Token ``b`` is the byte ``b`` of the UTF-8 text; token 256, if there is room for it, begins a text and ends it.

    Args:
        vocab_size: of the model, at least 256.

    Raises:
        InputError: if the vocabulary is too small.
    """
    check_int("byte_tokenizer", "vocab_size", vocab_size, low=_NUM_BYTES)
    # The byte-level alphabet: printable bytes stand for themselves, the others for the code points from 256 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(_NUM_BYTES) if byte not in printable]
    vocab = {chr(byte) if byte in printable else chr(256 + hidden.index(byte)): byte for byte in range(_NUM_BYTES)}
    has_end = vocab_size > _NUM_BYTES
    tokenizer = Tokenizer(models.BPE(vocab=vocab | ({_END: _NUM_BYTES} if has_end else {}), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if not has_end:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokenizer.add_special_tokens([AddedToken(_END, special=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_END} $A", pair=f"{_END} $A $B", special_tokens=[(_END, _NUM_BYTES)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_END, eos_token=_END)


def _device(device: str) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise fail("load", "device", "be a device of this machine", f"{device} ({_first_line(error)})") from error
    return target


def _convert(model: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """``model.to``, except that rotary frequencies, which transformers computes at any dtype in float32, stay so."""
    exact = {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name.endswith("inv_freq")}
    model.to(device=device, dtype=dtype)
    for name, buffer in exact.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer.to(device))


def _from_folder(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> Loaded:
    if not folder.is_dir():
        raise fail("load", "source", "be 'embedded', a hub id or a folder that exists", folder)
    packed = (folder / PACKED_INDEX).is_file()
    if not packed and not (folder / "config.json").is_file():
        raise fail("load", "source", "be a Hugging Face folder with a config.json", folder)
    constraint, notes = "be a readable Hugging Face folder", list[str]()
    if packed:
        from .packed_files import read_packed  # which saves what is loaded here

        model = read_packed(folder)
    elif any(file.suffix in _WEIGHT_SUFFIXES for file in folder.iterdir()):
        model = _pretrained(str(folder), constraint, local=True)
    else:
        model = _random(str(folder), constraint)
        notes.append(f"{folder} holds a configuration without weights: they are random numbers.")
    loaded = Loaded(model, tokenizer, str(folder), notes)
    if tokenizer is not None:
        return loaded
    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        try:
            loaded.tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except _UNREADABLE as error:
            raise fail("load", "source", "have a readable tokenizer", f"{folder} ({_first_line(error)})") from error
        return loaded
    vocab_size = getattr(loaded.model.config, "vocab_size", 0)
    if vocab_size >= _NUM_BYTES:
        loaded.tokenizer = byte_tokenizer(vocab_size)
        loaded.notes.append(f"{folder} has no tokenizer: every byte of a text is one token.")
    else:
        loaded.notes.append(f"{folder} has no tokenizer and a vocabulary too small for bytes ({vocab_size}).")
    return loaded


def _from_hub(name: str, tokenizer: PreTrainedTokenizerBase | None) -> Loaded:
    constraint = "be 'embedded', a folder that exists or a hub id that can be reached"
    local = False
    try:  # one quick question: transformers asks again and again for half a minute
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # whatever the reason, what has been downloaded before still loads
        local = True
        constraint += f" ({_first_line(error)})"
    loaded = Loaded(_pretrained(name, constraint, local=local), tokenizer, name)
    if tokenizer is None:
        try:
            loaded.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local)
        except _UNREADABLE as error:
            loaded.notes.append(f"{name} has no tokenizer that can be read ({_first_line(error)}).")
    return loaded


def _pretrained(name: str, constraint: str, *, local: bool) -> nn.Module:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", trust_remote_code=False, local_files_only=local, output_loading_info=True
        )
    except torch.OutOfMemoryError:
        raise
    except _UNREADABLE as error:
        raise fail("load", "source", constraint, f"{name} ({_first_line(error)})") from error
    missing = sorted(info["missing_keys"])
    if missing:  # they would be random numbers
        some = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise InputError(f"load: source must hold all weights, got {name} without {len(missing)} of them: {some}.")
    loaded: nn.Module = model
    return loaded


def _random(name: str, constraint: str) -> nn.Module:
    """A model of the configuration in a folder, the same at every call; the caller's random numbers are left alone."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except _UNREADABLE as error:
        raise fail("load", "source", constraint, f"{name} ({_first_line(error)})") from error
    return model


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].strip() if lines else type(error).__name__).rstrip(".:")
