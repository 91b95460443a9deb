"""Segmentors, data and Runners of MMSegmentation, small enough to train on a CPU in a second."""

import itertools
from pathlib import Path
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from small_networks import randomise
from torch import Tensor, nn
from torch.utils.data import Dataset

import deepmoe_plugin.mmseg  # noqa: F401 (registers everything)
from deepmoe_plugin.cli import street_scenes

STREETS = Path(__file__).parents[1] / 'configs/mmseg/deepmoe_resnet18_street_scenes.py'
ITERATIONS = 6
CLASSES = 5
SIZE = 64
init_default_scope('mmseg')
_names = (f'run{i}' for i in itertools.count())


class Scenes(Dataset):
    """Random images and maps with ignored pixels; image i shows the classes up to i modulo 5.

    Args:
        sizes: (height, width) of the images, in turn.
    """

    metainfo = dict(classes=tuple(f'class {i}' for i in range(CLASSES)), palette=[[i, i, i] for i in range(CLASSES)])

    def __init__(self, length: int = 4, sizes: tuple[tuple[int, int], ...] = ((SIZE, SIZE),)) -> None:
        self.length = length
        self.sizes = sizes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i >= self.length:
            raise IndexError(i)
        size = self.sizes[i % len(self.sizes)]
        generator = torch.Generator().manual_seed(i)
        image = torch.randint(0, 256, (3, *size), generator=generator) * (0.3 + i % 3) / 2.3
        labels = torch.randint(0, i % CLASSES + 1, (1, *size), generator=generator)
        labels[:, :3] = 255
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size, img_path=f'{i}.png'))
        sample.gt_sem_seg = PixelData(data=labels)
        return dict(inputs=image.to(torch.uint8), data_samples=sample)


def small_street_scenes(folder: Path) -> Path:
    """Draw four training and two validation scenes in `folder`, and write a config that trains on them in seconds.

    Returns:
        The config: that of the quick start with a smaller network, smaller images and `ITERATIONS` iterations.
    """
    street_scenes.main([str(folder), '--train', '4', '--val', '2', '--width', '128', '--height', '64'])
    path = folder / 'small.py'
    loader = f'num_workers=0, persistent_workers=False, dataset=dict(data_root={str(folder)!r})'
    path.write_text(
        f'_base_ = {str(STREETS)!r}\n'
        'model = dict(backbone=dict(widen=0.25), data_preprocessor=dict(size=(64, 64)))\n'
        f'train_dataloader = dict(batch_size=2, {loader})\n'
        f'val_dataloader = dict({loader})\n'
        f'test_dataloader = dict({loader})\n'
        f'train_cfg = dict(max_iters={ITERATIONS}, val_interval={ITERATIONS})\n'
        'default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))\n'
        'optim_wrapper = dict(optimizer=dict(lr=0.01))\n'
        'randomness = dict(seed=0)\n'
        'crop_size = (64, 64)\n'
        'train_pipeline = [dict(step, crop_size=crop_size) if step.type == "RandomCrop" else step\n'
        '                  for step in _base_.train_pipeline]\n'
        'train_dataloader["dataset"]["pipeline"] = train_pipeline\n'
    )
    return path


@METRICS.register_module()
class SaveLogits(BaseMetric):
    """Keeps the logits of every image, to compare runs."""

    default_prefix = None

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [sample['seg_logits']['data'].clone() for sample in data_samples]

    def compute_metrics(self, results: list[Tensor]) -> dict[str, float]:
        self.logits = list(results)
        return {'mean': float(sum(logit.mean() for logit in results))}


def backbone_config(**kwargs: Any) -> dict[str, Any]:
    return {'type': 'DeepMoEResNet', 'depth': 18, 'widen': 0.25, **kwargs}


