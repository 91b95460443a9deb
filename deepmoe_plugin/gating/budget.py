"""The budget: a controller of lambda that leads the average cost of an image to a target."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import GatingConfig


def default_weight(config: GatingConfig, widths: Sequence[int]) -> float:
    """lambda where none is given.

    One step of SGD at learning rate r and momentum 0.9 moves a gate by about 10 r lambda / (N K): its share in the
    mean over N gates is 1/N, and the squares of K even mixture weights sum to 1/K.
    """
    if not config.has_target:
        return 1.0
    return config.num_latent_experts / 300 * (1 if config.gate_norm == 'sum' else sum(widths))


class GateBudget(nn.Module):
    """Steers lambda so that the average cost (kept experts or MACs) settles at a target.

    The cost does not change before the first gate reaches zero, and then most gates follow at once. So lambda follows
    the distance that gates still have to go: the threshold t at which the experts with a gate above t would cost just
    the target. Gates move at a speed proportional to lambda. With lambda proportional to t, they slow down on their
    way to the target. Below the target, t and lambda are negative, and the loss raises the gates above t, closed ones
    included. The factor, `strength`, finds its own scale: it grows while the running average of the error in cost is
    outside the tolerance, and shrinks each time that average changes sign after it has been outside. The state is
    saved with the model.

    Args:
        target: fraction to settle at.
        strength: the factor to start with.
    """

    growth = 0.01
    shrink = 0.7
    tolerance = 0.01
    momentum = 0.95
    bisections = 12
    sample = 16  # images that the threshold is found on

    def __init__(self, target: float, strength: float, device: Any = None) -> None:
        super().__init__()
        self.target = target
        self.strength: Tensor
        self.error: Tensor
        self.peak: Tensor
        self.register_buffer('strength', torch.tensor(float(strength), device=device))
        self.register_buffer('error', torch.tensor(0.0, device=device))
        self.register_buffer('peak', torch.tensor(0.0, device=device))

    @torch.no_grad()
    def step(self, preact: Tensor, cost: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Look at one batch.

        Args:
            preact: gates before their ReLU, shape (B, N).
            cost: maps the experts that images keep (B, N, boolean) to the fraction that each image spends (B,).

        Returns:
            lambda, a scalar, signed, and the threshold t, -inf where no gate is near enough to spend the target.
        """
        error = (_average(cost(preact > 0)) - self.target).to(self.strength.dtype)
        average = torch.lerp(error, self.error, self.momentum)
        crossed = average * self.error < 0
        overshot = crossed & (self.peak > 2 * self.tolerance)
        self.strength.mul_(torch.where(overshot, self.shrink, 1.0))
        self.strength.mul_(torch.where(average.abs() > self.tolerance, 1 + self.growth, 1.0))
        self.peak.copy_(torch.where(crossed, average.abs(), torch.maximum(self.peak, average.abs())))
        self.error.copy_(average)
        distance = self._distance(preact[: self.sample], cost)
        return self.strength * distance, torch.where(distance < -0.99, -torch.inf, distance)

    def _distance(self, preact: Tensor, cost: Callable[[Tensor], Tensor]) -> Tensor:
        """The threshold at which the target is spent, at most 1 either way; found without leaving the device."""
        low, high = self.strength.new_tensor([-1.0, 1.0])
        for _ in range(self.bisections):
            middle = (low + high) / 2
            too_much = _average(cost(preact > middle)) > self.target
            low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
        return (low + high) / 2


def _average(values: Tensor) -> Tensor:
    """Mean over a batch, that of all processes."""
    mean = values.mean()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(mean)
        mean = mean / torch.distributed.get_world_size()
    return mean
