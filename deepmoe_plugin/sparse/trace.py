"""From a network to the operations that sparse execution runs: a trace, in which what belongs together is fused.

The trace is torch.fx's of the network's own `forward_features`; where gates sit is what the trace shows, so that a new
family of networks needs nothing here. A convolution takes up its norm, its ReLU, its gate and the residual sum behind
it. What has no operation of its own stays a `Call` and runs as it is.
"""

import dataclasses
import operator
from typing import Any

import torch
from timm.layers import GELU, BlurPool2d, DropBlock2d, DropPath, LayerNorm, LayerNorm2d
from torch import Tensor, fx, nn

from ..activation import GatedActivation
from ..models.deepmoe_convnext import GatedResponseNorm
from ..plain import is_plain
from .fold import eval_view, fold_norm, folds
from .operations import (
    Attribute,
    Call,
    ChannelsLast,
    Convolve,
    Depthwise,
    Norms,
    Operation,
    Pool,
    Respond,
    Scale,
    Trace,
)

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
"""Permutations to (B, H, W, C), and back."""
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d, DropBlock2d, DropPath)
"""What does nothing in evaluation mode."""
ELEMENTWISE = (nn.SiLU, nn.GELU, nn.ELU, nn.LeakyReLU, nn.ReLU6, nn.Hardswish, nn.Mish, nn.Softplus, nn.Tanh)
"""What maps every number by itself."""
CHANNELWISE = (nn.AvgPool2d, nn.MaxPool2d, BlurPool2d)
"""What maps every channel by itself, and zeros to zeros."""


class _Gates(nn.Module):
    """Stands in for the gating network while the network is traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class _Tracer(fx.Tracer):
    """Looks into modules only as far as gates sit inside."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        has_gates = any(isinstance(part, GatedActivation) for part in module.modules())
        return not isinstance(module, nn.Sequential) and (not has_gates or isinstance(module, GatedActivation))


def trace(network: Any) -> Trace:
    """Trace the `forward_features` of a gated network.

    Raises:
        ValueError: a norm under a gate cannot be folded.
    """
    for layer in network.expert_layers:
        conv = network.get_submodule(layer.conv)
        if layer.norm:
            fold_norm(conv, network.get_submodule(layer.norm))
    view: Any = eval_view(network)
    view.gating = _Gates()
    view.grad_checkpointing = False
    tracer = _Tracer()
    tracer.traced_func_name = 'forward_features'
    return _Lowering(view, tracer.trace(view)).lower()


