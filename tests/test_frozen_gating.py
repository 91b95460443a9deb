"""Frozen gating stays frozen, whatever a host does to the base network."""

import copy
import io

import pytest
import torch
from small_networks import SMALL, images, randomise, small
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

import deepmoe_plugin


def frozen(structure: str = 'cifar', **kwargs) -> nn.Module:
    """A network of two stages of training: gates that know the image, and stay."""
    model = randomise(small(structure, **kwargs))
    deepmoe_plugin.freeze_gating(model)
    return model


def assert_gates_stay(model: nn.Module, change) -> None:
    state = {key: value.clone() for key, value in model.gating.state_dict().items()}
    gates = model.gating.packed_gates(images(4))
    change(model)
    assert all(torch.equal(value, state[key]) for key, value in model.gating.state_dict().items())
    assert torch.equal(model.gating.packed_gates(images(4)), gates)


def reset_as_lightning_does(model: nn.Module) -> None:
    """Its weight averaging assigns new statistics and lets a pass in training mode fill them."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.running_mean = torch.zeros_like(norm.running_mean)
        norm.running_var = torch.ones_like(norm.running_var)
        norm.num_batches_tracked *= 0
        norm.momentum = None
    model.train()(images(8))


def unfreeze_as_finetuning_callbacks_do(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad = True
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(images(4)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize('structure', SMALL)
@pytest.mark.parametrize(
    'change',
    [lambda model: update_bn([images(8)], model), reset_as_lightning_does, unfreeze_as_finetuning_callbacks_do],
    ids=['update_bn', 'weight_averaging', 'requires_grad'],
)
def test_nothing_moves_frozen_gating(structure, change):
    model = frozen(structure)
    base = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith('gating.')}
    assert_gates_stay(model, change)
    state = model.state_dict()
    if change is unfreeze_as_finetuning_callbacks_do or any('running_mean' in key for key in base):
        assert any(not torch.equal(value, state[key]) for key, value in base.items())  # the base did move


def test_average_of_a_frozen_network_keeps_its_gates():
    model = frozen()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    assert_gates_stay(average.module, lambda _: update_bn([images(8)], average))


@pytest.mark.parametrize('copied', [lambda model: model, copy.deepcopy, lambda model: pickled(model), nn.Module.double])
def test_unfreezing_brings_back_the_norms(copied):
    model = small('cifar')
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    deepmoe_plugin.freeze_gating(model)
    assert list(model.state_dict()) == keys
    model = copied(model)
    deepmoe_plugin.unfreeze_gating(model)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == kinds
    norm = model.gating.embedding.layers[0].norm
    before = norm.running_mean.clone()
    model.train()(images(4).to(norm.weight.dtype))
    assert not torch.equal(norm.running_mean, before)
    parameters = dict(model.named_parameters())
    assert norm.weight is parameters['gating.embedding.layers.0.norm.weight']


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_old_checkpoints_without_counters_load_into_frozen_gating():
    model = frozen()
    state = {key: value for key, value in model.state_dict().items() if not key.endswith('num_batches_tracked')}
    other = small('cifar')
    deepmoe_plugin.freeze_gating(other)
    other.load_state_dict(state)
    assert torch.equal(other.eval()(images()), model.eval()(images()))


def test_norms_with_an_activation_freeze_too():
    model = small('cifar', norm_layer=BatchNormAct2d)
    expected = model.eval()(images(4))
    deepmoe_plugin.freeze_gating(model)
    assert torch.equal(model.eval()(images(4)), expected)
    assert_gates_stay(model, lambda model: update_bn([images(8)], model))
