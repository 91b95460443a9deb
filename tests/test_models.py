"""Every registered model keeps timm's model contract, and the numbers and invariants of the paper's networks."""

import copy
import io
import math
import pickle
import re
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
from small_networks import RESNETS, SMALL, FixedGates, images, randomise, small, widths
from timm.layers import BlurPool2d
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from deepmoe_plugin import count_macs, gating_terms
from deepmoe_plugin.activation import spread
from deepmoe_plugin.gating import GatingNetwork
from deepmoe_plugin.macs import MacsTable
from deepmoe_plugin.models.deepmoe_vgg import DeepMoEVGG

CONVNEXTS = [
    f'{version}_{size}'
    for version in ('convnext', 'convnextv2')
    for size in ('atto', 'femto', 'pico', 'nano', 'tiny', 'small', 'base')
]
GATED = sorted(
    [f'{width}_deepmoe_resnet{depth}' for width in ('wide', 'narrow') for depth in (18, 34, 50, 101)]
    + ['wide_deepmoe_resnet50b']
    + [f'{width}_deepmoe_resnet{depth}_cifar' for width in ('wide', 'narrow') for depth in (20, 32, 56, 110)]
    + [f'{width}_deepmoe_vgg{depth}_bn' for width in ('wide', 'narrow') for depth in (11, 13, 16, 19)]
    + [f'{width}_deepmoe_{net}' for width in ('wide', 'narrow') for net in ('vgg16_cifar', 'drn_a_50')]
    + [f'{width}_deepmoe_{net}' for width in ('wide', 'narrow') for net in CONVNEXTS]
)
DENSE = ['drn_a_50', 'resnet110_cifar', 'resnet20_cifar', 'resnet32_cifar', 'resnet56_cifar', 'vgg16_cifar']
ALL = sorted(GATED + DENSE)
HUGE = ['wide_deepmoe_resnet101', *(name for name in GATED if name.endswith(('_bn', '_tiny', '_small', '_base')))]
AFFORDABLE = [pytest.param(name, marks=pytest.mark.slow) if name in HUGE else name for name in ALL]

structures = pytest.mark.parametrize('structure', SMALL)
resnets = pytest.mark.parametrize('structure', RESNETS)
with_blocks = pytest.mark.parametrize('structure', [name for name in SMALL if not name.startswith('vgg')])


def meta_model(name, **kwargs):
    return timm.create_model(name, device='meta', **kwargs)


def meta_images(model, batch=2, size=None):
    channels, height, width = model.default_cfg['input_size']
    return torch.empty(batch, channels, *((size, size) if size else (height, width)), device='meta')


def missing_gradients(model):
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# Names and numbers


def test_registered_names_are_those_of_the_design():
    families = ('deepmoe_resnet', 'deepmoe_vgg', 'deepmoe_convnext')
    assert sorted(name for family in families for name in timm.list_models(module=family)) == ALL


