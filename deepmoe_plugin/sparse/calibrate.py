"""Timing of a network on this machine: up to which kept fraction layers run on compact weights, and whether at all."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ragged
from .engine import Executor, SparseNetwork
from .fold import eval_view

FRACTIONS = (0.25, 0.5, 0.625, 0.75, 0.875)
REPEATS = 7
MARGIN = 0.97
NEVER = 0.0


@torch.no_grad()
def calibrate(sparse: SparseNetwork, x: Tensor) -> None:
    """Set the largest kept fraction up to which gated layers run on compact weights, and batches ragged.

    The network runs these images with random experts at several fractions, in turns dense and compact. If the masked
    network as it is still runs them faster, as small ones may do, it is what runs from now on.

    Args:
        sparse: its settings are set.
        x: images (B, in_chans, H, W).
    """
    settings = sparse.settings
    settings.masked = False
    sparse.refresh()
    executor = sparse.executor
    assert executor is not None
    layers = range(len(executor.widths))
    settings.ragged_limit = NEVER

    def limit(fraction: float) -> None:
        settings.limits = dict.fromkeys(layers, fraction)

    limit(_largest(executor, x, limit))
    if ragged.available(x):

        def limit_ragged(fraction: float) -> None:
            settings.ragged_limit = fraction

        limit_ragged(_largest(executor, x, limit_ragged))
    executor.apply()
    masked: Any = eval_view(sparse.network)
    view = sparse.view()
    settings.masked = not _is_faster(lambda: view.forward_features(x), lambda: masked.forward_features(x))
    sparse.refresh()


def _largest(executor: Executor, x: Tensor, limit: Callable[[float], None]) -> float:
    """The largest fraction up to which running below the limit takes less time than running above it."""
    best = NEVER
    for fraction in FRACTIONS:
        gates = _random_gates(executor, x, fraction)

        def run(value: float, gates: list[Tensor] = gates) -> None:
            limit(value)
            executor.apply()
            executor.run_gated(x, gates, [executor.trace.result])

        if not _is_faster(lambda run=run, trial=fraction + 1e-6: run(trial), lambda run=run: run(NEVER)):  # type: ignore[misc]
            break
        best = fraction + 1e-6
    return best


def _random_gates(executor: Executor, x: Tensor, fraction: float) -> list[Tensor]:
    gates = []
    for width in executor.widths:
        order = torch.rand(len(x), width).argsort(1).argsort(1)
        gates.append((order < max(1, int(width * fraction))).float().to(x.device))
    return gates


def _is_faster(candidate: Callable[[], object], current: Callable[[], object]) -> bool:
    """Whether the candidate clearly wins: shortest times, in turns, so that other programs' load does not decide."""
    best = [float('inf'), float('inf')]
    for repetition in range(REPEATS + 1):
        for i, run in enumerate((candidate, current)):
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repetition:
                best[i] = min(best[i], time.perf_counter() - start)
    return best[0] < MARGIN * best[1]
