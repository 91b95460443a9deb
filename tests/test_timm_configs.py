"""Every configs/timm/*.yaml: known options, a model that builds, the paper's schedules and Table 4's widths.

With TIMM_REPO=<a checkout of timm's repository> the options are compared with those of its train.py.
"""

import ast
import functools
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from timm.data import create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn

import deepmoe_plugin
from deepmoe_plugin.macs import GATING_GROUPS, GROUPS, MacsTable

ALL = sorted((Path(__file__).parents[1] / 'configs/timm').glob('*.yaml'))
SIBLINGS = [path for path in ALL if path.stem.startswith(('dmoe_', 'moe_'))]
CONFIGS = [path for path in ALL if path not in SIBLINGS]
STAGE2 = [path for path in CONFIGS if path.stem.endswith('_stage2')]
CIFAR = [path for path in CONFIGS if 'cifar' in path.read_text()]
STAGE1 = [path for path in CIFAR if path not in STAGE2]
IMAGENET = [path for path in CONFIGS if path.stem.endswith('_imagenet')]
BASE_GROUPS = [group for group in GROUPS if group not in GATING_GROUPS]

# Options that train.py has defaults for and create_scheduler_v2 needs.
SCHEDULE_DEFAULTS = {
    **dict.fromkeys(('min_lr', 'cooldown_epochs', 'patience_epochs', 'warmup_prefix', 'sched_on_updates'), 0),
    **dict.fromkeys(('warmup_lr', 'lr_cycle_mul', 'lr_cycle_decay', 'lr_cycle_limit', 'lr_k_decay'), 1),
    'lr_noise': None,
    'decay_rate': 0.1,
    'decay_epochs': 90,
    'decay_milestones': [90],
}


def ids(path: Path) -> str:
    return path.stem


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@functools.cache
def build(path: Path) -> nn.Module:
    config = load(path)
    return timm.create_model(config['model'], device='meta', **config.get('model_kwargs', {}))


def lr_of_each_epoch(config: dict[str, Any]) -> list[float]:
    lr = config['lr_base'] * config['batch_size'] / config['lr_base_size']
    optimizer = create_optimizer_v2(nn.Linear(1, 1), opt=config['opt'], lr=lr)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]['nesterov'] is False
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(Namespace(**{**SCHEDULE_DEFAULTS, **config}), False), updates_per_epoch=1
    )
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        scheduler.step(epoch + 1)
    return rates


def pieces(*parts: tuple[float, int]) -> Any:
    return pytest.approx([lr for lr, epochs in parts for _ in range(epochs)])


def test_all_configs_are_found() -> None:
    assert len(CONFIGS) == len({*CIFAR, *IMAGENET})
    assert len(IMAGENET) == 6
    assert {path.stem.removesuffix('_stage2') for path in STAGE2} == {
        path.stem for path in STAGE1 if 'gated' not in load(path) and 'deepmoe' in load(path)['model']
    }


@pytest.mark.skipif('TIMM_REPO' not in os.environ, reason="TIMM_REPO (a checkout of timm's repository) is not set")
@pytest.mark.parametrize('path', ALL, ids=ids)
def test_options_are_known_to_train_py(path: Path) -> None:
    source = Path(os.environ['TIMM_REPO'], 'train.py').read_text()
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    options = set()
    for call in calls:
        if isinstance(call.func, ast.Attribute) and call.func.attr == 'add_argument':
            flags = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            named = [keyword.value.value for keyword in call.keywords if keyword.arg == 'dest']
            long = [flag for flag in flags if flag.startswith('--')] or flags
            options.add(named[0] if named else long[0].lstrip('-').replace('-', '_'))
    assert len(options) > 100
    assert set(load(path)) <= options


@pytest.mark.parametrize('path', CONFIGS, ids=ids)
def test_model_builds(path: Path) -> None:
    config = load(path)
    model = build(path)
    assert config['device_modules'] == ['deepmoe_plugin']
    is_deepmoe = isinstance(model, deepmoe_plugin.DeepMoE)
    assert is_deepmoe == ('deepmoe' in config['model'])
    if is_deepmoe:
        model.check_terms()  # refuses a target that cannot be reached
    expected = ('torch/cifar100', 100, (3, 32, 32)) if path in CIFAR else (None, 1000, (3, 224, 224))
    assert (config.get('dataset'), model.num_classes, model.pretrained_cfg['input_size']) == expected
    assert config['smoothing'] == 0


@pytest.mark.parametrize('path', SIBLINGS, ids=ids)
def test_sibling_builds_for_the_images_of_its_config(path: Path) -> None:
    config = load(path)
    model = build(path)
    assert config['device_modules'] == ['deepmoe_plugin']
    assert tuple(config['input_size']) == (model.in_chans, *model.img_size)
    assert config['smoothing'] == 0
    assert (config['opt'] == 'adam') == path.stem.startswith('moe_')
    assert config['sched'] == 'cosine' or config['decay_epochs'] > config['epochs']  # sched: none ends train.py


