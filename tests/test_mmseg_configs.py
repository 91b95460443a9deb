"""Every configs/mmseg/*.py: loads, builds its whole model, and reads its data; section 5.4's numbers."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip('mmseg')

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmseg.registry import DATA_SAMPLERS, DATASETS, HOOKS, LOOPS, METRICS, MODELS, TRANSFORMS, VISUALIZERS

import deepmoe_plugin
from deepmoe_plugin.macs import GATING_GROUPS, GROUPS, MacsTable

FOLDER = Path(__file__).parents[1] / 'configs/mmseg'
CONFIGS = sorted(FOLDER.glob('*.py'))
GATED = [path for path in CONFIGS if 'deepmoe' in path.stem]
BASES = sorted(FOLDER.glob('_base_/**/*.py'))
# Width and height of the images of each dataset, and its classes.
DATA = {'cityscapes': ((2048, 1024), 19), 'camvid': ((480, 360), 11), 'street_scenes': ((256, 128), 19)}


def ids(path: Path) -> str:
    return path.stem


@functools.cache
def load(name: str) -> Config:
    return Config.fromfile(FOLDER / f'{name}.py')


@functools.cache
def build(name: str) -> nn.Module:
    with torch.device('meta'):
        return MODELS.build(load(name).model)


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope('mmseg')


@pytest.fixture(scope='module')
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One training, validation and test image for each dataset, in its folders and of its size."""
    rng = np.random.default_rng(0)
    roots = {}
    for name, ((width, height), classes) in DATA.items():
        roots[name] = tmp_path_factory.mktemp(name)
        image = np.kron(rng.integers(0, 255, (height // 8, width // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        labels = np.kron(rng.integers(0, classes + 1, (height // 8, width // 8)), np.ones((8, 8))).astype(np.uint8)
        labels[labels == classes] = 255
        for split in ('train', 'val', 'test'):
            if name == 'camvid':
                files = f'img_dir/{split}/a.jpg', f'ann_dir/{split}/a.png'
            else:
                files = (f'leftImg8bit/{split}/x/a_leftImg8bit.png', f'gtFine/{split}/x/a_gtFine_labelTrainIds.png')
            for file, pixels in zip(files, (image, labels), strict=True):
                path = roots[name] / file
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return roots


def dataset_of(name: str) -> str:
    return next(dataset for dataset in DATA if name.endswith((dataset, f'{dataset}_slide')))


def test_all_bases_are_used() -> None:
    """Through whatever chain of `_base_`."""
    texts = [path.read_text() for path in [*CONFIGS, *BASES]]
    assert len(CONFIGS) > 20
    for base in BASES:
        assert any(f'/{base.name}' in text for text in texts), base


@pytest.mark.parametrize('path', CONFIGS, ids=ids)
def test_names_resolve(path: Path) -> None:
    config = load(path.stem)
    assert '::' not in config.pretty_text.replace('://', '')
    assert config.custom_imports.imports == ['deepmoe_plugin.mmseg']
    types = [(HOOKS, hook) for hook in [*config.default_hooks.values(), *config.custom_hooks]]
    types += [(LOOPS, config[name]) for name in ('train_cfg', 'val_cfg', 'test_cfg')]
    types += [(METRICS, config.val_evaluator), (METRICS, config.test_evaluator), (MODELS, config.tta_model)]
    types += [(VISUALIZERS, config.visualizer)]
    for split in ('train', 'val', 'test'):
        loader = config[f'{split}_dataloader']
        types += [(DATASETS, loader.dataset), (DATA_SAMPLERS, loader.sampler)]
        types += [(TRANSFORMS, step) for step in loader.dataset.pipeline]
    for registry, part in types:
        assert registry.get(part['type']) is not None, part


@pytest.mark.parametrize('path', CONFIGS, ids=ids)
def test_model(path: Path) -> None:
    """Builds, classifies each pixel into the dataset's classes, and is gated if its name says so."""
    config, model = load(path.stem), build(path.stem)
    gated = path in GATED
    hooks = [hook.type for hook in config.custom_hooks]
    assert isinstance(model.backbone, deepmoe_plugin.DeepMoE) == gated == ('DeepMoELossHook' in hooks)
    assert 'GateStatisticsHook' in hooks
    classes = DATA[dataset_of(path.stem)][1]
    meta = config.train_dataloader.dataset.get('metainfo') or DATASETS.get(config.dataset_type).METAINFO
    heads = [model.decode_head, *([model.auxiliary_head] if model.with_auxiliary_head else [])]
    assert {head.num_classes for head in heads} == {classes} == {len(meta['classes'])} == {len(meta['palette'])}
    with torch.no_grad():
        features = model.eval().backbone(torch.zeros(2, 3, *config.crop_size, device='meta'))
        for head in heads:
            assert head(features).shape[:2] == (2, classes)


@pytest.mark.parametrize('path', GATED, ids=ids)
def test_weight_decay_spares_the_gate_heads(path: Path) -> None:
    config, model = load(path.stem), build(path.stem)
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    spared = {name: group['weight_decay'] == 0 for group in wrapper.param_groups for name in group_names(model, group)}
    assert spared['backbone.gating.gates.weight']
    if 'convnext' in path.stem:  # there, all vectors are spared
        assert type(wrapper.optimizer) is torch.optim.AdamW
        assert {name for name in spared if spared[name]} == {
            name for name, p in model.named_parameters() if p.ndim == 1 or 'gates' in name
        }
        return
    assert sum(spared.values()) == 1
    assert type(wrapper.optimizer) is torch.optim.SGD
    assert {group['momentum'] for group in wrapper.param_groups} == {0.9}


def group_names(model: nn.Module, group: dict) -> list[str]:
    return [name for name, parameter in model.named_parameters() if any(parameter is p for p in group['params'])]


@pytest.mark.parametrize(
    'name',
    ['drn50', 'wide_drn50', 'deepmoe_drn50', 'deepmoe_drn50_accurate', 'deepmoe_drn50b', 'narrow_deepmoe_drn50'],
)
def test_section_5_4(name: str) -> None:
    config = load(f'{name}_cityscapes')
    head = config.model.decode_head
    assert (head.type, head.num_convs, head.concat_input) == ('FCNHead', 0, False)
    assert config.crop_size == config.model.data_preprocessor.size == (832, 832)
    assert config.optim_wrapper.optimizer.lr == 5e-4
    (step,) = config.param_scheduler
    assert (step.type, step.milestones, step.gamma, step.by_epoch) == ('MultiStepLR', [200], 0.1, True)
    assert config.train_cfg.max_epochs > 200
    assert [step.type for step in config.train_pipeline[2:5]] == ['RandomResize', 'RandomCrop', 'RandomFlip']
    assert config.model.backbone.norm_cfg.type == 'SyncBN'
    finetune = [hook for hook in config.custom_hooks if hook.type == 'DeepMoEFinetuneHook']
    assert [hook.by_epoch for hook in finetune] == [True] * ('deepmoe' in name)
    assert all(200 < hook.begin < config.train_cfg.max_epochs for hook in finetune)


@pytest.mark.parametrize(
    ('name', 'params', 'gmacs', 'without_shortcuts'),
    [('drn50', 23.508, 797.35, 705.05), ('wide_drn50', 66.834, 2260.9, 2168.5)],
)
def test_table_5(name: str, params: float, gmacs: float, without_shortcuts: float) -> None:
    backbone = build(f'{name}_cityscapes').backbone
    table = MacsTable(backbone, (1024, 2048))
    dense = table.dense([group for group in GROUPS if group not in GATING_GROUPS])
    assert sum(parameter.numel() for parameter in backbone.parameters()) / 1e6 == pytest.approx(params, abs=0.001)
    assert dense / 1e9 == pytest.approx(gmacs, abs=0.05)
    assert (dense - table.dense(('shortcut',))) / 1e9 == pytest.approx(without_shortcuts, abs=0.05)


def test_accurate_network_of_table_5() -> None:
    target = load('deepmoe_drn50_accurate_cityscapes').model.backbone.target_macs
    assert target * 2260.9 - (2260.9 - 2168.5) == pytest.approx(1738, rel=0.005)


@pytest.mark.parametrize('path', CONFIGS, ids=ids)
def test_train_pipeline(path: Path, roots: dict[str, Path]) -> None:
    config = load(path.stem)
    dataset = DATASETS.build({**config.train_dataloader.dataset, 'data_root': str(roots[dataset_of(path.stem)])})
    preprocessor = MODELS.build(config.model.data_preprocessor)
    samples = [dataset[0] for _ in range(config.train_dataloader.batch_size)]
    for sample in samples:
        width, height = np.multiply(DATA[dataset_of(path.stem)][0], sample['data_samples'].scale_factor)
        assert sample['inputs'].shape[1:] == tuple(np.minimum(config.crop_size, (round(height), round(width))))
    batch = preprocessor({key: [sample[key] for sample in samples] for key in samples[0]}, training=True)
    assert batch['inputs'].shape == (len(samples), 3, *config.crop_size)
    assert batch['inputs'].std() > 0.1
    labels = torch.stack([sample.gt_sem_seg.data for sample in batch['data_samples']])
    assert labels.shape == (len(samples), 1, *config.crop_size)
    assert set(labels.unique().tolist()) <= {*range(len(dataset.metainfo['classes'])), 255}


@pytest.mark.parametrize(
    'name', ['drn50_cityscapes', 'resnet18_camvid', 'drn50_camvid', 'deepmoe_resnet18_street_scenes']
)
def test_test_pipelines(name: str, roots: dict[str, Path]) -> None:
    config = load(name)
    (width, height), _ = DATA[dataset_of(name)]
    for split in ('val', 'test'):
        cfg = {**config[f'{split}_dataloader'].dataset, 'data_root': str(roots[dataset_of(name)]), 'test_mode': True}
        sample = DATASETS.build(cfg)[0]
        assert sample['inputs'].shape == (3, height, width)
        assert sample['data_samples'].gt_sem_seg.shape == (height, width)
    augmented = DATASETS.build({**cfg, 'pipeline': config.tta_pipeline})[0]
    shapes = [tuple(image.shape[1:]) for image in augmented['inputs']]
    assert sorted(shapes) == [
        (round(height * ratio), round(width * ratio)) for ratio in (0.75, 1.0, 1.25) for _ in range(2)
    ]
    assert [sample.flip for sample in augmented['data_samples']].count(True) == 3
    assert {sample.gt_sem_seg.shape for sample in augmented['data_samples']} == {(height, width)}
