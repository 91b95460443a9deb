"""What `train` and `test` share: arguments, the config, and a look at it and its data before anything starts."""

import argparse
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.registry import Registry
from mmengine.runner import Runner
from mmseg.registry import DATASETS, HOOKS, MODELS, TRANSFORMS

from .configs import did_you_mean, find_config, shipped_configs
from .parsing import create_parser, output_folder


def segmentor_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The arguments that both have in common."""
    parser = create_parser(command, description)
    parser.add_argument('config', help='config file, or a config of this package by its name: deepmoe_drn50_cityscapes')
    parser.add_argument(
        '--work-dir', type=output_folder, help='folder for logs and checkpoints (default: work_dirs/NAME_OF_CONFIG)'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='change the config: model.backbone.widen=2, key="[a,b]" or key=a,b; no white space',
    )
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='what started the processes'
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def load_config(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Config:
    """The config with the changes of the command line; exits with a message where they are wrong."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    path = _find(parser, args.config)
    config = Config.fromfile(str(path))
    options = args.cfg_options or {}
    known = {*config, *inspect.signature(Runner).parameters, 'work_dir', 'runner_type'}
    for key in (option.split('.')[0] for option in options):
        if key not in known:
            parser.error(f'--cfg-options: the config has no key {key}{did_you_mean(key, known)}')
    config.merge_from_dict(options)
    config.launcher = args.launcher
    config.work_dir = str(args.work_dir or config.get('work_dir') or f'work_dirs/{path.stem}')
    return config


def _find(parser: argparse.ArgumentParser, name: str) -> Path:
    path = find_config(name, 'mmseg')
    if path is not None and path.suffix == '.py':
        return path
    if path is not None or find_config(name, 'timm') is not None:
        parser.error(
            f"{name} is a config of timm's train.py, which is in timm's repository: "
            f'deepmoe run train.py --config {name} --data-dir FOLDER'
        )
    beside = [file.stem for file in Path(name).parent.glob('*.py')] if '/' in name or name.endswith('.py') else []
    parser.error(f'config {name} does not exist{did_you_mean(Path(name).stem, [*shipped_configs("mmseg"), *beside])}')


def check_types(parser: argparse.ArgumentParser, config: Config) -> None:
    """Exit with the name of a type that no registry has, and with those that are close to it."""
    if config.get('default_scope', 'mmseg') != 'mmseg':
        return
    typed: list[tuple[str, Registry, Any]] = []
    for name in ('train', 'val', 'test'):
        loader = config.get(f'{name}_dataloader')
        for dataset in plain_datasets(loader.dataset) if loader else ():
            typed.append((f'{name}_dataloader.dataset', DATASETS, dataset))
            typed += [(f'{name}_dataloader.dataset.pipeline', TRANSFORMS, step) for step in dataset.get('pipeline', ())]
    typed += [('custom_hooks', HOOKS, hook) for hook in config.get('custom_hooks') or ()]
    model = config.get('model') or {}
    typed += [('model', MODELS, model)]
    for name in ('backbone', 'decode_head', 'auxiliary_head'):
        parts = model.get(name) or ()
        typed += [(f'model.{name}', MODELS, part) for part in (parts if isinstance(parts, (list, tuple)) else [parts])]
    for place, registry, part in typed:
        kind = part.get('type') if isinstance(part, dict) else None
        if isinstance(kind, str) and _look_up(registry, kind) is None:
            parser.error(f'{place}: there is no type {kind}{did_you_mean(kind, _names(registry))}')


def _look_up(registry: Registry, kind: str) -> Any:
    try:
        return registry.get(kind)
    except RuntimeError:  # of mmengine, where it finds nothing
        return None


def _names(registry: Registry) -> set[str]:
    names = set(registry.module_dict)
    return names | _names(registry.parent) if registry.parent is not None else names


def check_data(parser: argparse.ArgumentParser, config: Config, *splits: str) -> None:
    """Exit with what to do unless all images of the splits ('train', 'val', 'test') and their label maps are there."""
    for split in splits:
        loader = config.get(f'{split}_dataloader')
        for dataset in plain_datasets(loader.dataset) if loader else ():
            problem = _missing(dataset)
            if problem:
                parser.error(f'{split}_dataloader: {problem}\n{_remedy(dataset)}')


def plain_datasets(dataset: Any) -> Iterator[Any]:
    """The datasets inside wrappers such as RepeatDataset and ConcatDataset."""
    inner = dataset.get('datasets') or ([dataset.dataset] if 'dataset' in dataset else [])
    if not inner:
        yield dataset
    for part in inner:
        yield from plain_datasets(part)


def _type_of(dataset: Any) -> Any:
    """The class of a dataset; a config in pure Python holds it, others its name."""
    return DATASETS.get(dataset.type) if isinstance(dataset.type, str) else dataset.type


def _missing(dataset: Any) -> str | None:
    """What a dataset of mmseg lacks on disk."""
    prefix = dataset.get('data_prefix', {})
    if 'img_path' not in prefix or dataset.get('ann_file') or dataset.get('backend_args'):
        return None
    parameters = inspect.signature(_type_of(dataset)).parameters
    defaults = {'img_suffix': '.jpg', 'seg_map_suffix': '.png'}
    suffixes = [
        dataset.get(name, parameters[name].default if name in parameters else default)
        for name, default in defaults.items()
    ]
    root = Path(dataset.get('data_root') or '')
    images = root / prefix['img_path']
    labels = root / prefix['seg_map_path'] if prefix.get('seg_map_path') is not None else None
    if not images.is_dir():
        return f'folder {images} does not exist.'
    names = [str(path.relative_to(images)).removesuffix(suffixes[0]) for path in images.rglob(f'*{suffixes[0]}')]
    if not names:
        return f'no *{suffixes[0]} in folder {images}.'
    if labels is None:
        return None
    lacking = sorted(name for name in names if not (labels / f'{name}{suffixes[1]}').is_file())
    if lacking:
        first = labels / f'{lacking[0]}{suffixes[1]}'
        return f'{len(lacking)} of {len(names)} images have no label map; the first one, {first}, does not exist.'
    return None


def _remedy(dataset: Any) -> str:
    root = dataset.get('data_root')
    if getattr(_type_of(dataset), '__name__', '') != 'CityscapesDataset':
        return f'Put the data into {root}, or give its folder as *_dataloader.dataset.data_root.'
    return (
        f'CityScapes: unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip in {root}, then\n'
        f'  pip install cityscapesscripts && CITYSCAPES_DATASET={root} csCreateTrainIdLabelImgs\n'
        f'makes the *_labelTrainIds.png. The configs *_street_scenes do with generated scenes instead:\n'
        f'  deepmoe street-scenes data/street_scenes'
    )
