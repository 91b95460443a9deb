"""Memory of native code."""

import contextlib
import mmap
import threading

import torch
from torch import Tensor

HUGE_PAGE = 2 * 2**20


def buffer(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros, on huge pages where the system has them: a gather jumps from row to row, each on a page of its own."""
    size = numel * dtype.itemsize
    if size < HUGE_PAGE or not hasattr(mmap, 'MADV_HUGEPAGE'):
        return torch.zeros(numel, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


class Workspace(threading.local):
    """Memory of a thread for what is used during one call, as large as the largest call so far."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """Memory that the next call of this thread takes for something else; 64 bytes or more each."""
        if num_bytes > len(self.memory):
            with torch.inference_mode(False):
                self.memory = buffer(num_bytes, torch.uint8)
        return self.memory
