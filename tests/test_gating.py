"""The gating network: latent mixture, gates, freezing, budget, and what it leaves for the loss."""

import pytest
import torch
from small_networks import images, randomise, small
from torch import nn

import deepmoe_plugin
from deepmoe_plugin import gating_terms
from deepmoe_plugin.gating import GateBudget, GateHeads, GatingConfig, GatingNetwork, GatingRecord, ShallowEmbedding


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
    assert moved == before.keys()


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


@pytest.mark.parametrize('target', [0.3, 0.5, 0.8])
@pytest.mark.parametrize('mean', [0.9, 0.1, -0.4])
def test_lambda_is_proportional_to_the_distance_of_the_gates_from_the_target(target, mean):
    distance = mean + 0.5 - target  # lowering all gates by this leaves the target fraction above zero
    budget = GateBudget(target, 2.0)
    assert budget.step(gates_around(mean), fraction_kept)[0].item() == pytest.approx(
        2.02 * max(-1, min(1, distance)), abs=0.05
    )


def test_lambda_sees_gates_coming_before_the_first_one_closes():
    far, near = (GateBudget(0.5, 1.0).step(torch.full((2, 8), gate), fraction_kept)[0] for gate in (1.0, 0.1))
    assert near < 0.2 * far


def test_budget_pushes_harder_while_the_target_is_missed_and_softer_after_overshooting():
    budget = GateBudget(0.5, 2.0)
    first, _ = budget.step(gates_around(0.4), fraction_kept)
    for _ in range(20):
        last, _ = budget.step(gates_around(0.4), fraction_kept)
    assert last > first
    before = budget.strength.item()
    strengths = []
    for _ in range(15):
        budget.step(gates_around(-0.4), fraction_kept)
        strengths.append(budget.strength.item())
    assert strengths[0] > before
    assert strengths[-1] < before


@pytest.mark.parametrize('target', [0.3, 0.7])
@pytest.mark.parametrize('speed', [1e-6, 1e-5, 3e-4])
@pytest.mark.parametrize('spread', [0.02, 0.5])
def test_budget_settles_at_its_target(target, speed, spread):
    """Gates that start at one, part a little, and move with momentum at a speed proportional to lambda."""
    torch.manual_seed(0)
    budget, offsets = GateBudget(target, 3.0), spread * torch.randn(4, 200)
    gate, velocity, kept = torch.tensor(1.0), torch.tensor(0.0), []
    for step in range(1500):
        gates = gate + min(1, step / 300) * offsets
        velocity = 0.9 * velocity + speed * budget.step(gates, fraction_kept)[0]
        gate = gate - velocity
        kept.append((gates > 0).float().mean().item())
    assert sum(kept[-100:]) / 100 == pytest.approx(target, abs=0.02)
    assert min(kept) > target - 0.1


@pytest.mark.parametrize('target', [0.1, 0.25, 0.75])
def test_target_is_held_when_images_differ(target):
    """Heads train on mixtures that part from image to image: lambda must settle, and neither swing nor run away."""
    torch.manual_seed(0)
    model = small('cifar', target_kept=target, num_latent_experts=64).train()
    heads, centres = model.gating.gates, torch.randn(100, 64)
    optimizer = torch.optim.SGD([heads.weight], lr=0.1, momentum=0.9)
    kept, lambdas = [], []
    for step in range(1500):
        logits = centres[torch.randint(100, (64,))] + 0.5 * torch.randn(64, 64)
        preact = heads((3 * min(1, step / 500) * logits).softmax(1))
        optimizer.zero_grad()
        model.terms(GatingRecord(preact, None), None, None)['loss_gate'].backward()
        optimizer.step()
        kept.append((preact > 0).float().mean().item())
        lambdas.append(model.gating.budget.strength.item())
    assert sum(kept[-200:]) / 200 == pytest.approx(target, abs=0.02)
    assert lambdas[-1] < 100 * lambdas[0]


def test_gates_far_below_zero_are_all_lifted():
    budget = GateBudget(0.5, 1.0)
    weight, threshold = budget.step(torch.full((2, 8), -5.0), fraction_kept)
    assert weight < 0
    assert threshold == -torch.inf
    weight, threshold = budget.step(gates_around(-0.4), fraction_kept)
    assert weight < 0
    assert threshold.item() == pytest.approx(-0.4, abs=0.02)


def test_budget_continues_from_its_saved_state():
    model, twin = small('cifar', target_kept=0.5), small('cifar', target_kept=0.5)
    for i in range(10):
        model.gating.budget.step(gates_around(0.9 - 0.02 * i), fraction_kept)
    assert any(key.startswith('gating.budget.') for key in model.state_dict())
    twin.load_state_dict(model.state_dict())
    for mean in (-0.2, 0.3, 0.1):
        budgets = (model.gating.budget, twin.gating.budget)
        first, second = (budget.step(gates_around(mean), fraction_kept)[0] for budget in budgets)
        assert first == second
    torch.testing.assert_close(state(model.gating.budget), state(twin.gating.budget), rtol=0, atol=0)


def test_no_budget_without_target():
    assert small('cifar').gating.budget is None


@pytest.mark.parametrize('gate_norm', ['mean', 'sum', 'macs'])
@pytest.mark.parametrize('structure', ['cifar', 'bottleneck_a'])
def test_towards_a_target_gates_of_any_network_close_equally_fast(structure, gate_norm):
    steps = 20
    model = small(structure, target_kept=0.5, gate_norm=gate_norm).train()
    optimizer = torch.optim.SGD([model.gating.gates.weight], lr=0.1, momentum=0.9)
    for _ in range(steps):
        gates = torch.cat(model.gating(images()), 1)
        optimizer.zero_grad()
        gating_terms(model)['loss_gate'].backward()
        optimizer.step()
    expected = sum((1 - 0.9**i) / 300 for i in range(steps))  # momentum has not reached its full speed at first
    assert (1 - gates.mean()).item() == pytest.approx(expected, rel=0.3)
