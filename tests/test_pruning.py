"""`prune`: exact on the calibration images, smaller, and loadable by name."""

from functools import partial

import pytest
import timm
import torch
from small_networks import SMALL, images, randomise, small, widths
from timm.layers import GroupNorm, StdConv2d
from timm.models import save_for_hf
from torch import nn

import deepmoe_plugin


def gated(structure: str, **kwargs) -> torch.nn.Module:
    """A network whose images keep part of the experts, some experts of every layer never."""
    model = randomise(small(structure, **kwargs)).eval()
    with torch.no_grad():
        model.gating.gates.weight[::3] = -1
    return model


@pytest.mark.parametrize('structure', SMALL)
def test_pruned_network_is_smaller_and_exact(structure):
    model = gated(structure)
    x = images(6)
    smaller = deepmoe_plugin.prune(model, [x[:4], x[4:]])
    stats = deepmoe_plugin.gate_statistics(model, x)
    least = model.gating.gates.experts_per_gate
    used = [max(least, int(part.any(0).sum())) for part in stats.kept.split(stats.widths, dim=1)]
    if not model.expert_layers[-1].consumer:
        used[-1] = stats.widths[-1]
    assert widths(smaller) == used == list(smaller.pruning.widths)
    assert sum(used) < sum(smaller.pruning.widths_before)
    assert not smaller.training
    torch.testing.assert_close(smaller(x), model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(deepmoe_plugin.sparsify(smaller)(x), model(x), rtol=1e-4, atol=1e-4)
    channels = [info['num_chs'] for info in smaller.feature_info]
    assert channels == [feature.shape[1] for feature in smaller.forward_intermediates(x, intermediates_only=True)]


@pytest.mark.parametrize('structure', ['bottleneck_a', 'grouped'])
def test_saved_and_loaded_by_name(structure, tmp_path):
    model = gated(structure, embed_loss_weight=1.0, in_chans=1)
    model.reset_classifier(7)
    x = images(4, channels=1)
    smaller = deepmoe_plugin.prune(model, [(x, torch.zeros(4))])
    save_for_hf(smaller, str(tmp_path / 'pruned'), safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path / "pruned"}', pretrained=True).eval()
    assert torch.equal(loaded(x), smaller(x))
    assert loaded(x).shape == (4, 7)


@pytest.mark.parametrize(('structure', 'left'), [('basic', 1), ('grouped', 8)])
def test_layer_that_nobody_keeps_holds_the_experts_of_one_gate(structure, left):
    model = gated(structure)
    with torch.no_grad():
        model.gating.gates.weight[: widths(model)[0] // left] = -1
    x = images(3)
    smaller = deepmoe_plugin.prune(model, x)
    assert widths(smaller)[0] == left
    torch.testing.assert_close(smaller(x), model(x), rtol=1e-4, atol=1e-4)


def test_tolerance_removes_more_and_reports_the_accuracy():
    model = gated('cifar')
    x = images(20)
    with torch.no_grad():
        labels = model(x).argmax(1)
    loader = [(x, labels)]
    exact = deepmoe_plugin.prune(model, loader)
    smaller = deepmoe_plugin.prune(model, loader, tolerance=0.4)
    assert sum(smaller.pruning.widths) < sum(exact.pruning.widths)
    assert exact.pruning.top1 is None
    assert smaller.pruning.top1_before == 100
    with torch.no_grad():
        expected = 100 * (smaller(x).argmax(1) == labels).float().mean().item()
    assert smaller.pruning.top1 == pytest.approx(expected)
    assert deepmoe_plugin.prune(model, [x], tolerance=0.4).pruning.top1 is None


def test_the_original_stays_as_it_is():
    model = gated('basic').train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    deepmoe_plugin.prune(model, [(images(4), torch.zeros(4))], tolerance=0.1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize(
    ('make', 'loader', 'tolerance', 'message'),
    [
        (lambda: gated('basic'), [], 0.0, 'empty'),
        (lambda: gated('basic'), [images(2)], 1.0, 'tolerance'),
        (lambda: gated('basic'), [images(2)], -0.1, 'tolerance'),
        (lambda: gated('basic'), iter([images(2)]), 0.1, 'DataLoader'),
        (lambda: small('basic', gated=False), [images(2)], 0.0, 'create_model'),
        (lambda: small('basic', features_only=True), [images(2)], 0.0, 'create_model'),
    ],
)
def test_bad_arguments(make, loader, tolerance, message):
    with pytest.raises(ValueError, match=message):
        deepmoe_plugin.prune(make(), loader, tolerance)


@pytest.mark.parametrize('structure', SMALL)
def test_what_is_frozen_stays_frozen(structure):
    model = gated(structure, drop_path_rate=0.1) if 'vgg' not in structure else gated(structure)
    deepmoe_plugin.freeze_gating(model)
    next(model.parameters()).requires_grad_(False)
    smaller = deepmoe_plugin.prune(model, [images(4)])
    assert smaller.gating.frozen
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in smaller.named_parameters() if parameter.requires_grad} == trains
    gates = smaller.gating.packed_gates(images(4))
    optimizer = torch.optim.SGD(smaller.parameters(), 0.1)
    smaller.train()(images(4)).square().mean().backward()
    optimizer.step()
    assert torch.equal(smaller.gating.packed_gates(images(4)), gates)


def test_all_other_state_stays():
    model = gated('cifar', target_kept=0.5)
    model.set_grad_checkpointing()
    model.drop_rate = 0.3
    model.bn1.momentum = 0.01
    model.gating.gate_loss_weight = 0.25
    model.gating.gates.threshold.fill_(0.01)
    model.layer1[0].conv2.to(memory_format=torch.channels_last)
    calls = []
    model.fc.register_forward_hook(lambda *_: calls.append(1))
    smaller = deepmoe_plugin.prune(model, [images(4)])
    calls.clear()
    smaller(images(4))
    assert calls == [1]
    assert smaller.grad_checkpointing
    assert (smaller.drop_rate, smaller.bn1.momentum, smaller.gating.gate_loss_weight) == (0.3, 0.01, 0.25)
    assert smaller.gating.gates.threshold == model.gating.gates.threshold > 0
    assert smaller.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    mixed = gated('cifar').to(torch.bfloat16)
    mixed.gating.float()
    types = {name: value.dtype for name, value in mixed.state_dict().items()}
    assert {n: v.dtype for n, v in deepmoe_plugin.prune(mixed, [images(2)]).state_dict().items()} == types


def test_pruned_again_and_in_ddp_form_of_norms(tmp_path):
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(gated('basic')).eval()
    smaller = deepmoe_plugin.prune(model, [images(4)])
    again = deepmoe_plugin.prune(smaller, [images(2)])
    torch.testing.assert_close(again(images(2)), model(images(2)), rtol=1e-4, atol=1e-4)
    assert sum(widths(again)) <= sum(widths(smaller))
    save_for_hf(again, str(tmp_path / 'pruned'), safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path / "pruned"}', pretrained=True).eval()
    torch.testing.assert_close(loaded(images(2)), again(images(2)))


def changed(**modules):
    """The network 'cifar' with other modules in some places."""

    def make() -> torch.nn.Module:
        model = gated('cifar')
        for name, module in modules.items():
            model.set_submodule(name.replace('__', '.'), module)
        return model

    return make


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (changed(fc=nn.Linear(64, 7)), r'fc has a weight of shape \(7, 64\).*reset_classifier\(7\)'),
        (changed(fc=nn.Identity()), r'reset_classifier\(0\)'),
        (changed(layer1__0__conv1=StdConv2d(16, 32, 3, padding=1)), r'layer1\.0\.conv1'),
        (changed(conv1=StdConv2d(3, 16, 3, padding=1)), 'conv1 is of type StdConv2d'),
        (changed(act1=nn.SiLU()), 'act1 is of type SiLU'),
        (changed(layer1__0__act1__act=nn.Softmax2d()), r'layer1\.0\.act1'),
        (changed(extra=nn.Linear(2, 2)), 'extra was added'),
        (lambda: gated('vgg', conv_layer=StdConv2d), r'features\.0'),
        (lambda: gated('cifar', norm_layer=partial(GroupNorm, num_groups=4)), 'create the model with batch norms'),
    ],
)
def test_networks_that_their_name_does_not_tell(make, message):
    with pytest.raises(ValueError, match=message):
        deepmoe_plugin.prune(make(), [images(2)])