SHORTCUTS_TOO = ('base', 'shortcut', 'head')
SHORTCUTS_NOT = ('base', 'head')
HIGH = (*[1] * 12, 2503 / 512)
MIDDLE = (*[1] * 5, 2293 / 256, *[1] * 7)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'size', 'groups', 'params', 'gmacs'),
    [
        ('narrow_deepmoe_resnet50', {}, (224, 224), SHORTCUTS_TOO, '25.557', '4.089'),
        ('narrow_deepmoe_resnet50', {}, (224, 224), SHORTCUTS_NOT, '25.557', '3.7295'),
        ('wide_deepmoe_resnet50', {}, (224, 224), SHORTCUTS_TOO, '68.883', '11.398'),
        ('wide_deepmoe_resnet50b', {}, (224, 224), SHORTCUTS_TOO, '41.912', '6.761'),
        ('narrow_deepmoe_resnet101', {}, (224, 224), SHORTCUTS_TOO, '44.549', '7.801'),
        ('narrow_deepmoe_resnet18', {}, (224, 224), SHORTCUTS_TOO, '11.690', '1.814'),
        ('wide_deepmoe_resnet18', {}, (224, 224), SHORTCUTS_TOO, '22.679', '3.490'),
        ('narrow_deepmoe_resnet34', {}, (224, 224), SHORTCUTS_TOO, '21.798', '3.664'),
        ('wide_deepmoe_resnet34', {}, (224, 224), SHORTCUTS_TOO, '42.891', '7.190'),
        ('narrow_deepmoe_resnet56_cifar', {}, (32, 32), SHORTCUTS_TOO, '0.859', '0.1255'),
        ('resnet56_cifar', {}, (32, 32), SHORTCUTS_TOO, '0.859', '0.1255'),
        ('wide_deepmoe_resnet56_cifar', {}, (32, 32), SHORTCUTS_TOO, '1.709', '0.2505'),
        ('narrow_deepmoe_vgg16_cifar', {}, (32, 32), SHORTCUTS_TOO, '14.770', '0.3132'),
        ('vgg16_cifar', {}, (32, 32), SHORTCUTS_TOO, '14.770', '0.3132'),
        ('narrow_deepmoe_vgg16_cifar', dict(widen=HIGH), (32, 32), SHORTCUTS_TOO, '24.148', '0.3501'),
        ('narrow_deepmoe_vgg16_cifar', dict(widen=MIDDLE), (32, 32), SHORTCUTS_TOO, '24.161', '0.9140'),
        ('narrow_deepmoe_vgg16_cifar', dict(widen=1.28), (32, 32), SHORTCUTS_TOO, '24.16', '0.513'),
        ('narrow_deepmoe_drn_a_50', dict(num_classes=0), (1024, 2048), SHORTCUTS_TOO, '23.508', '797.35'),
        ('narrow_deepmoe_drn_a_50', dict(num_classes=0), (1024, 2048), SHORTCUTS_NOT, '23.508', '705.01'),
        ('drn_a_50', dict(num_classes=0), (1024, 2048), SHORTCUTS_TOO, '23.508', '797.35'),
        ('wide_deepmoe_drn_a_50', dict(num_classes=0), (1024, 2048), SHORTCUTS_TOO, '66.834', '2260.9'),
        ('wide_deepmoe_drn_a_50', dict(num_classes=0), (1024, 2048), SHORTCUTS_NOT, '66.834', '2168.5'),
        ('narrow_deepmoe_convnext_tiny', {}, (224, 224), ('base',), '28.589', '4.455'),
        ('wide_deepmoe_convnext_tiny', {}, (224, 224), ('base',), '54.494', '8.617'),
        ('narrow_deepmoe_convnext_base', {}, (224, 224), ('base',), '88.591', '15.354'),
        ('narrow_deepmoe_convnextv2_tiny', {}, (224, 224), ('base',), '28.635', '4.455'),
    ],
)
def test_parameters_and_macs_are_those_of_the_design(name, kwargs, size, groups, params, gmacs):
    model = meta_model(name, **kwargs)
    own = sum(p.numel() for key, p in model.named_parameters() if not key.startswith('gating.'))
    dense = count_macs(model, torch.empty(1, 3, *size, device='meta')).dense_by_group
    assert f'{own / 1e6:.{len(params.split(".")[1])}f}' == params
    assert f'{sum(dense[group] for group in groups) / 1e9:.{len(gmacs.split(".")[1])}f}' == gmacs


