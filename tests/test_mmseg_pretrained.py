"""Weights that mmseg loads into our backbones: of timm, torchvision, mmpretrain and mmengine."""

import os
import pickle
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from small_networks import images, randomise

pytest.importorskip('mmseg')

from mmengine.logging import HistoryBuffer
from mmengine.model import PretrainedInit
from mmseg.registry import MODELS
from small_segmentors import CLASSES, backbone_config, build, make_runner, segmentor, segmentor_config


def checkpoint(kind, file):
    """Save the weights of a network that fits `DeepMoEResNet(depth=18)`, and return them under timm's names."""
    if kind == 'mmseg':
        network = MODELS.build(dict(type='mmseg.ResNet', depth=18))
    elif kind == 'torchvision':
        import torchvision

        network = torchvision.models.resnet18()
    else:
        network = timm.create_model('resnet18')
    weights = randomise(network).state_dict()
    content = weights
    if kind == 'wrapped':
        content = {'state_dict': {f'module.{key}': value for key, value in weights.items()}}
    if kind == 'segmentor':
        content = {
            'meta': {'epoch': 3},
            'state_dict': {f'backbone.{key}': value for key, value in weights.items() if not key.startswith('fc.')},
        }
        content['state_dict']['decode_head.conv_seg.weight'] = torch.zeros(5, 512, 1, 1)
    if file.suffix == '.safetensors':
        save_file({key: value.contiguous() for key, value in content.get('state_dict', content).items()}, file)
    else:
        torch.save(content, file)
    return {key: value for key, value in weights.items() if not key.startswith('fc.')}


def pretrained(file, **kwargs):
    return dict(type='Pretrained', checkpoint=str(file), **kwargs)


def loaded(file, **kwargs):
    config = {'widen': 1, 'init_cfg': pretrained(file), **kwargs}
    model = MODELS.build(segmentor_config(backbone_config(**config)))
    model.init_weights()
    return model.backbone


@pytest.mark.parametrize('gated', [True, False])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('kind', ['timm', 'torchvision', 'mmseg', 'segmentor', 'wrapped'])
def test_pretrained(kind, suffix, gated, tmp_path):
    weights = checkpoint(kind, tmp_path / f'weights{suffix}')
    backbone = loaded(tmp_path / f'weights{suffix}', gated=gated)
    own = {key: value for key, value in backbone.state_dict().items() if not key.startswith('gating.')}
    torch.testing.assert_close(own, weights, rtol=0, atol=0)
    if gated:
        assert all((gate == 1).all() for gate in backbone.eval().gating(images(2, 64)))


def mmpretrains(name):
    """mmpretrain's name of a tensor of timm's ConvNeXt."""
    for pattern, replacement in (
        (r'^stem', 'downsample_layers.0'),
        (r'stages\.(\d)\.downsample', r'downsample_layers.\1'),
        (r'\.blocks', ''),
        ('conv_dw', 'depthwise_conv'),
        (r'mlp\.fc', 'pointwise_conv'),
        ('head.norm', 'norm3'),
    ):
        name = re.sub(pattern, replacement, name)
    return name


@pytest.mark.parametrize('kind', ['timm', 'mmpretrain', 'authors'])
@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1,)])
def test_pretrained_convnext(kind, out_indices, tmp_path):
    weights = randomise(timm.create_model('convnext_atto', conv_mlp=False, num_classes=10)).state_dict()
    content = weights
    if kind != 'timm':
        content = {mmpretrains(key): value for key, value in weights.items() if 'head.fc' not in key}
    if kind == 'mmpretrain':
        content = {'state_dict': {f'backbone.{key}': value for key, value in content.items()}}
    if kind == 'authors':
        names = {'depthwise_conv': 'dwconv', 'pointwise_conv': 'pwconv', 'norm3': 'norm'}
        renamed = [(re.sub('|'.join(names), lambda m: names[m[0]], key), value) for key, value in content.items()]
        content = {'model': dict(renamed)}
    torch.save(content, tmp_path / 'weights.pth')
    model = MODELS.build(
        dict(
            type='DeepMoEConvNeXt', arch='atto', out_indices=out_indices, init_cfg=pretrained(tmp_path / 'weights.pth')
        )
    )
    model.init_weights()
    own = {key: value for key, value in model.state_dict().items() if not key.startswith(('gating.', 'norm'))}
    torch.testing.assert_close(own, {key: weights[key] for key in own}, rtol=0, atol=0)
    assert len(own) > 20


