"""Whether a network knows more than its embedding, against what a read-out can and cannot know."""

import pytest
import torch
from small_networks import randomise, small
from torch import Tensor

from deepmoe_plugin.handover import measure_handover

CLASSES, PER_CLASS = 5, 201


def mixtures_of(labels: Tensor, sharpness: float) -> Tensor:
    """Mixtures that lean towards one latent expert of each class, in the noise of the image."""
    logits = 0.5 * torch.randn(len(labels), 64) + sharpness * torch.eye(64)[labels]
    return logits.softmax(1)


@pytest.fixture
def labels():
    return torch.arange(CLASSES).repeat_interleave(PER_CLASS)


@pytest.fixture
def gating():
    return small('cifar').gating


def test_mixtures_that_carry_the_class_are_read(labels, gating):
    result = measure_handover(gating, mixtures_of(labels, 4.0), labels, labels)
    assert result.is_fitted
    assert result.embedding_right > 0.95
    assert result.agreement == pytest.approx(result.embedding_right)


def test_mixtures_that_say_nothing_are_guessed(labels, gating):
    """No image is asked about that the read-out was fitted to: it would know most of these."""
    result = measure_handover(gating, mixtures_of(labels, 0.0), labels, labels)
    assert result.embedding_right < 2 / CLASSES
    assert result.right_where_wrong == 1


def test_where_the_embedding_is_wrong(labels, gating):
    mixtures = mixtures_of(labels, 3.0)
    mixtures[::5] = mixtures_of((labels + 1) % CLASSES, 3.0)[::5]  # one in five looks like the next class
    misled = torch.arange(len(labels)) % 5 == 0
    repeats_it = torch.where(misled, (labels + 1) % CLASSES, labels)
    follows = measure_handover(gating, mixtures, repeats_it, labels)
    assert follows.embedding_right == pytest.approx(0.8, abs=0.1)
    assert follows.agreement > 0.9
    assert follows.right_where_wrong < 0.3
    knows = measure_handover(gating, mixtures, labels, labels)
    assert knows.embedding_right == follows.embedding_right
    assert knows.right_where_wrong == 1


def test_the_classifier_of_the_embedding_comes_first(labels):
    gating = randomise(small('cifar', embed_loss_weight=1.0)).gating
    mixtures = mixtures_of(labels, 3.0)
    with torch.no_grad():
        guessed = gating.class_scores(64 * mixtures).argmax(1)
    result = measure_handover(gating, mixtures, labels, labels)
    assert not result.is_fitted
    assert torch.equal(result.guessed, guessed)
    assert result.embedding_right == pytest.approx((guessed == labels).float().mean().item())


@pytest.mark.parametrize('count', [1, 2, 3])
def test_few_images_and_equal_mixtures(count, gating):
    labels = torch.arange(count)
    result = measure_handover(gating, torch.full((count, 64), 1 / 64), labels, labels)
    assert result.embedding_right == 0
    assert result.right_where_wrong == 1


def test_an_embedding_that_is_never_wrong(labels, gating):
    result = measure_handover(gating, torch.eye(64)[labels], labels, labels)
    assert result.embedding_right == 1
    assert result.right_where_wrong is None