def test_siblings_are_those_of_both_papers() -> None:
    stacked = {path.stem for path in SIBLINGS if path.stem.startswith('dmoe_')}
    rows = {stem for stem in stacked if 'dnn' not in stem and not stem.endswith('_phase2')}
    assert len(rows) == 5
    assert stacked - rows == {f'{row}_phase2' for row in rows} | {
        row.replace('dmoe', 'dmoe_dnn', 1) for row in rows if row != 'dmoe_4x100'
    }
    assert all('balance_margin' in load(path)['model_kwargs'] for path in SIBLINGS if path.stem in rows)
    for name, epochs, batch in (('moe_mnist', 20, 512), ('moe_fashion_mnist', 20, 512), ('moe_cifar100', 40, 256)):
        kinds = [load(path) for path in SIBLINGS if path.stem.startswith(name) and 'distilled' not in path.stem]
        assert len(kinds) == 7
        assert {(kind['epochs'], kind['batch_size'], kind['lr']) for kind in kinds} == {(epochs, batch, 0.001)}


@pytest.mark.parametrize('path', IMAGENET, ids=ids)
def test_imagenet_schedule(path: Path) -> None:
    config = load(path)
    assert lr_of_each_epoch(config) == pieces((0.1, 30), (0.01, 30), (0.001, 30), (0.0001, 10))
    assert config.get('model_kwargs', {}).get('embed_loss_weight', 0) == 0


@pytest.mark.parametrize('path', STAGE1, ids=ids)
def test_cifar_schedule(path: Path) -> None:
    config = load(path)
    lr = 0.01 if 'vgg' in config['model'] else 0.1
    is_deepmoe = 'deepmoe' in config['model']
    assert lr_of_each_epoch(config) == pieces((lr, 150), (lr / 10, 100), (lr / 100, 20 if is_deepmoe else 100))
    if is_deepmoe:
        assert build(path).gating.embed_loss_weight == 1
        assert build(path).gating.budget is not None


@pytest.mark.parametrize('path', STAGE2, ids=ids)
def test_stage2_goes_on_with_the_gating_frozen(path: Path) -> None:
    config, stage1 = load(path), load(path.with_stem(path.stem.removesuffix('_stage2')))
    lr = lr_of_each_epoch(stage1)[-1]
    assert lr_of_each_epoch(config) == pieces((lr, 80))
    assert config['model_kwargs'] == {
        'freeze_gating': True,
        **{name: value for name, value in stage1['model_kwargs'].items() if name == 'widen'},
    }
    assert not any(parameter.requires_grad for parameter in build(path).gating.parameters())
    same = ('model', 'dataset', 'batch_size', 'opt', 'weight_decay', 'scale', 'ratio', 'smoothing', 'lr_base_size')
    assert {name: config[name] for name in same} == {name: stage1[name] for name in same}


@pytest.mark.parametrize(
    ('name', 'params', 'gmacs', 'target'),
    [
        ('w1_high', 24.15, 0.350, 0.298),
        ('w1_mid', 24.16, 0.914, 0.274),
        ('w4_low', 24.18, 3.347, 0.245),  # the paper prints 4.316 GMACs; four equally widened layers cost 3.347
        ('w13_all', 24.18, 0.513, 0.229),
    ],
)
def test_table_4(name: str, params: float, gmacs: float, target: float) -> None:
    path = next(path for path in CONFIGS if path.stem == f'table4_{name}')
    config = load(path)
    model = build(path)
    base = sum(p.numel() for key, p in model.named_parameters() if not key.startswith('gating.'))
    dense = MacsTable(model, (32, 32)).dense(BASE_GROUPS)
    assert round(base / 1e6, 2) == params
    assert round(dense / 1e9, 3) == gmacs
    assert config['model_kwargs']['target_macs'] * dense / 1e9 == pytest.approx(target, rel=0.005)


def test_table_3() -> None:
    path = next(path for path in CONFIGS if path.stem == 'narrow_deepmoe_resnet50_imagenet')
    table = MacsTable(build(path), (224, 224))
    dense, shortcuts = table.dense(BASE_GROUPS), table.dense(('shortcut',))
    spent = load(path)['model_kwargs']['target_macs'] * dense
    assert 1 - (spent - shortcuts) / (dense - shortcuts) == pytest.approx(0.568, abs=0.001)


def test_shift_of_padded_images_is_exact() -> None:
    """What the configs say about images that are padded beforehand: any 32x32 window, untouched."""
    image = torch.arange(40 * 40).remainder(251).to(torch.uint8).reshape(40, 40)
    transform = create_transform(
        (3, 32, 32), is_training=True, scale=[0.64, 0.64], ratio=[1.0, 1.0], hflip=0, interpolation='bilinear',
        color_jitter=None, use_prefetcher=True,
    )  # fmt: skip
    pil = pytest.importorskip('torchvision.transforms.functional').to_pil_image(image.expand(3, 40, 40))
    windows = image.unfold(0, 32, 1).unfold(1, 32, 1).flatten(0, 1)
    corners = set()
    for _ in range(100):
        shifted = torch.as_tensor(transform(pil))[0]
        found = [i for i, window in enumerate(windows) if torch.equal(window, shifted)]
        assert found
        corners.add(found[0])
    assert len(corners) > 40
