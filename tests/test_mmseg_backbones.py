"""Backbones for MMSegmentation: what a user of mmseg's own backbones expects, on the same networks as timm's."""

import copy
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from small_networks import images, randomise
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

pytest.importorskip('mmseg')

from mmseg.registry import MODELS
from small_segmentors import TYPES, backbone_config, build, make_runner, segmentor

from deepmoe_plugin import count_macs, find_deepmoe, gating_terms, sparsify
from deepmoe_plugin.macs import MacsTable

WIDTHS = {'vgg11': 128, 'convnext': 48, 'convnextv2': 320}
FIRST = {'vgg11': 'features.0.weight', 'convnext': 'stem.0.weight', 'convnextv2': 'stem.0.weight'}
types = pytest.mark.parametrize('name', TYPES)
DENSE = dict(type='DeepMoEResNet', depth=18, gated=False)


def refused(*words, error=ValueError, **kwargs):
    with pytest.raises(error) as caught:
        MODELS.build(backbone_config(**kwargs))
    for word in words:
        assert word in str(caught.value)


def base_keys(model):
    return {key for key in model.state_dict() if not key.startswith('gating.')}


@pytest.mark.parametrize(
    ('twin', 'config'),
    [
        ('resnet18', dict(type='DeepMoEResNet', depth=18)),
        ('resnet34', dict(type='DeepMoEResNet', depth=34)),
        ('wide_resnet50_2', dict(type='DeepMoEResNet', depth=50, widen=2)),
        ('resnet101', dict(type='DeepMoEResNet', depth=101)),
        ('drn_a_50', dict(type='DeepMoEDRN')),
        ('vgg11_bn', dict(type='DeepMoEVGG', depth=11)),
        ('vgg19_bn', dict(type='DeepMoEVGG', depth=19)),
        ('convnext_tiny', dict(type='DeepMoEConvNeXt')),
        ('convnext_atto', dict(type='DeepMoEConvNeXt', arch='atto', linear_pw_conv=False)),
        ('convnextv2_tiny', dict(type='DeepMoEConvNeXt', use_grn=True, layer_scale_init_value=0)),
    ],
)
def test_state_dict_is_that_of_timms_network(twin, config):
    with torch.device('meta'):
        expected = timm.create_model(twin).state_dict()
        gated = MODELS.build(config)
        dense = MODELS.build({**config, 'gated': False})
    shapes = {key: value.shape for key, value in expected.items() if not key.startswith(('fc.', 'head.', 'pre_logits'))}
    for backbone in (dense, gated):
        new = ('gating.', *backbone.output_norms)
        assert {key: value.shape for key, value in backbone.state_dict().items() if not key.startswith(new)} == shapes


@types
def test_a_segmentor_holds_exactly_one_network_and_mmseg_keys(name):
    backbone = TYPES[name]
    channels = 2048 if '50' in name or name == 'drn' else WIDTHS.get(name, 512)
    head = dict(type='FCNHead', in_channels=channels, in_index=3, channels=8, num_convs=1, concat_input=False)
    model = segmentor(backbone, head=head)
    assert find_deepmoe(model) is model.backbone
    first = FIRST.get(name, 'conv1.weight')
    assert f'backbone.{first}' in model.state_dict()
    assert 'backbone.gating.gates.weight' in model.state_dict()


@types
def test_neighbouring_experts_share_a_gate(name):
    with torch.device('meta'):
        gates = build(name, experts_per_gate=4).gating.gates
    assert len(gates.weight) == sum(gates.widths) // 4 > 0


