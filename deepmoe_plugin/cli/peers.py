"""Networks that compute the same, to be timed beside each other: masked, sparse, and dense ones of kept widths."""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..pruning import leave_only
from ..sparse.fold import eval_view, fold_norm
from ..stats import gate_statistics

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Largest difference from the masked network, over its largest output: a network that leaves out a part differs by far
more."""


class SyntheticGates(nn.Module):
    """Stands in for a gating network: random experts, an exact fraction of every layer, different for each image.

    Args:
        widths: experts of each gated layer.
        images: the first batch.
        kept: fraction of the gates, which round to whole ones, that each image keeps.
        experts_per_gate: neighbouring experts that share a gate.

    Attributes:
        images: the batch (B, in_chans, H, W) that all variants run on until the next `draw`.
        counts: experts that a thin network of the same cost has in each layer.
    """

    def __init__(self, widths: list[int], images: Tensor, kept: float, experts_per_gate: int = 1) -> None:
        super().__init__()
        self.widths, self.images, self.experts_per_gate = widths, images, experts_per_gate
        self.batch, self.device = len(images), images.device
        self.counts = [experts_per_gate * round(width / experts_per_gate * kept) for width in widths]
        self.current: list[Tensor] = []
        self.draw()

    def __deepcopy__(self, memo: dict[int, Any]) -> 'SyntheticGates':
        return self  # copies of the network share the gates that are drawn

    def draw(self) -> None:
        """Draw the experts that the next repetition keeps."""
        gates = []
        size = self.experts_per_gate
        for width, count in zip(self.widths, self.counts, strict=True):
            kept = torch.rand(self.batch, width // size).argsort(1).argsort(1) < count // size
            values = kept * torch.empty(self.batch, width // size).uniform_(0.5, 1.5)
            gates.append(values.repeat_interleave(size, dim=1).to(self.device))
        self.current[:] = gates

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.current)


class RealGates:
    """Batches of images whose gates the model itself computes; attributes as those of `SyntheticGates`."""

    def __init__(self, model: nn.Module, batches: list[Tensor]) -> None:
        self.batches = itertools.cycle(batches)
        self.stats = gate_statistics(model, batches)
        by_layer = zip(self.stats.widths, self.stats.by_layer().values(), strict=True)
        self.counts = [round(width * kept) for width, kept in by_layer]
        self.draw()

    def draw(self) -> None:
        """Go on to the next batch."""
        self.images = next(self.batches)


class GivenGates(nn.Module):
    """Stands in for a gating network: gates of one for some experts, of all images alike.

    Args:
        kept: indices of the kept experts of each layer.
        widths: experts of each layer.
    """

    def __init__(self, kept: Sequence[Tensor], widths: Sequence[int]) -> None:
        super().__init__()
        self.kept, self.widths = kept, widths

    def forward(self, x: Tensor) -> list[Tensor]:
        gates = [torch.zeros(len(x), width, device=x.device) for width in self.widths]
        for gate, index in zip(gates, self.kept, strict=True):
            gate[:, index.to(x.device)] = 1
        return gates


def with_gates(model: nn.Module, gating: nn.Module) -> nn.Module:
    """A gated network with the same weights, in evaluation mode, and other gates."""
    view: Any = eval_view(model)
    view.gating = gating
    return view


def random_experts(widths: Sequence[int], counts: Sequence[int], experts_per_gate: int) -> list[Tensor]:
    """Indices of `counts` experts of each layer, at least one, in whole groups as far as the count allows."""
    found = []
    for width, count in zip(widths, counts, strict=True):
        groups = torch.randperm(width // experts_per_gate)
        experts = (groups[:, None] * experts_per_gate + torch.arange(experts_per_gate)).flatten()
        found.append(experts[: max(1, count)].sort().values)
    return found


def thinned(network: nn.Module, kept: Sequence[Tensor]) -> Any:
    """A copy of a network, gated or dense, that has only the kept experts."""
    network = copy.deepcopy(network)
    leave_only(network, kept)
    return network


@torch.no_grad()
def wake(model: nn.Module) -> None:
    """Give new weights to what hides the blocks of a new network from its output.

    The last norm of a residual block starts at zero and layer scale at 1e-6: whatever a block computes, the output is
    the same.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not name.endswith('bias') and parameter.abs().max() < 0.1:
            parameter.uniform_(0.2, 0.4)


def check_same(label: str, run: Callable[[], Any], expected: Tensor) -> None:
    """Run a network and compare its output with that of the masked one.

    Raises:
        ValueError: they differ by more than rounding.
    """
    output = torch.as_tensor(run()).to(expected)
    difference = ((output - expected).abs().max() / expected.abs().max()).item()
    if not difference < TOLERANCE[expected.dtype]:
        raise ValueError(
            f'{label} does not compute what the masked network computes (they differ by {difference:.1g} of the '
            'largest output): its time would be that of another network.'
        )


def folded(model: nn.Module) -> nn.Module:
    """A copy for inference whose norms are folded into the convolutions before them."""
    model = copy.deepcopy(model).eval()
    previous = ('', None)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and isinstance(previous[1], nn.Conv2d):
            conv = previous[1]
            weight, bias = fold_norm(conv, module)
            conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
            model.set_submodule(name, nn.Identity())
        if not list(module.children()):
            previous = (name, module)
    return model
