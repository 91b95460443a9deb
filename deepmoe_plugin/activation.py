"""The one place where a gate touches an activation map (Eq. 3-5 of the paper)."""

from typing import Any, TypeVar

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from .plain import is_plain
from .tracing import is_traced

Gates = TypeVar('Gates')


class _Gate(torch.autograd.Function):
    """`y = relu(x) * gate` in place (or `x * gate`), keeping only `y` (which the next convolution keeps anyway).

    The ungated activation that the gradient of the gate needs is `y / gate`. Where the gate is closed that is
    undefined, but there the ReLU that produced the gate stops the gradient, so zero is exact.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, relu: bool, channels_last: bool) -> Tensor:
        scale = spread(gate.to(x.dtype), channels_last)
        if relu:
            y = x.relu_().mul_(scale)
            ctx.mark_dirty(x)
        else:  # other activations may need their output in their own backward pass
            y = x * scale
        ctx.save_for_backward(y, gate)
        ctx.relu, ctx.channels_last = relu, channels_last
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        y, gate = ctx.saved_tensors
        scale = spread(gate.to(grad.dtype), ctx.channels_last)
        product = grad * y
        is_kept = gate > 0
        positions = (1, 2) if ctx.channels_last else (2, 3)
        grad_gate = product.sum(positions, dtype=gate.dtype) / torch.where(is_kept, gate, 1)
        grad_gate = torch.where(is_kept, grad_gate, 0)
        # Nobody reads the product any more: the gradient of x reuses its memory, unless this pass is itself recorded.
        buffer = None if torch.is_grad_enabled() or is_traced(grad) else product
        grad_x = torch.mul(grad, scale, out=buffer)
        if ctx.relu:
            if buffer is None:
                grad_x = torch.ops.aten.threshold_backward(grad_x, y, 0)
            else:
                torch.ops.aten.threshold_backward.grad_input(grad_x, y, 0, grad_input=grad_x)
        return grad_x, grad_gate, None, None


@register_notrace_module
class GatedActivation(nn.Module):
    """Activation followed by the gate of its layer; a closed gate leaves an exactly zero channel.

    Holds no parameters, so a base network keeps its state-dict keys when its activations are wrapped.
    Training memory equals that of the ungated activation: see `_Gate`. Tracers, compilers and function transforms
    get the plain formula instead, and decide themselves what to keep.

    Args:
        act: the base network's activation; ReLU takes the fastest path, any other works.
        channels_last: maps have the shape (B, H, W, C), as between linear layers, and not (B, C, H, W).
    """

    def __init__(self, act: nn.Module, channels_last: bool = False) -> None:
        super().__init__()
        self.act = act
        self.channels_last = channels_last

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Map a map `x` and gates `(B, C)` to the gated map; overwrites `x`."""
        gate = given(gate)
        if is_traced(x):
            return self.act(x) * spread(gate.to(x.dtype), self.channels_last)
        width = x.shape[-1 if self.channels_last else 1]
        if gate.shape[1] != width:
            raise ValueError(
                f'A gated activation got {width} channels and {gate.shape[1]} gates: something else has changed '
                'the width of a gated layer. deepmoe_plugin.prune removes experts with their gates.'
            )
        if is_plain(self.act, nn.ReLU):
            return _Gate.apply(x, gate, True, self.channels_last)
        return _Gate.apply(self.act(x), gate, False, self.channels_last)


def spread(gate: Tensor, channels_last: bool) -> Tensor:
    """Gates (B, C) as they multiply maps (B, H, W, C) with `channels_last`, or (B, C, H, W)."""
    return gate[:, None, None] if channels_last else gate[:, :, None, None]


def given(gates: Gates | None) -> Gates:
    """The gate or gates that a gated part of a network was called with.

    Raises:
        ValueError: it was called without gates, as code does that calls the children of a network one by one.
    """
    if gates is None:
        raise ValueError(
            'A gated part of this network was called without gates, as happens where its parts are called one by one. '
            'For features use timm.create_model(name, features_only=True) without feature_cls, or '
            'forward_intermediates.'
        )
    return gates
