"""The labelled images that a command line names."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import get_pretrained_cfg
from torch.utils.data import DataLoader

from .timm_options import DATA, DATASET, class_count


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


def add_image_arguments(
    parser: argparse.ArgumentParser,
    flag: str = '--data-dir',
    required: bool = True,
    help: str = 'folder with SPLIT/CLASS/* or CLASS/*',
) -> None:
    """Add the arguments that `create_images` reads."""
    parser.add_argument(flag, dest='data_dir', required=required, help=help)
    parser.add_argument('--dataset', help="data set in timm's spelling, as torch/cifar100 (default: image folder)")
    parser.add_argument('--split', help='in any spelling (default: val_split of the YAML, or validation)')
    parser.add_argument('--class-map', help='file that lists the classes in the order of their labels, one a line')
    parser.add_argument('--img-size', type=int, help='side in pixels (default: of the model)')
    parser.add_argument('--crop-pct', type=float, help='(default: of the model)')
    parser.add_argument('--mean', type=float, nargs='+', help='of the normalisation (default: of the model)')
    parser.add_argument('--std', type=float, nargs='+', help='likewise')
    parser.add_argument('--batch-size', type=int, default=64, help='(default: %(default)s)')
    parser.add_argument('--workers', type=int, default=2, help='processes that load images (default: %(default)s)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')


def data_config(settings: dict[str, Any]) -> dict[str, Any]:
    """Size, normalisation, crop and interpolation of the images, as timm resolves them.

    Raises:
        ValueError: an option has the wrong number of values.
    """
    options = {name: settings[name] for name in DATA if settings.get(name) is not None}
    known = get_pretrained_cfg(settings['model'])
    cfg = known.to_dict() if known is not None else {}
    cfg.update(settings['model_kwargs'].get('pretrained_cfg_overlay') or {})
    try:
        return resolve_data_config(options, pretrained_cfg=cfg)
    except AssertionError as error:
        given = ', '.join(
            f'{name}={options[name]}' for name in ('input_size', 'in_chans', 'mean', 'std') if name in options
        )
        raise ValueError(f'{given} do not fit together: input_size has three numbers, mean and std one for each '
                         f'channel.') from error  # fmt: skip


def create_images(args: argparse.Namespace, settings: dict[str, Any]) -> Images:
    """The images; sets `num_classes` of the settings if nothing else did.

    Raises:
        ValueError: there are no images, or their classes are not those of the network.
    """
    config = data_config(settings)
    dataset = create_dataset_of(args.data_dir, config, settings)
    reader = getattr(dataset, 'reader', None)
    classes, files = _classes(dataset), []
    if reader is not None and hasattr(reader, 'class_to_idx'):
        files = dataset.filenames()
        if not settings.get('class_map'):
            _compare_with_training(Path(args.data_dir), classes)
    if settings.get('num_classes') is None:
        settings['num_classes'] = settings['model_kwargs'].get('num_classes', len(classes))
    count = class_count(settings)
    if count is not None and len(classes) > count:
        raise ValueError(
            f'{args.data_dir} has {len(classes)} classes, num_classes is {count}: images and network do not belong '
            f'together.'
        )
    if count is not None and classes and len(classes) < count and not settings.get('class_map'):
        print(
            f'Warning: {args.data_dir} has {len(classes)} classes, the network {count}. They are taken for its first '
            f'{len(classes)}: if they are others, list all classes in a file and give it as --class-map.',
            file=sys.stderr,
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
    return Images(loader, classes, files, config['mean'], config['std'])


def create_dataset_of(folder: str, config: dict[str, Any], settings: dict[str, Any]) -> Any:
    options = {argument: settings[name] for name, argument in DATASET.items() if settings.get(name)}
    options.setdefault('split', 'validation')
    options.setdefault('input_img_mode', 'RGB' if config['input_size'][0] == 3 else 'L')
    name = options.pop('name', '')
    if not name and not Path(folder).is_dir():
        raise ValueError(f'There is no folder {folder}.')
    try:
        return create_dataset(name, root=folder, **options)
    except (RuntimeError, FileNotFoundError, AssertionError) as error:
        raise ValueError(f'{folder} (--dataset {name or "image folder"}): {error}') from error


def _classes(dataset: Any) -> list[str]:
    """Name of each label; of a class map, whose labels need not be dense, a number where it has no name."""
    by_name = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
    if not by_name:
        return list(getattr(dataset, 'classes', []))
    names = {label: name for name, label in by_name.items()}
    return [str(names.get(label, label)) for label in range(1 + max(names))]


def _compare_with_training(root: Path, classes: Sequence[str]) -> None:
    """Refuse images whose classes are not those of the training folder beside them: their labels would be others.

    timm numbers the classes of each folder by themselves.
    """
    folder = next((root / name for name in ('train', 'training') if (root / name).is_dir()), None)
    if folder is None:
        return
    trained = {path.name for path in folder.iterdir() if path.is_dir() and any(path.iterdir())}
    if not trained & set(classes):
        return
    for missing, kind, other in (
        (sorted(trained - set(classes)), 'images of', folder),
        (sorted(set(classes) - trained), 'training images of', root),
    ):
        if missing:
            raise ValueError(
                f'There are no {kind} the class{"es" if len(missing) > 1 else ""} {", ".join(missing[:5])}'
                f'{" and others" if len(missing) > 5 else ""}, which {other} has: labels would be shifted. List the '
                f'classes of the training folder in a file, one a line in its order, and give it as --class-map.'
            )


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
