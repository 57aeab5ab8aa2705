"""What iterative pruning leaves on disk: a plan, the weights to go back to, and one folder for each finished round."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from ..checks import fail
from ..folder import replacing, write_whole
from ..ops.formats import Masks

_PLAN, _REWOUND, _WEIGHTS, _MASKS, _RECORD = (
    "plan.json", "rewound.safetensors", "weights.safetensors", "masks.safetensors", "record.json"
)  # fmt: skip


class TicketFolder:
    """A folder in which every file and every round appears whole or not at all; safetensors and JSON only.

    Args:
        path: made if absent.
        plan: JSON-able; a folder of another plan is refused.

    Raises:
        InputError: if ``path`` is a file, holds something else, or another plan.
    """

    def __init__(self, path: Path, plan: dict[str, Any]) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise fail("iterative_magnitude", "folder", "be a folder", path)
        if (path / _PLAN).is_file():
            try:
                found = json.loads((path / _PLAN).read_text(encoding="utf-8"))
            except ValueError:
                found = None
            if found != plan:
                raise fail("iterative_magnitude", "folder", "be absent, empty or of the same plan", path)
        elif path.is_dir() and any(file.suffix != ".tmp" for file in path.iterdir()):
            raise fail("iterative_magnitude", "folder", "be absent, empty or of the same plan", path)
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / _PLAN, json.dumps(plan))

    def keep_rewound(self, model: nn.Module) -> None:
        """Keep the state of ``model`` as the one to go back to."""
        with replacing(self.path / _REWOUND) as temporary:
            save_model(model, str(temporary))

    def read_rewound(self, model: nn.Module) -> bool:
        """Give ``model`` the state to go back to, if there is one yet."""
        if not (self.path / _REWOUND).is_file():
            return False
        self._read(model, self.path / _REWOUND)
        return True

    def keep_round(self, index: int, model: nn.Module, masks: Masks, record: dict[str, Any]) -> None:
        """Keep a finished round; the weights of the one before go, as nothing starts from them any more."""
        target = self._round(index)
        temporary = target.with_name(target.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with replacing(temporary / _WEIGHTS) as weights:
            save_model(model, str(weights))
        masks.save(temporary / _MASKS)
        (temporary / _RECORD).write_text(json.dumps(record), encoding="utf-8")
        temporary.rename(target)
        if index:
            (self._round(index - 1) / _WEIGHTS).unlink(missing_ok=True)

    def read_rounds(self, model: nn.Module) -> list[tuple[Masks, dict[str, Any]]]:
        """Masks and record of the rounds that are done; ``model`` gets the weights of the last."""
        done: list[tuple[Masks, dict[str, Any]]] = []
        while self._round(len(done)).is_dir():
            path = self._round(len(done))
            done.append((Masks.load(path / _MASKS), _record(path / _RECORD)))
        if done:
            self._read(model, self._round(len(done) - 1) / _WEIGHTS)
        return done

    def _round(self, index: int) -> Path:
        return self.path / f"round_{index:03d}"

    def _read(self, model: nn.Module, path: Path) -> None:
        try:
            load_model(model, str(path))
        except (SafetensorError, RuntimeError, OSError) as error:
            raise fail("iterative_magnitude", "folder", f"hold weights of this model ({error})", path) from error


def _record(path: Path) -> dict[str, Any]:
    """What `paucity.weights.iterative` noted of a round; InputError if it is not whole."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise fail("iterative_magnitude", "folder", f"hold a readable record ({error})", path) from error
    if not isinstance(record, dict) or not {"sparsity", "record", "seconds", "empty"} <= set(record):
        raise fail("iterative_magnitude", "folder", "hold records of sparsity, record, seconds and empty", path)
    return record
