"""The gating network: latent mixture, gates, freezing, budget, and what it leaves for the loss."""

import pytest
import torch
from small_networks import images, randomise, small
from torch import nn

import deepmoe_plugin
from deepmoe_plugin import gating_terms
from deepmoe_plugin.gating import GateBudget, GateHeads, GatingConfig, GatingNetwork, ShallowEmbedding
from deepmoe_plugin.gating.budget import find_threshold


def gating(widths=(4, 6), **kwargs):
    shape = dict(in_chans=3, num_classes=5)
    shape.update({key: kwargs.pop(key) for key in ('in_chans', 'num_classes', 'min_size') if key in kwargs})
    config = GatingConfig(**{'num_latent_experts': 8, 'embedding_channels': (4, 8), **kwargs})
    return GatingNetwork(config, widths, **shape)


def test_latent_mixture_weights_are_a_softmax():
    embedding = ShallowEmbedding(3, (4, 8), 6)
    torch.testing.assert_close(embedding(images(5)), torch.full((5, 6), 1 / 6))
    nn.init.normal_(embedding.mixture.weight)
    mixture = embedding(images(5))
    assert mixture.shape == (5, 6)
    assert (mixture > 0).all()
    torch.testing.assert_close(mixture.sum(1), torch.ones(5))
    assert not torch.allclose(mixture[0], mixture[1])


def test_embedding_layers_are_stride_two_convolutions_with_norm_and_relu():
    embedding = ShallowEmbedding(3, (4, 8, 16), 6)
    assert embedding.layers(images(1, 32)).shape == (1, 16, 4, 4)
    for layer, width in zip(embedding.layers, (4, 8, 16), strict=True):
        assert (layer.conv.out_channels, layer.conv.kernel_size, layer.conv.stride) == (width, (3, 3), (2, 2))
        assert layer.conv.bias is None
        assert [type(part) for part in layer] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


def test_number_of_embedding_layers_follows_the_image_size():
    assert len(small('cifar').gating.embedding.layers) == len(small('vgg_cifar').gating.embedding.layers) == 4
    assert len(small('basic').gating.embedding.layers) == len(small('vgg').gating.embedding.layers) == 5


def test_gates_are_the_relu_of_a_linear_map_of_the_mixture_without_bias():
    network = randomise(nn.ModuleDict(dict(inner=gating())))['inner'].eval()
    nn.init.normal_(network.gates.weight)
    x = images(3)
    first, second = network(x)
    assert (first.shape, second.shape) == ((3, 4), (3, 6))
    expected = network.embedding(x) @ network.gates.weight.T
    assert (expected < 0).any()
    torch.testing.assert_close(torch.cat([first, second], 1), expected.relu())
    assert [name for name, _ in network.gates.named_parameters()] == ['weight']


@pytest.mark.parametrize('num_latent_experts', [1, 4, 7, 64])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_heads_start_spread_around_one(num_latent_experts, dtype):
    weight = GateHeads((300, 200), num_latent_experts, dtype=dtype).weight.detach().double()
    assert torch.equal(weight.sum(1), torch.full((500,), num_latent_experts, dtype=torch.float64))
    assert weight.min() >= 0
    if num_latent_experts > 1:
        assert 0.3 < weight.std() < 0.6
        assert len(weight.unique(dim=0)) > 100


def test_neighbouring_experts_share_a_gate():
    network = gating((8, 12), experts_per_gate=4).eval()
    nn.init.normal_(network.gates.weight)
    nn.init.normal_(network.embedding.mixture.weight)
    x = images(3)
    first, second = network(x)
    assert (first.shape, second.shape) == ((3, 8), (3, 12))
    assert network.gates.weight.shape == (5, 8)
    expected = (network.embedding(x) @ network.gates.weight.T).relu()
    torch.testing.assert_close(torch.cat([first, second], 1), expected.repeat_interleave(4, dim=1))
    values = torch.randn(3, 5)
    torch.testing.assert_close(network.gates.by_gate(network.gates.by_expert(values)), values)
    network.keep_first(1)
    assert torch.equal(network(x)[0], first)


def test_gates_stay_float32_in_a_half_precision_network():
    network = gating().half().eval()
    assert {gate.dtype for gate in network(images().half())} == {torch.float32}
    with torch.autocast('cpu', torch.float16):
        assert {gate.dtype for gate in gating()(images())} == {torch.float32}


