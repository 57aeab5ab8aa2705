"""Pruning a model from its files to files, a block in memory at a time, so that it may be larger than memory.

Each block of the output is written when all calibration has gone through it. A job that was killed reads what it had
written and goes on behind it.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..folder import replacing, write_whole
from ..models.blocks import block_path, sites_by_block
from ..models.calibration import stacked
from ..models.exact_attention import exact_attention
from ..models.save import FOREIGN_KEYS
from ..models.sites import Site, find_sites
from ..models.streamed import Streamed, give_back
from ..ops import budget
from .layerwise import STACKED, Tell, dense_blocks, solve_site
from .matrices import only
from .pruner import Pruner
from .statistics import InputNorm

_COPIED = (
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab.*",
    "*.model",
    "*.tiktoken",
)


class ShardsJob:
    """One model on its way from files to files.

    Args:
        streamed: the model.
        sites: what is pruned, all in its blocks.
        pruner: a method that needs no pass through the whole model, with ``uniform`` or ``erk`` allocation.
        folder: where files are written; blocks that are there already are taken as they are.
        tell: told before every site.

    Attributes:
        zeros: entries that are 0, by parameter, when it has run.
        sizes: entries, by parameter.
        notes: what the user should know, when it has run.
    """

    def __init__(self, streamed: Streamed, sites: list[Site], pruner: Pruner, folder: Path, tell: Tell) -> None:
        self.streamed, self.sites, self.pruner, self.folder, self.tell = streamed, sites, pruner, folder, tell
        self.model = streamed.model
        paths = list(dict.fromkeys(block_path(site) for site in find_sites(self.model) if site.layer is not None))
        self.blocks = {path: [name for name in streamed.files if name.startswith(f"{path}.")] for path in paths}
        inside = {name for names in self.blocks.values() for name in names}
        self.rest = [name for name in streamed.files if name not in inside]
        self.file = {path: _file(number, len(paths) + 1) for number, path in enumerate(paths, 1)}
        self.zeros: dict[str, int] = {}
        self.sizes = {site.name: self.model.get_parameter(site.name).numel() for site in sites}
        shapes = {site.name: tuple(self.model.get_parameter(site.name).shape) for site in sites}
        shared = {"uniform": budget.uniform, "erk": budget.erk}[pruner.allocation]
        self.sparsities = shared(shapes, sparsity=pruner.target)
        self.notes: list[str] = []

    @torch.no_grad()
    def run(self, ids: Sequence[Tensor]) -> None:
        """Prune block after block."""
        self.streamed.fill(self.rest)
        groups = dict(sites_by_block(self.sites))
        left = {path: [] if self._has(path) else groups.get(path, []) for path in self.blocks}
        for path, inputs in self._visited(left, ids):
            notes: list[str] = []
            zeros = {site.name: self.solve(site, inputs.get(site.name), notes) for site in left[path]}
            self.leave(path, {"zeros": zeros, "notes": notes})
        for path in self.blocks:  # also those that a killed job wrote
            record = json.loads(self._record(path).read_text(encoding="utf-8"))
            self.zeros |= record["zeros"]
            self.notes += record["notes"]

    def _visited(
        self, left: dict[str, list[Site]], ids: Sequence[Tensor]
    ) -> Iterator[tuple[str, dict[str, list[InputNorm]]]]:
        """Blocks in memory, one at a time, with what the sites in ``left`` read in the dense model."""
        if self.pruner.gathers is not None and any(left.values()):
            batches = stacked(ids, most=STACKED)
            with exact_attention(self.model):
                yield from dense_blocks(self.model, left, self.pruner.gathers, batches, enter=self.enter)
            return
        for path in left:
            if not self._has(path):
                self.enter(path)
                yield path, {}

    def enter(self, path: str) -> None:
        """Read a block as it was."""
        self.streamed.fill(self.blocks[path])

    def leave(self, path: str, record: dict[str, Any]) -> None:
        """Write a block with what is known of it, unless a killed job did, and take it out of memory."""
        if not self._has(path):
            self._record(path).parent.mkdir(exist_ok=True)
            write_whole(self._record(path), json.dumps(record))
            self._write(self.blocks[path], self.file[path])
        self.streamed.drop(self.blocks[path])
        give_back()

    def solve(self, site: Site, inputs: list[InputNorm] | None, notes: list[str]) -> int:
        """Prune one site in memory; the number of its zeros."""
        self.tell(self.sites.index(site), len(self.sites), site.name)
        _, mask, weight = solve_site(self.model, site, self.pruner, inputs, self.sparsities[site.name], {}, notes)
        before = self.model.get_parameter(site.name).detach()
        kept = only(before if weight is None else weight, mask)
        self.streamed.put(site.name, kept)  # not in place: what was read is the file's own memory
        return kept.numel() - int(kept.count_nonzero())

    def finish(self) -> None:
        """Write what is outside the blocks, the index and the other files of a model."""
        source = self.streamed.folder
        last = _file(len(self.blocks) + 1, len(self.blocks) + 1)
        self._write(self.rest, last)
        stored = self.streamed.stored
        weights = {stored[name]: self.file[path] for path, names in self.blocks.items() for name in names}
        weights |= {stored[name]: last for name in self.rest}
        size = sum((self.folder / file).stat().st_size for file in set(weights.values()))
        index = {"metadata": {"total_size": size}, "weight_map": weights}
        write_whole(self.folder / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
        for file in sorted({path for pattern in _COPIED for path in source.glob(pattern) if path.is_file()}):
            shutil.copyfile(file, self.folder / file.name)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in FOREIGN_KEYS}
        write_whole(self.folder / "config.json", json.dumps(kept, indent=2, sort_keys=True) + "\n")

    def _write(self, names: list[str], file: str) -> None:
        tensors = {self.streamed.stored[name] or name: self.model.get_parameter(name).detach() for name in names}
        with replacing(self.folder / file) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"format": "pt"})

    def _has(self, path: str) -> bool:
        return (self.folder / self.file[path]).is_file()

    def _record(self, path: str) -> Path:
        return self.folder / "stages" / f"{path}.json"


def _file(number: int, count: int) -> str:
    return f"model-{number:05}-of-{count:05}.safetensors"
