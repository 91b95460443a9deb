"""What hosts do with parameters by name or by position treats a gated network as its dense twin."""

import copy
import fnmatch

import pytest
import torch
from small_networks import SMALL, images, small
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import deepmoe_plugin
from deepmoe_plugin.gating.heads import GateHeads

# Parts of names by which users and configs select parameters, in timm, mmengine and hand-written loops.
SELECTORS = (
    'head', 'heads', 'classifier', 'fc', 'head.fc', 'decode_head', 'auxiliary_head', 'neck', 'conv1', 'bn1', 'layer4',
    'downsample', 'features', 'pre_logits', 'last_layer', 'logits', 'stem', 'pos_embed', 'patch_embed', 'cls_token',
)  # fmt: skip


@pytest.mark.parametrize('structure', SMALL)
def test_names_that_users_select_by_are_those_of_the_base_network(structure):
    model = small(structure, embed_loss_weight=1.0)
    own = [name for name, _ in model.named_parameters() if name.startswith('gating.')]
    assert own
    assert {part for part in SELECTORS for name in own if part in name.removeprefix('gating.')} == set()


@pytest.mark.parametrize('structure', SMALL)
def test_training_the_classifier_alone_leaves_the_gates(structure):
    model = small(structure, embed_loss_weight=1.0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(part in name for part in ('fc', 'head', 'classifier'))
    assert not any(parameter.requires_grad for parameter in model.gating.parameters())


@pytest.mark.parametrize('structure', SMALL)
def test_the_last_parameters_are_the_classifiers(structure):
    model, twin = small(structure), small(structure, gated=False)
    left_out = {id(p) for p in model.parameters()} - {id(p) for p in model_parameters(model, exclude_head=True)}
    assert left_out == {id(p) for p in model.get_classifier().parameters()}
    base = [name for name, _ in model.named_parameters() if not name.startswith('gating.')]
    assert base == [name for name, _ in twin.named_parameters()]
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert first is next(module for name, module in model.named_modules() if name in ('conv1', 'features.0', 'stem.0'))


def groups(model: nn.Module, made) -> dict[str, tuple[float, float]]:
    """Factor on the learning rate, and weight decay, of each parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group.get('lr_scale', 1.0), group['weight_decay'])
        for group in made
        for parameter in group['params']
    }


@pytest.mark.parametrize('structure', SMALL)
@pytest.mark.parametrize('num_classes', [10, 0])
def test_layer_decay(structure, num_classes):
    model = small(structure, num_classes=num_classes)
    twin = small(structure, num_classes=num_classes, gated=False)
    kwargs = dict(layer_decay=0.5, weight_decay=0.1)
    own = groups(model, param_groups_layer_decay(model, no_weight_decay_list=model.no_weight_decay(), **kwargs))
    expected = groups(twin, param_groups_layer_decay(twin, **kwargs))
    assert {name: group for name, group in own.items() if not name.startswith('gating.')} == expected
    gating = {name: group for name, group in own.items() if name.startswith('gating.')}
    assert {scale for scale, _ in gating.values()} == {max(scale for scale, _ in expected.values())}
    assert gating['gating.gates.weight'][1] == 0


@pytest.mark.parametrize('opt', ['muon', 'nmuon', 'adamuon'])
def test_muon_leaves_the_gate_heads_to_its_other_method(opt):
    model, twin = small('basic'), small('basic', gated=False)
    routes = []
    for network in (copy.deepcopy(model), twin):
        optimizer = create_optimizer_v2(network, opt, lr=0.01, weight_decay=0.1)
        network.train()(images(4)).square().mean().backward()
        optimizer.step()
        names = {parameter: name for name, parameter in network.named_parameters()}
        routes.append({names[p]: state['use_muon'] for p, state in optimizer.state.items()})
        loaded = create_optimizer_v2(network, opt, lr=0.01, weight_decay=0.1)
        loaded.load_state_dict(optimizer.state_dict())
        loaded.step()
    assert routes[0].pop('gating.gates.weight') is False
    assert {name: route for name, route in routes[0].items() if not name.startswith('gating.')} == routes[1]
    assert routes[0]['gating.embedding.layers.1.conv.weight'] is True


def test_muon_where_the_user_says_which():
    heads = GateHeads([40], 16)
    optimizer = create_optimizer_v2([{'params': [heads.weight], 'use_muon': True}], 'muon', lr=0.01)
    heads(torch.rand(2, 16).softmax(1)).sum().backward()
    optimizer.step()
    assert optimizer.state[heads.weight]['use_muon'] is True


@pytest.mark.parametrize(
    'key', ['head', 'decode_head', 'backbone', 'backbone.layer1', 'norm', 'bn1', 'fc', 'classifier']
)
def test_custom_keys_of_mmengine(key):
    pytest.importorskip('mmseg')
    from mmengine.optim import build_optim_wrapper
    from small_segmentors import backbone_config, segmentor

    config = dict(
        optimizer=dict(type='SGD', lr=0.01, weight_decay=0.1),
        paramwise_cfg=dict(custom_keys={key: dict(lr_mult=10.0, decay_mult=0.5)}),
    )
    rates = []
    for gated in (True, False):
        model = segmentor(backbone_config(gated=gated))
        wrapper = build_optim_wrapper(model, dict(config, type='OptimWrapper'))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found = {}
        for group in wrapper.param_groups:
            found.update({names.get(id(p)): (group['lr'], group['weight_decay']) for p in group['params']})
        found.pop(None)  # mmengine adds a parameter of its own
        rates.append(found)
    gating = {name: rates[0].pop(name) for name in list(rates[0]) if 'gating.' in name}
    assert rates[0] == rates[1]
    raised = {name for name, (rate, _) in gating.items() if rate > 0.05}
    expected = {'backbone': '*', 'norm': '*.norm.*'}.get(key, '')
    assert raised == set(fnmatch.filter(gating, expected))


@pytest.mark.parametrize('name', ['LearningRateDecayOptimizerConstructor', 'LayerDecayOptimizerConstructor'])
@pytest.mark.parametrize('gated', [True, False])
def test_layer_decay_of_mmseg_knows_neither_network(name, gated):
    pytest.importorskip('mmseg')
    from mmengine.optim import build_optim_wrapper
    from small_segmentors import backbone_config, segmentor

    rate = 'layer_decay_rate' if name.startswith('LayerDecay') else 'decay_rate'
    config = dict(
        type='OptimWrapper',
        optimizer=dict(type='SGD', lr=0.01),
        constructor=name,
        paramwise_cfg={rate: 0.9, 'num_layers': 6},
    )
    with pytest.raises(NotImplementedError):
        build_optim_wrapper(segmentor(backbone_config(gated=gated)), config)


def test_gates_of_a_clipped_step_as_in_timm():
    """`--clip-mode agc` leaves out the classifier, by position."""
    from timm.utils import dispatch_clip_grad

    model, twin = small('cifar'), small('cifar', gated=False)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('gating.')})
    norms = []
    for network in (model, twin):
        network.train()(images(8)).square().sum().mul(100).backward()
        before = network.fc.weight.grad.clone()
        dispatch_clip_grad(model_parameters(network, exclude_head=True), value=0.01, mode='agc')
        assert torch.equal(network.fc.weight.grad, before)
        norms.append(network.conv1.weight.grad.norm())
    torch.testing.assert_close(*norms)
    assert deepmoe_plugin.gate_statistics(model, images()).kept_experts == 1
