"""The budget: a controller of the threshold that leads the average cost of an image to a target."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .heads import GateHeads

Cost = Callable[[Tensor], Tensor]
"""Maps the experts that images keep (B, N), boolean, to the fraction that each image spends (B,)."""

BISECTIONS = 16
GOLDEN = 0.6180339887498949
"""Multiples of it, less their whole part, fill (0, 1) evenly: a draw that a resumed run repeats, in every process."""


class GateBudget(nn.Module):
    """Raises the threshold of the gates until the average image spends the target, and holds it there (ours).

    The budget falls from everything to the target along a cubic curve, steep at first and flat at the end: the least
    useful experts close first, one after the other, and the network learns to do without them meanwhile. The paper's
    L1 norm moves all gates at once, and at the end of its way they close at once.

    Of a range of targets, training draws another one for each step, so that one network learns all of them (after Yu et
    al., *Slimmable neural networks*, 2019). The threshold of evaluation is that of the smallest.

    Args:
        target: fraction of the cost to settle at, or the smallest and the largest of a range.
        steps: training steps until the budget has fallen to the target.
    """

    momentum = 0.9
    sample = 32  # images of a batch that the threshold is found on
    step_count: Tensor
    drawn: Tensor | None  # threshold of the next training step, where there is a range

    def __init__(self, target: float | Sequence[float], steps: int, device: Any = None) -> None:
        super().__init__()
        self.target, self.largest = (target, target) if isinstance(target, float | int) else target
        self.steps = steps
        self.register_buffer('step_count', torch.zeros((), dtype=torch.long, device=device))
        has_range = self.largest > self.target
        self.register_buffer('drawn', torch.zeros((), device=device) if has_range else None)

    @torch.no_grad()
    def step(self, gates: GateHeads, preact: Tensor, cost: Cost) -> None:
        """Look at one batch and move the threshold for the next.

        Args:
            gates: the heads, whose threshold moves.
            preact: `W e` of the batch, (B, N).
            cost: of kept experts (kept experts or MACs).
        """
        self.step_count += 1
        found = find_threshold(preact[: self.sample], cost, self._goal(self.target)).to(gates.threshold.dtype)
        if self.drawn is not None:
            target = self.draw(self.step_count.double())
            self.drawn.copy_(find_threshold(preact[: self.sample], cost, self._goal(target)))
        is_first = self.step_count == 1
        gates.threshold.copy_(torch.where(is_first, found, torch.lerp(found, gates.threshold, self.momentum)))

    def draw(self, step: Any) -> Any:
        """The target of a training step: a number in the range."""
        return self.target + (self.largest - self.target) * (step * GOLDEN % 1)

    def _goal(self, target: Any) -> Tensor:
        """The budget on its way to the target."""
        left = (1 - self.step_count.double() / max(1, self.steps)).clamp(min=0)
        return target + (1 - target) * left**3


@torch.no_grad()
def find_threshold(preact: Tensor, cost: Cost, goal: Tensor | float) -> Tensor:
    """The threshold at which images spend `goal` on average over all processes; found without leaving the device.

    Args:
        preact: `W e` of the images, (B, N).
        cost: of kept experts.
        goal: fraction of the cost.

    Returns:
        A scalar, at least zero: gates that are closed at zero cannot open.
    """
    low = preact.new_zeros(())
    high = preact.max().clamp(min=0) + 1e-6
    if _is_distributed():
        torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        too_much = _average(cost(preact > middle)) > goal
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    # Where gates are equal, as in a new network, no threshold spends the goal: the lower side keeps them all.
    return torch.where(_average(cost(preact > 0)) > goal, low, 0)


def _average(values: Tensor) -> Tensor:
    """Mean over a batch, that of all processes."""
    mean = values.mean()
    if _is_distributed():
        torch.distributed.all_reduce(mean)
        mean = mean / torch.distributed.get_world_size()
    return mean


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
