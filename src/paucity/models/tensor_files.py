"""Writing safetensors one tensor at a time, so that tensors may be made only when they are written."""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checks import InputTypeError, fail

SHARD_BYTES = 5 * 10**9
"""Tensors of one file, unless a single one is larger."""

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class Later:
    """A tensor that is made when it is written.

    Attributes:
        shape: of what ``make`` will give.
        dtype: of the same.
        make: called once.
    """

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.shape.numel() * self.dtype.itemsize


def shards(entries: Mapping[str, Tensor | Later], stem: str, most: int | None = None) -> dict[str, list[str]]:
    """Which names go to which file: ``STEM.safetensors``, or ``STEM-00001-of-0000N.safetensors`` where there are more.

    Args:
        entries: in the order in which they are written.
        stem: of the file names.
        most: bytes of a file, unless one tensor is larger; None is `SHARD_BYTES`.
    """
    parts: list[list[str]] = [[]]
    size, most = 0, SHARD_BYTES if most is None else most
    for name, entry in entries.items():
        if parts[-1] and size + entry.nbytes > most:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += entry.nbytes
    if len(parts) == 1:
        return {f"{stem}.safetensors": parts[0]}
    return {f"{stem}-{i:05}-of-{len(parts):05}.safetensors": names for i, names in enumerate(parts, 1)}


def write_tensors(path: Path, entries: Mapping[str, Tensor | Later], names: Sequence[str]) -> None:
    """Write ``names`` of ``entries`` to ``path``; at no time more than one that comes `Later` is in memory.

    Raises:
        InputError: if a dtype has no name in safetensors, or a tensor is not what was announced.
        OSError: if it cannot be written, such as to a full disk; the file is incomplete then.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start, names = 0, sorted(names, key=lambda name: -entries[name].dtype.itemsize)  # each then lies aligned
    for name in names:
        entry = entries[name]
        if entry.dtype not in _NAMES:
            raise InputTypeError(f"save: {name} must have a dtype of safetensors, got {entry.dtype}.")
        offsets = [start, start := start + entry.nbytes]
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(_bytes(name, entries[name]))


def _bytes(name: str, entry: Tensor | Later) -> memoryview:
    tensor = entry.make() if isinstance(entry, Later) else entry
    if (tensor.shape, tensor.dtype) != (entry.shape, entry.dtype):
        raise fail("save", name, f"be {list(entry.shape)} {entry.dtype}", f"{list(tensor.shape)} {tensor.dtype}")
    data: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return data


def write_shards(folder: Path, entries: Mapping[str, Tensor | Later], stem: str) -> dict[str, str]:
    """Write all ``entries`` to as many files as they need.

    Returns:
        Name of the file by name of the tensor.
    """
    files = shards(entries, stem)
    for file, names in files.items():
        write_tensors(folder / file, entries, names)
    return {name: file for file, names in files.items() for name in names}