def test_pretrained_takes_a_checkpoint_of_a_runner_with_its_gates(tmp_path):
    model = segmentor()
    hooks = dict(type='DeepMoELossHook'), dict(type='GateStatisticsHook')
    make_runner(model, tmp_path, *hooks, iters=1).train()
    # What an mmengine without its own allowance, as the upstream one, does on resume:
    assert torch.load(tmp_path / 'iter_1.pth', weights_only=True)['message_hub']['log_scalars']
    with torch.serialization.safe_globals([HistoryBuffer]):  # and what the other one does
        pass
    backbone = loaded(tmp_path / 'iter_1.pth', widen=0.25)
    torch.testing.assert_close(backbone.state_dict(), model.backbone.state_dict(), rtol=0, atol=0)
    part = loaded(tmp_path / 'iter_1.pth', widen=0.25, init_cfg=pretrained(tmp_path / 'iter_1.pth', prefix='backbone.'))
    torch.testing.assert_close(part.state_dict(), model.backbone.state_dict(), rtol=0, atol=0)


def test_pretrained_comes_after_every_other_initialisation(tmp_path):
    weights = checkpoint('timm', tmp_path / 'weights.pth')
    kaiming = dict(type='Kaiming', layer='Conv2d')
    backbone = loaded(tmp_path, init_cfg=[dict(pretrained(tmp_path / 'weights.pth'), type=PretrainedInit), kaiming])
    torch.testing.assert_close(backbone.conv1.weight, weights['conv1.weight'], rtol=0, atol=0)
    torch.manual_seed(0)
    constant = loaded(tmp_path, init_cfg=dict(type='Constant', layer='Conv2d', val=0.5))
    assert (constant.layer1[0].conv2.weight == 0.5).all()


def test_pretrained_without_the_stages_after_the_last_output(tmp_path):
    weights = checkpoint('torchvision', tmp_path / 'weights.pth')
    head = dict(type='FCNHead', in_channels=128, in_index=1, channels=8, num_convs=1, concat_input=False)
    config = backbone_config(widen=1, out_indices=(0, 1), init_cfg=pretrained(tmp_path / 'weights.pth'))
    model = MODELS.build(segmentor_config(config, head))
    model.init_weights()
    assert 'backbone.layer3.0.conv1.weight' not in model.state_dict()
    torch.testing.assert_close(model.backbone.layer2[1].bn2.bias, weights['layer2.1.bn2.bias'], rtol=0, atol=0)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_pretrained_vgg(suffix, tmp_path):
    network = randomise(timm.create_model('vgg11_bn', mlp_ratio=1 / 64))
    file = tmp_path / f'vgg{suffix}'
    save_file(network.state_dict(), file) if suffix == '.safetensors' else torch.save(network.state_dict(), file)
    backbone = build('vgg11', widen=1, out_indices=(0, 2), init_cfg=pretrained(file))
    backbone.init_weights()
    features = backbone.eval()(images(1, 64))
    expected = network.eval().forward_intermediates(images(1, 64), indices=[2, 4], intermediates_only=True)
    torch.testing.assert_close(list(features), expected, rtol=1e-4, atol=1e-4)


def test_the_old_argument_pretrained(tmp_path):
    weights = checkpoint('timm', tmp_path / 'weights.pth')
    with pytest.warns(DeprecationWarning, match='init_cfg'):
        backbone = MODELS.build(backbone_config(widen=1, pretrained=str(tmp_path / 'weights.pth')))
    backbone.init_weights()
    torch.testing.assert_close(backbone.bn1.weight, weights['bn1.weight'], rtol=0, atol=0)
    assert MODELS.build(backbone_config(pretrained=None)).init_cfg is None


