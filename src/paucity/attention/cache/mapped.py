"""Buffers in memory-mapped files: what is not read of a cache need not be in memory.

The operating system brings in the pages of the file that are read, and drops them when it wants memory. The file has no
name from the start, and its space is given back with the last tensor that uses it.
"""

import mmap
import os
import tempfile
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks import InputError, fail


@dataclass(frozen=True)
class Mapped:
    """Makes buffers in a folder; see `Store.relocate`. A copy of such a buffer (``deepcopy``) is in memory.

    Attributes:
        folder: where the files are; a file system in memory (often ``/tmp``) would save nothing.
    """

    folder: str

    def __call__(self, like: Tensor, entries: int) -> Tensor:
        """Zeros ``[entries, ...]`` in a new file.

        Raises:
            InputError: if ``like`` is not on the CPU, or the folder cannot be written to.
        """
        if like.device.type != "cpu":
            raise fail("offload", "cache", "be on the CPU", f"one on {like.device}")
        shape = (entries, *like.shape[1:])
        size = like.element_size() * torch.Size(shape).numel()
        if not size:
            return like.new_zeros(shape)
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                os.truncate(file.fileno(), size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise InputError(f"offload: folder must take {size} bytes, got {self.folder} ({error.strerror}).") from None
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)  # rows far apart are read, not their neighbours
        return torch.frombuffer(mapped, dtype=like.dtype).view(shape)
