"""Wrong arguments, checkpoints and images: one error, before the first step, that names the culprit and the remedy."""

import math
import os

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from small_networks import images, randomise, small
from timm.models.resnet import Bottleneck
from torch import nn

import deepmoe_plugin
from deepmoe_plugin import count_macs
from deepmoe_plugin.models.deepmoe_vgg import DeepMoEVGG

RESNET = 'basic'
BOTTLENECK = 'bottleneck_a'
CIFAR = 'cifar'
VGG = 'vgg_cifar'


@pytest.mark.parametrize(
    ('structure', 'kwargs', 'names'),
    [
        (CIFAR, dict(gate_loss_weight=-0.1), ('gate_loss_weight', '>= 0', '-0.1')),
        (CIFAR, dict(gate_loss_weight=math.nan), ('gate_loss_weight', 'finite')),
        (CIFAR, dict(gate_loss_weight=math.inf), ('gate_loss_weight', 'finite')),
        (CIFAR, dict(gate_loss_weight=yaml.safe_load('1e-3')), ('gate_loss_weight', 'YAML', '1.0e-3')),
        (CIFAR, dict(gate_loss_weight=True), ('gate_loss_weight', 'number')),
        (CIFAR, dict(embed_loss_weight=-1), ('embed_loss_weight', '>= 0')),
        (CIFAR, dict(embed_loss_weight=1, num_classes=0), ('embed_loss_weight', 'num_classes')),
        (CIFAR, dict(gate_norm='max'), ('gate_norm', 'mean, sum, macs', 'max')),
        (CIFAR, dict(target_kept=1.5), ('target_kept', 'between 0 and 1', '1.5')),
        (CIFAR, dict(target_kept=0), ('target_kept', 'between 0 and 1')),
        (CIFAR, dict(target_macs='half'), ('target_macs', 'number', 'half')),
        (CIFAR, dict(target_kept=0.5, target_macs=0.5), ('target_kept', 'target_macs', 'one of them')),
        (CIFAR, dict(target_kept=0.5, target_steps=0), ('target_steps', 'whole number >= 1')),
        (CIFAR, dict(freeze_gating=True, gate_loss_weight=1), ('freeze_gating', 'gate_loss_weight', 'leave them out')),
        (CIFAR, dict(freeze_gating=True, embed_loss_weight=1), ('freeze_gating', 'embed_loss_weight')),
        (CIFAR, dict(freeze_gating=True, target_kept=0.5), ('freeze_gating', 'target_kept')),
        (CIFAR, dict(freeze_gating='no'), ('freeze_gating', 'True or False', 'no')),
        (CIFAR, dict(num_latent_experts=0), ('num_latent_experts', '>= 1')),
        (CIFAR, dict(experts_per_gate=0), ('experts_per_gate', '>= 1')),
        (CIFAR, dict(experts_per_gate=64), ('layer1.0.conv1', '32 experts', 'experts_per_gate=64', 'widen')),
        (CIFAR, dict(num_latent_experts=6.5), ('num_latent_experts', 'whole number', '6.5')),
        (CIFAR, dict(embedding_channels=()), ('embedding_channels', '>= 1')),
        (CIFAR, dict(embedding_channels=(16, 0)), ('embedding_channels', '>= 1')),
        (CIFAR, dict(embedding_channels=32), ('embedding_channels', 'list', '32')),
        (CIFAR, dict(widen=0), ('widen', 'positive')),
        (CIFAR, dict(widen=-2), ('widen', 'positive', '-2')),
        (CIFAR, dict(widen=math.nan), ('widen', 'positive')),
        (CIFAR, dict(widen='2'), ('widen', 'number', "'2'")),
        (CIFAR, dict(widen=(1, 'x', 1, 1)), ('widen', 'number', "'x'")),
        (CIFAR, dict(widen=(1, 2)), ('widen', '4 gated layers', 'got 2')),
        (VGG, dict(widen=(1, 2, 3, 4)), ('widen', '3 gated layers', 'got 4')),
        (VGG, dict(widen=[1, 0, 1]), ('widen', 'positive')),
        (BOTTLENECK, dict(bottleneck='C'), ('bottleneck', "'A' or 'B'", "'C'")),
        (RESNET, dict(bottleneck='B'), ('bottleneck', 'basic blocks')),
        (CIFAR, dict(block=Bottleneck), ('small_images', 'block=BasicBlock')),
        (RESNET, dict(base_width=128), ('base_width', 'widen')),
        (BOTTLENECK, dict(cardinality=32), ('cardinality', 'widen')),
        (BOTTLENECK, dict(channels=(8, 8, 8, 8)), ('channels', 'widen')),
        (RESNET, dict(output_stride=4), ('output_stride', '8, 16 or 32', '4')),
        (CIFAR, dict(output_stride=8), ('output_stride', 'small_images')),
        (VGG, dict(output_stride=16), ('output_stride', '32')),
        (RESNET, dict(layers=(1, 1, 1)), ('layers', '4 numbers', '(1, 1, 1)')),
        (CIFAR, dict(layers=(1, 1, 1, 1)), ('layers', '3 numbers')),
        (RESNET, dict(layers=(1, 0, 1, 1)), ('layers', 'at least 1')),
        (CIFAR, dict(stem_type='deep'), ('stem_type', 'small_images', 'leave it out')),
        (VGG, dict(mlp_ratio=0.5), ('mlp_ratio', 'small_images', 'leave them out')),
        (VGG, dict(layout=(8, 'X')), ('layout', "'M'", 'X')),
        (VGG, dict(layout=(8, -8, 'M')), ('layout', '-8')),
        (CIFAR, dict(gated=False, widen='2'), ('widen', 'number')),
    ],
)
def test_wrong_arguments(structure, kwargs, names):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (what it says is checked below)
        small(structure, **kwargs)
    assert_names(caught, *names)


