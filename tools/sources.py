"""The networks, checkpoints and images that a command line names."""

import argparse
import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import yaml
from timm.data import create_dataset, create_loader, get_img_extensions, resolve_data_config
from timm.models import get_pretrained_cfg, is_model, load_checkpoint, load_state_dict
from timm.utils import ParseKwargs
from torch import nn
from torch.utils.data import DataLoader

import deepmoe_plugin
from deepmoe_plugin.checkpoints import check_complete, check_readable

# What timm's train.py is told about the images; its output folder holds all of it in args.yaml.
_DATA_OPTIONS = ('in_chans', 'input_size', 'img_size', 'crop_pct', 'interpolation', 'mean', 'std')


class Images(NamedTuple):
    """Labelled images, in the order of their files, transformed as in timm's validation.

    Attributes:
        loader: batches of (images, labels).
        classes: name of each label.
        files: path of each image inside the folder; empty for a data set that is no image folder.
        mean, std: of the normalisation, one number for each channel.
    """

    loader: DataLoader
    classes: list[str]
    files: list[str]
    mean: Sequence[float]
    std: Sequence[float]


NETWORK_HELP = "timm's name of a model, or a YAML of timm's train.py (configs/timm/*, RUN/args.yaml)"


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `read_settings` and `create_network` read."""
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='NAME=VALUE')
    parser.add_argument('--num-classes', type=int, help='default: as many as the images have')
    parser.add_argument('--checkpoint', help='of timm, or .safetensors; default: no training at all')
    parser.add_argument('--use-ema', action='store_true', help='the moving average of the weights in the checkpoint')


def add_image_arguments(
    parser: argparse.ArgumentParser,
    flag: str = '--data-dir',
    required: bool = True,
    help: str = 'folder with SPLIT/CLASS/* or CLASS/*',
) -> None:
    """Add the arguments that `create_images` reads."""
    parser.add_argument(flag, dest='data_dir', required=required, help=help)
    parser.add_argument('--dataset', help="data set in timm's spelling, as torch/cifar100 (default: image folder)")
    parser.add_argument('--split', default='validation', help='default: %(default)s, in any spelling')
    parser.add_argument('--img-size', type=int, help='side in pixels (default: of the model)')
    parser.add_argument('--crop-pct', type=float, help='(default: of the model)')
    parser.add_argument('--batch-size', type=int, default=64, help='(default: %(default)s)')
    parser.add_argument('--workers', type=int, default=2, help='processes that load images (default: %(default)s)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')


def read_settings(network: str, args: argparse.Namespace) -> dict[str, Any]:
    """Model name, `model_kwargs` and options of the data: those of the YAML, overridden by the command line.

    Raises:
        ValueError: there is no such model or file; the message names it.
    """
    settings: dict[str, Any] = {'model': network}
    if network.endswith(('.yaml', '.yml')):
        if not Path(network).is_file():
            raise ValueError(f'There is no file {network}.')
        settings = yaml.safe_load(Path(network).read_text())
        if not isinstance(settings, dict) or 'model' not in settings:
            raise ValueError(f"{network} is no configuration of timm's train.py: it names no model.")
    given = {name: value for name, value in vars(args).items() if name in (*_DATA_OPTIONS, 'num_classes', 'dataset')}
    settings.update({name: value for name, value in given.items() if value is not None})
    settings['model_kwargs'] = {**(settings.get('model_kwargs') or {}), **args.model_kwargs}
    if not is_model(settings['model']):
        close = get_close_matches(settings['model'], timm.list_models(), n=3, cutoff=0.4)
        raise ValueError(f'timm has no model {settings["model"]!r}. Similar: {", ".join(close) or "none"}.')
    return settings


def create_network(
    settings: dict[str, Any], checkpoint: str | None = None, use_ema: bool = False, device: str = 'cpu'
) -> nn.Module:
    """The network in evaluation mode, with the weights of the checkpoint.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it cannot be read without running code from it, or belongs to another network.
    """
    kwargs = {name: settings[name] for name in ('num_classes', 'in_chans') if settings.get(name) is not None}
    with torch.device(device):
        model = timm.create_model(settings['model'], **{**kwargs, **settings['model_kwargs']})
    if checkpoint is not None:
        check_readable(checkpoint, '--checkpoint')
        if isinstance(model, deepmoe_plugin.DeepMoE):
            check_complete(load_state_dict(checkpoint, use_ema), model, checkpoint, settings['model'])
        try:
            load_checkpoint(model, checkpoint, use_ema)
        except RuntimeError as error:
            raise ValueError(f'{checkpoint} does not fit {settings["model"]}: {error}') from error
    return model.eval()


def read_segmentor(config: str) -> Any:
    """A config of mmseg, ready to build what it names.

    Raises:
        ValueError: there is no such file, or it has no model.
    """
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmseg.utils import register_all_modules

    if not Path(config).is_file():
        raise ValueError(f'There is no file {config}.')
    register_all_modules(init_default_scope=False)
    settings = Config.fromfile(config)
    if 'model' not in settings:
        raise ValueError(f'{config} is no mmseg config of a network: it has no `model`.')
    init_default_scope(settings.get('default_scope', 'mmseg'))
    return settings


def create_segmentor(config: str, checkpoint: str | None = None, device: str = 'cpu') -> nn.Module:
    """The segmentor of an mmseg config, in evaluation mode, with the weights of the checkpoint.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the config has no model, or the checkpoint is unsafe to read or belongs to another network.
    """
    from mmseg.registry import MODELS

    settings = read_segmentor(config)
    settings.model.pretrained = None
    model = MODELS.build(settings.model)
    if checkpoint is not None:
        from deepmoe_plugin.mmseg import allow_histories

        allow_histories()
        check_readable(checkpoint, '--checkpoint')
        try:
            model.load_state_dict(load_state_dict(checkpoint))
        except RuntimeError as error:
            raise ValueError(f'{checkpoint} does not fit {config}: {error}') from error
    return model.eval().to(device)


def create_scenes(config: str, folder: str | None = None, workers: int = 0) -> DataLoader:
    """The images that an mmseg config tests on, read as it reads them, without label maps.

    Args:
        folder: others in their place: a data root in the layout of the config, or any folder of images.

    Raises:
        ValueError: the config does not say how test images are read, or there are none.
    """
    from mmengine.runner import Runner

    loader = read_segmentor(config).get('test_dataloader', {})
    dataset = loader.get('dataset', {})
    if 'pipeline' not in dataset:
        raise ValueError(f'{config} has no `test_dataloader.dataset.pipeline`, which says how images are read: add it.')
    dataset.pipeline = [step for step in dataset.pipeline if 'LoadAnnotations' not in str(step['type'])]
    inside = dataset.get('data_prefix', {}).get('img_path')
    if folder is not None and inside and Path(folder, inside).is_dir():
        dataset.data_root = folder
    elif folder is not None:
        images = dict(data_prefix=dict(img_path=folder), img_suffix=tuple(get_img_extensions()))
        loader.dataset = dict(type='mmseg.BaseSegDataset', pipeline=dataset.pipeline, **images)
    loader.update(num_workers=workers, persistent_workers=False)
    try:
        return Runner.build_dataloader(loader)
    except (FileNotFoundError, AssertionError, ValueError) as error:
        source = folder or f'test_dataloader of {config}'
        raise ValueError(f'There are no images in {source} ({error}): give their folder as --images.') from error


def data_config(settings: dict[str, Any]) -> dict[str, Any]:
    """Size, normalisation, crop and interpolation of the images, as timm resolves them."""
    options = {name: settings[name] for name in _DATA_OPTIONS if settings.get(name) is not None}
    return resolve_data_config(options, pretrained_cfg=get_pretrained_cfg(settings['model']).to_dict())


def create_images(args: argparse.Namespace, settings: dict[str, Any]) -> Images:
    """The images; sets `num_classes` of the settings if nothing else did.

    Raises:
        ValueError: there are no images.
    """
    config = data_config(settings)
    dataset_name = settings.get('dataset') or ''
    if not dataset_name and not Path(args.data_dir).is_dir():
        raise ValueError(f'There is no folder {args.data_dir}.')
    try:
        dataset = create_dataset(
            dataset_name,
            root=args.data_dir,
            split=args.split,
            input_img_mode='RGB' if config['input_size'][0] == 3 else 'L',
        )
    except (RuntimeError, FileNotFoundError) as error:
        raise ValueError(f'{args.data_dir} (--dataset {dataset_name or "image folder"}): {error}') from error
    reader = getattr(dataset, 'reader', None)
    classes = list(reader.class_to_idx) if reader is not None else list(getattr(dataset, 'classes', []))
    if settings.get('num_classes') is None:
        settings['num_classes'] = len(classes)
    if len(classes) > settings['num_classes']:
        raise ValueError(
            f'{args.data_dir} has {len(classes)} classes, num_classes is {settings["num_classes"]}: images and network '
            f'do not belong together.'
        )
    names = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    loader = create_loader(
        dataset,
        batch_size=args.batch_size,
        is_training=False,
        use_prefetcher=False,
        num_workers=args.workers,
        persistent_workers=False,
        **{name: config[name] for name in names},
    )
    files = dataset.filenames() if reader is not None else []
    return Images(loader, classes, files, config['mean'], config['std'])


def read_groups(path: Path, classes: Sequence[str]) -> list[str]:
    """The group of each class, from a JSON that maps classes to groups, or that lists them as CIFAR-100 does.

    Raises:
        ValueError: the file is no such JSON, or leaves a class out.
    """
    try:
        groups = json.loads(path.read_text())
        if 'fine_to_coarse' in groups:
            names = groups.get('coarse_classes') or [str(i) for i in range(1 + max(groups['fine_to_coarse']))]
            groups = dict(zip(groups['classes'], (names[i] for i in groups['fine_to_coarse']), strict=True))
        return [str(groups[name]) for name in classes]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f'--groups {path} is no JSON of classes and their groups ({error!r}).') from error
    except KeyError as error:
        raise ValueError(f'--groups {path} leaves out {error}: give every class its group.') from error


def class_indices(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Labels of the classes.

    Raises:
        ValueError: the images have no such class.
    """
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise ValueError(f'The images have no class {unknown[0]}: --classes takes {", ".join(classes)}.')
    return [list(classes).index(name) for name in names]
