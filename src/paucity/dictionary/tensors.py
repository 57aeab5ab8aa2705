"""Tensors of a dictionary from and to files, with errors that say what does not fit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checks import fail
from ..folder import replacing
from .base import Dictionary

DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def read_json(function: str, path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        InputError: if it holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise fail(function, "source", f"hold a JSON object in {path.name}", error) from None
    if not isinstance(found, dict):
        raise fail(function, "source", f"hold a JSON object in {path.name}", type(found).__name__)
    return found


def read_tensors(function: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata.

    Raises:
        InputError: if there is none, or it is not whole.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise fail(function, "source", f"hold a whole safetensors file {path.name}", error) from None


def dtype_of(function: str, name: object) -> torch.dtype:
    """The dtype of a name, with or without ``torch.`` before it."""
    full = f"torch.{str(name).removeprefix('torch.')}"
    if full not in DTYPES:
        raise fail(function, "dtype of the source", f"be one of {', '.join(DTYPES)}", name)
    return DTYPES[full]


def fill(function: str, dictionary: Dictionary, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Put ``tensors`` into the parameters and buffers of ``dictionary``, which take their dtypes.

    Args:
        function: in whose name errors speak.
        dictionary: of the sizes that the settings of the source say.
        tensors: by name of the parameter.
        names: what the source calls a parameter, where that is another name.

    Raises:
        InputError: if one is missing, unknown, of another shape or not finite.
    """
    dictionary.make_room({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    wanted, learned = dictionary.state_dict(), dict(dictionary.named_parameters())

    def said(of: set[str]) -> str:
        return ", ".join(sorted(names.get(name, name) for name in of)) or "none"

    missing, unknown = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing or unknown:
        kind = f"hold the tensors of {type(dictionary).__name__}"
        raise fail(function, "source", kind, f"missing: {said(missing)}; unknown: {said(unknown)}")
    for name in wanted:
        tensor = tensors[name]
        if tensor.shape != wanted[name].shape:
            what = f"hold {said({name})} of shape {list(wanted[name].shape)}, as its settings say"
            raise fail(function, "source", what, list(tensor.shape))
        if name in learned and not bool(tensor.isfinite().all()):
            raise fail(function, "source", f"hold finite numbers in {said({name})}", "NaN or infinity")
    dictionary.is_fit = True
    dictionary.load_state_dict({name: tensor.contiguous() for name, tensor in tensors.items()}, assign=True)
    dictionary.eval()


def write_both(settings: Path, record: Mapping[str, Any], weights: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a JSON file and a safetensors file of one folder; if one fails, both stay as they were."""
    text = json.dumps(record, indent=1)
    settings.parent.mkdir(parents=True, exist_ok=True)
    with replacing(settings) as first, replacing(weights) as second:
        first.write_text(text, encoding="utf-8")
        held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(held, second, {"format": "pt", "settings": json.dumps(record, sort_keys=True)})
