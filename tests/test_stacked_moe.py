"""Stacked mixtures of experts: sizes and forward pass of the paper, the form of the last layer, phases."""

from typing import Any

import pytest
import torch
from small_mixtures import batch_for, build, parameters, step
from timm.task import ClassificationTask
from torch import nn
from torch.nn import functional as F

from deepmoe_plugin.models.stacked_moe import StackedMoE


@pytest.mark.parametrize(
    ('name', 'kwargs', 'twin', 'twin_kwargs'),
    [
        ('dmoe_4x100_4x100', {}, 'dmoe_dnn_4x100_4x100', {}),
        ('dmoe_4x100_4x20', {}, 'dmoe_dnn_4x100_4x20', {}),
        ('dmoe_4x100_4x20', dict(gate_hidden=(50, 20)), 'dmoe_dnn_4x100_4x20', dict(hidden=(451, 20))),
        ('dmoe_4x50_4x20', {}, 'dmoe_dnn_4x50_4x20', {}),
    ],
)
def test_dnn_has_as_many_parameters_as_one_unit_allows(
    name: str, kwargs: dict[str, Any], twin: str, twin_kwargs: dict[str, Any]
) -> None:
    assert abs(parameters(name, **kwargs) - parameters(twin, **twin_kwargs)) < 1296 + 1 + 100


def test_networks_of_the_speech_experiment_build_and_train() -> None:
    """440 inputs, 4x128 - 16x128, gates 64-64, 40 classes: the sizes of the paper, on generated data."""
    sizes = dict(experts=(4, 16), hidden=(128, 128), gate_hidden=(64, 64), balance_margin=10.0)
    torch.manual_seed(0)
    model = StackedMoE(**sizes, num_classes=40, img_size=(11, 40))
    centres = torch.randn(40, 1, 11, 40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    losses = []
    for _ in range(100):
        labels = torch.randint(40, (64,))
        loss = F.cross_entropy(model(centres[labels] + 0.3 * torch.randn(64, 1, 11, 40)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_stacked_forward_pass_is_the_papers() -> None:
    model = build('stacked').eval().double()
    x, _ = batch_for(model)
    z = x.double().flatten(1)
    for layer in model.layers:
        experts = layer.experts.weight.view(4, -1, z.shape[1]), layer.experts.bias.view(4, -1)
        gate = layer.gate(z).softmax(1)
        z = sum(
            gate[:, i : i + 1] * F.relu(F.linear(z, weight, bias))
            for i, (weight, bias) in enumerate(zip(*experts, strict=True))
        )
    torch.testing.assert_close(model(x.double()), model.head(z))


@pytest.mark.parametrize(('form', 'width'), [('mixture', 6), ('single', 6), ('concat', 24)])
@pytest.mark.parametrize('layers', [1, 2, 3])
def test_form_of_the_last_layer(form: str, width: int, layers: int) -> None:
    sizes = dict(experts=(4,) * layers, hidden=(6,) * layers, gate_hidden=(5,) * layers)
    model = StackedMoE(**sizes, second_layer=form)
    assert model.num_features == width
    assert [layer.gate is not None for layer in model.layers] == [True] * (layers - 1) + [form == 'mixture']


def test_terms_of_a_stacked_network_are_numbered() -> None:
    model = build('stacked')
    x, y = batch_for(model)
    result = ClassificationTask(model, nn.CrossEntropyLoss())(x, y)
    assert {'gate_entropy_1', 'gate_entropy_2', 'class_information_1', 'use_entropy_2'} <= result.keys()
    torch.testing.assert_close(result['loss'], F.cross_entropy(result['output'], y))


def test_phase_2_goes_on_from_a_checkpoint_of_phase_1() -> None:
    model = build('stacked')
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    second = build('stacked, phase 2')
    second.load_state_dict(model.state_dict())
    totals = second.layers[0].balance.totals
    assert totals.sum() > 5
    step(second, torch.optim.SGD(second.parameters(), lr=0.1), 1)
    assert torch.equal(second.layers[0].balance.totals, totals)
