"""Timing of every segment on this machine: which layers run on compact weights, up to which kept fraction."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ragged
from .engine import SparseFeatures, SparseNetwork
from .fold import eval_view
from .plan import Plan, Segment

FRACTIONS = (0.25, 0.5, 0.625, 0.75, 0.875)
REPEATS = 7
MARGIN = 0.97
NEVER = 0.0


@torch.no_grad()
def calibrate(sparse: SparseNetwork, x: Tensor) -> None:
    """Set the largest kept fraction up to which each gated layer runs on compact weights, and each segment ragged.

    Every segment runs on the input that it gets in the network, with random experts at several fractions, in turns
    dense and compact. Segments of equal shape are timed once. If the masked network as it is still runs these images
    faster, as very small networks do, it is what runs from now on.

    Args:
        sparse: its `limits`, `ragged_limits` and `masked` are set.
        x: images (B, in_chans, H, W).
    """
    inputs: list[tuple[Any, Tensor]] = []

    def remember(module: nn.Module, args: tuple[Tensor, Plan]) -> None:
        inputs.append((module, args[0].clone()))

    view = sparse.view()
    found = [m for m in view.modules() if hasattr(m, 'segment')]
    hooks = [module.register_forward_pre_hook(remember) for module in found]
    try:
        view.forward_features(x)
    finally:
        for hook in hooks:
            hook.remove()
    num_layers = len(sparse.network.expert_layers)
    timed: dict[tuple[object, ...], tuple[list[float], float]] = {}
    for module, entry in inputs:
        segment: Segment = module.segment
        key = (type(module), tuple(segment.widths), tuple(segment.readers), entry.shape)
        if key not in timed:
            segment.ragged_limit = NEVER
            limits = segment.limits = _limits(module, segment, entry, num_layers)
            timed[key] = limits, _ragged_limit(module, segment, entry, num_layers)
        segment.limits, segment.ragged_limit = timed[key]
        for offset, limit in enumerate(segment.limits):
            sparse.limits[segment.first + offset] = limit
        sparse.ragged_limits[segment.first] = segment.ragged_limit
    masked: Any = eval_view(sparse.network)
    sparse.masked = not _is_faster(lambda: view.forward_features(x), lambda: masked.forward_features(x))
    sparse.refresh()


def _limits(module: nn.Module, segment: Segment, entry: Tensor, num_layers: int) -> list[float]:
    """One limit for all layers of a block; the layers of a VGG, too many to be alike, are tried one by one."""
    count = len(segment.widths)
    groups = [[layer] for layer in range(count)] if isinstance(module, SparseFeatures) else [list(range(count))]
    limits = [NEVER] * count
    for layers in groups:
        for fraction in FRACTIONS:
            plan = _random_plan(segment, entry, fraction, num_layers)
            trial = [fraction + 1e-6 if layer in layers else limit for layer, limit in enumerate(limits)]

            def run(choice: list[float], plan: Plan = plan) -> None:
                segment.limits = choice
                module(entry.clone(), plan)

            if not _is_faster(functools.partial(run, trial), functools.partial(run, limits)):
                break
            limits = trial
    return limits


def _ragged_limit(module: nn.Module, segment: Segment, entry: Tensor, num_layers: int) -> float:
    """The same for running ragged, timed against one group of all images."""
    if not segment.widths or not ragged.available(entry):
        return NEVER
    best = NEVER
    for fraction in FRACTIONS:
        plan = _random_plan(segment, entry, fraction, num_layers)

        def run(limit: float, plan: Plan = plan) -> None:
            segment.ragged_limit = limit
            module(entry.clone(), plan)

        if not _is_faster(functools.partial(run, fraction + 1e-6), functools.partial(run, NEVER)):
            break
        best = fraction + 1e-6
    return best


def _random_plan(segment: Segment, entry: Tensor, fraction: float, num_layers: int) -> Plan:
    gates = [torch.zeros(len(entry), 0, device=entry.device)] * num_layers
    for layer, width in enumerate(segment.widths):
        count = max(1, int(width * fraction))
        order = torch.rand(len(entry), width).argsort(1).argsort(1)
        gates[segment.first + layer] = (order < count).float().to(entry.device)
    return Plan(gates, is_ragged=ragged.available(entry))


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
