"""The losses on gates against plain loops, and what the gates tell against closed forms."""

import copy
import math
from typing import Any

import pytest
import torch
from small_networks import images, randomise, small
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.nn import functional as F

from deepmoe_plugin.information import gate_entropy, mutual_information, use_entropy
from deepmoe_plugin.specialisation import (
    SpecialisationConfig,
    importance_loss,
    sample_distances,
    similarity_loss,
    similarity_terms,
)


def gates(batch: int = 7, experts: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, experts, generator=generator, dtype=torch.float64).softmax(1)


def samples(batch: int = 7, seed: int = 1) -> Tensor:
    return torch.randn(batch, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_terms(p: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """A and B, written as the sums of the paper."""
    size, experts = p.shape
    same = different = torch.zeros((), dtype=p.dtype)
    for e in range(experts):
        for f in range(experts):
            for i in range(size):
                for j in range(size):
                    term = p[i, e] * p[j, f] * d[i, j]
                    if e == f:
                        same = same + term
                    else:
                        different = different + term
    return same / experts, different / (experts**2 - experts)


def plain_distances(x: Tensor, norm: str) -> Tensor:
    rows = [[(first - second).square().sum() for second in x.flatten(1)] for first in x.flatten(1)]
    squared = torch.stack([torch.stack(row) for row in rows])
    return squared if norm == 'pairs' else squared.sqrt() / squared.sqrt().max()


@pytest.mark.parametrize('norm', ['batch', 'pairs'])
def test_similarity_loss_equals_the_plain_loop(norm: str) -> None:
    p, x = gates(), samples()
    distances = plain_distances(x, norm)
    torch.testing.assert_close(sample_distances(x, norm), distances, rtol=1e-9, atol=1e-9)
    same, different = plain_terms(p, distances)
    torch.testing.assert_close(similarity_terms(p, distances), (same, different))
    expected = 0.3 * same - 0.7 * different / 49 if norm == 'batch' else (0.3 * same - 0.7 * different) / (49 - 7)
    torch.testing.assert_close(similarity_loss(p, sample_distances(x, norm), 0.3, 0.7, norm), expected)


def test_both_terms_are_one_for_gates_that_sum_to_one() -> None:
    """B = (sum(D) - M A) / (M^2 - M), so both have the same gradient up to a factor."""
    p = gates(experts=4).requires_grad_()
    distances = sample_distances(samples())
    same, different = similarity_terms(p, distances)
    torch.testing.assert_close(different, (distances.sum() - 4 * same) / 12)
    logits = gates(experts=4).log().requires_grad_()
    same, different = similarity_terms(logits.softmax(1), distances)
    (of_same,) = torch.autograd.grad(same, logits, retain_graph=True)
    (of_different,) = torch.autograd.grad(different, logits)
    torch.testing.assert_close(of_different, -of_same / 3)


@pytest.mark.parametrize('norm', ['batch', 'pairs'])
def test_gradient_of_the_similarity_loss(norm: str) -> None:
    logits = gates().log().requires_grad_()
    distances = sample_distances(samples(), norm)
    torch.autograd.gradcheck(lambda x: similarity_loss(x.softmax(1), distances, 0.3, 0.7, norm), logits)
    torch.autograd.gradcheck(lambda x: importance_loss(x.softmax(1)), logits)


def test_similarity_loss_is_lower_where_like_samples_share_an_expert() -> None:
    x = torch.tensor([0.0, 0.1, 5.0, 5.1])[:, None]
    together = torch.eye(2)[[0, 0, 1, 1]]
    apart = torch.eye(2)[[0, 1, 0, 1]]
    distances = sample_distances(x)
    assert similarity_loss(together, distances, 1, 1) < similarity_loss(apart, distances, 1, 1)


def test_equal_samples_and_a_single_one_have_no_similarity_loss() -> None:
    for batch in (1, 3):
        for norm in ('batch', 'pairs'):
            loss = similarity_loss(gates(batch), sample_distances(torch.ones(batch, 4), norm), 1, 1, norm)
            assert loss == 0


def test_distances_of_low_precision_samples_are_float32() -> None:
    assert sample_distances(samples().bfloat16()).dtype == torch.float32
    with torch.autocast('cpu', dtype=torch.bfloat16):
        p, x = gates().float(), samples().float()
        inside = similarity_loss(p, sample_distances(x), 1, 1)
    torch.testing.assert_close(inside, similarity_loss(p, sample_distances(x), 1, 1), rtol=0, atol=1e-6)


def test_importance_loss_is_the_squared_coefficient_of_variation() -> None:
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert importance_loss(p).item() == pytest.approx((1 / 2) ** 2)  # sums 3 and 1: mean 2, deviation 1
    assert importance_loss(torch.full((4, 5), 0.2)).item() == pytest.approx(0)


def test_terms_are_weighted_and_named() -> None:
    p, x = gates(), samples()
    terms = SpecialisationConfig(0.5, [0.1, 0.2], 'pairs').terms(p, x)
    assert terms.keys() == {'loss_importance', 'loss_similarity'}
    torch.testing.assert_close(terms['loss_importance'], 0.5 * importance_loss(p))
    torch.testing.assert_close(
        terms['loss_similarity'], similarity_loss(p, sample_distances(x, 'pairs'), 0.1, 0.2, 'pairs')
    )
    assert SpecialisationConfig().terms(p, None) == {}
    assert not SpecialisationConfig().active


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('importance_loss_weight', -1),
        ('importance_loss_weight', '1e-3'),
        ('similarity_loss_weight', 0.1),
        ('similarity_loss_weight', (0.1,)),
        ('similarity_loss_weight', (0.1, float('nan'))),
        ('similarity_norm', 'sum'),
    ],
)
def test_bad_arguments_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        SpecialisationConfig(**{name: value})  # type: ignore[arg-type]


