"""The gate heads: from latent mixture weights to `W e`, and from `W e` to the gates."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tracing import is_symbolic

_instances: 'WeakSet[GateHeads]' = WeakSet()


def is_gate_matrix() -> Callable[[Tensor], bool]:
    """A test whether a parameter is the matrix of some gate heads, whatever optimizer or wrapper holds it."""
    matrices = {id(heads.weight) for heads in _instances}
    return lambda parameter: id(parameter) in matrices


class GateHeads(nn.Module):
    """One linear gate head for each gated layer, all in the rows of one matrix, so that all gates cost one product.

    `weight` has shape (gates, K): the rows of gated layer l follow those of layer l - 1. Rows start at random around
    one, with a mean of exactly one. The embedding starts at the even mixture, 1/K for every image, so that all gates
    are one and the network is its dense base. The rows differ so that the gates of experts differ as soon as the
    mixtures of images do: from equal rows, the L1 norm closes all gates at once, and no gradient reaches the embedding.

    Args:
        widths: experts of each gated layer, in the order in which the network runs them.
        experts_per_gate: neighbouring experts that share a gate; divides every width. Only this class maps gates to
            experts: `W e` has a column for each expert, and those of experts that share a gate are equal.
    """

    threshold: Tensor

    def __init__(
        self,
        widths: Sequence[int],
        num_latent_experts: int,
        experts_per_gate: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.widths: list[int] = [int(width) for width in widths]
        self.experts_per_gate = experts_per_gate
        num_gates = sum(self.widths) // experts_per_gate
        # Steps of 1/64, in pairs of opposite sign, add up to zero without rounding, in bfloat16 too.
        spread = torch.randn(num_gates, num_latent_experts // 2, device=device, dtype=torch.float32)
        spread = (spread / 2).clamp(-1, 1).mul(64).round() / 64
        spread = torch.cat([spread, -spread, spread.new_zeros(len(spread), num_latent_experts % 2)], dim=1)
        spread = spread.gather(1, torch.rand_like(spread).argsort(dim=1))
        self.weight = nn.Parameter((1 + spread).to(dtype or torch.get_default_dtype()))
        self.register_buffer('threshold', torch.zeros((), device=device, dtype=self.weight.dtype))
        _instances.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _instances.add(self)

    def forward(self, mixture: Tensor) -> Tensor:
        """Map mixture weights (B, K) to `W e`, shape (B, N), at least in float32, under autocast too."""
        weight = self.weight.to(mixture.dtype)
        if is_symbolic(mixture) or not torch.amp.is_autocast_available(mixture.device.type):
            return self.by_expert(F.linear(mixture, weight))
        with torch.autocast(mixture.device.type, enabled=False):
            return self.by_expert(F.linear(mixture, weight))

    def by_expert(self, values: Tensor) -> Tensor:
        """Map one value for each gate, (..., gates), to one for each expert, (..., N)."""
        if self.experts_per_gate == 1:
            return values
        return values.repeat_interleave(self.experts_per_gate, dim=-1)

    def by_gate(self, values: Tensor) -> Tensor:
        """Map one value for each expert, (..., N), to their mean for each gate, (..., gates)."""
        return values.unflatten(-1, (-1, self.experts_per_gate)).mean(-1)

    def cut(self, preact: Tensor, straight_through: bool = False, threshold: Tensor | None = None) -> Tensor:
        """Map `W e` to gates, both (B, N): zero where the expert is closed.

        Args:
            straight_through: a closed gate has the gradient of a kept one (ours), so that what an expert would do for
                an image decides whether it opens again. By default it has none, as under a ReLU.
            threshold: in place of the heads' own.
        """
        kept = preact > (self.threshold if threshold is None else threshold)
        if straight_through:
            return preact - torch.where(kept, 0, preact).detach()
        return torch.where(kept, preact, 0)

    def split(self, packed: Tensor) -> list[Tensor]:
        """Cut (B, N) into one (B, C_l) for each gated layer."""
        parts = packed.split(self.widths, dim=1)
        return [parts[i] for i in range(len(self.widths))]  # torch.fx knows only the number of items, not the items

    def keep_first(self, num_layers: int) -> None:
        """Drop the heads of all gated layers but the first `num_layers`; without any, `weight` is no parameter."""
        self.widths = self.widths[:num_layers]
        weight = self.weight.detach()[: sum(self.widths) // self.experts_per_gate].clone()
        if self.widths:
            self.weight = nn.Parameter(weight, self.weight.requires_grad)
        else:
            del self.weight
            self.register_buffer('weight', weight)
