"""Finished blocks of a pruning on disk, so that a job that was killed goes on where it was."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..folder import replacing, write_whole
from ..models.sites import Site
from ..ops.formats.packed import pack_bits, unpack_bits


class KeptBlocks:
    """Masks and changed weights of each finished block; without a folder nothing is kept.

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

    def has(self, index: int) -> bool:
        """Whether block ``index`` is finished."""
        return self.folder is not None and self._path(index).is_file()

    def keep(self, index: int, solved: Sequence[tuple[Site, Tensor, Tensor | None]]) -> None:
        """Keep what was found for a block."""
        if self.folder is None:
            return
        tensors = {f"{site.name}.mask": pack_bits(mask.flatten()).cpu() for site, mask, _ in solved}
        tensors |= {site.name: weight.cpu() for site, _, weight in solved if weight is not None}
        with replacing(self._path(index)) as temporary:
            save_file(tensors, temporary)

    def load(self, index: int, model: nn.Module, group: Sequence[Site]) -> list[tuple[Site, Tensor, Tensor | None]]:
        """What `keep` was given."""
        tensors = load_file(self._path(index))
        found = []
        for site in group:
            parameter = model.get_parameter(site.name)
            mask = unpack_bits(tensors[f"{site.name}.mask"], parameter.numel()).view(parameter.shape)
            weight = tensors.get(site.name)
            found.append((site, mask.to(parameter.device), None if weight is None else weight.to(parameter.device)))
        return found

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"block-{index:05}.safetensors"
