"""The configuration of a model, without its weights."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import AutoConfig

from ..checks import InputTypeError, fail
from .load import _HUB_ID, _UNREADABLE, _first_line


def read_config(source: str | Path) -> Any:
    """The transformers configuration of ``source``; of a model of images and text the part that reads text.

    Args:
        source: ``"embedded"``, a folder with a config.json, that file, or a hub id. Weights are neither needed nor
            read, and code that comes with a model is never run.

    Raises:
        InputError: if there is no such thing, or it cannot be reached or read.
    """
    if not isinstance(source, str | Path):
        raise InputTypeError(f"read_config: source must be a name or a path, got {type(source).__name__}.")
    constraint, local = "be 'embedded', a hub id or a folder with a config.json", True
    if source == "embedded":
        from .embedded import folder

        name = str(folder())
    elif isinstance(source, Path) or Path(source).exists() or not _HUB_ID.fullmatch(source):
        path = Path(source).expanduser()
        if not (path.is_file() or (path / "config.json").is_file()):
            raise fail("read_config", "source", constraint, source)
        name = str(path)
    else:
        name = source
        try:  # one quick question: transformers asks again and again for half a minute
            HfApi().model_info(name, timeout=10)
            local = False
        except Exception as error:  # whatever the reason, what has been downloaded before can still be read
            constraint += f" that can be reached ({_first_line(error)})"
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=local)
    except _UNREADABLE as error:
        raise fail("read_config", "source", constraint, f"{source} ({_first_line(error)})") from error
    return config.get_text_config(decoder=True)