def test_entropies_in_bits() -> None:
    one_hot, even = torch.eye(4)[[0, 1, 2, 3]], torch.full((5, 4), 0.25)
    assert gate_entropy(one_hot) == 0
    assert use_entropy(one_hot).item() == pytest.approx(2)
    assert gate_entropy(even).item() == pytest.approx(2)
    half = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert gate_entropy(half).item() == pytest.approx(0.5)
    assert use_entropy(half).item() == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))


def test_mutual_information_in_bits() -> None:
    first = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert mutual_information(first, first).item() == pytest.approx(2)
    assert mutual_information(first, torch.tensor([0, 1] * 4)).item() == pytest.approx(0)
    assert mutual_information(first, first // 2).item() == pytest.approx(1)
    joint = torch.tensor([[0.3, 0.1], [0.2, 0.4]])
    expected = sum(
        joint[i, j] * math.log2(joint[i, j] / joint[i].sum() / joint[:, j].sum()) for i in (0, 1) for j in (0, 1)
    )
    pairs = [(i, j) for i in (0, 1) for j in (0, 1) for _ in range(round(10 * joint[i, j].item()))]
    measured = mutual_information(*torch.tensor(pairs).unbind(1))
    assert measured.item() == pytest.approx(expected.item(), abs=1e-6)


# The latent mixture of DeepMoE


@pytest.mark.parametrize('structure', ['basic', 'bottleneck_a', 'vgg_cifar'])
@pytest.mark.parametrize('similarity_of', ['pixels', 'features'])
def test_losses_on_the_latent_mixture(structure: str, similarity_of: str) -> None:
    weights = dict(importance_loss_weight=0.3, similarity_loss_weight=(0.1, 0.2), similarity_of=similarity_of)
    model = randomise(small(structure, **weights))
    x, y = images(4), torch.tensor([0, 1, 2, 3])
    twin = copy.deepcopy(model).gating.embedding
    features = twin.pool(x)
    mixture = twin.mix(features)
    compared = x if similarity_of == 'pixels' else features
    result = ClassificationTask(model, nn.CrossEntropyLoss())(x, y)
    torch.testing.assert_close(result['loss_importance'], 0.3 * importance_loss(mixture))
    expected = similarity_loss(mixture, sample_distances(compared), 0.1, 0.2)
    torch.testing.assert_close(result['loss_similarity'], expected)
    torch.testing.assert_close(result['gate_entropy'], gate_entropy(mixture))
    terms = result['loss_gate'] + result['loss_importance'] + result['loss_similarity']
    torch.testing.assert_close(result['loss'], F.cross_entropy(result['output'], y) + terms)
    (result['loss_importance'] + result['loss_similarity']).backward()
    assert model.gating.embedding.mixture.weight.grad.abs().sum() > 0


def test_losses_change_nothing_where_they_are_not_asked_for() -> None:
    model = small('cifar')
    names = ClassificationTask(model, nn.CrossEntropyLoss())(images(), torch.tensor([0, 1])).keys()
    assert names == {'loss', 'output', 'loss_gate', 'kept_experts', 'dynamic_experts', 'gate_entropy', 'use_entropy'}


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        (dict(similarity_of='labels'), 'similarity_of'),
        (dict(importance_loss_weight=-1), 'importance_loss_weight'),
        (dict(similarity_loss_weight=(1, 1), num_latent_experts=1), 'num_latent_experts'),
        (dict(importance_loss_weight=1, freeze_gating=True), 'freeze_gating'),
    ],
)
def test_bad_arguments_of_a_deepmoe_network(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small('cifar', **arguments)
