"""Trained weights that come with the package."""

import os
import socket
from pathlib import Path

import pytest
import timm
import torch
from small_networks import images
from timm.data import create_dataset, create_loader, resolve_data_config

from deepmoe_plugin import gate_statistics, sparsify
from deepmoe_plugin.cli import evaluate
from deepmoe_plugin.models.registration import WEIGHTS

NAMES = timm.list_models('*deepmoe*', pretrained=True)


def test_every_file_has_a_name_and_a_card():
    assert sorted(path.stem for path in WEIGHTS.glob('*.safetensors')) == sorted(NAMES) != []
    assert sorted(path.stem for path in WEIGHTS.glob('*.md')) == sorted(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_weights_load_without_a_network_connection_and_run_sparsely(name, monkeypatch):
    monkeypatch.setattr(socket, 'socket', None)
    model = timm.create_model(name.partition('.')[0], pretrained=True).eval()
    assert f'{model.pretrained_cfg["architecture"]}.{model.pretrained_cfg["tag"]}' == name
    batch = images(4)
    stats = gate_statistics(model, [batch])
    assert 0.2 < stats.kept_experts < 0.8
    expected = model(batch)
    assert expected.std() > 0.5  # trained: a new classifier's logits are close to each other
    torch.testing.assert_close(sparsify(model)(batch), expected, rtol=1e-3, atol=1e-3)


def test_other_classes_and_channels_start_from_the_weights():
    model = timm.create_model('wide_deepmoe_resnet20_cifar', pretrained=True, num_classes=7, in_chans=1)
    full = timm.create_model('wide_deepmoe_resnet20_cifar', pretrained=True)
    assert torch.equal(model.layer3[2].conv2.weight, full.layer3[2].conv2.weight)
    assert model(images(2)[:, :1]).shape == (2, 7)


def test_the_dense_twin_does_not_take_the_weights_of_a_gated_network():
    with pytest.raises(ValueError, match=r'checkpoint of a gated network.*leave out gated=False'):
        timm.create_model('wide_deepmoe_resnet20_cifar', pretrained=True, gated=False)


@pytest.mark.slow
def test_accuracy_and_cost_on_cifar100():
    """`DEEPMOE_DATA` names a folder with `cifar100/val/CLASS/*`; without it the test skips."""
    root = Path(os.environ.get('DEEPMOE_DATA', '')) / 'cifar100'
    if not os.environ.get('DEEPMOE_DATA') or not root.is_dir():
        pytest.skip('DEEPMOE_DATA does not name a folder with cifar100')
    model = timm.create_model('wide_deepmoe_resnet20_cifar', pretrained=True).eval()
    config = resolve_data_config({}, model=model)
    names = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')
    loader = create_loader(
        create_dataset('', root=str(root), split='validation'), batch_size=250, use_prefetcher=False, num_workers=0,
        **{name: config[name] for name in names},
    )  # fmt: skip
    result = evaluate.evaluate(model, loader)
    assert (result.predicted == result.labels).double().mean() >= 0.66
    assert result.macs.total.double().mean() <= 43.5e6
    assert result.dynamic >= 0.2
