"""Run a script of timm's repository, unmodified, with the models of this package.

    deepmoe run validate.py --model wide_deepmoe_resnet50 --checkpoint model.safetensors --data-dir FOLDER
    deepmoe run train.py --config wide_deepmoe_resnet50_imagenet --data-dir FOLDER

The script runs as `python SCRIPT` runs it, except that the installed timm is used even if the script lies beside
another. What follows its --config may be the name of a config of this package.
"""

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import timm

from .configs import find_config
from .parsing import create_parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = create_parser('run', __doc__)
    parser.add_argument('script', help='a Python file')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help='its arguments')
    args = parser.parse_args(argv)
    if not Path(args.script).is_file():
        parser.error(f"there is no file {args.script}: timm's scripts are in its repository, not in its package")
    folder = Path(args.script).resolve().parent
    if (folder / 'timm/__init__.py').is_file() and folder != Path(timm.__file__).resolve().parents[1]:
        print(f'timm {timm.__version__} as installed is used, not {folder / "timm"}.', file=sys.stderr)
    sys.argv = [args.script, *_with_config_paths(args.arguments)]
    sys.path.insert(0, str(folder))
    # Processes that a script starts with `spawn` import it from this path, wherever they are.
    runpy.run_path(os.path.abspath(args.script), run_name='__main__')


def _with_config_paths(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the path of each config that is given by its name."""
    changed: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition('=')
        if flag == '--config' and equals:
            changed.append(f'{flag}={find_config(value, "timm") or value}')
        elif changed and changed[-1] in ('--config', '-c'):
            changed.append(str(find_config(argument, 'timm') or argument))
        else:
            changed.append(argument)
    return changed
