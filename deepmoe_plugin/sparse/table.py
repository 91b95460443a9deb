"""A row of the table of operations that native code works through."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from .fold import geometry_of
from .layout import (
    ACTIVATIONS,
    AVERAGE,
    CONVOLVE,
    DEPTHWISE,
    LOAD,
    NORMS,
    OPERATIONS,
    POOL,
    RESPOND,
    SCALE,
    SOFTMAX,
    WIDEN,
)
from .operations import Average, Convolve, Depthwise, Norms, Operation, Pool, Respond, Scale, Softmax
from .weights import NativeNetwork


class Load(Operation):
    """The images as native code reads them."""


class Shape(NamedTuple):
    """Of one image of a value."""

    channels: int
    height: int
    width: int


def row_of(
    op: Operation, network: NativeNetwork, numbers: Mapping[str, int], shapes: Mapping[str, Shape], dtype: torch.dtype
) -> dict[str, int]:
    """What native code reads of an operation on values with these numbers and shapes."""
    row = dict.fromkeys(OPERATIONS.names or (), 0)
    row.update(output=numbers[op.output], residual=-1)
    row['input'] = numbers[op.inputs[0]] if op.inputs else -1
    if isinstance(op, Convolve):
        weight = network.weights[op.output]
        row.update(kind=CONVOLVE, **_geometry(*op.geometry))
        row.update(activation=ACTIVATIONS.index(op.activation), bias=weight.bias.data_ptr())
        row['block'] = weight.block
        if weight.blocks is not None:
            row.update(weight=weight.blocks.data_ptr(), weight_bytes=weight.blocks.nbytes)
        if weight.rows is not None:
            row.update(rows=weight.rows.data_ptr(), rows_bytes=weight.rows.nbytes)
        if op.residual:
            row['residual'] = numbers[op.residual]
        row['tile'] = network.tile(op, math.prod(shapes[op.output][1:]), dtype)
    elif isinstance(op, Norms | Average | Softmax):
        row['kind'] = NORMS if isinstance(op, Norms) else AVERAGE if isinstance(op, Average) else SOFTMAX
    elif isinstance(op, Respond):
        rows = network.response_weights[op.output]
        row.update(kind=RESPOND, residual=numbers[op.inputs[1]])
        row.update(weight=rows.data_ptr(), weight_bytes=rows.nbytes)
    elif isinstance(op, Depthwise):
        own = network.channel_weights[op.output]
        row.update(kind=DEPTHWISE)
        if own.taps is not None and own.bias is not None:
            row.update(**_geometry(*geometry_of(op.conv)), bias=own.bias.data_ptr())
            row.update(weight=own.taps.data_ptr(), weight_bytes=own.taps.nbytes)
        if own.norm is not None:
            row.update(rows=own.norm.data_ptr(), rows_bytes=own.norm.nbytes)
    elif isinstance(op, Pool):
        row.update(kind=POOL, **_geometry(*op.window))
    elif isinstance(op, Load):
        row.update(kind=LOAD, image_channels=shapes[op.output].channels)
    else:
        row['kind'] = SCALE if isinstance(op, Scale) else WIDEN
    return row


def _geometry(
    kernel: tuple[int, int], pad: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> dict[str, int]:
    pairs = {'kernel': kernel, 'pad': pad, 'stride': stride, 'dilation': dilation}
    return {f'{name}_{side}': pair[i] for name, pair in pairs.items() for i, side in enumerate(('height', 'width'))}
