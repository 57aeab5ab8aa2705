"""Text and data sets for calibration, training and measurement.

Python source is on every machine that runs this library, so it is the default text. Larger sets are read from the
folder that the environment variable ``PAUCITY_DATA`` names; each loader knows the set's public address and says so
when the folder or the file is absent.
"""

import functools
import gzip
import hashlib
import json
import os
import sysconfig
from pathlib import Path

from ..checks import check_choice, fail

HELD_OUT_MODULES = (
    "argparse",
    "calendar",
    "configparser",
    "difflib",
    "fractions",
    "heapq",
    "queue",
    "sched",
    "shlex",
    "statistics",
    "tarfile",
    "textwrap",
    "tokenize",
)
"""Standard-library modules that the embedded model has never seen; the default text to measure on."""

_SKIPPED_PARTS = {"site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3", "__pycache__", "idle_test"}


@functools.cache
def _stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _is_held_out(path: Path) -> bool:
    return any(name in path.stem.removeprefix("test_") for name in HELD_OUT_MODULES)


def held_out_modules() -> dict[str, str]:
    """The running Python's source of `HELD_OUT_MODULES` by name, in that order."""
    files = {name: _stdlib_root() / f"{name}.py" for name in HELD_OUT_MODULES}
    return {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}


def held_out_python() -> str:
    """The source of `held_out_modules`, one after the other, each file ending with a newline."""
    return "\n".join(held_out_modules().values())


def python_documents(*, include_tests: bool = True) -> list[str]:
    """The running Python's standard library without the held-out modules, one string a file, sorted by path.

    Tables of character encodings and generated topics are left out, as are files over 400 kB and repeated files.
    """
    documents, seen = [], set()
    for file in sorted(_stdlib_root().rglob("*.py")):
        parts = set(file.relative_to(_stdlib_root()).parts)
        if parts & _SKIPPED_PARTS or _is_held_out(file):
            continue
        if not file.is_file() or file.stat().st_size > 400_000:  # some distributions leave dangling links
            continue
        if not include_tests and parts & {"test", "tests"}:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # test fixtures in other encodings
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) > 200 and digest not in seen:
            seen.add(digest)
            documents.append(text)
    return documents


def data_file(name: str, *, address: str) -> Path:
    """Path of ``name`` under ``PAUCITY_DATA``.

    Args:
        name: path relative to the data folder.
        address: the public address of the set, named when it is absent.

    Raises:
        FileNotFoundError: if ``PAUCITY_DATA`` is not set or holds no such file.
    """
    root = os.environ.get("PAUCITY_DATA")
    path = Path(root or "") / name
    if not root or not path.exists():
        where = f"{root} holds no {name}" if root else "PAUCITY_DATA is not set"
        raise FileNotFoundError(f"data_file: {where}; the set is public at {address}.")
    return path


def gutenberg_books() -> list[str]:
    """Ten long public-domain books (16.4 M characters), sorted by file name. Needs ``PAUCITY_DATA/gutenberg``."""
    folder = data_file("gutenberg", address="https://www.gutenberg.org")
    return [gzip.decompress(file.read_bytes()).decode("utf-8") for file in sorted(folder.glob("*.txt.gz"))]


def tiny_stories() -> list[str]:
    """1,000 TinyStories stories. Needs ``PAUCITY_DATA/tinystories_sample``."""
    name = "tinystories_sample/tinystories_1000.json"
    path = data_file(name, address="https://huggingface.co/datasets/roneneldan/TinyStories")
    stories: list[str] = json.loads(path.read_text(encoding="utf-8"))
    return stories


def wiki_text(split: str = "valid") -> str:
    """WikiText-2 at word level, ``<unk>`` for rare words. Needs ``PAUCITY_DATA/wikitext2``.

    Args:
        split: "valid" (218 k words) or "test" (246 k words).
    """
    check_choice("wiki_text", "split", split, ("valid", "test"))
    path = data_file(f"wikitext2/{split}.txt", address="https://huggingface.co/datasets/Salesforce/wikitext")
    return path.read_text(encoding="utf-8")


def read_text(name: str, *, role: str) -> str:
    """A built-in text or a UTF-8 file.

    The built-in ones are ``held_out_python`` and ``python``: the former, and every tenth of `python_documents` without
    the tests, spread over the whole library (about 1 MB: longer texts only take longer to tokenize).

    Args:
        name: of the text.
        role: what it is for, named in errors.

    Raises:
        InputError: if there is no such file, or it is empty or no UTF-8.
    """
    if name == "python":
        return "\n".join(python_documents(include_tests=False)[::10])
    if name == "held_out_python":
        return held_out_python()
    path = Path(name).expanduser()
    if not path.is_file():
        raise fail("read_text", f"{role} text", "be python, held_out_python or a file that exists", name)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise fail("read_text", f"{role} text", "be UTF-8", name) from None
    if not text.strip():
        raise fail("read_text", f"{role} text", "hold more than white space", f"{len(text)} characters in {name}")
    return text
