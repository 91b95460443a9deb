"""Make a trained segmentor cheaper: gate its backbone, train on, and compare it with what it was.

    deepmoe train resnet18_camvid --work-dir output/dense
    deepmoe compress resnet18_camvid --checkpoint output/dense/iter_1000.pth --macs 0.5

The config names a segmentor whose backbone is one of this package, with gates or without. It is trained by its own
schedule, in mmengine's Runner, with the dense segmentor as the teacher. The gates start from what each expert is worth
and from which images use it (deepmoe_plugin.warm_start). A threshold closes the least useful experts until the average
image costs the budget, and the last iterations train with frozen gates (stage 2).

The work dir gets config and weights (compressed.py, compressed.pth), a table (results.md, results.json) and a picture
of the experts that images of each class keep (experts.png). MACs are those of the backbone, gating network included.
"""

import argparse
import copy
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, find_latest_checkpoint
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from timm.models import load_state_dict
from torch import Tensor

from ..budgets import base_target
from ..checkpoints import check_readable
from ..gating import GatingConfig
from ..macs import macs_table
from ..mmseg import allow_histories
from ..mmseg.hooks.compress_hook import CompressHook, Stages, Teacher, TrainingBatches
from ..mmseg.hooks.loss_hook import class_presence
from ..network import find_deepmoe
from ..stats import join_kept, kept_experts
from .compression import GROUPS, RAMP, TEMPERATURE, add_recipe, check_recipe, each_budget, target_of, write_table
from .figures import draw_experts
from .parsing import output_folder
from .segmentation import check_data, check_types, load_config, segmentor_parser

NOMINAL = (224, 224)
"""Image size at which the MACs of the budget are counted: their fraction hardly depends on it."""
BASELINES = ('dense',)
_OURS = ('DeepMoELossHook', 'DeepMoEFinetuneHook')
_run_numbers = itertools.count()


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = segmentor_parser('compress', __doc__ or '')
    parser.add_argument(
        '--checkpoint', required=True, help='of the trained dense segmentor, as `deepmoe train` writes it'
    )
    parser.add_argument('--output', dest='work_dir', type=output_folder, help='the same as --work-dir')
    add_recipe(parser, BASELINES)
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None) -> dict[str, Any]:
    """Compress a segmentor, with these arguments."""
    parser, args = parse_args(argv)
    check_recipe(parser, args)
    if args.launcher != 'none':
        parser.error('--launcher: compress trains in one process; leave it out')
    given = args.work_dir
    config = load_config(parser, args)
    folder = Path(given or f'{config.work_dir}_compressed')
    register_all_modules(init_default_scope=False)
    check_types(parser, config)
    check_data(parser, config, 'train', 'val', 'test')
    init_default_scope(config.get('default_scope', 'mmseg'))
    try:
        segmentors = Segmentors(config, args)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    folder.mkdir(parents=True, exist_ok=True)
    runner = segmentors.runner(segmentors.dense, folder / 'dense')
    runner.model.load_state_dict(segmentors.weights)
    rows = [{'name': 'dense', **_judge(runner)}]
    title = f'{{}}, {segmentors.length}'
    if 'dense' in args.baselines:
        trained = segmentors.train_dense(folder / 'dense_longer')
        rows.append({'name': title.format('dense'), **_judge(trained)})
    runner = segmentors.train_gated(folder / 'gated')
    model = runner.model
    budgets = each_budget(segmentors.targets, title.format('gated'), model, TrainingBatches(runner))
    rows += [{'name': name, **_judge(runner)} for name in budgets]
    config_file, weights = folder / 'compressed.py', folder / 'compressed.pth'
    segmentors.gated.dump(str(config_file))
    metainfo = getattr(runner.test_dataloader.dataset, 'metainfo', {})
    torch.save({'state_dict': model.state_dict(), 'meta': {'dataset_meta': metainfo}}, weights)
    summary = {'config': args.config, 'checkpoint': args.checkpoint, 'macs': args.macs, 'results': rows}
    table = write_table(folder, summary, ('mIoU', 'mIoU (%)'), 'GMACs')
    _draw(runner).savefig(folder / 'experts.png', dpi=120)
    print(f'\n{table}\n\nTable, picture and network are in {folder}/: deepmoe test {config_file} {weights} --sparse')
    return summary


