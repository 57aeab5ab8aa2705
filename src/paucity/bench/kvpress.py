"""Kvpress as a peer, in a process of its own.

It wants a transformers of its own, so it may live in another environment: `PAUCITY_KVPRESS_PYTHON` names that
environment's Python; without it, this one's is asked for kvpress.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..measure.after_prompt import Case
from ..models.load import Loaded

VARIABLE = "PAUCITY_KVPRESS_PYTHON"


class Theirs:
    """kvpress in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def ask(self, do: str, **job: Any) -> dict[str, Any]:
        """Send a job, wait for the result."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do} | job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"kvpress: the peer must answer, got exit status {self.process.wait()}.")
        found: dict[str, Any] = json.loads(line)
        return found

    def use(self, name: str | None, options: dict[str, Any], heads: bool) -> None:
        """Put a press in the place of the one before."""
        self.ask("press", name=name, options=options, heads=heads)

    def answer(self, cases: Sequence[Case]) -> list[tuple[bool, float]]:
        """(right, bits) of each case."""
        return [tuple(one) for one in self.ask("cases", cases=[asdict(case) for case in cases])["outcomes"]]

    def prefill(self, prompt: Sequence[int]) -> tuple[float, int]:
        """Seconds, and bytes of the cache."""
        found = self.ask("prefill", prompt=list(prompt))
        return float(found["seconds"]), int(found["bytes"])

    def decode(self, num_tokens: int) -> float:
        """Seconds of steps after the last prompt."""
        return float(self.ask("decode", num_tokens=num_tokens)["seconds"])


def kvpress_python() -> str | None:
    """A Python that has kvpress, if one is known."""
    named = os.environ.get(VARIABLE)
    return named or (sys.executable if importlib.util.find_spec("kvpress") is not None else None)


@contextmanager
def kvpress_peer(loaded: Loaded) -> Iterator[Theirs | None]:
    """Kvpress with the same model, in a process of its own; None where it is not installed."""
    python = kvpress_python()
    if python is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        loaded.model.save_pretrained(folder)  # type: ignore[operator]
        # As a command, not as a file: the modules beside it would stand before those of the standard library.
        script = Path(__file__).with_name("kvpress_peer.py").read_text(encoding="utf-8")
        with subprocess.Popen(
            [python, "-c", script, folder, str(torch.get_num_threads())],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield Theirs(process)
            finally:
                with contextlib.suppress(BrokenPipeError):  # it ended before, and has said why
                    process.communicate()