class _Lowering:
    """One walk over a trace.

    A convolution is held back, `pending`, until nothing more can be fused into it. All maps are (B, C, H, W) in the
    operations: what the network does on channels-last maps is taken for what it is on those.
    """

    def __init__(self, view: Any, graph: fx.Graph) -> None:
        self.view, self.nodes = view, list(graph.nodes)
        self.operations: list[Operation] = []
        self.pending: dict[str, Convolve] = {}
        self.names: dict[fx.Node, str] = {}  # the value of each node
        self.layers: dict[str, int | None] = {}
        self.gates: dict[str, int] = {}
        self.gating: fx.Node | None = None
        self.channels_last: set[Any] = set()  # nodes (B, H, W, C), whose values are (B, C, H, W) all the same
        self.late_norms = {layer.late_norm for layer in view.expert_layers}
        self.taps = self._taps()
        self.tapped = set(self.taps.values())

    def lower(self) -> Trace:
        image = next(node.name for node in self.nodes if node.op == 'placeholder')
        result = ''
        for node in self.nodes:
            self.names[node] = node.name
            if node.op == 'output':
                result = self._value(node.args[0])
            elif node.op != 'placeholder' and not self._is_gate(node):
                self._lower(node)
        taps = {module: self._value(node) for module, node in self.taps.items()}
        return Trace(self.operations, image, result, taps, self.names, self.gates, self.view)

    def _taps(self) -> dict[str, fx.Node]:
        """The last node of each module whose output is a feature."""
        wanted = {info['module'] for info in self.view.feature_info}
        found: dict[str, fx.Node] = {}
        for node in self.nodes:
            for path in node.meta.get('nn_module_stack') or {}:
                if path in wanted and 'getitem' not in node.name:
                    found[path] = node
        return found

    def _is_gate(self, node: fx.Node) -> bool:
        if node.op == 'call_module' and node.target == 'gating':
            self.gating = node
        elif node.op == 'call_function' and node.target is operator.getitem and node.args[0] is self.gating:
            self.gates[node.name] = node.args[1]  # type: ignore[assignment]
        else:
            return False
        return True

    def _value(self, node: Any) -> str:
        """The value of a node, there from here on."""
        name = self.names[node]
        if name in self.pending:
            self._emit(self.pending.pop(name))
        return name

    def _emit(self, operation: Operation) -> None:
        self.operations.append(operation)
        self.layers[operation.output] = operation.layer

    def _fusible(self, node: Any) -> Convolve | None:
        """The convolution that a node ends with, if nobody else reads the node."""
        if not isinstance(node, fx.Node) or len(node.users) > 1 or node in self.tapped:
            return None
        return self.pending.get(self.names[node])

    def _extend(self, node: fx.Node, conv: Convolve, **changes: Any) -> None:
        """Let a pending convolution end with this node."""
        del self.pending[conv.output]
        self.pending[node.name] = dataclasses.replace(conv, output=node.name, **changes)

    def _alias(self, node: fx.Node, first: Any, conv: Convolve | None) -> None:
        """Let a node stand for the value of its input."""
        if node in self.tapped or len(node.users) > 1 or conv is None:
            self.names[node] = self._value(first)
        else:
            self._extend(node, conv)

    def _lower(self, node: fx.Node) -> None:
        module: Any = self.view.get_submodule(node.target) if node.op == 'call_module' else None
        first: Any = node.args[0] if node.args else None
        conv = self._fusible(first)
        last = first in self.channels_last
        moved = _moved(node)
        if moved == (TO_FIRST if last else TO_LAST):
            self._alias(node, first, conv)
            if not last:
                self.channels_last.add(node)
            return
        if last:
            self._lower_channels_last(node, module, first, conv)
        elif is_plain(module, *NOTHING):
            self._alias(node, first, conv)
        elif is_convolution(module):
            self.pending[node.name] = Convolve([self._value(first)], node.name, conv=module)
        elif _is_depthwise(module) and self.layers.get(self._value(first)) is None:
            self._emit(Depthwise([self._value(first)], node.name, conv=module))
        elif is_layer_norm(module, LayerNorm2d):
            self._layer_norm(node, module, first)
        elif module is not None and conv is not None and conv.norm is None and _is_norm(module, conv):
            self._extend(node, conv, norm=module)
        elif is_plain(module, GatedResponseNorm):
            self._response_norm(node, module, first)
        elif is_plain(module, GatedActivation):
            assert isinstance(module, GatedActivation)
            self._gate(node, module, conv)
        elif is_plain(module, nn.ReLU) and conv is not None and not conv.activation:
            self._extend(node, conv, activation='relu')
        elif conv is not None and (factors := self._factors(node)) is not None and _takes_factors(conv):
            self._extend(node, conv, factors=factors)
        elif node.op == 'call_function' and node.target in (operator.add, operator.iadd, torch.add):
            self._add(node)
        elif is_plain(module, nn.MaxPool2d) and not module.ceil_mode and not module.return_indices:
            window = tuple(map(_pair, (module.kernel_size, module.padding, module.stride, module.dilation)))
            value = self._value(first)
            self._emit(Pool([value], node.name, self.layers.get(value), window=window))
        elif module is not None and hasattr(module, 'extra_channels') and self.layers.get(self._value(first)) is None:
            window = ((1, 1), (0, 0), _pair(module.stride), (1, 1))
            self._emit(Pool([self._value(first)], node.name, window=window, extra_channels=module.extra_channels))
        else:
            self._call(node, module)

    def _lower_channels_last(self, node: fx.Node, module: Any, first: fx.Node, conv: Convolve | None) -> None:
        """An operation on (B, H, W, C)."""
        if is_plain(module, *NOTHING):
            self._alias(node, first, conv)
        elif is_plain(module, GatedResponseNorm):
            self._response_norm(node, module, first)
        elif is_plain(module, nn.Linear):
            self.pending[node.name] = Convolve([self._value(first)], node.name, conv=module)
        elif is_plain(module, GatedActivation):
            self._gate(node, module, conv)
        elif is_layer_norm(module, LayerNorm, nn.LayerNorm):
            self._layer_norm(node, module, first)
        elif isinstance(module, nn.LayerNorm) or node.target in self.late_norms:
            self._call(node, module)
        else:  # a true permutation
            permuted = f'{node.name}_permuted'
            self._emit(Call([self._value(first)], permuted, None, _to_last, ((first,), {})))
            self.names[first] = permuted
            self.channels_last.discard(first)
            return self._lower(node)
        self.channels_last.add(node)

    def _factors(self, node: fx.Node) -> 'Attribute | None':
        """The tensor of the network that a node multiplies channels by: `x.mul(tensor.reshape(1, -1, 1, 1))`."""
        if node.op != 'call_method' or node.target != 'mul' or len(node.args) != 2:
            return None
        spread: Any = node.args[1]
        if not isinstance(spread, fx.Node) or spread.op != 'call_method' or spread.target not in ('reshape', 'view'):
            return None
        tensor, *shape = spread.args
        if shape != [1, -1, 1, 1] or not isinstance(tensor, fx.Node) or tensor.op != 'get_attr':
            return None
        return Attribute(self.view, str(tensor.target))

    def _gate(self, node: fx.Node, module: GatedActivation, conv: Convolve | None) -> None:
        gate: Any = node.args[1]
        layer = self.gates[gate.name]
        if conv is None or conv.activation or conv.residual is not None:
            self._call(node, module)
        elif is_plain(module.act, nn.ReLU):
            self._extend(node, conv, activation='relu', layer=layer)
        elif _is_gelu(module.act):
            self._extend(node, conv, activation='gelu', layer=layer)
        elif is_plain(module.act, *ELEMENTWISE):
            value = self._value(node.args[0])
            self.operations[-1].layer = self.layers[value] = layer
            active = f'{node.name}_active'
            self._emit(Call([value], active, layer, module.act, ((node.args[0],), {}), each=True))
            self._emit(Scale([active], node.name, layer))
        else:
            self._call(node, module)

    def _layer_norm(self, node: fx.Node, module: nn.Module, first: fx.Node) -> None:
        """A norm over channels, which a depthwise convolution before it takes up."""
        value = self._value(first)
        if self.layers.get(value) is not None:
            return self._call(node, module)
        known = [other for other, name in self.names.items() if name == value]
        alone = all(len(other.users) == 1 and other not in self.tapped for other in known)
        last = self.operations[-1] if self.operations else None
        if alone and isinstance(last, Depthwise) and last.output == value and last.norm is None:
            self.operations.pop()
            return self._emit(dataclasses.replace(last, output=node.name, norm=module))
        self._emit(Depthwise([value], node.name, norm=module))

    def _response_norm(self, node: fx.Node, module: Any, first: fx.Node) -> None:
        """GRN of gated channels: closed ones are zero before and behind it, and add nothing to its mean."""
        gate: Any = node.args[1]
        layer, value = self.gates[gate.name], self._value(first)
        if self.layers.get(value) != layer:
            return self._call(node, module)
        norms = f'{node.name}_norms'
        self._emit(Norms([value], norms, layer))
        self._emit(Respond([value, norms], node.name, layer, norm=module))

    def _add(self, node: fx.Node) -> None:
        operands = node.args
        for mine, other in (operands, operands[::-1]):
            conv = self._fusible(mine)
            free = conv is not None and not conv.activation and conv.residual is None and conv.layer is None
            if conv is None or not free or not isinstance(other, fx.Node) or node.kwargs:
                continue
            residual = self._value(other)
            if self.layers.get(residual) is None and residual != conv.output:
                return self._extend(node, conv, residual=residual)
        self._call(node, None)

    def _call(self, node: fx.Node, module: nn.Module | None) -> None:
        function: Any = module if module is not None else node.target
        if node.op == 'call_method':
            name = str(node.target)
            function = lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)  # noqa: E731
        elif node.op == 'get_attr':
            attribute = str(node.target)
            function = Attribute(self.view, attribute)
        if any(part in self.channels_last for part in node.all_input_nodes):
            function = ChannelsLast(function)
        inputs = [self._value(part) for part in node.all_input_nodes if part.name not in self.gates]
        if getattr(getattr(module, 'act', module), 'inplace', False):  # who reads what it overwrites reads it before
            for name in [name for name, conv in self.pending.items() if {*conv.inputs, conv.residual} & {*inputs}]:
                self._emit(self.pending.pop(name))
        layers = {self.layers.get(value) for value in inputs}
        layer = layers.pop() if len(layers) == 1 and len(inputs) == 1 else None
        each = layer is not None and is_plain(module, *CHANNELWISE)
        if isinstance(module, BlurPool2d) and module.channels is not None:
            each = False
        self._emit(Call(inputs, node.name, layer if each else None, function, (node.args, node.kwargs), each))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def is_convolution(module: Any) -> bool:
    """Whether a module is a convolution that has an operation of its own."""
    return (
        is_plain(module, nn.Conv2d)
        and module.groups == 1
        and module.padding_mode == 'zeros'
        and not isinstance(module.padding, str)
    )


