"""The command `deepmoe`.

It stands outside of the package so that `deepmoe --help` need not import torch and timm, which takes seconds.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

COMMANDS = {
    'train': 'train a segmentor of MMSegmentation',
    'test': 'test a segmentor, write its label maps and pictures',
    'evaluate': 'accuracy, kept experts and MACs of a classifier on a folder of images',
    'analyze': 'figures of what gates do',
    'flops': 'parameters and MACs of networks, of segmentors too',
    'compress': 'make a trained classifier or segmentor cheaper: gate it, train on, compare',
    'benchmark': 'time sparse execution',
    'benchmark-training': 'step time and memory that gating costs in training',
    'demo': 'train a small classifier on 5,000 real digits',
    'train-digits': 'train the networks of the sibling papers on digits that stay in memory',
    'jittered-digits': 'write digits that are moved by a few pixels, as image folders',
    'street-scenes': "draw street scenes in CityScapes' layout, for the quick start of segmentation",
    'run': "run a script of timm's repository with the models of this package",
    'doctor': 'versions, configs, and how sparse execution runs on this machine',
}

# Modules that only an extra installs.
EXTRAS = {
    **dict.fromkeys(('mmengine', 'mmcv', 'mmseg'), 'mmseg'),
    **dict.fromkeys(('matplotlib', 'sklearn', 'scipy'), 'plot'),
    'mlxtend': 'demo',
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sub-command that the arguments (default: those of the process) name first."""
    parser = argparse.ArgumentParser(
        prog='deepmoe',
        usage='deepmoe COMMAND ...',
        description='DeepMoE for timm and MMSegmentation: every image chooses the channels of every convolution.',
        epilog='\n'.join(
            [
                'commands:',
                *(f'  {name:20}{text}' for name, text in COMMANDS.items()),
                '',
                '`deepmoe COMMAND --help` tells more.',
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='store_true', help='print the version')
    parser.add_argument('command', nargs='?', metavar='COMMAND', help='one of those below')
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments[:1])
    if args.version:
        from deepmoe_plugin import __version__

        print(f'deepmoe-plugin {__version__}')
    elif args.command is None:
        parser.print_help()
    elif args.command not in COMMANDS:
        close = get_close_matches(args.command, COMMANDS)
        parser.error(f'there is no command {args.command}; ' + _choice(close or list(COMMANDS), bool(close)))
    else:
        _call(args.command, arguments[1:])


def _choice(names: Sequence[str], is_guess: bool) -> str:
    return f'did you mean {" or ".join(names)}?' if is_guess else f'choose from {", ".join(names)}'


def _call(command: str, argv: Sequence[str]) -> None:
    try:
        module = importlib.import_module(f'deepmoe_plugin.cli.{command.replace("-", "_")}')
        module.main(argv)
    except ModuleNotFoundError as error:
        _name_the_extra(command, error)


def _name_the_extra(command: str, error: ModuleNotFoundError) -> NoReturn:
    missing = (error.name or '').partition('.')[0]
    if missing not in EXTRAS or command == 'run':
        raise error
    sys.exit(
        f"deepmoe {command} needs {missing}, which is not installed: pip install 'deepmoe-plugin[{EXTRAS[missing]}]'"
    )


if __name__ == '__main__':
    main()