@pytest.mark.parametrize('size', [(64, 64), (65, 97)])
@pytest.mark.parametrize(
    ('name', 'kwargs', 'strides'),
    [
        ('resnet18', {}, (4, 8, 16, 32)),
        ('resnet18', dict(output_stride=32), (4, 8, 16, 32)),
        ('resnet18', dict(output_stride=16), (4, 8, 16, 16)),
        ('resnet50', dict(output_stride=8), (4, 8, 8, 8)),
        ('resnet50b', dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)), (4, 8, 16, 16)),
        ('drn', {}, (4, 8, 8, 8)),
    ],
)
def test_features_of_a_resnet(name, kwargs, strides, size):
    backbone = build(name, **kwargs).eval()
    x = torch.randn(1, 3, *size)
    widths = (64, 128, 256, 512) if name == 'resnet18' else (256, 512, 1024, 2048)
    expected = [(1, width, -(-size[0] // s), -(-size[1] // s)) for width, s in zip(widths, strides, strict=True)]
    assert [tuple(feature.shape) for feature in backbone(x)] == expected


def test_features_of_a_vgg_have_a_resnets_strides():
    backbone = build('vgg11', widen=1).eval()
    shapes = [tuple(feature.shape) for feature in backbone(torch.randn(1, 3, 65, 97))]
    assert shapes == [(1, 256, 16, 24), (1, 512, 8, 12), (1, 512, 4, 6), (1, 512, 2, 3)]


@pytest.mark.parametrize(
    ('name', 'twin'), [('resnet18', 'resnet18'), ('vgg11', 'vgg11_bn'), ('drn', 'drn_a_50'), ('convnext', '')]
)
def test_features_are_timms(name, twin):
    small = dict(depths=(1, 1, 2, 1), dims=(16, 24, 32, 48))  # as TYPES has it
    model = randomise(timm.create_model(twin or 'convnext_tiny', **({} if twin else small))).eval()
    x = images(2, 64)
    expected = model.forward_intermediates(x, indices=4, intermediates_only=True)
    for gated in (True, False):
        backbone = build(name, widen=1, gated=gated).eval()
        weights = {k: v for k, v in model.state_dict().items() if k in backbone.state_dict()}
        own = {key: value for key, value in backbone.state_dict().items() if key.startswith('norm')}
        backbone.load_state_dict({**own, **weights})
        norms = [backbone.get_submodule(norm) for norm in backbone.output_norms] or [nn.Identity()] * 4
        normed = [norm(feature) for norm, feature in zip(norms, expected, strict=True)]
        torch.testing.assert_close(list(backbone(x)), normed, rtol=1e-4, atol=1e-4)


@types
def test_each_image_has_its_own_gates(name):
    backbone = randomise(build(name)).eval()
    x = images(3, 64) * torch.tensor([0.2, 1, 4])[:, None, None, None]
    together = backbone(x)
    gates = torch.cat(backbone.gating(x), 1)
    assert not torch.equal(gates[0] > 0, gates[2] > 0)
    for i in range(3):
        alone = backbone(x[i : i + 1])
        for feature, whole in zip(alone, together, strict=True):
            torch.testing.assert_close(feature[0], whole[i], rtol=1e-4, atol=1e-4 * whole.abs().max().item())


@pytest.mark.parametrize('name', ['resnet18', 'vgg11', 'convnext'])
@pytest.mark.parametrize('gated', [True, False])
def test_the_network_ends_at_its_last_output(name, gated):
    whole = randomise(build(name, gated=gated)).eval()
    part = build(name, gated=gated, out_indices=(0, 1)).eval()
    weights = whole.state_dict()
    if gated:
        weights['gating.gates.weight'] = weights['gating.gates.weight'][: len(part.gating.gates.weight)]
    part.load_state_dict({key: weights[key] for key in part.state_dict()})
    assert len(part.state_dict()) < len(weights)
    torch.testing.assert_close(part(images(2, 64)), whole(images(2, 64))[:2], rtol=1e-5, atol=1e-5)
    features = build(name, gated=gated, out_indices=(1, 3)).eval()(images(1, 64))
    assert len(features) == 2


@pytest.mark.parametrize('out_indices', [(), (0, 4), (-1,), (2, 1), (1, 1)])
def test_out_indices_are_checked(out_indices):
    refused('out_indices', out_indices=out_indices)


@pytest.mark.parametrize(
    ('kwargs', 'words'),
    [
        (dict(output_stride=4), ['output_stride', '8, 16 or 32']),
        (dict(strides=(1, 2, 1, 1)), ['strides', 'dilations', 'not supported']),
        (dict(strides=(1, 1, 1, 1), dilations=(1, 2, 4, 8)), ['not supported']),
        (dict(dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1), output_stride=16), ['contradicts', 'output_stride=16']),
        (dict(depth=20), ['depth', '18, 34, 50, 101']),
        (dict(bottleneck='B'), ['bottleneck']),
        (dict(frozen_stages=5), ['frozen_stages']),
        (dict(norm_cfg=None), ['norm_cfg']),
        (dict(target_kept=2), ['target_kept']),
        (dict(experts_per_gate=7), ['layer1.0.conv1', 'experts_per_gate=7']),
        (dict(embed_loss_weight=1.0), ['num_classes']),
        (dict(gated=False, gate_loss_weight=1.0), ['gate_loss_weight', 'gated=False']),
        (dict(pretrained='a', init_cfg=dict(type='Pretrained', checkpoint='b')), ['pretrained', 'init_cfg']),
        (dict(type='DeepMoEVGG', depth=12), ['depth', '11, 13, 16, 19']),
        (dict(type='DeepMoEDRN', depth=18), ['depth', '50']),
    ],
)
def test_bad_arguments_are_named(kwargs, words):
    refused(*words, **kwargs)


@pytest.mark.parametrize(
    ('kwargs', 'name'),
    [
        (dict(gate_weight=1), 'gate_weight'),
        (dict(gated=False, deep_stem=True), 'deep_stem'),
        (dict(type='DeepMoEVGG', depth=11, with_cp=True), 'with_cp'),
        (dict(type='DeepMoEDRN', depth=50, output_stride=16), 'output_stride'),
        (dict(type='DeepMoEConvNeXt', depth=18), 'depth'),
    ],
)
def test_unknown_arguments_are_named(kwargs, name):
    refused(name, error=TypeError, **kwargs)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(arch='big'), 'arch must be one of atto, femto'),
        (dict(arch=dict(depths=(1, 1))), "arch must .*'depths' and 'channels'"),
        (dict(arch=dict(depths=(1, 1), channels=(1, 1))), 'depths must be 4 numbers'),
        (dict(gap_before_final_norm=True), 'gap_before_final_norm'),
        (dict(norm_cfg=dict(type='BN')), 'norm_cfg.*LN2d'),
        (dict(out_indices=4), 'out_indices'),
        (dict(norm_eval=True), 'norm_eval'),
    ],
)
def test_bad_arguments_of_convnext_are_named(kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        MODELS.build(dict(type='DeepMoEConvNeXt', **kwargs))


def test_strides_and_dilations_are_another_way_to_say_output_stride():
    by_stride = build(output_stride=8)
    by_layout = build(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), output_stride=8)
    assert str(by_stride) == str(by_layout)
    assert by_stride.layer4[1].conv1.dilation == (4, 4)


