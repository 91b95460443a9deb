"""Whether gates hand over the class: how often a network is right where its embedding alone would be wrong (ours).

Gates that carry the label let the base network read it off the gates instead of the image, and the network then knows
what its shallow embedding knows, and little more.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .gating import GatingNetwork

RIDGE = 1e-3  # of the mean variance, added to the covariance: mixtures sum to one, so that it is singular


class Handover(NamedTuple):
    """What a network knows beyond its embedding; all numbers are fractions (0..1).

    Attributes:
        guessed: class that the embedding alone finds, shape (images,).
        is_fitted: the class of the embedding is that of a read-out fitted to the images, not of its own classifier.
        embedding_right: images whose class the embedding alone finds.
        agreement: images that the network gives the class that the embedding gives them.
        right_where_wrong: images that the network classifies rightly, of those that the embedding does not; None if
            there is no such image.
    """

    guessed: Tensor
    is_fitted: bool
    embedding_right: float
    agreement: float
    right_where_wrong: float | None

    def numbers(self) -> dict[str, float | None]:
        """All but the guesses, for tables."""
        return {name: value for name, value in self._asdict().items() if name != 'guessed'}


@torch.no_grad()
def measure_handover(gating: GatingNetwork, mixtures: Tensor, predicted: Tensor, labels: Tensor) -> Handover:
    """Compare what a network predicts with what its embedding alone would.

    The embedding's class is that of its classifier where it has one (`embed_loss_weight > 0`); otherwise that of a
    linear discriminant of the mixture, which is all that gates know of an image. It is fitted to every second image and
    asked about the others, and then the other way round.

    Args:
        gating: of the network.
        mixtures: latent mixture weights, shape (images, K).
        predicted: class that the network predicts, shape (images,).
        labels: true class, shape (images,).
    """
    logits = gating.class_logits(mixtures.to(gating.gates.weight.device))
    guessed = _read_out(mixtures, labels) if logits is None else logits.argmax(1).to(labels.device)
    wrong = guessed != labels
    hits = (predicted == labels)[wrong].double()
    return Handover(
        guessed=guessed,
        is_fitted=logits is None,
        embedding_right=1 - wrong.double().mean().item(),
        agreement=(guessed == predicted).double().mean().item(),
        right_where_wrong=hits.mean().item() if len(hits) else None,
    )


def _read_out(mixtures: Tensor, labels: Tensor) -> Tensor:
    """Class of each image by a linear discriminant that is fitted to the other half of the images."""
    x = mixtures.double()
    is_even = torch.arange(len(x), device=x.device) % 2 == 0
    guessed = torch.empty_like(labels)
    for fitted in (is_even, ~is_even):
        if fitted.any():
            guessed[~fitted] = _discriminant(x[fitted], labels[fitted], x[~fitted])
        else:  # a single image
            guessed[~fitted] = -1
    return guessed


def _discriminant(x: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """Fisher's linear discriminant: the likeliest class if all classes are normal with one covariance."""
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    means = x.new_zeros(len(classes), x.shape[1]).index_add_(0, index, x) / counts[:, None]
    within = x - means[index]
    covariance = within.T @ within / len(x)
    ridge = RIDGE * covariance.diagonal().mean() + 1e-9  # all mixtures may be alike
    covariance.diagonal().add_(ridge)
    weight = torch.linalg.solve(covariance, means.T)
    bias = (counts / len(x)).log() - (means * weight.T).sum(1) / 2
    return classes[(asked @ weight + bias).argmax(1)]
