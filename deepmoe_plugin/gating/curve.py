"""The budget curve: what images spend at each threshold, so that a checkpoint knows all of its budgets (ours)."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Unit = Literal['macs', 'kept']
POINTS = 65


class BudgetCurve(nn.Module):
    """Thresholds and what the average of some images spends at each: part of the state dict.

    It is all zeros until it is measured, and again once the gates have trained. The fractions fall as the threshold
    rises, in steps of at most 1/64 of the experts kept at threshold zero.
    """

    points: Tensor

    def __init__(self, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        # Columns: threshold, fraction of the MACs, fraction of experts kept; thresholds ascend.
        self.register_buffer('points', torch.zeros(POINTS, 3, device=device, dtype=dtype))

    @torch.no_grad()
    def measure(self, preact: Tensor, spent: Callable[[Tensor], Tensor]) -> None:
        """Measure the curve on some images.

        Args:
            preact: `W e` of the images, (B, N).
            spent: fraction of the MACs that each image spends (B,), of kept experts (B, N).
        """
        ordered = preact[preact > 0].sort().values
        places = torch.linspace(0, max(len(ordered) - 1, 0), POINTS - 1, dtype=torch.float64).round().long()
        thresholds = ordered[places.to(ordered.device)] if len(ordered) else preact.new_zeros(POINTS - 1)
        rows = []
        for threshold in torch.cat([thresholds.new_zeros(1), thresholds]):
            kept = preact > threshold
            rows.append(torch.stack([threshold.double(), spent(kept).mean(), kept.double().mean()]))
        self.points.copy_(torch.stack(rows).to(self.points.dtype))

    def forget(self) -> None:
        """Mark the curve as not measured."""
        self.points.zero_()

    @property
    def is_measured(self) -> bool:
        return bool(self.points.any())

    def find(self, unit: Unit, goal: float) -> tuple[Tensor, float]:
        """The threshold at which the images spend `goal`, and what they spend there.

        What they spend is `goal`, or the end of the curve that is nearest to it.
        """
        thresholds, *fractions = self.points.double().unbind(1)
        spends = fractions[0 if unit == 'macs' else 1].flip(0).contiguous()  # ascending
        clipped = spends.new_tensor(goal).clamp(spends[0], spends[-1])
        above = torch.searchsorted(spends, clipped).clamp(1, len(spends) - 1)
        low, high = spends[above - 1], spends[above]
        part = ((clipped - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        descending = thresholds.flip(0)
        return torch.lerp(descending[above - 1], descending[above], part), clipped.item()
