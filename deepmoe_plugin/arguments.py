"""Checks of the arguments of models."""

import math
from numbers import Integral, Real


def check_number(name: str, value: object) -> None:
    """Refuse anything but a number as the value of the argument `name`.

    Raises:
        ValueError: names the argument, and the remedy for the text that YAML makes of `1e-3`.
    """
    if isinstance(value, str):
        raise ValueError(f'{name} must be a number, got the text {value!r}: in YAML, write 1.0e-3 instead of 1e-3.')
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f'{name} must be a number, got {value!r}.')


def check_weight(name: str, value: float) -> None:
    """Refuse anything but a finite number >= 0 as the value of the argument `name`.

    Raises:
        ValueError: names the argument.
    """
    check_number(name, value)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f'{name} must be a finite number >= 0, got {value}.')


def is_whole(value: object) -> bool:
    """Whether a value is a whole number >= 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def check_whole(name: str, value: object) -> None:
    """Refuse anything but a whole number >= 1 as the value of the argument `name`.

    Raises:
        ValueError: names the argument.
    """
    if not is_whole(value):
        raise ValueError(f'{name} must be a whole number >= 1, got {value!r}.')