def segmentor_config(
    backbone: dict[str, Any] | None = None, head: dict[str, Any] | None = None, **kwargs: Any
) -> ConfigDict:
    fcn = dict(
        type='FCNHead', in_channels=512, in_index=3, channels=8, num_convs=1, dropout_ratio=0.0, concat_input=False
    )
    config = {
        'type': 'EncoderDecoder',
        'data_preprocessor': dict(
            type='SegDataPreProcessor', mean=[110.0] * 3, std=[60.0] * 3, size=(SIZE, SIZE), pad_val=0, seg_pad_val=255
        ),
        'backbone': backbone or backbone_config(),
        'decode_head': {
            **(head or {**fcn, 'concat_input': False}),
            'num_classes': CLASSES,
            'norm_cfg': dict(type='BN'),
        },
        'train_cfg': dict(),
        'test_cfg': dict(mode='whole'),
        **kwargs,
    }
    return ConfigDict(config)


def segmentor(backbone: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """A segmentor in which every weight counts: some experts are closed, others open, by image."""
    torch.manual_seed(0)
    model = MODELS.build(segmentor_config(backbone, **kwargs))
    model.init_weights()  # before the Runner does, so that copies made before training start alike
    randomise(model.backbone)
    return model


def loader(length: int = 4, batch_size: int = 2, endless: bool = False, **kwargs: Any) -> dict[str, Any]:
    sampler = dict(type='InfiniteSampler' if endless else 'DefaultSampler', shuffle=True)
    return dict(
        batch_size=batch_size,
        num_workers=0,
        dataset=Scenes(length, **kwargs),
        sampler=sampler,
        collate_fn=dict(type='pseudo_collate'),
    )


def make_runner(
    model: nn.Module | dict[str, Any],
    work_dir: Path,
    *hooks: Any,
    epochs: int | None = None,
    iters: int | None = None,
    val: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    interval: int = 1,
    cfg: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Runner:
    """A Runner that trains for some epochs or iterations, saves at each, and validates and tests on `val`."""
    by_epoch = iters is None
    config: dict[str, Any] = {}
    if epochs or iters:
        limit = dict(max_epochs=epochs) if by_epoch else dict(max_iters=iters)
        config['train_dataloader'] = loader(endless=not by_epoch)
        config['train_cfg'] = dict(by_epoch=by_epoch, **limit, **(dict(val_interval=1) if val else {}))
        sgd = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.01)
        config['optim_wrapper'] = {'type': 'OptimWrapper', 'optimizer': sgd, **(optim or {})}
    if val:
        for mode in ('val', 'test'):
            config[f'{mode}_dataloader'] = val
            config[f'{mode}_cfg'] = dict()
            config[f'{mode}_evaluator'] = dict(type='SaveLogits')
    default_hooks = dict(
        logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=by_epoch),
        checkpoint=dict(type='CheckpointHook', interval=interval, by_epoch=by_epoch),
        param_scheduler=None,
        sampler_seed=dict(type='DistSamplerSeedHook'),
    )
    return Runner(
        model=model,
        work_dir=str(work_dir),
        custom_hooks=list(hooks),
        default_hooks=default_hooks,
        log_processor=dict(by_epoch=by_epoch),
        default_scope='mmseg',
        experiment_name=next(_names),
        randomness=dict(seed=0),
        cfg=cfg or {},
        **{'log_level': 'WARNING', **config, **kwargs},
    )


# Backbones of every kind, small where that takes no more than an argument.
TYPES = {
    'resnet18': dict(type='DeepMoEResNet', depth=18),
    'resnet50': dict(type='DeepMoEResNet', depth=50, widen=0.25),
    'resnet50b': dict(type='DeepMoEResNet', depth=50, widen=0.25, bottleneck='B'),
    'drn': dict(type='DeepMoEDRN', depth=50, widen=0.25),
    'vgg11': dict(type='DeepMoEVGG', depth=11, widen=0.25),
    'convnext': dict(type='DeepMoEConvNeXt', arch=dict(depths=(1, 1, 2, 1), channels=(16, 24, 32, 48))),
    'convnextv2': dict(
        type='DeepMoEConvNeXt', arch='atto', widen=0.25, use_grn=True, layer_scale_init_value=0, linear_pw_conv=False
    ),
}


def build(name: str = 'resnet18', seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS.build({**TYPES[name], **kwargs})
