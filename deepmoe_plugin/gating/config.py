"""Arguments of the gating network."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from ..arguments import check_number, check_weight, check_whole, is_whole
from ..specialisation import SpecialisationConfig

GATE_NORMS = ('mean', 'sum', 'macs')
GateNorm = Literal['mean', 'sum', 'macs']
SIMILARITY_OF = ('pixels', 'features')
SimilarityOf = Literal['pixels', 'features']


@dataclasses.dataclass(frozen=True)
class GatingConfig(SpecialisationConfig):
    """Arguments of the gating network; every DeepMoE model takes them as keyword arguments.

    The losses of `SpecialisationConfig` take the latent mixture weights for p(e|x).

    Raises:
        ValueError: an argument is out of range or contradicts another one; the message names it.
    """

    num_latent_experts: int = 64
    """K, length of the latent mixture weights `e`."""
    experts_per_gate: int = 1
    """Neighbouring channels of a layer that share a gate (ours; the paper has 1). With 8, 16 or 32, the channels that
    an image keeps fill the vector registers of a processor. It must divide the width of every gated layer."""
    gate_loss_weight: float | None = None
    """lambda of Eq. 7; by default 1, and 0 with a target or when gating is frozen."""
    embed_loss_weight: float = 0.0
    """mu of Eq. 7; 0 creates no embedding classifier (paper: 1 for CIFAR, 0 for ImageNet)."""
    gate_norm: GateNorm = 'mean'
    """L_g: 'mean' over all gates, 'sum' per image (Eq. 8 to the letter), 'macs' weighs an expert by its MACs."""
    target_kept: float | Sequence[float] | None = None
    """Fraction of experts to keep on average (ours): a threshold of the gates then rises until the target is met. Two
    fractions are a range: each training step draws a target from it, for a network of many budgets."""
    target_macs: float | Sequence[float] | None = None
    """The same for the fraction of the base network's dense MACs to spend on average."""
    target_steps: int = 1000
    """Training steps in which the budget falls from everything to the target."""
    freeze_gating: bool = False
    """Stage 2 of Procedure 1: gates stay as loaded, norm statistics included; both weights are 0."""
    embedding_channels: Sequence[int] = (16, 32, 64, 128, 256)
    """Widths of the stride-2 layers of the shallow embedding."""
    similarity_of: SimilarityOf = 'pixels'
    """What `similarity_loss_weight` takes distances of: 'pixels' of the normalised images, or the 'features' that the
    embedding computes the mixture from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.similarity_of not in SIMILARITY_OF:
            raise ValueError(f'similarity_of must be one of {", ".join(SIMILARITY_OF)}, got {self.similarity_of!r}.')
        for name in ('num_latent_experts', 'experts_per_gate'):
            check_whole(name, getattr(self, name))
        if not isinstance(self.freeze_gating, bool):
            raise ValueError(f'freeze_gating must be True or False, got {self.freeze_gating!r}.')
        if self.gate_norm not in GATE_NORMS:
            raise ValueError(f'gate_norm must be one of {", ".join(GATE_NORMS)}, got {self.gate_norm!r}.')
        for name in ('gate_loss_weight', 'embed_loss_weight'):
            value = getattr(self, name)
            if value is not None:
                check_weight(name, value)
        for name in ('target_kept', 'target_macs'):
            value = getattr(self, name)
            if value is None:
                continue
            is_range = isinstance(value, Sequence) and not isinstance(value, str)
            ends = tuple(value) if is_range else (value,)
            for end in ends:
                check_number(name, end)
                if not 0 < end < 1:
                    raise ValueError(f'{name} must lie between 0 and 1 (a fraction), got {end}.')
            if is_range and not (len(ends) == 2 and ends[0] < ends[1]):
                raise ValueError(f'{name} must be one fraction, or a smaller and a larger one, got {value}.')
        if self.target_kept is not None and self.target_macs is not None:
            raise ValueError('target_kept and target_macs contradict each other: give one of them.')
        check_whole('target_steps', self.target_steps)
        channels = self.embedding_channels
        if not isinstance(channels, Sequence) or not channels or not all(is_whole(width) for width in channels):
            raise ValueError(f'embedding_channels must be a list of whole numbers >= 1, got {channels!r}.')
        if self.needs_samples and self.num_latent_experts == 1:
            raise ValueError('similarity_loss_weight compares experts: num_latent_experts must be at least 2.')
        trains = self.gate_loss_weight or self.embed_loss_weight or self.has_target or self.active
        if self.freeze_gating and trains:
            raise ValueError(
                'freeze_gating=True leaves nothing for gate_loss_weight, embed_loss_weight, target_kept, target_macs, '
                'importance_loss_weight or similarity_loss_weight to train: set them to 0 or leave them out.'
            )

    @property
    def has_target(self) -> bool:
        return self.target_kept is not None or self.target_macs is not None