def test_half_the_experts_of_a_wide_network_cost_what_the_narrow_one_costs():
    table = MacsTable(meta_model('wide_deepmoe_resnet50'), (224, 224))
    half = torch.cat([torch.arange(width) < width // 2 for width in table.widths])[None]
    of_base = [cost.group in SHORTCUTS_TOO for cost in table.costs]
    narrow = MacsTable(meta_model('narrow_deepmoe_resnet50'), (224, 224)).dense(SHORTCUTS_TOO)
    assert table.by_module(half)[0, torch.tensor(of_base)].sum().item() == narrow


def test_embedding_costs_about_two_percent_of_the_base_network():
    dense = count_macs(meta_model('narrow_deepmoe_resnet50'), torch.empty(1, 3, 224, 224, device='meta')).dense_by_group
    assert 0.005 < dense['embedding'] / dense['base'] < 0.02


# timm's model contract, for every registered model


@pytest.mark.parametrize('name', ALL)
def test_contract_on_shapes(name):
    model = meta_model(name, num_classes=7, dtype=torch.float64)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {'meta'}
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float64}
    x = meta_images(model).double()
    features = model.forward_features(x)
    assert tuple(features.shape[2:]) == model.default_cfg['pool_size']
    assert features.shape[1] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model(x).shape == (2, 7)
    model(x).sum().backward()
    assert not missing_gradients(model)
    taps = [(info['num_chs'], math.ceil(x.shape[-1] / info['reduction'])) for info in model.feature_info]
    output, intermediates = model.forward_intermediates(x)
    assert output.shape == features.shape
    assert [(tap.shape[1], tap.shape[2]) for tap in intermediates] == taps
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.get_classifier().weight.dtype == torch.float64


@pytest.mark.parametrize('name', ALL)
def test_default_cfg_names_what_exists(name):
    model = meta_model(name)
    cfg = model.default_cfg
    assert cfg['architecture'] == name
    assert model.num_classes == cfg['num_classes'] == model.get_classifier().out_features
    assert model.get_submodule(cfg['classifier']) is model.get_classifier()
    first = [cfg['first_conv']] if isinstance(cfg['first_conv'], str) else cfg['first_conv']
    assert {model.get_submodule(conv).in_channels for conv in first} == {3}
    inputs = [key for key, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3]
    assert sorted(first) == sorted(inputs)


@pytest.mark.parametrize('name', ALL)
def test_features_only_on_shapes(name):
    size = 64
    whole = meta_model(name, features_only=True)
    assert whole.feature_info.channels() == [info['num_chs'] for info in meta_model(name).feature_info]
    outputs = whole(torch.empty(2, 3, size, size, device='meta'))
    assert [out.shape[1] for out in outputs] == whole.feature_info.channels()
    assert [size // out.shape[2] for out in outputs] == whole.feature_info.reduction()
    pruned = meta_model(name, features_only=True, out_indices=(1,))
    (out,) = pruned(torch.empty(2, 3, size, size, device='meta'))
    assert out.shape == outputs[1].shape


@pytest.mark.parametrize('name', AFFORDABLE)
def test_forward_and_backward(name):
    model = timm.create_model(name, num_classes=7)
    x = images(size=32)
    output = model(x)
    assert output.shape == (2, 7)
    assert output.isfinite().all()
    nn.functional.cross_entropy(output, torch.tensor([1, 2])).backward()
    assert not missing_gradients(model)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize('name', ['wide_deepmoe_resnet18', 'wide_deepmoe_resnet20_cifar', 'narrow_deepmoe_vgg16_cifar'])
def test_gates_start_at_exactly_one(name):
    model = timm.create_model(name).eval()
    for gate in model.gating(images(size=64)):
        torch.testing.assert_close(gate, torch.ones_like(gate), rtol=0, atol=2e-7)


# timm's model contract, in depth on small networks


@structures
def test_intermediates_agree_with_features(structure):
    model = randomise(small(structure)).eval()
    x = images()
    output, taps = model.forward_intermediates(x)
    torch.testing.assert_close(output, model.forward_features(x), rtol=0, atol=0)
    last = len(taps) - 1
    for indices in ([0], [1], [last], [0, 2], list(range(last + 1)), 2):
        chosen = indices if isinstance(indices, list) else [last - 1, last]
        for stop_early in (False, True):
            some = model.forward_intermediates(x, indices, stop_early=stop_early, intermediates_only=True)
            torch.testing.assert_close(some, [taps[i] for i in chosen], rtol=0, atol=0)
    with pytest.raises(ValueError, match='output_fmt'):
        model.forward_intermediates(x, output_fmt='NLC')


@structures
@pytest.mark.parametrize('out_indices', [(0,), (1,), (0, 2), (2,), (-1,)])
@pytest.mark.parametrize('embed_loss_weight', [0, 1])
def test_pruned_features(structure, out_indices, embed_loss_weight):
    x = images(dtype=torch.float64)
    whole = randomise(small(structure)).double().eval()
    taps = whole.forward_intermediates(x, intermediates_only=True)
    pruned = small(structure, features_only=True, out_indices=out_indices, embed_loss_weight=embed_loss_weight).double()
    weights = whole.state_dict()
    weights['gating.gates.weight'] = weights['gating.gates.weight'][: len(pruned.model.gating.gates.weight)]
    own = pruned.model.state_dict()
    pruned.model.load_state_dict({key: weights.get(key, own[key]) for key in own})
    torch.testing.assert_close(pruned.eval()(x), [taps[i] for i in out_indices])
    outputs = pruned.train()(x)
    terms = gating_terms(pruned, torch.tensor([1, 2]), nn.CrossEntropyLoss())
    assert ('loss_embed' in terms) == bool(embed_loss_weight and pruned.model.expert_layers)
    sum([*(out.sum() for out in outputs), *terms.values()]).backward()
    assert not missing_gradients(pruned)
    assert len(pruned.model.expert_layers) == len(pruned.model.gating.gates.widths)


@structures
def test_pruning_keeps_head_and_gates_when_asked(structure):
    model = randomise(small(structure, embed_loss_weight=1)).eval()
    expected = model(images())
    model.prune_intermediate_layers([len(model.feature_info) - 1], prune_head=False)
    torch.testing.assert_close(model(images()), expected, rtol=0, atol=0)
    assert model.gating.class_scores is not None


@structures
def test_head_without_classifier_or_pooling(structure):
    x = images()
    model = randomise(small(structure)).eval()
    pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), pre_logits, rtol=0, atol=0)
    assert small(structure, num_classes=0)(x).shape == pre_logits.shape
    unpooled = small(structure, num_classes=0, global_pool='')
    assert unpooled(x).ndim == 4
    model.reset_classifier(0, '')
    assert model(x).ndim == 4


@structures
def test_reset_classifier_resets_the_embedding_classifier_too(structure):
    model = small(structure, embed_loss_weight=1)
    assert model.gating.class_scores.out_features == 10
    model.reset_classifier(4)
    assert model.gating.class_scores.out_features == model.get_classifier().out_features == 4
    model.reset_classifier(0)
    assert model.gating.class_scores is None
    plain = small(structure)
    plain.reset_classifier(4)
    assert plain.gating.class_scores is None


