"""Losses that make experts specialise (Krishnamurthy, Watkins, Gaertner 2023), for any gates that sum to one."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from .arguments import check_weight
from .tracing import at_least_float32

SimilarityNorm = Literal['batch', 'pairs']
SIMILARITY_NORMS = ('batch', 'pairs')
Config = TypeVar('Config', bound='SpecialisationConfig')


@dataclasses.dataclass(frozen=True)
class SpecialisationConfig:
    """Weights of the losses on the gates; models with a mixture take them as keyword arguments.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    importance_loss_weight: float = 0.0
    """Weight of the squared coefficient of variation of the experts' importances (Shazeer et al. 2017); the authors'
    range is 0.2 to 1."""
    similarity_loss_weight: Sequence[float] = (0.0, 0.0)
    """(beta_s, beta_d): weights of the distance between samples of the same expert and of different experts; the
    authors' ranges are 1e-7 to 1e-3 and 1e-6 to 1e-1."""
    similarity_norm: SimilarityNorm = 'batch'
    """See `similarity_loss`."""

    def __post_init__(self) -> None:
        check_weight('importance_loss_weight', self.importance_loss_weight)
        betas = self.similarity_loss_weight
        if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
            raise ValueError(f'similarity_loss_weight must be two numbers (beta_s, beta_d), got {betas!r}.')
        for beta in betas:
            check_weight('similarity_loss_weight', beta)
        if self.similarity_norm not in SIMILARITY_NORMS:
            raise ValueError(
                f'similarity_norm must be one of {", ".join(SIMILARITY_NORMS)}, got {self.similarity_norm!r}.'
            )

    @property
    def active(self) -> bool:
        """Whether there is any loss."""
        return self.importance_loss_weight > 0 or self.needs_samples

    @property
    def needs_samples(self) -> bool:
        """Whether a loss asks for distances between samples."""
        return any(self.similarity_loss_weight)

    @classmethod
    def pop_from(cls: type[Config], kwargs: dict[str, Any]) -> Config:
        """Take this class's arguments out of a model's keyword arguments."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: kwargs.pop(name) for name in names if name in kwargs})

    def terms(self, gates: Tensor, samples: Tensor | None) -> dict[str, Tensor]:
        """The weighted losses whose weights are not zero.

        Args:
            gates: p(e|x), shape (B, experts).
            samples: what distances are taken of, shape (B, ...); needed with `needs_samples` only.

        Returns:
            Scalars `loss_importance` and `loss_similarity`, each only where it applies.
        """
        terms = {}
        if self.importance_loss_weight > 0:
            terms['loss_importance'] = self.importance_loss_weight * importance_loss(gates)
        if self.needs_samples:
            assert samples is not None
            distances = sample_distances(samples, self.similarity_norm)
            beta_s, beta_d = self.similarity_loss_weight
            terms['loss_similarity'] = similarity_loss(gates, distances, beta_s, beta_d, self.similarity_norm)
        return terms


def importance_loss(gates: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' importances, the sums of their gates over the batch.

    The variance is that of the whole set of experts (divided by their number), as Shazeer et al. compute it.

    Args:
        gates: p(e|x), shape (B, experts).
    """
    importance = gates.sum(0)
    return importance.var(unbiased=False) / importance.mean().square()


@torch.no_grad()
def sample_distances(samples: Tensor, norm: SimilarityNorm = 'batch') -> Tensor:
    """Distances between all samples of a batch, shape (B, B), at least in float32; nothing is learnt through them.

    Args:
        samples: shape (B, ...); all but the first dimension are flattened.
        norm: 'batch': Euclidean, divided by the largest of the batch; 'pairs': squared Euclidean.
    """
    flat = samples.flatten(1).to(at_least_float32(samples))
    distances = torch.cdist(flat, flat).fill_diagonal_(0)
    if norm == 'pairs':
        return distances.square()
    return distances / distances.amax().clamp_min(torch.finfo(distances.dtype).tiny)


def similarity_terms(gates: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over experts, and over pairs of different experts, of the distances between the samples they get.

    With S = P^T D P these are A = tr(S) / M and B = (sum(S) - tr(S)) / (M^2 - M). Gates sum to one, so sum(S) is
    sum(D), and B is what A leaves of it.

    Args:
        gates: P, p(e|x), shape (B, M), M >= 2.
        distances: D, shape (B, B).

    Returns:
        A and B, scalars.
    """
    experts = gates.shape[1]
    with torch.autocast(gates.device.type, enabled=False):
        distances = distances.to(gates.dtype)
        same = (gates * (distances @ gates)).sum()
        mass = gates.sum(1)
        different = mass @ distances @ mass - same
    return same / experts, different / (experts * (experts - 1))


def similarity_loss(
    gates: Tensor, distances: Tensor, beta_s: float, beta_d: float, norm: SimilarityNorm = 'batch'
) -> Tensor:
    """L_s: samples of the same expert should be alike, and samples of different experts should differ.

    Args:
        gates: p(e|x), shape (B, experts).
        distances: of `sample_distances` with the same `norm`, shape (B, B).
        beta_s, beta_d: weights of the two terms of `similarity_terms`, A and B.
        norm: 'batch' is `beta_s A - beta_d B / B^2` with the batch size B, as the authors' code has it; 'pairs' is
            `(beta_s A - beta_d B) / (B^2 - B)`, with squared distances (remembered of the paper, not confirmed).
    """
    same, different = similarity_terms(gates, distances)
    size = len(gates)
    if norm == 'pairs':
        return (beta_s * same - beta_d * different) / max(size * (size - 1), 1)
    return beta_s * same - beta_d * different / size**2
