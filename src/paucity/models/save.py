"""Saving: an ordinary Hugging Face folder, zeros in place, that any other tool loads; never pickle."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_model
from transformers import PreTrainedModel

from ..checks import InputTypeError, fail
from .load import Loaded

# Keys by which other tools would take plain weights for packed ones.
_FOREIGN_KEYS = ("sparsity_config", "compression_config")


def save(loaded: Loaded, folder: str | Path, *, extra: Mapping[str, object] | None = None) -> Path:
    """Write the model to ``folder``, complete or not at all: to a temporary folder beside it first, then moved.

    A Hugging Face model becomes what ``AutoModelForCausalLM.from_pretrained`` loads: safetensors, configuration,
    generation configuration and tokenizer. Any other module becomes its state as ``model.safetensors`` with a
    ``paucity.json``.

    Args:
        loaded: what to save.
        folder: must be absent or empty; its parents are made.
        extra: JSON-able, written to ``paucity.json`` as ``extra``.

    Returns:
        ``folder`` as a path.

    Raises:
        InputError: if ``folder`` is a file or is not empty, or ``extra`` cannot be written as JSON.
    """
    target = Path(folder)
    if target.is_file():
        raise fail("save", "folder", "be absent or an empty folder", f"the file {target}")
    if target.is_dir() and any(target.iterdir()):
        raise fail("save", "folder", "be absent or empty", target)
    hugging_face = isinstance(loaded.model, PreTrainedModel)
    record = {"source": loaded.source, "class": type(loaded.model).__name__, "extra": dict(extra or {})}
    try:
        text = json.dumps(record, indent=2)
    except (TypeError, ValueError) as error:
        raise InputTypeError(f"save: extra must be JSON-able, got {error}.") from error

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        if isinstance(loaded.model, PreTrainedModel):
            _save_hugging_face(loaded, temporary)
        else:
            save_model(loaded.model, str(temporary / "model.safetensors"))
        if extra or not hugging_face:
            (temporary / "paucity.json").write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _save_hugging_face(loaded: Loaded, folder: Path) -> None:
    model: PreTrainedModel = loaded.model
    model.save_pretrained(folder)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _FOREIGN_KEYS}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
