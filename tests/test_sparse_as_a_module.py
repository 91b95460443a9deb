"""A sparse network behaves as any module: saved, copied, sent to workers, counted, in any wrapper."""

import copy
import io

import pytest
import torch
from small_networks import images, randomise, small
from torch import nn

import deepmoe_plugin


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize('structure', ['basic', 'vgg', 'features', 'wrapped'])
@pytest.mark.parametrize('twin_of', [saved_and_loaded, copy.deepcopy])
def test_saved_and_copied(structure, twin_of):
    if structure == 'features':
        model = small('basic', features_only=True)
    elif structure == 'wrapped':
        model = nn.Sequential(randomise(small('basic')), nn.Softmax(1))
    else:
        model = randomise(small(structure))
    model.eval()
    deepmoe_plugin.DeepMoELoss(model, nn.CrossEntropyLoss())
    sparse = deepmoe_plugin.sparsify(model, cache_mb=3)
    sparse(images())
    twin = twin_of(sparse)
    expected, result = model(images()), twin(images())
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    network = next(module for module in twin.modules() if isinstance(module, deepmoe_plugin.sparse.SparseNetwork))
    assert network.cache_mb == 3
    original = next(module for module in sparse.modules() if isinstance(module, deepmoe_plugin.sparse.SparseNetwork))
    assert network.network is not original.network
    with torch.no_grad():
        next(network.network.parameters()).zero_()  # the twin follows its own weights, not the original's
    torch.testing.assert_close(sparse(images()), expected, rtol=1e-4, atol=1e-5)


WRAPPERS = {
    'sparsify': deepmoe_plugin.sparsify,
    'sparsify in training': lambda model: deepmoe_plugin.sparsify(model.train()),
    'sparsify of a wrapper': lambda model: deepmoe_plugin.sparsify(nn.Sequential(model)),
    'DataParallel': nn.DataParallel,
    'AveragedModel': torch.optim.swa_utils.AveragedModel,
    'torch.compile': torch.compile,
    'Sequential': nn.Sequential,
}


@pytest.mark.parametrize('structure', ['basic', 'vgg'])
@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_macs_are_those_of_the_network(structure, wrap):
    model = randomise(small(structure)).eval()
    expected = deepmoe_plugin.count_macs(model, images())
    assert expected.total[0] < expected.dense_total
    modes = {module: module.training for module in model.modules()}
    report = deepmoe_plugin.count_macs(wrap(copy.deepcopy(model)), images())
    assert {name: value.tolist() for name, value in report.by_group.items()} == {
        name: value.tolist() for name, value in expected.by_group.items()
    }
    last = next(reversed(expected.by_module))
    assert next(reversed(report.by_module)).endswith(last)
    assert {module: module.training for module in model.modules()} == modes


def test_macs_of_features_and_of_their_sparse_network():
    model = small('basic', features_only=True).eval()
    expected = deepmoe_plugin.count_macs(model, images())
    assert torch.equal(deepmoe_plugin.count_macs(deepmoe_plugin.sparsify(model), images()).total, expected.total)