def test_initial_gates_change_with_training_and_differ_between_images():
    torch.manual_seed(0)
    network = gating().double()
    optimizer = torch.optim.SGD(network.parameters(), lr=5)
    x = images(4, dtype=torch.float64)
    wanted = torch.rand(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for _ in range(50):
        optimizer.zero_grad()
        loss = (torch.cat(network(x), 1) - wanted).square().mean()
        loss.backward()
        optimizer.step()
    gates = torch.cat(network(x), 1)
    assert (gates.std(0) > 1e-3).any()


# What a forward pass leaves for the loss


def test_record_is_handed_over_once_and_only_by_training_passes():
    network = gating(embed_loss_weight=1)
    assert not network.passes.take()
    gates = network(images(3))
    (record,) = network.passes.take(gates)
    assert record.preact.shape == (3, 10)
    assert record.embed_logits.shape == (3, 5)
    assert not network.passes.take()
    with torch.no_grad():
        gates = network(images())
    assert not network.passes.take()
    gates = network.eval()(images())
    assert gates[0].requires_grad
    assert not network.passes.take()


def test_no_classifier_without_embedding_loss():
    assert gating().class_scores is None
    assert not [name for name, _ in gating().named_parameters() if name.startswith('class_scores')]
    network = gating()
    gates = network(images())
    assert network.passes.take(gates)[0].embed_logits is None


# Freezing


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def train_once(model, x):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    model(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize('structure', ['basic', 'vgg_cifar'])
def test_frozen_gating_does_not_move_whatever_training_does(structure):
    model = randomise(small(structure, embed_loss_weight=1))
    deepmoe_plugin.freeze_gating(model)
    before = state(model)
    train_once(model, images(4, size=64))
    after = state(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in moved if name.startswith('gating.')]
    assert {name for name in before if not name.startswith('gating.') and 'weight' in name} <= moved
    assert not any(module.training for module in model.gating.modules())


def test_unfrozen_gating_moves_again_statistics_included():
    model = randomise(small('cifar'))
    deepmoe_plugin.freeze_gating(model)
    deepmoe_plugin.unfreeze_gating(model)
    assert all(module.training for module in model.gating.modules())
    before = state(model.gating)
    train_once(model, images(4))
    moved = {name for name, value in state(model.gating).items() if not torch.equal(value, before[name])}
    assert moved == before.keys() - {'gates.threshold', 'curve.points'}


def test_freezing_on_creation_equals_freezing_later():
    model = small('cifar', freeze_gating=True)
    assert model.gating.frozen
    assert not any(parameter.requires_grad for parameter in model.gating.parameters())
    assert not any(module.training for module in model.train().gating.modules())
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.startswith('gating.'))


@pytest.mark.parametrize('function', [deepmoe_plugin.freeze_gating, deepmoe_plugin.unfreeze_gating])
def test_freezing_needs_a_deepmoe_network(function):
    with pytest.raises(ValueError, match='DeepMoE network in Linear'):
        function(nn.Linear(2, 2))


# Budget


def fraction_kept(kept):
    return kept.double().mean(1)


def gates_around(mean, experts=100):
    return (mean + torch.linspace(-0.5, 0.5, experts)).expand(3, -1)


def test_threshold_closes_gates_and_leaves_the_others_as_they_are():
    gates = GateHeads([4], 2)
    preact = torch.tensor([[-0.5, 0.2, 0.7, 1.3]])
    assert gates.cut(preact)[0].tolist() == pytest.approx([0, 0.2, 0.7, 1.3])
    gates.threshold.fill_(0.5)
    assert gates.cut(preact)[0].tolist() == pytest.approx([0, 0, 0.7, 1.3])


@pytest.mark.parametrize('straight_through', [False, True])
def test_closed_gates_have_a_gradient_only_straight_through(straight_through):
    gates = GateHeads([4], 2)
    gates.threshold.fill_(0.5)
    preact = torch.tensor([[-0.5, 0.2, 0.7, 1.3]], requires_grad=True)
    cut = gates.cut(preact, straight_through)
    assert cut.tolist() == gates.cut(preact).tolist()
    (cut * torch.tensor([1.0, 2, 3, 4])).sum().backward()
    assert preact.grad.tolist() == ([[1, 2, 3, 4]] if straight_through else [[0, 0, 3, 4]])


@pytest.mark.parametrize('goal', [0.1, 0.3, 0.5, 0.8])
def test_threshold_is_where_images_spend_the_goal(goal):
    preact = 1 + torch.randn(16, 400, generator=torch.Generator().manual_seed(0))
    threshold = find_threshold(preact, fraction_kept, goal)
    assert fraction_kept(preact > threshold).mean().item() == pytest.approx(goal, abs=0.005)
    assert threshold >= 0


def test_threshold_stays_at_zero_where_the_goal_has_room_for_all():
    assert find_threshold(gates_around(1.0), fraction_kept, 1.0) == 0
    assert find_threshold(gates_around(-3.0), fraction_kept, 0.5) == 0


def test_budget_falls_along_a_curve_to_its_target_and_stays():
    budget, gates = GateBudget(0.4, steps=100), GateHeads([100], 2)
    kept = []
    for _ in range(200):
        budget.step(gates, gates_around(1.0), fraction_kept)
        kept.append(fraction_kept(gates_around(1.0) > gates.threshold).mean().item())
    assert kept[0] > 0.95
    assert kept == sorted(kept, reverse=True)
    assert kept[20] - kept[40] > 3 * (kept[60] - kept[80]) > 0  # steep first, flat at the end
    assert kept[-1] == pytest.approx(0.4, abs=0.02)


def test_budget_follows_gates_that_move():
    budget, gates = GateBudget(0.5, steps=1), GateHeads([100], 2)
    for mean in (1.0, 3.0):
        for _ in range(80):
            budget.step(gates, gates_around(mean), fraction_kept)
        assert fraction_kept(gates_around(mean) > gates.threshold).mean().item() == pytest.approx(0.5, abs=0.02)


def test_budget_continues_from_its_saved_state():
    model, twin = small('cifar', target_kept=0.5), small('cifar', target_kept=0.5)
    for i in range(10):
        model.gating.budget.step(model.gating.gates, gates_around(0.9 - 0.02 * i), fraction_kept)
    twin.load_state_dict(model.state_dict())
    for mean in (0.2, 0.7):
        for network in (model, twin):
            network.gating.budget.step(network.gating.gates, gates_around(mean), fraction_kept)
    assert model.gating.gates.threshold > 0
    torch.testing.assert_close(state(model.gating), state(twin.gating), rtol=0, atol=0)


def test_no_budget_without_target():
    assert small('cifar').gating.budget is None


def test_frozen_gating_has_a_fixed_threshold():
    model = randomise(small('cifar', target_kept=0.5)).train()
    deepmoe_plugin.freeze_gating(model)
    model(images())
    gating_terms(model)
    assert model.gating.gates.threshold == 0
