"""`prune`: exact on the calibration images, smaller, and loadable by name."""

import pytest
import timm
import torch
from small_networks import SMALL, images, randomise, small, widths
from timm.models import save_for_hf

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
    used = [int(part.any(0).sum()) for part in stats.kept.split(stats.widths, dim=1)]
    if not model.expert_layers[-1].consumer:
        used[-1] = stats.widths[-1]
    assert widths(smaller) == used == list(smaller.pruning.widths)
    assert sum(used) < sum(smaller.pruning.widths_before)
    assert not smaller.training
    torch.testing.assert_close(smaller(x), model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(deepmoe_plugin.sparsify(smaller)(x), model(x), rtol=1e-4, atol=1e-4)
    channels = [info['num_chs'] for info in smaller.feature_info]
    assert channels == [feature.shape[1] for feature in smaller.forward_intermediates(x, intermediates_only=True)]


def test_saved_and_loaded_by_name(tmp_path):
    model = gated('bottleneck_a', embed_loss_weight=1.0, in_chans=1)
    model.reset_classifier(7)
    x = images(4, channels=1)
    smaller = deepmoe_plugin.prune(model, [(x, torch.zeros(4))])
    save_for_hf(smaller, str(tmp_path / 'pruned'), safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path / "pruned"}', pretrained=True).eval()
    assert torch.equal(loaded(x), smaller(x))
    assert loaded(x).shape == (4, 7)


def test_layer_that_nobody_keeps_holds_one_expert():
    model = gated('basic')
    with torch.no_grad():
        model.gating.gates.weight[: widths(model)[0]] = -1
    x = images(3)
    smaller = deepmoe_plugin.prune(model, x)
    assert widths(smaller)[0] == 1
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
