"""The argument parser of a sub-command, and what arguments of several commands mean."""

import argparse
from pathlib import Path

FILE_ENDINGS = ('.csv', '.jpg', '.json', '.pdf', '.png', '.safetensors', '.svg')


def create_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose help keeps the lines of the description, mostly the docstring of the command's module."""
    return argparse.ArgumentParser(
        prog=f'deepmoe {command}', description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def output_folder(value: str) -> Path:
    """The type of arguments that say where a command writes: a folder, which it makes when it is missing.

    Raises:
        argparse.ArgumentTypeError: a file is in the way, or the name is that of a file.
    """
    path = Path(value)
    existing = next((place for place in (path, *path.parents) if place.exists()), None)
    if existing is not None and not existing.is_dir():
        raise argparse.ArgumentTypeError(f'{existing} is a file: give a folder, the files in it get names of their own')
    if existing != path and path.suffix in FILE_ENDINGS:
        raise argparse.ArgumentTypeError(
            f'{value} is the name of a file: give a folder, the files in it get names of their own'
        )
    return path
