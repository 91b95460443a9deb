"""Runs a traced network on the CPU: a table of operations over planned memory, which native code works through.

`Program` holds the weights; for each shape of images it makes a `Schedule` once: where values lie, which operations
groups of images run through without meeting the others, and what runs by torch in between. For a batch, only masks,
gates and addresses are filled in; one native call then runs all operations up to the next that torch runs.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import build
from .layout import MAX_INPUTS
from .operations import Convolve, Trace
from .schedule import Schedule
from .weights import NativeNetwork

MAX_SCHEDULES = 8
DTYPES = (torch.float32, torch.bfloat16)


def available(x: Tensor) -> bool:
    """Whether a native program can run these images."""
    return (
        x.device.type == 'cpu'
        and x.dtype in DTYPES
        and not torch.is_autocast_enabled('cpu')
        and build.library() is not None
    )


def fits(trace: Trace) -> bool:
    """Whether a native program can run these operations."""
    widths = [op.conv.weight.shape[1] * op.geometry.kernel[1] for op in trace.operations if isinstance(op, Convolve)]
    return max(widths, default=0) <= MAX_INPUTS


class Program(NativeNetwork):
    """The operations of a network with their weights, which run on images of any shape."""

    def __init__(self, trace: Trace, widths: Sequence[int], winograd: bool = True) -> None:
        super().__init__(trace, widths, winograd)
        self._schedules: OrderedDict[tuple[object, ...], Schedule] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, x: Tensor, gates: Sequence[Tensor], wanted: Sequence[str]) -> list[Tensor]:
        """The wanted values, all channels, for images (B, C, H, W) and their gates, each (B, C_l)."""
        packed = torch.cat(list(gates), 1).detach().float() if gates else torch.zeros(len(x), 0)
        return self.run_packed(x, packed.numpy(), wanted)

    def run_packed(self, x: Tensor, gates: np.ndarray, wanted: Sequence[str]) -> list[Tensor]:
        """The same with the gates of all layers side by side, (B, N), float32, contiguous."""
        if not len(x):
            one = self.run_packed(x.new_zeros(1, *x.shape[1:]), np.ones((1, gates.shape[1]), np.float32), wanted)
            return [value[:0] for value in one]
        key = (x.shape, tuple(wanted))
        with self._lock:
            schedule = self._schedules.get(key)
            if schedule is None:
                schedule = self._schedules[key] = Schedule(self, x, gates, wanted)
                if len(self._schedules) > MAX_SCHEDULES:
                    self._schedules.popitem(last=False)
            self._schedules.move_to_end(key)
        return schedule.run(x, gates)