def assert_names(caught, *names):
    """One error, on one line, not the last of a chain of others, that says all that is needed."""
    message = str(caught.value)
    assert not [name for name in names if name not in message], message
    assert '\n' not in message
    assert caught.value.__context__ is None or caught.value.__cause__ is caught.value.__context__


@pytest.mark.parametrize('structure', [RESNET, CIFAR, VGG])
@pytest.mark.parametrize('kwargs', [dict(gate_los_weight=1), dict(widden=2), dict(gated=False, num_latent_experts=8)])
def test_unknown_or_misplaced_arguments(structure, kwargs):
    with pytest.raises(TypeError, match=f'unexpected keyword argument .{list(kwargs)[-1]}'):
        small(structure, **kwargs)


# Images


@pytest.mark.parametrize('structure', ['basic', 'cifar', 'vgg', 'vgg_cifar'])
@pytest.mark.parametrize('count', [False, True])
@pytest.mark.parametrize(
    ('x', 'names'),
    [
        (torch.zeros(3, 64, 64), ('(batch, 3, height, width)', '(3, 64, 64)')),
        (torch.zeros(2, 1, 64, 64), ('3 channels', 'in_chans=1')),
        (torch.zeros(2, 64, 64, 3), ('3 channels', 'in_chans', 'got 64')),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), ('floating-point', 'uint8', 'normalise')),
        (torch.zeros(2, 3, 2, 2), ('at least', '2x2', 'resize')),
    ],
    ids=['unbatched', 'gray', 'channels at the end', 'integers', 'tiny'],
)
def test_wrong_images(structure, count, x, names):
    model = small(structure).eval()
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        count_macs(model, x) if count else model(x)
    assert_names(caught, *names)


@pytest.mark.parametrize('name', ['narrow_deepmoe_resnet18', 'narrow_deepmoe_resnet20_cifar'])
def test_eight_by_eight_images(name):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        timm.create_model(name)(torch.zeros(2, 3, 8, 8))
    assert_names(caught, '8x8', 'resize', '16x16' if 'cifar' in name else '32x32')


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('structure', [RESNET, VGG])
def test_images_that_are_not_finite(structure, value):
    x = images(4)
    x[2, 1, 3, 3] = value
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        small(structure).eval()(x)
    assert_names(caught, '[2]', 'not finite', 'NaN')


def test_diverged_weights():
    model = small(CIFAR).eval()
    nn.init.constant_(model.gating.embedding.mixture.weight, math.nan)
    with pytest.raises(ValueError, match=r'\[0, 1\].*diverged'):
        model(images())


