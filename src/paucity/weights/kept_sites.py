"""Finished sites of a pruning on disk, so that a job that was killed goes on where it was."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checks import fail
from ..folder import replacing, write_whole
from ..models.sites import Site
from ..ops.formats.packed import pack_bits, unpack_bits

_JOB = "job.json"


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of shapes, dtypes and contents, in their order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def claim(folder: Path, job: dict[str, Any]) -> None:
    """Make ``folder`` that of ``job``, a JSON value that no other job shares.

    Raises:
        InputError: if it holds sites of another job.
    """
    record, text = folder / _JOB, json.dumps(job, sort_keys=True)
    same = record.read_text(encoding="utf-8") == text if record.is_file() else not any(folder.glob("*.safetensors"))
    if not same:
        raise fail(
            "prune",
            "keep",
            "be a new folder or that of the same job (method, options, calibration, dense weights)",
            folder,
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(record, text)


class KeptSites:
    """Masks and changed weights of each finished site; without a folder nothing is kept.

    Args:
        folder: of one job, see `claim`.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def sparsities(self, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The allocation, worked out once: what it looks at is pruned afterwards."""
        if self.folder is None:
            return make()
        path = self.folder / "allocation.json"
        if not path.is_file():
            write_whole(path, json.dumps(make()))
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def has(self, site: Site) -> bool:
        """Whether ``site`` is finished."""
        return self.folder is not None and self._path(site).is_file()

    def keep(self, site: Site, mask: Tensor, weight: Tensor | None, notes: list[str]) -> None:
        """Keep what was found for a site, with what the user should know of it."""
        if self.folder is None:
            return
        tensors = {"mask": pack_bits(mask.flatten()).cpu()} | ({} if weight is None else {"weight": weight.cpu()})
        with replacing(self._path(site)) as temporary:
            save_file(tensors, temporary, {"notes": json.dumps(notes)})

    def notes(self, site: Site) -> list[str]:
        """The notes that `keep` was given."""
        with safe_open(self._path(site), "pt") as file:
            notes: list[str] = json.loads(file.metadata()["notes"])
        return notes

    def load(self, model: nn.Module, site: Site) -> tuple[Site, Tensor, Tensor | None]:
        """What `keep` was given besides."""
        tensors, parameter = load_file(self._path(site)), model.get_parameter(site.name)
        mask = unpack_bits(tensors["mask"], parameter.numel()).view(parameter.shape)
        weight = tensors.get("weight")
        return site, mask.to(parameter.device), None if weight is None else weight.to(parameter.device)

    def _path(self, site: Site) -> Path:
        assert self.folder is not None
        return self.folder / f"{site.name}.safetensors"
