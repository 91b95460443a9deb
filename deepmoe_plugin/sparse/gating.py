"""The gating network as a native program: no operator of torch then runs between a few images and their features."""

from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..gating import GatingNetwork
from ..gating.embedding import ShallowEmbedding
from ..gating.heads import GateHeads
from ..plain import is_plain
from ..tracing import is_traced
from . import program
from .fold import folds
from .operations import Average, Convolve, Operation, Softmax, Trace
from .program import Program
from .trace import is_convolution

TOLERANCE = 1e-6
"""Distance of `W e` from the threshold below which torch decides, relative to the largest weight of the gate and to one
plus the largest logit of the mixture, with which rounding errors grow. In random networks, both differ by a tenth
of it, and by a quarter at most."""

MAX_GATES = 2**13
"""Gates of all images together, at most: of more, some are often too close to the threshold, so that torch has to find
them all the same, and what is won is little beside what such networks or batches take."""


class NativeGating:
    """The gates that a `GatingNetwork` gives, in float32, to rounding; which experts are kept is what torch decides.

    Args:
        gating: in evaluation mode.
        trace: of it; weights are read here.
    """

    def __init__(self, gating: GatingNetwork, trace: Trace) -> None:
        self.gating = gating
        self.experts_per_gate = gating.gates.experts_per_gate
        self.program = Program(trace, [], winograd=False)  # each gate must be what torch finds
        self.threshold = np.float32(gating.gates.threshold.item())
        self.tolerances = gating.gates.weight.detach().abs().amax(1).numpy() * np.float32(TOLERANCE)

    def __call__(self, x: Tensor) -> np.ndarray | None:
        """The gates of all layers side by side, (B, N), of images (B, C, H, W); None: torch must find them.

        Raises:
            ValueError: see `GatingNetwork.forward`.
        """
        self.gating.check_images(x)
        if len(x) * len(self.tolerances) > MAX_GATES:
            return None
        logits, preact = (value.flatten(1).numpy() for value in self.program.run(x, [], ['logits', 'preact']))
        scale = 1 + np.abs(logits).max(axis=1, keepdims=True)
        if not (np.abs(preact - self.threshold) >= scale * self.tolerances).all():  # too close to tell, or no numbers
            return None
        gates = np.where(preact > self.threshold, preact, np.float32(0))
        return gates if self.experts_per_gate == 1 else gates.repeat(self.experts_per_gate, axis=1)


def suits(x: Any) -> bool:
    """Whether native code may find the gates of these images, if it runs on them at all."""
    return isinstance(x, Tensor) and x.dtype == torch.float32 and not is_traced(x)


def trace_of(gating: nn.Module) -> Trace | None:
    """What leads from the value `image` to `preact`, which is `W e`, (B, gates, 1, 1).

    None if the gating network is not as it was built, or not in float32: torch then must run it.
    """
    if not isinstance(gating, GatingNetwork) or not _is_as_built(gating):
        return None
    embedding, heads = gating.embedding, gating.gates
    operations: list[Operation] = []
    value = 'image'
    for number, layer in enumerate(embedding.layers):
        name = f'layer{number}'
        operations.append(Convolve([value], name, conv=layer.conv, norm=layer.norm, activation='relu'))
        value = name
    rows = nn.Linear(heads.weight.shape[1], len(heads.weight), bias=False, device='meta')
    rows.weight = heads.weight
    operations += [
        Average([value], 'features'),
        Convolve(['features'], 'logits', conv=embedding.mixture),
        Softmax(['logits'], 'mixture'),
        Convolve(['mixture'], 'preact', conv=rows),
    ]
    trace = Trace(operations, 'image', 'preact', {}, {}, {}, gating)
    return trace if program.fits(trace) else None


def _is_as_built(gating: GatingNetwork) -> bool:
    embedding, heads = gating.embedding, gating.gates
    kinds = [(gating, GatingNetwork), (embedding, ShallowEmbedding), (heads, GateHeads)]
    if not all(_is_own(module, kind) for module, kind in kinds) or not is_plain(embedding.layers, nn.Sequential):
        return False
    tensors = [*embedding.parameters(), heads.weight, heads.threshold]
    return (
        all(
            is_plain(layer, nn.Sequential) and [*layer._modules] == ['conv', 'norm', 'act']
            for layer in embedding.layers
        )
        and all(is_convolution(layer.conv) and folds(layer.norm) for layer in embedding.layers)
        and all(is_plain(layer.act, nn.ReLU) for layer in embedding.layers)
        and is_plain(embedding.mixture, nn.Linear)
        and all(tensor.dtype == torch.float32 and tensor.device.type == 'cpu' for tensor in tensors)
        and bool(heads.weight.isfinite().all())
    )


def _is_own(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module is of this class, which is ours, with all of its methods."""
    replaced = any(isinstance(getattr(kind, name, None), FunctionType) for name in module.__dict__)
    return type(module) is kind and is_plain(module, kind) and not replaced
