"""The classifier behind the features as operations, where it is timm's own: pooling and a linear layer."""

from typing import Any

from timm.layers import SelectAdaptivePool2d
from timm.models.resnet import ResNet
from torch import nn

from ..plain import is_plain
from .operations import Average, Convolve, Operation

LOGITS = 'head_logits'
"""The value that holds them, (B, classes, 1, 1)."""


def head_of(view: Any, features: str) -> list[Operation]:
    """What leads from the features to the value `LOGITS`; nothing if torch must run the head.

    Args:
        view: of the network, in evaluation mode.
        features: the value of `forward_features`.
    """
    if not _is_as_built(view):
        return []
    return [Average([features], 'head_pooled'), Convolve(['head_pooled'], LOGITS, conv=view.fc)]


def _is_as_built(view: Any) -> bool:
    """Whether `forward` is a mean over all positions and a linear layer, and nobody has changed either."""
    own = all(
        name not in view.__dict__ and getattr(type(view), name) is getattr(ResNet, name, None)
        for name in ('forward', 'forward_head')
    )
    if not own:
        return False
    pool = view.global_pool
    return (
        is_plain(pool, SelectAdaptivePool2d)
        and is_plain(pool.pool, nn.AdaptiveAvgPool2d)
        and pool.pool.output_size in (1, (1, 1))
        and is_plain(pool.flatten, nn.Flatten)
        and (pool.flatten.start_dim, pool.flatten.end_dim) == (1, -1)
        and is_plain(view.fc, nn.Linear)
        and view.fc.weight.dtype == next(view.parameters()).dtype
    )