# Checkpoints


def load(file, structure=CIFAR, **kwargs):
    overlay = dict(file=str(file), num_classes=kwargs.pop('classes', 10))
    return small(structure, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def saved(tmp_path, state_dict, name='checkpoint.pth'):
    torch.save(state_dict, tmp_path / name)
    return tmp_path / name


def refused(file, *names, error=ValueError, **kwargs):
    for gated in (True, False):
        with pytest.raises(error) as caught:
            load(file, gated=gated, **kwargs)
        assert_names(caught, str(file), *names)


def test_missing_file(tmp_path):
    refused(tmp_path / 'nowhere.pth', 'no checkpoint', 'correct `file`', error=FileNotFoundError)


def test_folder_in_place_of_a_file(tmp_path):
    refused(tmp_path, 'no checkpoint', error=FileNotFoundError)


@pytest.mark.parametrize('keep', [0.9, 0.5, 0.0])
def test_truncated_safetensors(tmp_path, keep):
    file = tmp_path / 'checkpoint.safetensors'
    save_file(small(CIFAR).state_dict(), file)
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    refused(file, 'safetensors', 'download or save it again')


@pytest.mark.parametrize('keep', [0.9, 0.5, 0.001, 0.0])
def test_truncated_pth(tmp_path, keep):
    file = saved(tmp_path, small(CIFAR).state_dict())
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    refused(file, 'save')


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize('zipped', [True, False])
def test_pickled_code_is_not_run(tmp_path, zipped):
    file, mark = tmp_path / 'checkpoint.pth', tmp_path / 'ran'
    torch.save({**small(CIFAR).state_dict(), 'extra': Payload(mark)}, file, _use_new_zipfile_serialization=zipped)
    refused(file, 'refused', 'safetensors')
    with pytest.raises(RuntimeError, match='weights_only=True blocked'):  # timm reads this one itself
        small(CIFAR, checkpoint_path=str(file))
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists(), 'the payload works, so not running it is what the test has seen'


def test_file_of_something_else(tmp_path):
    file = tmp_path / 'notes.pth'
    file.write_text('accuracy 93.1')
    refused(file, 'no checkpoint at all')
    refused(saved(tmp_path, torch.zeros(3), 'tensor.pth'), 'Tensor', 'state_dict()')


def test_checkpoint_of_another_architecture(tmp_path):
    file = saved(tmp_path, small(VGG).state_dict())
    refused(file, 'wide_deepmoe_resnet20_cifar', 'missing', 'unknown')
    refused(file, 'missing', num_classes=4)


def test_checkpoint_of_a_deeper_network(tmp_path):
    file = saved(tmp_path, small(CIFAR, layers=(2, 2, 2), gated=False).state_dict())
    refused(file, 'unknown', 'layer1.1.')
    refused(file, 'unknown', num_classes=4)


def test_checkpoint_with_missing_keys(tmp_path):
    weights = small(CIFAR, gated=False).state_dict()
    del weights['layer2.0.bn1.weight']
    refused(saved(tmp_path, weights), '1 missing', 'layer2.0.bn1.weight')
    # Loaded with strict=False for other class counts, timm would take it without a word.
    refused(saved(tmp_path, weights), 'layer2.0.bn1.weight', num_classes=4)


def test_checkpoint_with_a_part_of_the_gating_network(tmp_path):
    weights = small(CIFAR).state_dict()
    del weights['gating.gates.weight']
    with pytest.raises(ValueError, match=r'1 missing, as gating\.gates\.weight'):
        load(saved(tmp_path, weights), num_classes=4)


def test_class_count_that_would_lose_the_classifier(tmp_path):
    file = saved(tmp_path, small(CIFAR, gated=False).state_dict())
    refused(file, '10 classes', 'num_classes=100', 'pretrained_cfg_overlay', classes=100)
    refused(file, '10 classes', 'num_classes=100', classes=100, num_classes=100)


@pytest.mark.parametrize('how', ['pretrained', 'checkpoint_path', 'load_state_dict'])
@pytest.mark.parametrize(
    ('checkpoint', 'model', 'names'),
    [
        (dict(widen=2), dict(widen=1), ('layer1.0.conv1.weight', 'widen', 'narrow_')),
        (dict(widen=1, gated=False), dict(widen=2), ('layer1.0.conv1.weight', 'widen', 'narrow_')),
        (dict(num_latent_experts=8), {}, ('gating.', 'num_latent_experts')),
        (dict(experts_per_gate=8), {}, ('gating.gates.weight', 'experts_per_gate=8')),
        ({}, dict(experts_per_gate=8), ('gating.gates.weight', 'experts_per_gate=1')),
        (dict(experts_per_gate=16), dict(experts_per_gate=8), ('gating.gates.weight', 'experts_per_gate=16')),
        (dict(embedding_channels=(4, 8, 16, 32)), {}, ('gating.embedding', 'embedding_channels')),
    ],
    ids=['wide into narrow', 'narrow into wide', 'latents', 'groups', 'no groups', 'other groups', 'embedding'],
)
def test_checkpoint_of_other_widths(tmp_path, how, checkpoint, model, names):
    weights = small(CIFAR, **checkpoint).state_dict()
    file = saved(tmp_path, weights)
    ways = {
        'pretrained': lambda: load(file, **model),
        'checkpoint_path': lambda: small(CIFAR, checkpoint_path=str(file), **model),
        'load_state_dict': lambda: small(CIFAR, **model).load_state_dict(weights),
    }
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ways[how]()
    assert_names(caught, *names)


def test_checkpoint_of_the_other_bottleneck():
    weights = small('bottleneck_a', widen=2).state_dict()
    with pytest.raises(ValueError, match='bottleneck') as caught:
        small('bottleneck_b', widen=2).load_state_dict(weights)
    assert_names(caught, 'layer1.0.conv', 'widen')


def test_checkpoint_of_other_classes_or_channels():
    weights = small(CIFAR).state_dict()
    with pytest.raises(ValueError, match=r'fc\.weight has shape \(10, 64\).*num_classes'):
        small(CIFAR, num_classes=4).load_state_dict(weights)
    with pytest.raises(ValueError, match=r'shape \(16, 3, 3, 3\).*in_chans'):
        small(CIFAR, in_chans=1).load_state_dict(weights)


def test_pretrained_without_any_weights():
    with pytest.raises(RuntimeError, match=r'wide_deepmoe_resnet18.*pretrained=False'):
        small('basic', pretrained=True)


def test_vgg_built_by_hand_takes_the_same_checks():
    with pytest.raises(ValueError, match='layout'):
        DeepMoEVGG([], small_images=True)


def test_a_checkpoint_that_fits_is_taken(tmp_path):
    file = saved(tmp_path, randomise(small(CIFAR, gated=False)).state_dict())
    assert load(file)(images()).isfinite().all()


def test_gate_heads_that_are_not_finite():
    """Masked execution would return NaN, sparse execution would take the experts for closed."""
    model = small('basic').eval()
    with torch.no_grad():
        model.gating.gates.weight[3, 0] = math.nan
    for run in (model, deepmoe_plugin.sparsify(model)):
        with pytest.raises(ValueError, match=r'gating\.gates\.weight is not finite'):
            run(images())


def test_images_that_are_no_tensor():
    with pytest.raises(TypeError, match='ndarray'):
        small('basic')(images().numpy())


def test_checkpoint_with_something_else_for_a_tensor(tmp_path):
    model = timm.create_model('wide_deepmoe_resnet20_cifar')
    torch.save({**model.state_dict(), 'conv1.weight': None}, tmp_path / 'a.pth')
    overlay = dict(file=str(tmp_path / 'a.pth'))
    with pytest.raises(ValueError, match=r'a\.pth holds a NoneType for conv1\.weight'):
        timm.create_model('wide_deepmoe_resnet20_cifar', pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize('take', [deepmoe_plugin.gate_statistics, deepmoe_plugin.prune])
def test_loaders_of_dictionaries(take):
    with pytest.raises(ValueError, match='got a dict'):
        take(small('basic'), [{'image': images()}])


def test_calibration_without_images():
    with pytest.raises(ValueError, match='calibrate holds no image'):
        deepmoe_plugin.sparsify(small('basic'), calibrate=images()[:0])