@pytest.mark.parametrize('gated', [True, False])
@pytest.mark.parametrize('channels', [1, 4])
def test_images_with_other_channels_are_refused(channels, gated):
    with pytest.raises(ValueError, match=rf'3, height, width\), got \(1, {channels}, .*in_channels'):
        build(gated=gated)(images(1, 64, channels=channels))


@pytest.mark.parametrize('name', ['resnet18', 'vgg11', 'convnext'])
def test_in_channels(name):
    assert len(build(name, in_channels=1).eval()(images(1, 64, channels=1))) == 4


@pytest.mark.parametrize('name', [name for name in TYPES if 'convnext' not in name])
def test_norm_cfg_reaches_every_norm(name):
    norm_cfg = dict(type='SyncBN', eps=1e-3, requires_grad=False)
    norms = [module for module in build(name, norm_cfg=norm_cfg).modules() if isinstance(module, _BatchNorm)]
    assert all(isinstance(norm, nn.SyncBatchNorm) and norm.eps == 1e-3 for norm in norms)
    assert not any(parameter.requires_grad for norm in norms for parameter in norm.parameters())
    widths = {'resnet18': 20, 'resnet50': 53, 'resnet50b': 53, 'drn': 53, 'vgg11': 8}
    assert len(norms) == widths[name] + 5