@structures
def test_reset_classifier_of_a_frozen_network_leaves_its_gating_frozen(structure):
    model = small(structure, freeze_gating=True)
    model.reset_classifier(4)
    assert not any(parameter.requires_grad for parameter in model.gating.parameters())


@structures
def test_gray_images(structure):
    model = small(structure, in_chans=1)
    assert model(images(channels=1)).shape == (2, 10)
    with pytest.raises(ValueError, match='in_chans'):
        model(images())


@pytest.mark.parametrize('structure', ['basic', 'bottleneck_a', 'bottleneck_b', 'convnext'])
@pytest.mark.parametrize('stride', [8, 16, 32])
def test_output_stride(structure, stride):
    model = randomise(small(structure, output_stride=stride)).eval()
    x = images(size=64)
    assert model.forward_features(x).shape[2:] == (64 // stride, 64 // stride)
    assert model.feature_info[-1]['reduction'] == stride
    twin = randomise(small(structure, output_stride=stride, gated=False)).eval()
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith('gating.')})
    model.gating = FixedGates([torch.ones(2, width) for width in widths(model)])
    torch.testing.assert_close(model(x), twin(x), rtol=0, atol=0)


@structures
def test_dropout_before_the_classifier(structure):
    model = small(structure, drop_rate=0.5)
    frozen_statistics = [m.eval() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert frozen_statistics
    assert not torch.equal(model(images()), model(images()))
    model.eval()
    torch.testing.assert_close(model(images()), model(images()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ('structure', 'kind'),
    [
        *(
            (structure, kind)
            for structure in ('basic', 'bottleneck_a')
            for kind in ('drop_path_rate', 'drop_block_rate')
        ),
        *((structure, 'drop_path_rate') for structure in ('convnext', 'convnext_conv', 'convnextv2')),
    ],
)
def test_stochastic_depth_and_drop_block(structure, kind):
    rate = {'drop_path_rate': 0.6, 'drop_block_rate': 0.3}[kind]
    model = randomise(small(structure, **{kind: rate}))
    x = images(size=64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    torch.manual_seed(0)
    outputs = [model(x) for _ in range(4)]
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])
    sum(output.sum() for output in outputs).backward()
    assert not missing_gradients(model)
    plain = randomise(small(structure)).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(x), plain(x), rtol=0, atol=0)


@structures
def test_layer_wise_learning_rate_decay(structure):
    model = small(structure, embed_loss_weight=1)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    scale = {names[p]: group['lr_scale'] for group in groups for p in group['params']}
    decay = {names[p]: group['weight_decay'] for group in groups for p in group['params']}
    assert scale.keys() == set(names.values())
    # New, randomly initialised parameters learn at the full rate; the stem at the lowest.
    assert {scale[name] for name in scale if name.startswith('gating.')} == {1.0}
    first = f'{model.default_cfg["first_conv"][0]}.weight'
    assert scale[first] == min(scale.values()) < 1
    assert decay['gating.gates.weight'] == 0
    assert decay[first] == decay['gating.embedding.layers.0.conv.weight'] == 0.05


@structures
def test_timm_optimizers_leave_the_gate_heads_undecayed(structure):
    model = small(structure)
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=1e-4)
    decayed = {id(p) for group in optimizer.param_groups if group['weight_decay'] for p in group['params']}
    assert id(model.gating.gates.weight) not in decayed
    assert id(model.get_classifier().weight) in decayed


@with_blocks
def test_gradient_checkpointing_changes_nothing_but_memory(structure):
    calls = []
    # With a block or two in each stage, the parts without checkpoints are most of a small ConvNeXt.
    model = randomise(small(structure, **(dict(depths=(3, 3, 3, 3)) if structure.startswith('convnext') else {})))
    model.gating.register_forward_hook(lambda *_: calls.append(1))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    x = images(size=64)
    expected = model(x)
    expected.square().sum().backward()
    plain = gradients(model)
    stored = sum(saved_bytes(model, x).values())
    model.zero_grad()
    calls.clear()
    model.set_grad_checkpointing()
    output = model(x)
    output.square().sum().backward()
    assert len(calls) == 1, 'the gates must not be computed again in the backward pass'
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(model), plain)
    assert sum(saved_bytes(model, x).values()) < 0.8 * stored
    torch.testing.assert_close(model.eval().forward_intermediates(x)[0], model.forward_features(x), rtol=0, atol=0)
    model.set_grad_checkpointing(False)
    assert not any(getattr(module, 'grad_checkpointing', False) for module in model.modules())


def saved_bytes(model, x):
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    assert output.requires_grad
    return saved


@pytest.mark.parametrize('structure', ['vgg', 'vgg_cifar'])
def test_vgg_has_no_gradient_checkpointing_as_in_timm(structure):
    model = small(structure)
    model.set_grad_checkpointing(False)
    with pytest.raises(AssertionError, match='checkpointing not supported'):
        model.set_grad_checkpointing()


