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

TOLERANCE = 1e-5
"""Distance of `W e` from the threshold, relative to the largest weight of the gate, below which torch decides. It is five
times what both differ by where they differ most, which is where an image is nearly of one latent expert only."""


class NativeGating:
    """The gates that a `GatingNetwork` gives, in float32, to rounding; which experts are kept is what torch decides.

    Args:
        gating: one of which `has_native_form` holds, in evaluation mode; its weights are read here.
    """

    def __init__(self, gating: GatingNetwork) -> None:
        self.gating = gating
        self.experts_per_gate = gating.gates.experts_per_gate
        self.program = Program(Trace(operations_of(gating), 'image', 'preact', {}, {}, {}, gating), [])
        self.threshold = np.float32(gating.gates.threshold.item())
        self.tolerances = gating.gates.weight.detach().abs().amax(1).numpy() * np.float32(TOLERANCE)

    def __call__(self, x: Tensor) -> np.ndarray | None:
        """The gates of all layers side by side, (B, N), of images (B, C, H, W); None: torch must find them.

        Raises:
            ValueError: see `GatingNetwork.forward`.
        """
        self.gating.check_images(x)
        preact = self.program.run(x, [], ['preact'])[0].flatten(1).numpy()
        above = preact - self.threshold
        if not (np.abs(above) >= self.tolerances).all():  # too close to tell, or no numbers
            return None
        gates = np.where(above > 0, preact, np.float32(0))
        return gates if self.experts_per_gate == 1 else gates.repeat(self.experts_per_gate, axis=1)


def has_native_form(gating: Any) -> bool:
    """Whether a gating network is as it was built, in float32, so that native code may compute in its place."""
    if not _is_own(gating, GatingNetwork):
        return False
    embedding, heads = gating.embedding, gating.gates
    if not (_is_own(embedding, ShallowEmbedding) and _is_own(heads, GateHeads)):
        return False
    layers: Any = list(embedding.layers) if is_plain(embedding.layers, nn.Sequential) else []
    tensors = [*embedding.parameters(), heads.weight, heads.threshold]
    return (
        bool(layers)
        and all(is_plain(layer, nn.Sequential) and list(layer._modules) == ['conv', 'norm', 'act'] for layer in layers)
        and all(is_convolution(part.conv) and folds(part.norm) and is_plain(part.act, nn.ReLU) for part in layers)
        and is_plain(embedding.mixture, nn.Linear)
        and all(tensor.dtype == torch.float32 and tensor.device.type == 'cpu' for tensor in tensors)
        and bool(heads.weight.isfinite().all())
    )


def suits(x: Any) -> bool:
    """Whether these images are of the kind that native code finds gates for."""
    return isinstance(x, Tensor) and x.dtype == torch.float32 and program.available(x) and not is_traced(x)


def operations_of(gating: GatingNetwork) -> list[Operation]:
    """What leads from the value `image` to `preact`, which is `W e`, (B, gates, 1, 1)."""
    embedding, heads = gating.embedding, gating.gates
    operations: list[Operation] = []
    value = 'image'
    for number, layer in enumerate(embedding.layers):
        name = f'layer{number}'
        operations.append(Convolve([value], name, conv=layer.conv, norm=layer.norm, activation='relu'))
        value = name
    rows = nn.Linear(heads.weight.shape[1], len(heads.weight), bias=False, device='meta')
    rows.weight = heads.weight
    return [
        *operations,
        Average([value], 'features'),
        Convolve(['features'], 'logits', conv=embedding.mixture),
        Softmax(['logits'], 'mixture'),
        Convolve(['mixture'], 'preact', conv=rows),
    ]


def _is_own(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module is of this class, which is ours, with all of its methods."""
    replaced = any(isinstance(getattr(kind, name, None), FunctionType) for name in module.__dict__)
    return type(module) is kind and is_plain(module, kind) and not replaced