class Segmentors:
    """The dense segmentor, its gated twin, and their training.

    Raises:
        FileNotFoundError, ValueError: a setting, the config or the checkpoint cannot work; the message names it.
    """

    def __init__(self, config: Config, args: argparse.Namespace) -> None:
        self.args = args
        self.dense, self.gated = _twins(config)
        # Few groups of images, found by an embedding half as wide as usual, do best, as for classifiers.
        backbone = self.gated.model.backbone
        backbone.setdefault('num_latent_experts', GROUPS)
        backbone.setdefault('embedding_channels', [width // 2 for width in GatingConfig().embedding_channels])
        allow_histories()
        check_readable(args.checkpoint, '--checkpoint')
        self.weights = load_state_dict(args.checkpoint)
        self.teacher = MODELS.build(self.dense.model)
        try:
            self.teacher.load_state_dict(self.weights)
        except RuntimeError as error:
            raise ValueError(f'{args.checkpoint} is no checkpoint of the dense {args.config}: {error}') from error
        size = NOMINAL
        dense_macs = macs_table(self.teacher.backbone, size).dense()
        table = macs_table(MODELS.build(self.gated.model.backbone), size)
        self.targets = {fraction: base_target(fraction, dense_macs, table) for fraction in args.macs}
        loop = config.get('train_cfg') or {}
        self.by_epoch = 'max_epochs' in loop
        length = loop.get('max_epochs', loop.get('max_iters'))
        if not length:
            raise ValueError(f'{args.config} does not say how long to train: set train_cfg.max_iters.')
        self.length = f'{length} {"epochs" if self.by_epoch else "iterations"}'
        self.begin = length - math.floor(args.stage2 * length)
        self.gated.model.backbone.target_macs = target_of(self.targets)
        self.gated.custom_hooks = [*self.gated.custom_hooks, dict(type='deepmoe_plugin.DeepMoELossHook')]
        if self.begin < length:
            stage2 = dict(type='deepmoe_plugin.DeepMoEFinetuneHook', begin=self.begin, by_epoch=self.by_epoch)
            self.gated.custom_hooks.append(stage2)

    def runner(self, config: Config, folder: Path, resume: bool = False) -> Runner:
        """A Runner in a folder of its own; several may be in one process."""
        config = copy.deepcopy(config)
        config.work_dir = str(folder)
        # A Runner that finds nothing to resume looks again before it tests, and would load what training has saved.
        config.resume = resume and find_latest_checkpoint(str(folder)) is not None
        config.experiment_name = f'{folder.name}_{next(_run_numbers)}'
        if config.get('visualizer'):  # one of the same name would be the one of the Runner before
            config.visualizer.name = config.experiment_name
        return Runner.from_cfg(config)

    def train_dense(self, folder: Path) -> Runner:
        """Train the dense segmentor for as long as the gated one, with the same teacher."""
        return self._train(self.dense, folder, CompressHook(self.weights, self._teacher()))

    def train_gated(self, folder: Path) -> Runner:
        """Warm up the gates, and train to the budget, with stage 2."""
        stages = Stages(RAMP, self.begin, self.by_epoch, self.args.dynamic_experts)
        hook = CompressHook(self.weights, self._teacher(), stages)
        return self._train(self.gated, folder, hook)

    def _train(self, config: Config, folder: Path, hook: CompressHook) -> Runner:
        runner = self.runner(config, folder, self.args.resume)
        runner.register_hook(hook)
        runner.train()
        return runner

    def _teacher(self) -> Teacher | None:
        if not self.args.distill and not self.args.hint:
            return None
        return Teacher(self.teacher, self.args.distill, TEMPERATURE, self.args.hint)


def _twins(config: Config) -> tuple[Config, Config]:
    """The configs of the dense segmentor and of the gated one.

    Raises:
        ValueError: the backbone is none of this package.
    """
    name = _type_of(config.model.backbone)
    if not name.startswith('DeepMoE'):
        raise ValueError(
            f'The backbone {name} has no gated twin. Those of this package have one: train the dense segmentor with '
            f"model.backbone.type='deepmoe_plugin.DeepMoEResNet' (DeepMoEDRN, DeepMoEVGG, DeepMoEConvNeXt) and "
            f'model.backbone.gated=False.'
        )
    fields = {field.name for field in dataclasses.fields(GatingConfig)}
    hooks = [hook for hook in config.get('custom_hooks') or () if _type_of(hook) not in _OURS]
    if 'GateStatisticsHook' not in map(_type_of, hooks):
        hooks.append(dict(type='deepmoe_plugin.GateStatisticsHook'))
    twins = []
    for gated in (False, True):
        twin = copy.deepcopy(config)
        backbone = twin.model.backbone
        dropped = {'init_cfg', 'pretrained', *(('target_kept', 'target_macs', 'freeze_gating') if gated else fields)}
        for key in dropped & set(backbone):
            del backbone[key]
        backbone.gated = gated
        twin.model.pretrained = None
        twin.load_from = None
        twin.custom_hooks = copy.deepcopy(hooks)
        twins.append(twin)
    return twins[0], twins[1]


def _type_of(part: Any) -> str:
    """Name of the type of a part of a config, without the registry or module that it is from."""
    kind = part.get('type')
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def _judge(runner: Runner) -> dict[str, Any]:
    """One row of the table."""
    metrics = runner.test()
    if 'mIoU' not in metrics:
        raise SystemExit(f'The test evaluator of the config gives no mIoU, only {", ".join(metrics)}: use IoUMetric.')
    return {name: float(value) for name, value in metrics.items()}


@torch.no_grad()
def _draw(runner: Runner) -> Any:
    """Picture of the experts that images which show a class keep."""
    model: Any = runner.model
    network = find_deepmoe(model)
    kept: list[Tensor] = []
    shown: list[Tensor] = []
    classes = list(runner.test_dataloader.dataset.metainfo['classes'])
    for batch in runner.test_dataloader:
        data = model.data_preprocessor(batch, False)
        kept.append(kept_experts(network, data['inputs']).cpu())
        shown.append(class_presence(data['data_samples'], len(classes), 255).cpu())
    stats = join_kept(network, kept)
    usage = stats.by_class(torch.cat(shown))
    there = [i for i in range(len(classes)) if not usage[i].isnan().any()]
    return draw_experts(usage[there], stats.layers, stats.widths, [classes[i] for i in there])
