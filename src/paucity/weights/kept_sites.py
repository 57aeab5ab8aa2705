"""Finished sites of a pruning on disk, so that a job that was killed goes on where it was."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..folder import replacing, write_whole
from ..models.sites import Site
from ..ops.formats.packed import pack_bits, unpack_bits


class KeptSites:
    """Masks and changed weights of each finished site; without a folder nothing is kept.

    Args:
        folder: of one job; whoever names it again means the same job.
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

    def keep(self, site: Site, mask: Tensor, weight: Tensor | None) -> None:
        """Keep what was found for a site."""
        if self.folder is None:
            return
        tensors = {"mask": pack_bits(mask.flatten()).cpu()} | ({} if weight is None else {"weight": weight.cpu()})
        with replacing(self._path(site)) as temporary:
            save_file(tensors, temporary)

    def load(self, model: nn.Module, site: Site) -> tuple[Site, Tensor, Tensor | None]:
        """What `keep` was given."""
        tensors, parameter = load_file(self._path(site)), model.get_parameter(site.name)
        mask = unpack_bits(tensors["mask"], parameter.numel()).view(parameter.shape)
        weight = tensors.get("weight")
        return site, mask.to(parameter.device), None if weight is None else weight.to(parameter.device)

    def _path(self, site: Site) -> Path:
        assert self.folder is not None
        return self.folder / f"{site.name}.safetensors"
