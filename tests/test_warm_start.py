"""Gates of a trained network: the function stays, the order of closing is informed, and gates know the image."""

import pytest
import torch
import torch.nn.functional as F
from small_networks import images, randomise, small
from torch import nn

from deepmoe_plugin import gate_statistics, set_budget, warm_start
from deepmoe_plugin.gating.budget import find_threshold

STRUCTURES = ['cifar', 'bottleneck_a', 'vgg_cifar', 'convnext', 'grouped']


def loader(batches=4, batch=16, size=32):
    """Images of two kinds, bright and dark, that a network with random weights already treats differently."""
    found = []
    for i in range(batches):
        labels = torch.arange(batch) % 2
        x = 0.3 * images(batch, size, seed=i) + (2.0 * labels - 1)[:, None, None, None]
        found.append((x, labels))
    return found


def trained(structure, **kwargs):
    """A network whose gates are all one, as after the weights of its dense twin were loaded."""
    model = small(structure, **kwargs)
    base = randomise(small(structure, gated=False)).state_dict()
    model.load_state_dict(base)
    return model


@pytest.mark.parametrize('structure', STRUCTURES)
def test_network_stays_nearly_what_it_was_and_keeps_all_experts(structure):
    model = trained(structure).eval()
    x = loader()[0][0]
    before = model(x)
    warm_start(model, loader(), nn.CrossEntropyLoss(), epochs=8, progress=False)
    assert gate_statistics(model, x).kept_experts == 1
    after = model(x)
    assert not torch.equal(after, before)
    error = (after - before).norm() / (before - before.mean(0)).norm()
    assert error < 0.5


def test_the_experts_that_matter_least_close_first():
    model = trained('cifar').eval()
    data = loader()
    with torch.no_grad():  # nobody reads the first half of the experts of the first layer
        layer = model.expert_layers[0]
        model.get_submodule(layer.consumer).weight[:, : model.gating.gates.widths[0] // 2] = 1e-6
    warm_start(model, data, nn.CrossEntropyLoss(), epochs=8, progress=False)
    set_budget(model, torch.cat([x for x, _ in data]), kept=0.6)
    kept = gate_statistics(model, data).kept[:, : model.gating.gates.widths[0]].float()
    half = kept.shape[1] // 2
    assert kept[:, :half].mean() < 0.1 < 0.4 < kept[:, half:].mean()


def test_gates_differ_between_images_without_labels():
    torch.manual_seed(0)
    model = trained('cifar').eval()
    data = [(x, torch.zeros(len(x), dtype=torch.long)) for x, _ in loader(8)]
    warm_start(model, data, nn.CrossEntropyLoss(), epochs=12, progress=False)
    set_budget(model, torch.cat([x for x, _ in data]), kept=0.5)
    stats = gate_statistics(model, data)
    assert stats.dynamic_experts > 0.02
    kinds = stats.by_class(loader(1)[0][1].repeat(8))
    assert (kinds[0] - kinds[1]).abs().max() > 0.8  # some experts are those of bright images, some of dark ones


def test_images_of_a_group_keep_the_same():
    model = trained('cifar', num_latent_experts=4, target_macs=0.6).eval()
    data = loader(8)
    warm_start(model, data, nn.CrossEntropyLoss(), epochs=12, progress=False)
    x = torch.cat([x for x, _ in data])
    set_budget(model, x, macs=0.6)
    patterns, sizes = gate_statistics(model, x).kept.unique(dim=0, return_counts=True)
    assert len(patterns) > 1
    assert sizes.topk(min(4, len(sizes))).values.sum() > 0.9 * len(x)  # a few images lie between two groups


def test_all_groups_of_images_spend_the_same():
    from deepmoe_plugin.warm_start import _spend_alike

    model = trained('cifar', num_latent_experts=4, target_macs=0.6)
    heads = 1 + 0.05 * torch.randn_like(model.gating.gates.weight) + torch.tensor([-0.2, -0.1, 0.1, 0.2])
    columns = _spend_alike(model, heads).t()
    at_one_threshold = model.spent(columns > find_threshold(columns, model.spent, 0.6))
    torch.testing.assert_close(at_one_threshold, torch.full((4,), 0.6).double(), rtol=0, atol=0.02)
    assert model.spent(heads.t() > find_threshold(heads.t(), model.spent, 0.6)).std() > 0.1


def test_the_mixture_is_the_softmax_of_squared_distances_to_the_groups():
    from deepmoe_plugin.warm_start import SHARPNESS, _group_images

    model = trained('cifar', num_latent_experts=4).eval()
    data = loader(8)
    rows = torch.randn(sum(model.gating.gates.widths), model.gating.embedding.mixture.in_features)
    groups = _group_images(model, data, rows, progress=False)
    x = torch.cat([x for x, _ in data])
    features = model.gating.embedding.pool(x)
    distances = torch.cdist((features - features.mean(0)) @ rows.t(), groups.centers @ rows.t()).square()
    nearest, nearest_group = distances.min(1)
    torch.testing.assert_close(groups.shares, torch.bincount(nearest_group, minlength=4) / len(x))
    logits = model.gating.embedding.mixture(features)
    expected = -SHARPNESS * distances / nearest.mean()
    differences = [(values - values.mean(1, keepdim=True))[:, groups.shares > 0] for values in (logits, expected)]
    torch.testing.assert_close(*differences, rtol=1e-2, atol=0.05)


@pytest.mark.parametrize('experts_per_gate', [1, 16])
def test_worth_is_the_gradient_of_the_gates(experts_per_gate):
    """Against the definition: the root mean square over images of the loss change to first order."""
    from deepmoe_plugin.warm_start import _measure

    model = trained('cifar', experts_per_gate=experts_per_gate).eval()
    data = loader(2, 4)
    worth, activation = _measure(model, model, data, nn.CrossEntropyLoss(), 8, progress=False)
    expected = torch.zeros_like(worth)
    for x, labels in data:
        for image, label in zip(x, labels, strict=True):
            gates = torch.ones(1, len(worth), requires_grad=True)
            of_experts = gates.repeat_interleave(experts_per_gate, dim=1)
            model.gating.packed_gates = lambda _, gates=of_experts: gates
            F.cross_entropy(model(image[None]), label[None]).backward()
            del model.gating.packed_gates
            expected += gates.grad[0].square()
    torch.testing.assert_close(worth * experts_per_gate, (expected / 8).sqrt(), rtol=1e-3, atol=1e-6)
    assert (activation >= 0).all()


def test_mode_and_other_parameters_stay_and_no_hook_is_left():
    model = trained('cifar').train()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not name.startswith('gating.')}
    consumers = {f'{layer.consumer}.weight' for layer in model.expert_layers}
    warm_start(model, loader(1), nn.CrossEntropyLoss(), epochs=1, progress=False)
    assert model.training
    moved = {name for name, p in model.named_parameters() if name in frozen and not torch.equal(p, frozen[name])}
    assert moved == consumers
    assert not any(module._forward_hooks for module in model.modules())


