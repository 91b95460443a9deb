"""The argument parser of a sub-command."""

import argparse


def create_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose help keeps the lines of the description, mostly the docstring of the command's module."""
    return argparse.ArgumentParser(
        prog=f'deepmoe {command}', description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