class TestCheckpointsThatDoNotFit:
    def refused(self, file, *words, error=ValueError, **kwargs):
        with pytest.raises(error) as caught:
            loaded(file, **kwargs)
        for word in (*words, str(file)):
            assert word in str(caught.value)

    def test_tensors_missing(self, tmp_path):
        weights = checkpoint('timm', tmp_path / 'weights.pth')
        del weights['layer3.1.bn2.weight'], weights['layer2.0.conv1.weight']
        torch.save(weights, tmp_path / 'part.pth')
        self.refused(
            tmp_path / 'part.pth', '2 missing', 'layer2.0.conv1.weight', 'layer3.1.bn2.weight', 'DeepMoEResNet(depth=18'
        )

    def test_other_depth(self, tmp_path):
        checkpoint('timm', tmp_path / 'weights.pth')
        self.refused(tmp_path / 'weights.pth', 'missing', 'layer1.2.bn1.weight', 'depth=34', depth=34)

    @pytest.mark.parametrize('gated', [True, False])
    def test_other_width(self, gated, tmp_path):
        checkpoint('timm', tmp_path / 'weights.pth')
        with pytest.raises(ValueError, match=r'layer1.0.conv1.weight has shape \(64, .*\(128, .*`widen`'):
            loaded(tmp_path / 'weights.pth', widen=2, gated=gated)

    def test_deep_stem(self, tmp_path):
        network = MODELS.build(dict(type='mmseg.ResNetV1c', depth=18))
        torch.save({'state_dict': network.state_dict()}, tmp_path / 'v1c.pth')
        self.refused(tmp_path / 'v1c.pth', 'deep stem', 'ResNetV1c')

    def test_gates_for_a_dense_network(self, tmp_path):
        torch.save(build(widen=1).state_dict(), tmp_path / 'gated.pth')
        self.refused(tmp_path / 'gated.pth', 'a gated network', 'leave out gated=False', gated=False)

    def test_no_file(self, tmp_path):
        self.refused(tmp_path / 'nowhere.pth', 'init_cfg', error=FileNotFoundError)

    def test_prefix(self, tmp_path):
        checkpoint('timm', tmp_path / 'weights.pth')
        self.refused(
            tmp_path / 'weights.pth', "'encoder.'", init_cfg=pretrained(tmp_path / 'weights.pth', prefix='encoder')
        )

    def test_code_is_not_run(self, tmp_path):
        class Harm:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / 'harm'),)

        (tmp_path / 'harm.pth').write_bytes(pickle.dumps({'conv1.weight': Harm()}))
        self.refused(tmp_path / 'harm.pth')
        torch.save({'conv1.weight': Harm()}, tmp_path / 'harm.pth')
        self.refused(tmp_path / 'harm.pth', 'more than tensors')
        assert not (tmp_path / 'harm').exists()

    def test_getattr_fetches_nothing_but_log_histories(self, tmp_path):
        class Sneaky:
            def __reduce__(self):
                return getattr, (torch.Tensor, 'numpy')

        torch.save({'conv1.weight': Sneaky()}, tmp_path / 'sneaky.pth')
        self.refused(tmp_path / 'sneaky.pth', 'more than tensors')


def test_torchvision_addresses(tmp_path, monkeypatch):
    weights = checkpoint('torchvision', tmp_path / 'weights.pth')
    asked = []

    def download(url, **kwargs):
        asked.append(url)
        return torch.load(tmp_path / 'weights.pth', weights_only=kwargs['weights_only'])

    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', download)
    backbone = loaded('torchvision://resnet18')
    assert asked[0].startswith('https://')
    assert 'resnet18' in asked[0]
    torch.testing.assert_close(backbone.bn1.bias, weights['bn1.bias'], rtol=0, atol=0)


def test_weights_of_the_backbone_are_those_of_the_timm_model(tmp_path):
    """A segmentor's backbone and a timm classifier exchange weights, gates included."""
    model = segmentor(dict(type='DeepMoEResNet', depth=18))
    classifier = timm.create_model('narrow_deepmoe_resnet18', num_classes=CLASSES)
    missing = classifier.load_state_dict(model.backbone.state_dict(), strict=False)
    assert missing.missing_keys == ['fc.weight', 'fc.bias']
    assert not missing.unexpected_keys
    features = classifier.eval().forward_features(images(2, 64))
    torch.testing.assert_close(model.backbone.eval()(images(2, 64))[3], features, rtol=1e-5, atol=1e-5)
