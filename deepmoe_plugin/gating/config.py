"""Arguments of the gating network."""

import dataclasses
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal

GATE_NORMS = ('mean', 'sum', 'macs')
GateNorm = Literal['mean', 'sum', 'macs']


@dataclasses.dataclass(frozen=True)
class GatingConfig:
    """Arguments of the gating network; every DeepMoE model takes them as keyword arguments.

    Raises:
        ValueError: an argument is out of range or contradicts another one; the message names it.
    """

    num_latent_experts: int = 64
    """K, length of the latent mixture weights `e`."""
    gate_loss_weight: float | None = None
    """lambda of Eq. 7; 1 by default, 0 when gating is frozen. With a target: its initial value, by default one that
    moves a gate by 1 in about 300 steps of SGD (learning rate 0.1, momentum 0.9), whatever the size of the network."""
    embed_loss_weight: float = 0.0
    """mu of Eq. 7; 0 creates no embedding classifier (paper: 1 for CIFAR, 0 for ImageNet)."""
    gate_norm: GateNorm = 'mean'
    """L_g: 'mean' over all gates, 'sum' per image (Eq. 8 to the letter), 'macs' weighs an expert by its MACs."""
    target_kept: float | None = None
    """Fraction of experts to keep on average; lambda then adjusts itself during training."""
    target_macs: float | None = None
    """Fraction of the base network's dense MACs to spend on average; lambda then adjusts itself."""
    freeze_gating: bool = False
    """Stage 2 of Procedure 1: gates stay as loaded, norm statistics included; both weights are 0."""
    embedding_channels: Sequence[int] = (16, 32, 64, 128, 256)
    """Widths of the stride-2 layers of the shallow embedding."""

    def __post_init__(self) -> None:
        if not _is_width(self.num_latent_experts):
            raise ValueError(f'num_latent_experts must be a whole number >= 1, got {self.num_latent_experts!r}.')
        if not isinstance(self.freeze_gating, bool):
            raise ValueError(f'freeze_gating must be True or False, got {self.freeze_gating!r}.')
        if self.gate_norm not in GATE_NORMS:
            raise ValueError(f'gate_norm must be one of {", ".join(GATE_NORMS)}, got {self.gate_norm!r}.')
        for name in ('gate_loss_weight', 'embed_loss_weight'):
            value = getattr(self, name)
            if value is None:
                continue
            check_number(name, value)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f'{name} must be a finite number >= 0, got {value}.')
        for name in ('target_kept', 'target_macs'):
            value = getattr(self, name)
            if value is None:
                continue
            check_number(name, value)
            if not 0 < value < 1:
                raise ValueError(f'{name} must lie between 0 and 1 (a fraction), got {value}.')
        if self.target_kept is not None and self.target_macs is not None:
            raise ValueError('target_kept and target_macs contradict each other: give one of them.')
        if self.has_target and self.gate_loss_weight == 0:
            raise ValueError('gate_loss_weight must be > 0 with target_kept or target_macs: it is where lambda starts.')
        channels = self.embedding_channels
        if not isinstance(channels, Sequence) or not channels or not all(_is_width(width) for width in channels):
            raise ValueError(f'embedding_channels must be a list of whole numbers >= 1, got {channels!r}.')
        if self.freeze_gating and (self.gate_loss_weight or self.embed_loss_weight or self.has_target):
            raise ValueError(
                'freeze_gating=True leaves nothing for gate_loss_weight, embed_loss_weight, target_kept or '
                'target_macs to train: set them to 0 or leave them out.'
            )

    @property
    def has_target(self) -> bool:
        return self.target_kept is not None or self.target_macs is not None

    @classmethod
    def pop_from(cls, kwargs: dict[str, Any]) -> 'GatingConfig':
        """Take this class's arguments out of a model's keyword arguments."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: kwargs.pop(name) for name in names if name in kwargs})


def _is_width(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def check_number(name: str, value: object) -> None:
    """Refuse anything but a number as the value of the argument `name`.

    Raises:
        ValueError: names the argument, and the remedy for the text that YAML makes of `1e-3`.
    """
    if isinstance(value, str):
        raise ValueError(f'{name} must be a number, got the text {value!r}: in YAML, write 1.0e-3 instead of 1e-3.')
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f'{name} must be a number, got {value!r}.')