@structures
@pytest.mark.parametrize('act', [nn.SiLU, nn.LeakyReLU, nn.GELU], ids=lambda act: act.__name__)
def test_other_activations(structure, act):
    if act is nn.GELU:
        act = inplace_ignored(nn.GELU)
    model = randomise(small(structure, act_layer=act)).eval().double()
    twin = randomise(small(structure, act_layer=act, gated=False)).eval().double()
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith('gating.')})
    model.gating = FixedGates([torch.ones(2, width) for width in widths(model)])
    x = images(dtype=torch.float64)
    torch.testing.assert_close(model(x), twin(x), rtol=0, atol=0)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(twin))


def inplace_ignored(act):
    return lambda inplace=False: act()


@resnets
@pytest.mark.parametrize('widen', [1, 0.5])
def test_group_norm(structure, widen):
    norm = lambda channels, **kwargs: nn.GroupNorm(4, channels, **kwargs)  # noqa: E731
    model = small(structure, norm_layer=norm, widen=widen)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    model(images()).sum().backward()
    assert not missing_gradients(model)


@pytest.mark.parametrize('structure', ['basic', 'bottleneck_a', 'cifar'])
@pytest.mark.parametrize('aa_layer', [nn.AvgPool2d, BlurPool2d])
@pytest.mark.parametrize('widen', [1, 0.5, 2])
def test_anti_aliasing(structure, aa_layer, widen):
    model = small(structure, aa_layer=aa_layer, widen=widen)
    model(images(size=64)).sum().backward()
    assert not missing_gradients(model)


def test_anti_aliasing_of_an_unwidened_network_is_timms():
    model = timm.create_model('narrow_deepmoe_resnet18', aa_layer=BlurPool2d, num_classes=10).eval()
    twin = timm.create_model('resnet18', aa_layer=BlurPool2d, num_classes=10).eval()
    model.load_state_dict(twin.state_dict())
    torch.testing.assert_close(model(images()), twin(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('structure', ['vgg', 'vgg_cifar'])
@pytest.mark.parametrize('act', [nn.ReLU, nn.SiLU])
def test_vgg_without_norm(structure, act):
    # timm's factory drops arguments that are None, so this network is built by hand.
    kwargs = dict(SMALL[structure][1], small_images=structure == 'vgg_cifar', widen=2, num_classes=10)
    model = DeepMoEVGG(norm_layer=None, act_layer=act, **kwargs)
    assert [layer.norm for layer in model.expert_layers] == [''] * len(model.expert_layers)
    assert all(isinstance(model.get_submodule(layer.act).act, act) for layer in model.expert_layers)
    model(images()).sum().backward()
    assert not missing_gradients(model)


@structures
def test_channels_last(structure):
    model = randomise(small(structure)).eval()
    expected = model(images())
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images().to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)


@structures
@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_dtype_on_creation(structure, dtype):
    model = small(structure, dtype=dtype).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    output = model(images(dtype=dtype))
    assert output.dtype == dtype
    assert output.isfinite().all()


@structures
def test_autocast_computes_gates_in_float32(structure):
    model = randomise(small(structure))
    with torch.autocast('cpu', torch.float16):
        output = model(images())
        gates = model.gating(images())
    assert {gate.dtype for gate in gates} == {torch.float32}
    output.float().sum().backward()
    assert not missing_gradients(model)


@structures
def test_deepcopy_and_pickle(structure):
    model = randomise(small(structure, embed_loss_weight=1, target_kept=0.5))
    output = model(images())  # leaves a record with a graph, which belongs to this model only
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not twin.passes.take()
        torch.testing.assert_close(twin.eval()(images()), model.eval()(images()), rtol=0, atol=0)
        model.train()
    assert len(model.passes.take(output)) == 1


# Tracing and compiling


@structures
def test_fx(structure):
    from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor, get_graph_node_names

    model = randomise(small(structure)).eval()
    leaves = dict(leaf_modules=list(timm.models.get_notrace_modules()))
    leaves['autowrap_functions'] = list(timm.models.get_notrace_functions())
    _, eval_nodes = get_graph_node_names(model, tracer_kwargs=leaves)
    traced = create_feature_extractor(model, return_nodes={eval_nodes[-1]: 'out'}, tracer_kwargs=leaves)
    torch.testing.assert_close(traced(images())['out'], model(images()), rtol=0, atol=0)
    assert NodePathTracer(**leaves) is not None


@pytest.mark.parametrize('structure', [name for name in SMALL if name != 'vgg'])  # its dense twin cannot be traced
@pytest.mark.parametrize('train', [False, True])
def test_symbolic_trace(structure, train):
    model = randomise(small(structure)).train(train)
    twin = copy.deepcopy(model)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(images()), twin(images()), rtol=0, atol=0)