def moved(backbone):
    """Names of the tensors that a training step changes."""
    before = copy.deepcopy(backbone.state_dict())
    optimizer = torch.optim.SGD((p for p in backbone.parameters() if p.requires_grad), lr=0.1)
    sum(feature.square().mean() for feature in backbone.train()(images(2, 64))).backward()
    optimizer.step()
    return {key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}


FROZEN = {
    'resnet18': {-1: (), 0: ('conv1.', 'bn1.'), 2: ('conv1.', 'bn1.', 'layer1.', 'layer2.')},
    'vgg11': {-1: (), 0: ('features.0', 'features.1.', 'features.4', 'features.5')},
    'convnext': {0: (), 1: ('stem.', 'stages.0.'), 2: ('stem.', 'stages.0.', 'stages.1.')},
}


@pytest.mark.parametrize(('name', 'frozen_stages'), [(name, k) for name, cases in FROZEN.items() for k in cases])
def test_frozen_stages(name, frozen_stages):
    backbone = randomise(build(name, frozen_stages=frozen_stages))
    changed = moved(backbone)
    frozen = {key for key in base_keys(backbone) if key.startswith(FROZEN[name][frozen_stages])}
    budget = {'gating.gates.threshold', 'gating.curve.points'}  # move towards a target only
    assert changed == set(backbone.state_dict()) - frozen - budget


def test_frozen_stages_up_to_the_last_freeze_the_base_and_not_the_gates():
    for name in ('resnet18', 'vgg11'):
        changed = moved(randomise(build(name, frozen_stages=4)))
        assert changed
        assert all(key.startswith('gating.') for key in changed)


def test_norm_eval_keeps_the_statistics_of_the_base_network():
    changed = moved(randomise(build(norm_eval=True)))
    statistics = {key for key in changed if 'running' in key}
    assert statistics
    assert all(key.startswith('gating.') for key in statistics)
    assert 'bn1.weight' in changed


def test_freeze_gating_and_train_mode():
    backbone = randomise(build(freeze_gating=True))
    assert moved(backbone) == base_keys(backbone)


@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'convnext', 'convnextv2'])
def test_checkpointing_changes_no_gradient(name):
    grads = []
    for with_cp in (False, True):
        backbone = randomise(build(name, with_cp=with_cp)).train()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            loss = sum(feature.square().mean() for feature in backbone(images(2, 64)))
        loss.backward()
        grads.append((sum(saved), {name: parameter.grad for name, parameter in backbone.named_parameters()}))
    assert grads[1][0] < (0.8 if 'convnext' in name else 0.7) * grads[0][0]
    torch.testing.assert_close(grads[1][1], grads[0][1])


@types
@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1, 2)])
def test_sparse_backbones(name, out_indices):
    backbone = randomise(build(name, out_indices=out_indices)).eval()
    x = images(2, 64) * torch.tensor([0.3, 3])[:, None, None, None]
    with torch.no_grad():
        expected = backbone(x)
    for feature, own in zip(sparsify(backbone)(x), expected, strict=True):
        torch.testing.assert_close(feature, own, rtol=1e-4, atol=1e-5 * own.abs().max().item())