def _is_depthwise(module: Any) -> bool:
    """Whether a module is a convolution with one filter for each channel that has an operation of its own."""
    return (
        is_plain(module, nn.Conv2d)
        and module.groups == module.in_channels == module.out_channels > 1
        and module.padding_mode == 'zeros'
        and not isinstance(module.padding, str)
    )


def is_layer_norm(module: Any, *kinds: type[nn.Module]) -> bool:
    """Whether a module is a norm over channels that has an operation of its own."""
    return is_plain(module, *kinds) and len(module.normalized_shape) == 1


def _is_norm(module: Any, conv: Convolve) -> bool:
    """Whether a module is a norm that can be folded into the convolution before it."""
    follows = not conv.activation and conv.residual is None and conv.layer is None
    return follows and folds(module)


def _takes_factors(conv: Convolve) -> bool:
    return not conv.activation and conv.residual is None and conv.layer is None and conv.factors is None


def _is_gelu(module: nn.Module) -> bool:
    """Whether a module is the exact GELU."""
    return is_plain(module, GELU) or (is_plain(module, nn.GELU) and getattr(module, 'approximate', '') == 'none')


def _moved(node: fx.Node) -> tuple[int, ...] | None:
    """The dimensions that a node permutes."""
    if node.op != 'call_method' or node.target != 'permute' or node.kwargs:
        return None
    return tuple(node.args[1:])  # type: ignore[arg-type]


def _to_last(x: Tensor) -> Tensor:
    return x.permute(*TO_LAST)