@structures
def test_jit_trace(structure):
    model = randomise(small(structure, embed_loss_weight=1)).eval()
    traced = torch.jit.trace(model, images())
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    stored.seek(0)
    x = images(3, seed=1)
    torch.testing.assert_close(torch.jit.load(stored)(x), model(x), rtol=1e-5, atol=1e-5)


def test_quantization_observers_are_inserted():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    model = randomise(small('cifar')).eval()
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(), (images(),))
    torch.testing.assert_close(prepared(images()), model(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('structure', ['cifar', 'vgg_cifar', 'convnextv2'])
def test_gradients_of_each_image_by_function_transforms(structure):
    # In double precision: one rounding more or less and a ReLU near zero has another gradient.
    model, target = randomise(small(structure)).double().eval(), torch.tensor([1, 2])
    x = images(dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, x, y):
        logits = torch.func.functional_call(model, parameters, (x[None],))
        return nn.functional.cross_entropy(logits, y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, target)
    nn.functional.cross_entropy(model(x), target, reduction='sum').backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad, msg=name)


def test_forward_mode_derivative():
    model = randomise(small('cifar')).double().eval()
    x, direction = images(dtype=torch.float64), images(seed=1, dtype=torch.float64)
    expected = (model(x + 1e-6 * direction) - model(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(torch.func.jvp(model, (x,), (direction,))[1], expected, rtol=1e-4, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        output = model(torch.autograd.forward_ad.make_dual(x, direction))
        tangent = torch.autograd.forward_ad.unpack_dual(output).tangent
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)


def test_several_gradients_at_once():
    model, x = randomise(small('cifar')).eval(), images().requires_grad_()
    output = model(x)[0, :3]
    together = torch.autograd.grad(output, x, torch.eye(3), is_grads_batched=True, retain_graph=True)[0]
    for i in range(3):
        torch.testing.assert_close(together[i], torch.autograd.grad(output[i], x, retain_graph=True)[0])


@structures
def test_calling_the_parts_one_by_one_names_what_works(structure):
    parts = nn.Sequential(*list(small(structure).children())[:-2])
    with pytest.raises(ValueError, match='features_only=True'):
        parts(images())
    listed = small(
        structure,
        features_only=True,
        feature_cls='list',
        out_indices=(0, 1),
    )
    with pytest.raises(ValueError, match='features_only=True'):
        listed(images())


@pytest.mark.parametrize('structure', ['bottleneck_a', 'cifar', 'vgg', 'convnextv2'])
def test_compile_forward_and_training_step(structure):
    from deepmoe_plugin import DeepMoELoss

    torch.manual_seed(0)
    model = randomise(small(structure, embed_loss_weight=1)).double()
    reference = copy.deepcopy(model)
    x, target = images(dtype=torch.float64), torch.tensor([1, 2])
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    losses = [DeepMoELoss(each, nn.CrossEntropyLoss()) for each in (compiled, reference)]
    values = []
    for each, loss in zip((compiled, reference), losses, strict=True):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            value = loss(each(x), target)
            value.backward()
            optimizer.step()
        values.append(value.detach())
    assert 'loss_embed' in losses[0].terms
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(gradients(model), gradients(reference))
    torch.testing.assert_close(compiled.eval()(x), reference.eval()(x))


@pytest.mark.slow
def test_compile_with_inductor():
    torch.compiler.reset()
    model = randomise(small('cifar', layers=(1, 1, 1)))
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    compiled(images()).square().sum().backward()
    reference(images()).square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(reference), rtol=1e-3, atol=1e-3)


@structures
def test_export(structure):
    model = randomise(small(structure)).eval()
    batch = torch.export.Dim('batch', min=2, max=64)
    program = torch.export.export(model, (images(3),), dynamic_shapes={'x': {0: batch}})
    torch.testing.assert_close(program.module()(images(5)), model(images(5)), rtol=1e-5, atol=1e-5)


# Invariant 2: the dense twin

TWINS = [
    ('narrow_deepmoe_resnet18', 'resnet18', {}),
    ('narrow_deepmoe_resnet34', 'resnet34', {}),
    ('narrow_deepmoe_resnet50', 'resnet50', {}),
    ('narrow_deepmoe_resnet101', 'resnet101', {}),
    ('wide_deepmoe_resnet50', 'wide_resnet50_2', {}),
    ('wide_deepmoe_resnet101', 'wide_resnet101_2', {}),
    *((f'narrow_deepmoe_vgg{depth}_bn', f'vgg{depth}_bn', {}) for depth in (11, 13, 16, 19)),
    ('narrow_deepmoe_drn_a_50', 'resnet50', dict(output_stride=8)),
    *((f'{w}_deepmoe_resnet{d}_cifar', f'resnet{d}_cifar', {}) for w in ('narrow',) for d in (20, 32, 56, 110)),
    ('narrow_deepmoe_vgg16_cifar', 'vgg16_cifar', {}),
    ('narrow_deepmoe_drn_a_50', 'drn_a_50', {}),
    *((f'narrow_deepmoe_{name}', name, {}) for name in CONVNEXTS),
]


@pytest.mark.parametrize(('name', 'twin', 'kwargs'), TWINS)
def test_state_dict_keys_are_the_dense_twins_plus_gating(name, twin, kwargs):
    ours = meta_model(name).state_dict()
    theirs = meta_model(twin, **kwargs).state_dict()
    shapes = {key: value.shape for key, value in ours.items() if not key.startswith('gating.')}
    assert list(shapes.items()) == [(key, value.shape) for key, value in theirs.items()]
    assert len(shapes) < len(ours)


@pytest.mark.parametrize(
    ('name', 'twin', 'kwargs'),
    [
        ('narrow_deepmoe_resnet18', 'resnet18', {}),
        ('narrow_deepmoe_resnet50', 'resnet50', {}),
        ('wide_deepmoe_resnet50', 'wide_resnet50_2', {}),
        ('narrow_deepmoe_vgg11_bn', 'vgg11_bn', dict(mlp_ratio=1 / 64)),
        ('narrow_deepmoe_drn_a_50', 'resnet50', dict(output_stride=8)),
        ('narrow_deepmoe_resnet20_cifar', 'resnet20_cifar', {}),
        ('narrow_deepmoe_vgg16_cifar', 'vgg16_cifar', {}),
        ('narrow_deepmoe_convnext_atto', 'convnext_atto', {}),
        ('narrow_deepmoe_convnext_atto', 'convnext_atto', dict(conv_mlp=False)),
        ('narrow_deepmoe_convnextv2_atto', 'convnextv2_atto', {}),
        ('narrow_deepmoe_convnextv2_atto', 'convnextv2_atto', dict(conv_mlp=False)),
    ],
)
def test_output_is_the_dense_twins_with_its_weights(name, twin, kwargs):
    dense = randomise(timm.create_model(twin, num_classes=10, **kwargs)).eval()
    gated_kwargs = {key: value for key, value in kwargs.items() if key != 'output_stride'}
    model = timm.create_model(name, num_classes=10, **gated_kwargs).eval()
    model.load_state_dict(dense.state_dict())
    torch.testing.assert_close(model(images()), dense(images()), rtol=1e-4, atol=1e-4)


@structures
def test_training_of_an_ungated_start_equals_the_dense_twins(structure):
    model = randomise(small(structure)).double()
    twin = small(structure, gated=False).double()
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith('gating.')})
    with torch.no_grad():
        model.gating.gates.weight.fill_(1)
    x = images(dtype=torch.float64)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    ours = gradients(model)
    torch.testing.assert_close({key: ours[key] for key in gradients(twin)}, gradients(twin))


