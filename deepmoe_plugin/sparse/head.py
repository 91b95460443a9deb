"""The classifier behind the features as operations, where it is a mean over all positions and linear layers.

It is found by a trace of the network's own `forward`, in which the features stand for themselves. A head that has more
than pooling, norms of pooled features and linear layers is left to torch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, LayerNorm2d
from torch import fx, nn

from ..plain import is_plain
from .operations import Average, Convolve, Depthwise, Operation, Trace
from .parts import Widen
from .trace import NOTHING, is_convolution, is_layer_norm

LOGITS = 'head_logits'
"""The value that holds them, (B, classes, 1, 1); pooled features where there is no classifier."""
_KNOWN = ('deepmoe_plugin', 'timm')
"""Packages whose code does no more than a trace shows. That of others may count calls or print."""
_MAP, _PIXEL, _FLAT = '(B, C, H, W)', '(B, C, 1, 1)', '(B, C)'


class _Tracer(fx.Tracer):
    """Looks into modules as far as pooling and linear layers may sit inside."""

    def __init__(self, view: nn.Module) -> None:
        super().__init__()
        self.open = {
            module
            for module in view.modules()
            if is_plain(module, type(module))
            and (
                isinstance(module, nn.Sequential) or (_is_known(type(module)) and not isinstance(module, nn.LayerNorm))
            )
        }
        self.called: list[str] = []

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        self.called.append(name)
        return module not in self.open


def with_head(trace: Trace) -> Trace:
    """The trace with the operations from the features to the value `LOGITS`; as it is if torch must run these."""
    view = trace.view
    if not all(_is_known(getattr(type(view), name)) for name in ('forward', 'forward_head')):
        return trace
    view.forward_features = _features
    tracer = _Tracer(view)
    try:
        graph = tracer.trace(view)
    except Exception:  # code that looks at shapes or values, whose errors are of any kind: torch runs it
        return trace
    finally:
        del view.forward_features
    layer = next((op.layer for op in trace.operations if op.output == trace.result), None)
    return dataclasses.replace(trace, head=_lower(view, list(graph.nodes), trace.result, layer), called=tracer.called)


def head_of(trace: Trace) -> Sequence[Operation]:
    """The head's operations, if the network's view still has the head that was traced."""
    view = trace.view
    dtype = next(view.parameters()).dtype
    modules = [view.get_submodule(name) for name in trace.called]
    as_traced = all(is_plain(module, type(module)) for module in modules)
    same_type = all(parameter.dtype == dtype for module in modules for parameter in module.parameters())
    patched = {'forward', 'forward_head'} & {*view.__dict__}
    return trace.head if as_traced and same_type and not patched else ()


def _features(x: Any) -> Any:
    return x


def _is_known(code: Any) -> bool:
    """Whether a function or a class is of this package or of timm."""
    return code.__module__.partition('.')[0] in _KNOWN


def _lower(view: Any, nodes: Sequence[fx.Node], features: str, layer: int | None) -> list[Operation]:
    """The operations of a traced head, each on the result of the one before; none if it has others."""
    here, shape, value = nodes[0], _MAP, features
    found: list[Operation] = []
    if layer is not None:
        value = 'head_features'
        found.append(Widen([features], value))
    for node in nodes[1:]:
        if node.all_input_nodes != [here]:
            return []
        if node.op == 'output':
            break
        module: Any = view.get_submodule(node.target) if node.op == 'call_module' else None
        step = _step(node, module, shape, [value])
        if step is None:
            return []
        shape, operation = step
        if operation is not None:
            found.append(operation)
            value = operation.output
        here = node
    if shape != _FLAT:
        return []
    return [*found[:-1], dataclasses.replace(found[-1], output=LOGITS)]


def _step(node: fx.Node, module: Any, shape: str, inputs: list[str]) -> tuple[str, Operation | None] | None:
    """The shape behind a node, and what computes it, if there is something to compute; None if neither is known."""
    name = f'head_{node.name}'
    if _is_idle(node, module):
        return shape, None
    if shape == _MAP:
        pooled = _pooled(node, module)
        return None if pooled is None else (pooled, Average(inputs, name))
    if _is_flatten(node, module):
        return _FLAT, None
    if is_plain(module, nn.Linear) if shape == _FLAT else is_convolution(module) and module.kernel_size == (1, 1):
        return shape, Convolve(inputs, name, conv=module)
    if is_layer_norm(module, LayerNorm, nn.LayerNorm) if shape == _FLAT else is_layer_norm(module, LayerNorm2d):
        return shape, Depthwise(inputs, name, norm=module)
    return None


def _is_idle(node: fx.Node, module: Any) -> bool:
    return is_plain(module, *NOTHING) or (node.target is F.dropout and node.kwargs.get('training') is False)


def _pooled(node: fx.Node, module: Any) -> str | None:
    """The shape behind a mean over all positions; None if the node is something else."""
    if is_plain(module, nn.AdaptiveAvgPool2d):
        return _PIXEL if module.output_size in (1, (1, 1)) else None
    options = {**dict(zip(('dim', 'keepdim'), node.args[1:], strict=False)), **node.kwargs}
    if node.op != 'call_method' or node.target != 'mean' or not options.keys() <= {'dim', 'keepdim'}:
        return None
    dims: Any = options.get('dim')
    if not isinstance(dims, list | tuple) or sorted(dim % 4 for dim in dims) != [2, 3]:
        return None
    return _PIXEL if options.get('keepdim') else _FLAT


def _is_flatten(node: fx.Node, module: Any) -> bool:
    if is_plain(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    calls = (node.op == 'call_method' and node.target == 'flatten') or node.target is torch.flatten
    return calls and node.args[1:] == (1,) and not node.kwargs
