"""Dictionaries on disk: their own layout, and the front door that tells all layouts apart.

A folder holds ``dictionary.json`` (class and settings) and ``dictionary.safetensors`` (every parameter and buffer, bit
by bit). Nothing is ever unpickled.
"""

import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import list_repo_files, snapshot_download

from ..checks import InputError, fail
from . import foreign, saelens
from .base import Dictionary
from .sae import Rule
from .tensors import fill, read_json, read_tensors, write_both

SETTINGS, WEIGHTS = "dictionary.json", "dictionary.safetensors"
_FORMAT = 1
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w.-]+)*")
_PICKLES = (".pt", ".pth", ".bin", ".pkl")
_CONVERT = (
    "import torch; from safetensors.torch import save_file; "
    "save_file({n: t.contiguous() for n, t in torch.load('ae.pt', map_location='cpu', weights_only=True).items()}, "
    "'ae.safetensors')"
)


def save_dictionary(dictionary: Dictionary, folder: str | Path, *, facts: Mapping[str, Any] | None = None) -> None:
    """Write a dictionary so that `load_dictionary` gives back the same, bit by bit.

    Args:
        dictionary: of any class of this package.
        folder: is made; a dictionary in it is replaced when the new one is whole.
        facts: what else is known of it, such as the model, the place in it and how it was trained; JSON.
    """
    folder, kind = Path(folder), type(dictionary)
    record = {
        "format": _FORMAT,
        "class": f"{kind.__module__.removeprefix(f'{__package__}.')}:{kind.__name__}",
        "settings": dictionary.settings(),
        "facts": dict(facts or {}),
    }
    write_both(folder / SETTINGS, record, folder / WEIGHTS, dictionary.state_dict())


def load_dictionary(source: str | Path, *, scale: float | None = None) -> Dictionary:
    """Read a dictionary, ready to encode, of whichever layout it is.

    Args:
        source: a folder, or ``owner/name`` of the Hugging Face hub, with folders inside after it
            (``owner/name/layers.6``).
        scale: see `paucity.dictionary.saelens.read_saelens`; for that layout only.

    Returns:
        From a folder of this package the class that was saved; from others a `SparseAutoencoder` or what
        `read_saelens` makes of it.

    Raises:
        InputError: if there is none, it is a pickle, files are not whole, or tensors are of another architecture than
            the settings say.
    """
    folder = Path(source)
    if not folder.exists() and _HUB_ID.fullmatch(str(source)):
        folder = _download(str(source))
    if folder.suffix in _PICKLES and folder.is_file():
        raise _pickled(folder)
    if not folder.is_dir():
        raise fail("load_dictionary", "source", "be a folder with a dictionary, or owner/name on the hub", source)
    held = {path.name for path in folder.iterdir()}
    if held.issuperset({saelens.CONFIG, saelens.WEIGHTS, SETTINGS, WEIGHTS}):
        raise fail("load_dictionary", "source", "hold one dictionary", f"{folder} with two")
    if {saelens.CONFIG, saelens.WEIGHTS} <= held:
        return saelens.read_saelens(folder, scale=scale).dictionary
    if scale is not None:
        raise fail("load_dictionary", "scale", "be given for the layout of SAELens only", scale)
    if {SETTINGS, WEIGHTS} <= held:
        return _read(folder)
    if held.issuperset(foreign.SPARSIFY):
        return foreign.read_sparsify(folder)
    if held.issuperset(foreign.LEARNING):
        return foreign.read_dictionary_learning(folder)
    pickles = sorted(name for name in held if Path(name).suffix in _PICKLES)
    if pickles:
        raise _pickled(folder / pickles[0])
    layouts = ((SETTINGS, WEIGHTS), (saelens.CONFIG, saelens.WEIGHTS), foreign.SPARSIFY, foreign.LEARNING)
    wanted = "; or ".join(" and ".join(names) for names in layouts)
    raise fail("load_dictionary", "source", f"hold {wanted}", f"{folder} with {', '.join(sorted(held)) or 'nothing'}")


def read_facts(folder: str | Path) -> dict[str, Any]:
    """What `save_dictionary` was given as ``facts``."""
    found = read_json("read_facts", Path(folder) / SETTINGS).get("facts")
    return found if isinstance(found, dict) else {}


def _read(folder: Path) -> Dictionary:
    record = read_json("load_dictionary", folder / SETTINGS)
    tensors, metadata = read_tensors("load_dictionary", folder / WEIGHTS)
    if record.get("format") != _FORMAT:
        raise fail("load_dictionary", "format of the source", f"be {_FORMAT}", record.get("format"))
    dictionary: Dictionary = _made(record.get("class"), Dictionary, record.get("settings"))
    if metadata.get("settings") != json.dumps(record, sort_keys=True):
        raise fail("load_dictionary", "source", f"hold {SETTINGS} and {WEIGHTS} of one dictionary", "of two")
    fill("load_dictionary", dictionary, tensors, {})
    return dictionary


def _made(name: object, kind: type[Any], settings: object) -> Any:
    """An object of a class of this package, by name; nothing else is ever imported."""
    match = re.fullmatch(r"([a-z_]+):([A-Za-z]\w*)", str(name))
    try:
        found = getattr(importlib.import_module(f"{__package__}.{match[1]}"), match[2]) if match else None
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise fail("load_dictionary", "source", f"name a {kind.__name__} of this package", name)
    if not isinstance(settings, dict):
        raise fail("load_dictionary", "source", f"hold the settings of {found.__name__}", settings)
    given = dict(settings)
    if kind is Dictionary and isinstance(given.get("rule"), dict):
        rule = dict(given["rule"])
        given["rule"] = _made(rule.pop("name", None), Rule, rule)
    try:
        return found(**given)
    except InputError:
        raise
    except TypeError as error:
        raise fail("load_dictionary", "source", f"hold the settings of {found.__name__}", error) from None


def _download(source: str) -> Path:
    owner, name, *inner = source.split("/")
    inside = "/".join(inner)
    layouts = ((SETTINGS, WEIGHTS), (saelens.CONFIG, saelens.WEIGHTS), foreign.SPARSIFY, foreign.LEARNING)
    names = sorted({file for layout in layouts for file in (*layout, saelens.SPARSITY)})
    repository = f"{owner}/{name}"
    try:
        wanted = [f"{inside}/{file}" if inside else file for file in names]
        folder = Path(snapshot_download(repository, allow_patterns=wanted)) / inside
        held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if any(held.issuperset(layout) for layout in layouts):
            return folder
        there = [Path(file) for file in list_repo_files(repository)]
    except (OSError, ValueError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        what = "be a folder or a repository of the hub that can be reached"
        raise fail("load_dictionary", "source", what, f"{source}: {lines[0]}") from None
    for file in there:
        if file.parent == Path(inside) and file.suffix in _PICKLES:
            raise _pickled(Path(repository) / file)
    folders = sorted({f"{repository}/{file.parent.as_posix()}" for file in there if file.suffix == ".safetensors"})
    raise fail("load_dictionary", "source", "be a folder with a dictionary", f"{source}; there is {', '.join(folders)}")


def _pickled(path: Path) -> InputError:
    what = f'be safetensors: a pickle can run any code. Where you trust it, convert it once: python -c "{_CONVERT}"'
    return fail("load_dictionary", "source", what, path)