# Invariant 3: an image's output does not depend on its batch


@structures
def test_outputs_do_not_depend_on_the_batch(structure):
    model = randomise(small(structure)).eval().double()
    x = images(5, dtype=torch.float64)
    together = model(x)
    for i in range(5):
        torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(x.flip(0)), together.flip(0), rtol=1e-9, atol=1e-9)


# Invariant 7: gates sit where the definition says, and nowhere else


@structures
def test_a_gate_multiplies_exactly_the_input_of_its_consumer(structure):
    model = randomise(small(structure)).eval().double()
    x = images(dtype=torch.float64)
    gates = [torch.rand(2, width, dtype=torch.float64) for width in widths(model)]
    for gate in gates:
        gate[:, ::3] = 0
    seen = {}
    for i, layer in enumerate(model.expert_layers):
        model.get_submodule(layer.norm or layer.conv).register_forward_hook(
            lambda _m, _a, out, key=('norm', i): seen.__setitem__(key, out.clone())
        )
        for key, name in (('reader', layer.late_norm or layer.consumer), ('consumer', layer.consumer)):
            if name:
                model.get_submodule(name).register_forward_pre_hook(
                    lambda _m, args, key=(key, i): seen.__setitem__(key, args[0].clone())
                )
    model.gating = FixedGates(gates)
    model(x)
    for i, gate in enumerate(gates):
        layer = model.expert_layers[i]
        act = model.get_submodule(layer.act)
        expected = act.act(seen['norm', i]) * spread(gate, act.channels_last)
        if ('consumer', i) in seen:
            got = seen['reader', i]
            if got.shape != expected.shape:  # a pooling layer in between
                expected = nn.functional.adaptive_max_pool2d(expected, got.shape[2:])
            if layer.consumer != 'pre_logits.fc1':
                torch.testing.assert_close(got, expected, rtol=0, atol=0)
            read = seen['consumer', i]
            assert not (read[..., ::3] if act.channels_last else read[:, ::3]).any()