def test_an_empty_loader_is_refused():
    with pytest.raises(ValueError, match='no batch'):
        warm_start(trained('cifar'), [], nn.CrossEntropyLoss(), progress=False)


@pytest.mark.parametrize('kinds', [1, 2])
def test_no_more_kinds_of_images_than_groups(kinds):
    model = trained('cifar', num_latent_experts=8, target_macs=0.6)
    x = images(kinds).repeat(4, 1, 1, 1)
    data = [(x, torch.arange(len(x)) % 2)]
    warm_start(model, data, nn.CrossEntropyLoss(), progress=False)
    assert model.eval()(x).isfinite().all()


def test_a_network_that_is_not_trained_is_refused():
    model = small('cifar')
    with pytest.raises(ValueError, match='needs a trained network'):
        warm_start(model, loader(1), nn.CrossEntropyLoss(), progress=False)


@pytest.mark.parametrize('dynamic', [0.1, 0.4])
def test_as_many_experts_as_asked_for_depend_on_the_image(dynamic):
    from deepmoe_plugin.stats import dynamic_share
    from deepmoe_plugin.warm_start import _mixed

    model = trained('cifar', num_latent_experts=4, target_macs=0.6)
    rank, uses = torch.randn(len(model.gating.gates.weight)), torch.randn_like(model.gating.gates.weight)
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1])
    heads = _mixed(model, rank, uses, shares, dynamic).detach()
    kept = heads.t() > find_threshold(heads.t(), model.spent, 0.6)
    assert dynamic_share(shares @ kept.float(), 1) == pytest.approx(dynamic, abs=0.05)


def test_without_dynamic_experts_all_images_keep_the_same():
    model = trained('cifar', target_macs=0.6).eval()
    data = loader()
    warm_start(model, data, nn.CrossEntropyLoss(), dynamic_experts=0, progress=False)
    set_budget(model, data, macs=0.6)
    stats = gate_statistics(model, data)
    assert stats.dynamic_experts == 0
    assert 0.1 < stats.kept_experts < 0.9


@pytest.mark.parametrize('value', [-0.1, 1.5, float('nan')])
def test_share_of_dynamic_experts_must_be_a_fraction(value):
    with pytest.raises(ValueError, match='dynamic_experts must lie between 0 and 1'):
        warm_start(trained('cifar'), loader(1), nn.CrossEntropyLoss(), dynamic_experts=value, progress=False)
