"""A folder of results that appears complete or not at all, and remembers what was done when a job is killed."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors import SafetensorError

from .checks import fail

PLAN = "plan.json"


@dataclass
class Folder:
    """``OUT`` and ``OUT.partial``: results are kept as they come and published whole.

    Attributes:
        out: what appears when all is done.
        job: the function in whose name errors speak.
        partial: where work goes on.
    """

    out: Path
    job: str
    partial: Path = field(init=False)

    def __post_init__(self) -> None:
        self.partial = self.out.with_name(self.out.name + ".partial")

    def check(self, plan: BaseModel, *, force: bool, resume: bool) -> None:
        """Refuse what must not be overwritten; nothing is changed.

        Raises:
            InputError: if ``out`` exists without ``force``, or an unfinished run lies there and neither ``resume``
                nor ``force`` is set, or it is of another plan.
        """
        if self.out.exists() and not force:
            raise fail(self.job, "out", "not exist (--force replaces it when the run is complete)", self.out)
        if not self.partial.exists() or {path.name for path in self.partial.iterdir()} <= {f"{PLAN}.tmp"}:
            return  # nothing is there, or what `open` left when it was killed
        if resume:
            record = self.partial / PLAN
            if not record.is_file() or record.read_text(encoding="utf-8") != plan.model_dump_json():
                raise fail(self.job, "resume", "continue a run of the same plan", f"another in {self.partial}")
        elif not force:
            constraint = "hold no unfinished run (--resume continues it, --force discards it)"
            raise fail(self.job, "out", constraint, self.partial)

    def open(self, plan: BaseModel, *, resume: bool) -> None:
        """Start, or continue what was left with ``resume``."""
        if self.partial.exists() and not resume:
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        write_whole(self.partial / PLAN, plan.model_dump_json())

    def discard(self) -> None:
        """Drop what was begun."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The JSON value of ``make()``, computed once and read back after a resume."""
        if not self.has(name):
            self.keep(name, make())
        return json.loads(self._stage(name).read_text(encoding="utf-8"))

    def has(self, name: str) -> bool:
        """Whether something was kept under ``name``."""
        return self._stage(name).is_file()

    def keep(self, name: str, value: Any) -> None:
        """Keep a JSON value under ``name`` until the folder is published."""
        path = self._stage(name)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(value))

    def _stage(self, name: str) -> Path:
        return self.partial / "stages" / f"{name}.json"

    def publish(self) -> None:
        """Put the finished run in the place of ``out``; an older one goes only when the new one is there.

        The plan and what was kept go last: a job that is killed here can go on, or is complete.
        """
        aside = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.parent)) if self.out.exists() else None
        if aside is not None:
            self.out.rename(aside / self.out.name)
        self.partial.rename(self.out)
        shutil.rmtree(self.out / "stages", ignore_errors=True)
        (self.out / PLAN).unlink()
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write under a temporary name, then move."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, moved to ``path`` at the end; what fails leaves ``path`` as it was.

    Raises:
        OSError: if it cannot be written, also where safetensors says so in an error of its own.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