@structures
def test_weights_of_closed_experts_do_not_matter(structure):
    model = randomise(small(structure)).eval().double()
    x = images(dtype=torch.float64)
    layers, closed = model.expert_layers, []
    gates = []
    for i, width in enumerate(widths(model)):
        gate = torch.ones(2, width, dtype=torch.float64)
        index = torch.arange(i % 3, width, 3)
        gate[:, index] = 0
        gates.append(gate)
        closed.append(index)
    model.gating = FixedGates(gates)
    expected = model(x)
    with torch.no_grad():
        for layer, index in zip(layers, closed, strict=True):
            model.get_submodule(layer.conv).weight[index] += 7
            if layer.norm:
                model.get_submodule(layer.norm).bias[index] += 7
            if layer.late_norm:
                model.get_submodule(layer.late_norm).weight[index] += 7
                model.get_submodule(layer.late_norm).bias[index] += 7
            if layer.consumer:
                model.get_submodule(layer.consumer).weight[:, index] += 7
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        for layer, index in zip(layers, closed, strict=True):  # and those of open experts do
            model.get_submodule(layer.conv).weight[index + 1 if index[-1] + 1 < len(gates[0]) else index[:-1] + 1] += 7
        assert not torch.allclose(model(x), expected)


@structures
def test_every_gate_reaches_the_output(structure):
    model = randomise(small(structure)).eval().double()
    gates = [torch.ones(2, width, dtype=torch.float64, requires_grad=True) for width in widths(model)]
    model.gating = FixedGates(gates)
    model(images(dtype=torch.float64, size=64)).square().sum().backward()
    for gate in gates:
        assert (gate.grad != 0).any(dim=0).float().mean() > 0.5


@structures
def test_all_experts_closed_still_gives_an_output(structure):
    model = randomise(small(structure)).eval()
    model.gating = FixedGates([torch.zeros(2, width) for width in widths(model)])
    output = model(images())
    assert output.isfinite().all()
    torch.testing.assert_close(output[0], model(images(seed=9))[0] if 'vgg' in structure else output[0])


@structures
def test_experts_are_all_and_only_the_inner_activations(structure):
    model = small(structure)
    gated = {layer.act for layer in model.expert_layers}
    if structure.startswith('vgg'):
        convs = [name for name, m in model.features.named_children() if isinstance(m, nn.Conv2d)]
        assert [layer.conv for layer in model.expert_layers] == [f'features.{name}' for name in convs]
        return
    if structure.startswith('convnext'):
        assert gated == {name.removesuffix('.act') for name, m in model.named_modules() if type(m).__name__ == 'GELU'}
        return
    pattern = {'basic': 'act1', 'cifar': 'act1', 'bottleneck_b': 'act2'}.get(structure, 'act[12]')
    activations = {name for name, m in model.named_modules() if isinstance(m, nn.ReLU) and name.startswith('layer')}
    activations = {name.removesuffix('.act') for name in activations}
    assert gated == {name for name in activations if re.fullmatch(rf'layer\d\.\d\.{pattern}', name)}


# Invariant 5: importing the plugin changes nothing else


def run_python(code):
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_import_changes_no_other_model():
    done = run_python("""
        import logging, warnings
        warnings.simplefilter('error', UserWarning)
        logging.basicConfig(level='WARNING')
        import timm, torch
        from timm.models import _registry
        names = set(timm.list_models())

        def state():
            torch.manual_seed(0)
            model = timm.create_model('resnet18').eval()
            x = torch.randn(1, 3, 64, 64)
            tables = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_load_state_dict_pre_hooks')
            hooks = [len(getattr(m, name)) for m in model.modules() for name in tables]
            model.train()
            model(x.repeat(2, 1, 1, 1)).sum().backward()
            grads = [p.grad.double().sum().item() for p in model.parameters()]
            return model.eval()(x), hooks, grads, dict(model.default_cfg), [type(m) for m in model.modules()]

        before = state()
        import deepmoe_plugin
        after = state()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
        added = set(timm.list_models()) - names
        assert names <= set(timm.list_models())
        modules = {_registry._model_entrypoints[name].__module__.split('.')[0] for name in added}
        assert modules == {'deepmoe_plugin'}
    """)
    assert not done.stderr


def test_import_needs_no_segmentation_framework_and_is_quick():
    run_python("""
        import sys, time

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split('.')[0] in ('mmengine', 'mmcv', 'mmseg', 'matplotlib', 'sklearn', 'pandas'):
                    assert False, f'{name} was imported'

        import timm, timm.task, safetensors
        sys.meta_path.insert(0, Blocker())
        before = set(sys.modules)
        start = time.process_time()
        import deepmoe_plugin
        assert time.process_time() - start < 1
        heavy = {name.split('.')[0] for name in set(sys.modules) - before}
        allowed = {'deepmoe_plugin', 'timm', 'torch', 'safetensors'}
        assert not {name for name in heavy if name not in allowed and name not in sys.stdlib_module_names}, heavy
    """)


def test_gating_network_is_traced_as_a_leaf():
    assert GatingNetwork in timm.models.get_notrace_modules()
