"""Expert specialisation: the output and both gates by hand, terms of the loss, distillation."""

import copy

import pytest
import timm
import torch
from small_mixtures import SPECIALISED, batch_for, build
from timm.task import ClassificationTask
from torch import nn
from torch.nn import functional as F

import deepmoe_plugin
from deepmoe_plugin.models.specialised_moe import log_mixture, predicted_by_chosen, start_together
from deepmoe_plugin.specialisation import importance_loss, sample_distances, similarity_loss


def test_specialised_output_is_the_log_of_the_mixed_probabilities() -> None:
    for case in ('softmax', 'attentive'):
        model = build(case).eval().double()
        x, y = batch_for(model)
        x = x.double()
        hidden = [expert.trunk(expert.start(x)) for expert in model.experts]
        probabilities = [expert.head(h.relu()).softmax(1) for expert, h in zip(model.experts, hidden, strict=True)]
        own = model.gate.trunk(model.gate.start(x))
        if case == 'softmax':
            gates = model.gate.head(own.relu()).softmax(1)
        else:
            query = own @ model.gate.query.weight.T
            keys = [h @ model.gate.key.weight.T for h in hidden]
            gates = torch.stack([(query * key).sum(1) / 32**0.5 for key in keys], 1).softmax(1)
        mixed = sum(gates[:, i : i + 1] * p for i, p in enumerate(probabilities))
        torch.testing.assert_close(model(x).exp(), mixed)
        torch.testing.assert_close(F.cross_entropy(model(x), y), -mixed[range(6), y].log().mean())


def test_attentive_gate_trains_the_experts_through_their_hidden_vectors() -> None:
    model = build('attentive')
    x, _ = batch_for(model)
    _, gates = model.forward_features(x)
    (gates * torch.arange(5)).sum().backward()
    assert all(expert.start[0].weight.grad.abs().sum() > 0 for expert in model.experts)


def test_log_of_the_mixture_is_finite_for_gates_and_experts_that_are_sure() -> None:
    logits = torch.tensor([[[200.0, 0.0], [0.0, 200.0]]], requires_grad=True)
    gates = torch.tensor([[1.0, 0.0]], requires_grad=True)
    output = log_mixture(logits, gates)
    output.sum().backward()
    assert output.isfinite().all()
    assert logits.grad.isfinite().all()
    assert gates.grad.isfinite().all()
    assert predicted_by_chosen(gates, logits).tolist() == [0]


@pytest.mark.parametrize('name', SPECIALISED)
@pytest.mark.parametrize('size', [28, 29])
def test_starts_together_equal_starts_one_by_one(name: str, size: int) -> None:
    model = timm.create_model(name, **({} if name == 'moe_cifar100' else {'img_size': size})).double()
    x = batch_for(model)[0].double().requires_grad_()
    branches = [*model.experts, model.gate]
    model.eval()
    together, apart = start_together(branches, x), [branch.start(x) for branch in branches]
    torch.testing.assert_close(together, apart)
    for outputs in (together, apart):
        loss = sum((output * torch.arange(output.numel()).view_as(output)).sum() for output in outputs)
        (gradient,) = torch.autograd.grad(loss, x)
        if outputs is together:
            expected = gradient
    torch.testing.assert_close(gradient, expected)


def test_terms_of_a_specialised_network() -> None:
    model = build('attentive', importance_loss_weight=0.2)
    x, y = batch_for(model)
    criterion = nn.CrossEntropyLoss()
    result = ClassificationTask(model, criterion)(x, y)
    _, gates = copy.deepcopy(model).forward_features(x)
    similarity = similarity_loss(gates, sample_distances(x), 1e-3, 1e-3)
    torch.testing.assert_close(result['loss_importance'], 0.2 * importance_loss(gates))
    torch.testing.assert_close(result['loss_similarity'], similarity)
    expected = criterion(result['output'], y) + result['loss_importance'] + similarity
    torch.testing.assert_close(result['loss'], expected)
    assert {'gate_entropy', 'use_entropy', 'prediction_information', 'class_information'} <= result.keys()


def test_soft_targets_leave_out_the_true_class() -> None:
    model = build('softmax')
    x, _ = batch_for(model)
    output = model(x)
    terms = deepmoe_plugin.gating_terms(model, torch.rand(6, 10), None, output.sum())
    assert 'class_information' not in terms
    assert 'loss_importance' in terms


@pytest.mark.parametrize('distilled', ['output', 'gate'])
def test_distillation_trains_the_gate_alone(distilled: str) -> None:
    teacher = build('fashion')
    student = timm.create_model('moe_fashion_mnist', distilled=distilled)
    student.load_state_dict(teacher.state_dict())
    before = copy.deepcopy(student.state_dict())
    x, y = batch_for(student)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(student.train()(x), y).backward()
    optimizer.step()
    changed = {key for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
    assert {'gate.head.weight', 'gate.head.bias'} <= changed
    assert not any(key.startswith('experts.') for key in changed)
    assert any(key.startswith('gate.trunk.') for key in changed) == (distilled == 'gate')
    for key in before:
        if key in teacher.state_dict():
            assert torch.equal(before[key], teacher.state_dict()[key]), key