@pytest.mark.parametrize(
    ('kwargs', 'params', 'gmacs', 'without_shortcuts'),
    [
        (dict(gated=False), 23.508, 797.35, 705.0),
        (dict(widen=1), 23.508, 797.35, 705.0),
        (dict(widen=2), 66.834, 2260.9, 2168.5),
        (dict(widen=2, gated=False), 66.834, 2260.9, 2168.5),
    ],
)
def test_size_of_drn_on_cityscapes(kwargs, params, gmacs, without_shortcuts):
    """DESIGN section 5, after Table 5; the gating network is not included."""
    with torch.device('meta'):
        backbone = MODELS.build(dict(type='DeepMoEDRN', depth=50, **kwargs))
    count = sum(p.numel() for name, p in backbone.named_parameters() if not name.startswith('gating.'))
    assert count / 1e6 == pytest.approx(params, abs=5e-4)
    table = MacsTable(backbone, (1024, 2048))
    assert table.dense(('base', 'shortcut', 'head')) / 1e9 == pytest.approx(gmacs, rel=5e-5)
    assert table.dense(('base',)) / 1e9 == pytest.approx(without_shortcuts, abs=0.1)


def test_macs_of_a_backbone_are_those_of_the_classifier_without_its_head():
    backbone = randomise(build())
    classifier = timm.create_model('narrow_deepmoe_resnet18')
    classifier.load_state_dict(backbone.state_dict(), strict=False)
    report, whole = count_macs(backbone, images(2, 64)), count_macs(classifier, images(2, 64))
    assert torch.equal(report.total, whole.total - whole.by_group['head'])


HEADS = {
    'FCNHead': dict(in_index=3, channels=8, num_convs=1),
    'PSPHead': dict(in_index=3, channels=8, pool_scales=(1, 2)),
    'DepthwiseSeparableASPPHead': dict(in_index=3, channels=8, dilations=(1, 2), c1_channels=4),
    'UPerHead': dict(in_index=[0, 1, 2, 3], channels=8, pool_scales=(1, 2)),
}


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('name', ['resnet18', 'drn', 'vgg11', 'convnext'])
def test_decode_heads_build_and_step(name, head, tmp_path):
    widths = {'resnet18': (64, 128, 256, 512), 'drn': (256, 512, 1024, 2048), 'vgg11': (64, 128, 128, 128)}
    widths = {**widths, 'convnext': (16, 24, 32, 48)}[name]
    config = dict(type=head, in_channels=list(widths) if head == 'UPerHead' else widths[3], **HEADS[head])
    if head == 'DepthwiseSeparableASPPHead':
        config['c1_in_channels'] = widths[0]
    model = segmentor(TYPES[name], head=config)
    before = copy.deepcopy(model.state_dict())
    make_runner(model, tmp_path, dict(type='DeepMoELossHook'), iters=1, interval=10).train()
    trained = [key for key, _ in model.named_parameters()]
    read = {f'backbone.norm{i}' for i in (range(4) if head == 'UPerHead' else [3, *([0] if 'ASPP' in head else [])])}
    still = [key for key in trained if torch.equal(model.state_dict()[key], before[key])]
    still = [key for key in still if not key.startswith('backbone.norm') or key.rpartition('.')[0] in read]
    assert not [key for key in still if key != 'decode_head.conv_seg.bias'], still
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.parametrize('gated', [True, False])
def test_copies(gated):
    backbone = randomise(build(gated=gated)).eval()
    for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        torch.testing.assert_close(twin(images(1, 64)), backbone(images(1, 64)), rtol=0, atol=0)


def test_the_rest_of_the_package_needs_no_mmseg():
    code = 'import sys; sys.modules.update(mmengine=None, mmcv=None, mmseg=None); import deepmoe_plugin'
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('name', ['resnet18', 'drn', 'vgg11'])
def test_losses_on_the_latent_mixture(name):
    weights = dict(importance_loss_weight=0.2, similarity_loss_weight=[1e-3, 1e-3], similarity_of='features')
    backbone = build(name, **weights).train()
    features = backbone(images(size=64))
    terms = gating_terms(backbone, loss=list(features))
    assert terms.keys() == {
        *('loss_gate', 'loss_importance', 'loss_similarity', 'kept_experts', 'dynamic_experts'),
        *('gate_entropy', 'use_entropy'),
    }
    (terms['loss_importance'] + terms['loss_similarity']).backward()
    assert backbone.gating.embedding.mixture.weight.grad.isfinite().all()
