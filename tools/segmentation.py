"""What train.py and test.py share: arguments, the config, and a look at the data before anything starts."""

import argparse
import difflib
import inspect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    from mmengine.config import Config, DictAction
except ImportError as error:
    raise SystemExit(f"MMSegmentation is not installed ({error}): pip install '.[mmseg]'") from error


def create_parser(description: str) -> argparse.ArgumentParser:
    """The arguments that mmseg's scripts have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file, as configs/mmseg/deepmoe_drn50_cityscapes.py')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/NAME_OF_CONFIG)')
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
    path = Path(args.config)
    if not path.is_file():
        found = sorted(file.stem for file in path.parent.glob('*.py'))
        close = difflib.get_close_matches(path.stem, found, n=3)
        parser.error(f'config {path} does not exist{suggest(close)}')
    config = Config.fromfile(args.config)
    options = args.cfg_options or {}
    known = _known_keys(config) if options else set()
    for key in (option.split('.')[0] for option in options):
        if key not in known:
            parser.error(f'--cfg-options: the config has no key {key}{suggest(difflib.get_close_matches(key, known))}')
    config.merge_from_dict(options)
    config.launcher = args.launcher
    config.work_dir = args.work_dir or config.get('work_dir') or f'work_dirs/{path.stem}'
    return config


def suggest(names: Sequence[str]) -> str:
    return f'; did you mean {" or ".join(names)}?' if names else ''


def _known_keys(config: Config) -> set[str]:
    from mmengine.runner import Runner  # slow: it imports torch

    return {*config, *inspect.signature(Runner).parameters, 'work_dir', 'runner_type'}


def check_data(parser: argparse.ArgumentParser, config: Config, *splits: str) -> None:
    """Exit with what to do unless all images of the splits ('train', 'val', 'test') and their label maps are there."""
    for split in splits:
        loader = config.get(f'{split}_dataloader')
        for dataset in _plain_datasets(loader.dataset) if loader else ():
            problem = _missing(dataset)
            if problem:
                parser.error(f'{split}_dataloader: {problem}\n{_remedy(dataset)}')


def _plain_datasets(dataset: Any) -> Iterator[Any]:
    """The datasets inside wrappers such as RepeatDataset and ConcatDataset."""
    inner = dataset.get('datasets') or ([dataset.dataset] if 'dataset' in dataset else [])
    if not inner:
        yield dataset
    for part in inner:
        yield from _plain_datasets(part)


def _missing(dataset: Any) -> str | None:
    """What a dataset of mmseg lacks on disk."""
    from mmseg.registry import DATASETS

    prefix = dataset.get('data_prefix', {})
    if 'img_path' not in prefix or dataset.get('ann_file') or dataset.get('backend_args'):
        return None
    parameters = inspect.signature(DATASETS.get(dataset.type)).parameters
    defaults = {'img_suffix': '.jpg', 'seg_map_suffix': '.png'}
    suffixes = [
        dataset.get(name, parameters[name].default if name in parameters else default)
        for name, default in defaults.items()
    ]
    images, labels = (
        Path(dataset.get('data_root') or '', prefix[name]) if prefix.get(name) is not None else None
        for name in ('img_path', 'seg_map_path')
    )
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
    if dataset.type != 'CityscapesDataset':
        return f'Put the data into {root}, or give its folder as *_dataloader.dataset.data_root.'
    return (
        f'CityScapes: unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip in {root}, then\n'
        f'  pip install cityscapesscripts && CITYSCAPES_DATASET={root} csCreateTrainIdLabelImgs\n'
        f'makes the *_labelTrainIds.png. The configs *_street_scenes.py do with generated scenes instead:\n'
        f'  python tools/street_scenes.py data/street_scenes'
    )
