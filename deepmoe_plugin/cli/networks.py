"""The classifiers and checkpoints that a command line names."""

import argparse
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.models import get_pretrained_cfg, is_model, load_checkpoint, load_state_dict
from timm.utils import ParseKwargs
from torch import nn

from ..checkpoints import check_complete, check_readable
from ..network import DeepMoE
from .configs import SUFFIXES, find_config, shipped_configs
from .timm_options import ORIGIN, check_options, class_count, import_modules, model_arguments, uses_ema

NETWORK_HELP = (
    "timm's name of a model, or a YAML of timm's train.py: RUN/args.yaml, or a config of this package by its name"
)


def add_network_arguments(parser: argparse.ArgumentParser, default: str = 'no training at all') -> None:
    """Add the arguments that `read_settings` and `create_network` read.

    Args:
        default: what weights the network has without --checkpoint, for the help.
    """
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='NAME=VALUE')
    parser.add_argument(
        '--num-classes', type=int, help='default: as the YAML says; for the name of a model, as many as the images have'
    )
    parser.add_argument('--checkpoint', help=f'of timm, or .safetensors; default: {default}')
    parser.add_argument(
        '--pretrained',
        action='store_true',
        help="the weights that come with this package, or that timm downloads, for the model's name",
    )
    parser.add_argument(
        '--use-ema',
        action=argparse.BooleanOptionalAction,
        help='the moving average of the weights in the checkpoint (default: as model_ema of the YAML says)',
    )


def is_config(name: str) -> bool:
    """Whether a name means a config: by its suffix, which timm takes for a tag of weights, or as no model has it."""
    return name.endswith(SUFFIXES) or not is_model(name)


def read_settings(network: str, args: argparse.Namespace) -> dict[str, Any]:
    """Options of timm's train.py: those of the YAML, overridden by the command line.

    Raises:
        ValueError: there is no such model or file, or an option of it cannot be honoured; the message names it.
    """
    settings: dict[str, Any] = {'model': network}
    path = find_config(network, 'timm') if is_config(network) else None
    if path is not None:
        settings = yaml.safe_load(path.read_text())
        if not isinstance(settings, dict) or 'model' not in settings:
            raise ValueError(f"{path} is no configuration of timm's train.py: it names no model.")
        check_options(settings, str(path))
        import_modules(settings, str(path))
    elif network.endswith(('.yaml', '.yml')):
        raise ValueError(f'There is no file {network}, and no config of this name in the package.')
    names = ('img_size', 'crop_pct', 'mean', 'std', 'num_classes', 'dataset', 'class_map')
    given = {name: getattr(args, name, None) for name in names} | {'val_split': getattr(args, 'split', None)}
    settings.update({name: value for name, value in given.items() if value is not None})
    if given['img_size'] is not None and settings.get('input_size'):
        settings['input_size'] = (settings['input_size'][0], given['img_size'], given['img_size'])
    settings['model_kwargs'] = {**(settings.get('model_kwargs') or {}), **args.model_kwargs}
    if not is_model(settings['model']):
        known = [*timm.list_models(), *shipped_configs('timm')]
        close = get_close_matches(settings['model'], known, n=3, cutoff=0.4)
        raise ValueError(f'timm has no model {settings["model"]!r}. Similar: {", ".join(close) or "none"}.')
    if path is not None and settings.get('num_classes') is None:
        settings['num_classes'] = class_count(settings)  # as train.py, whatever the images have
    return settings


def create_network(settings: dict[str, Any], args: argparse.Namespace, device: str | None = None) -> nn.Module:
    """The network in evaluation mode, with the weights of `args.checkpoint`, or those of its name.

    Args:
        settings: as `read_settings` returns them.
        args: of `add_network_arguments`.
        device: default: `args.device`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it cannot be read without running code from it, or belongs to another network; there are two, or
            none although the settings say that the network starts from one.
    """
    checkpoint = args.checkpoint
    device = device or args.device
    if args.pretrained and checkpoint is not None:
        raise ValueError('--pretrained and --checkpoint contradict each other: give one of them.')
    started = [name for name in ORIGIN if settings.get(name)]
    if started and checkpoint is None and not args.pretrained and device != 'meta':
        raise ValueError(
            f'The YAML says {started[0]}: {settings[started[0]]!r}, which is where training started: give the trained '
            f'weights as --checkpoint.'
        )
    arguments = model_arguments(settings)
    if args.pretrained:
        _check_pretrained(settings)
    try:
        with torch.device(device):
            model = timm.create_model(settings['model'], pretrained=args.pretrained and device != 'meta', **arguments)
    except TypeError as error:
        raise ValueError(f'{settings["model"]} does not take {", ".join(arguments)}: {error}.') from error
    if checkpoint is not None:
        check_readable(checkpoint, '--checkpoint')
        use_ema = _choose_weights(settings, args)
        if isinstance(model, DeepMoE):
            check_complete(load_state_dict(checkpoint, use_ema), model, checkpoint, settings['model'])
        try:
            load_checkpoint(model, checkpoint, use_ema)
        except RuntimeError as error:
            raise ValueError(f'{checkpoint} does not fit {settings["model"]}: {error}') from error
    return model.eval()


def _check_pretrained(settings: dict[str, Any]) -> None:
    """Check that there are weights of a model's name for these classes; timm would draw a new classifier."""
    name, classes = settings['model'], class_count(settings)
    cfg = get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise ValueError(f'There are no pretrained weights of {name}: give its trained weights as --checkpoint.')
    if classes != cfg.num_classes:
        raise ValueError(
            f'The pretrained weights of {name} tell {cfg.num_classes} classes apart, not {classes}: give '
            f'--num-classes {cfg.num_classes}, or the weights of a network for {classes} classes as --checkpoint.'
        )


def _choose_weights(settings: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether to load the moving average of the weights."""
    use_ema = uses_ema(settings) if args.use_ema is None else args.use_ema
    if not use_ema:
        return False
    if not _holds_ema(args.checkpoint):
        if args.use_ema:
            raise ValueError(f'{args.checkpoint} holds no moving average of the weights: leave out --use-ema.')
        return False
    if args.use_ema is None:
        print('The run kept a moving average of its weights (model_ema), which is used: --no-use-ema.', file=sys.stderr)
    return True


def _holds_ema(checkpoint: str) -> bool:
    if Path(checkpoint).suffix == '.safetensors':
        return False
    with torch.serialization.safe_globals([argparse.Namespace]):
        stored = torch.load(checkpoint, map_location='cpu', mmap=True, weights_only=True)
    return any(stored.get(name) is not None for name in ('state_dict_ema', 'model_ema'))
