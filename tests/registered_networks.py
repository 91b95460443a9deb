"""The networks that the package registers with timm, and what their tests have in common."""

import pytest
import timm
import torch
from small_networks import RESNETS, SMALL

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
