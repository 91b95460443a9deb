"""The norm curve: norm statistics of the base network at some thresholds, for a checkpoint with many budgets (ours)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class NormCurve(nn.Module):
    """Running statistics of the batch norms at some thresholds of the gates: part of the state dict once measured.

    Between two thresholds the statistics are interpolated. They go with the weights that they were measured with: as
    soon as a norm has seen another training batch, the curve counts no more.
    """

    thresholds: Tensor | None
    statistics: Tensor | None
    batches: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('thresholds', None)  # (P,), ascending
        self.register_buffer('statistics', None)  # (P, 2, C): means and variances of all norms side by side
        self.register_buffer('batches', None)  # that each norm had seen, (norms,)

    def measure(self, norms: Sequence[_BatchNorm], points: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keep what was measured.

        Args:
            norms: batch norms with running statistics.
            points: threshold, and `read_norms` at it, of each budget.
        """
        thresholds = torch.stack([threshold for threshold, _ in points])
        order = thresholds.argsort()
        self.thresholds = thresholds[order]
        self.statistics = torch.stack([statistics for _, statistics in points])[order]
        self.batches = _batches_of(norms)

    def forget(self) -> None:
        """Mark the curve as not measured."""
        self.thresholds = self.statistics = self.batches = None

    @property
    def is_measured(self) -> bool:
        return self.thresholds is not None

    def make_room(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Take the shapes of a state dict; from one without a norm curve it gets none."""
        for name in ('thresholds', 'statistics', 'batches'):
            loaded = state_dict.get(prefix + name)
            setattr(self, name, None if loaded is None else torch.empty_like(loaded))

    def apply_to(self, norms: Sequence[_BatchNorm], threshold: Tensor) -> None:
        """Give the norms the statistics of a threshold, that of the nearest end outside of those measured.

        Nothing happens where the curve is of other norms, or of earlier weights.
        """
        self.to(threshold.device)  # a checkpoint is loaded to the host
        assert self.thresholds is not None
        assert self.statistics is not None
        assert self.batches is not None
        if not torch.equal(_batches_of(norms).to(self.batches), self.batches):
            return
        last = len(self.thresholds) - 1
        above = torch.searchsorted(self.thresholds, threshold.to(self.thresholds)).clamp(min(1, last), last)
        below = (above - 1).clamp(min=0)
        low, high = self.thresholds[below], self.thresholds[above]
        part = ((threshold - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        statistics = torch.lerp(self.statistics[below], self.statistics[above], part.to(self.statistics))
        start = 0
        for norm in norms:
            mean, variance = statistics[:, start : start + norm.num_features]
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            start += norm.num_features


def read_norms(norms: Sequence[_BatchNorm]) -> Tensor:
    """Means and variances of norms side by side, shape (2, C)."""
    rows = [[getattr(norm, name).detach() for norm in norms] for name in ('running_mean', 'running_var')]
    return torch.stack([torch.cat(row) if row else torch.zeros(0) for row in rows])


def _batches_of(norms: Sequence[_BatchNorm]) -> Tensor:
    return torch.tensor([int(norm.num_batches_tracked or 0) for norm in norms])
