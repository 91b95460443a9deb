"""The balancing constraint of stacked mixtures of experts (Eigen, Ranzato, Sutskever 2013)."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from .arguments import check_weight
from .tracing import at_least_float32

# Totals are whole numbers of 2**-24 examples: no cast of the model rounds them, and sums do not depend on their order.
UNITS_PER_EXAMPLE = 2**24


class BalancedSoftmax(nn.Module):
    """Softmax over experts that, in training, closes the gates of experts that are ahead of the others.

    The total of an expert is the sum of its gates over all training examples so far. Example by example, with the gate
    of the example counted in: where a total exceeds the mean of all totals by more than `margin`, the gate is zero, and
    the gates that are left are scaled to sum to one. The totals then grow by the gates that result. The paper does not
    say whether they grow by the gates before or after the constraint; after is our choice, since an expert that is
    closed then falls back, and opens again. In evaluation mode, and without a margin, this is the plain softmax.

    Under DDP all processes share one count: the examples of a process follow those of the process before it, so that
    several processes compute what one computes on the joined batch.

    Args:
        num_experts: experts to choose from.
        margin: in examples, at least 0; None switches the constraint off (phase 2) and leaves the totals as they are.

    Raises:
        ValueError: `margin` is negative or no finite number.
    """

    def __init__(self, num_experts: int, margin: float | None, device: torch.device | str | None = None) -> None:
        super().__init__()
        if margin is not None:
            check_weight('balance_margin', margin)
        self.margin = margin
        self.units: Tensor
        self.register_buffer('units', torch.zeros(num_experts, dtype=torch.long, device=device))

    @property
    def totals(self) -> Tensor:
        """Sum of the gates of each expert over the training examples so far, shape (experts,), float64."""
        return self.units.double() / UNITS_PER_EXAMPLE

    def forward(self, logits: Tensor) -> Tensor:
        """Map logits (B, experts) to gates (B, experts) that sum to one, at least in float32."""
        dtype = at_least_float32(logits)
        if self.training and self.margin is not None:
            closed = self._count(logits.detach(), self.margin)
            logits = logits.masked_fill(closed, -math.inf)
        return logits.softmax(1, dtype=dtype)

    @torch.compiler.disable
    def _count(self, logits: Tensor, margin: float) -> Tensor:
        """Add the examples of all processes to the totals; return which gates of this one are closed, (B, experts)."""
        everyone, first = _gather(logits.double())
        closed, growth = closed_gates(everyone.cpu().numpy(), self.units.cpu().numpy(), margin)
        self.units += torch.from_numpy(growth).to(self.units.device)
        return torch.from_numpy(closed[first : first + len(logits)]).to(logits.device)


def closed_gates(logits: np.ndarray, units: np.ndarray, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Which gates the constraint closes, for all examples of a batch at once.

    Which gates an example closes decides what the totals of the next one are. All examples are looked at together, with
    the gates of the last look as the guess of what was closed before them: after k looks the first k examples are
    right, whatever the guess, so a look that changes nothing has found what going example by example finds. There may
    be many looks, each at few numbers: NumPy on the host needs a fraction of PyTorch's time for them.

    Args:
        logits: shape (B, experts), float64.
        units: totals before the batch, shape (experts,), whole numbers of 1 / UNITS_PER_EXAMPLE.
        margin: in examples.

    Returns:
        Boolean, shape (B, experts), at least one gate of each example open; and what the totals grow by, (experts,).
    """
    logits = np.nan_to_num(logits)
    # However far ahead an expert is, the others keep a weight that can be divided by, for the case that it is closed.
    weights = np.exp(np.maximum(logits - logits.max(1, keepdims=True), -600))
    # Only how far totals are apart matters; their differences are small enough to be exact in float64.
    start = (units - units.min()).astype(np.float64)
    limit = round(margin * UNITS_PER_EXAMPLE) * len(units)
    own = start + _units(weights)
    closed = np.zeros(logits.shape, dtype=bool)
    for _ in range(len(logits) + 1):
        counted = _units(np.where(closed, 0, weights))
        totals = own - counted + counted.cumsum(0)
        found = len(units) * totals - totals.sum(1, keepdims=True) > limit
        if np.array_equal(found, closed):
            break
        closed = found
    return closed, counted.sum(0).astype(np.int64)


def _units(weights: np.ndarray) -> np.ndarray:
    """Gates in units, of weights (B, experts) that are to be scaled to sum to one."""
    return np.rint(weights * (UNITS_PER_EXAMPLE / weights.sum(1, keepdims=True)))


def _gather(logits: Tensor) -> tuple[Tensor, int]:
    """The logits of all processes, in the order of their ranks, and where those of this one begin."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return logits, 0
    size = torch.tensor([len(logits)], device=logits.device)
    sizes = [torch.empty_like(size) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, size)
    lengths = [int(other) for other in sizes]
    padded = logits.new_zeros(max(lengths), logits.shape[1])
    padded[: len(logits)] = logits
    parts = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(parts, padded)
    joined = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
    return joined, sum(lengths[: distributed.get_rank()])
