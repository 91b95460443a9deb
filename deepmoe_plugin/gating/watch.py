"""Warnings of gating that has failed: a number in the log that nobody looks at would hide it."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..stats import dynamic_share

_logger = logging.getLogger(__name__)

WINDOW = 50
"""Training passes that are looked at together; on an accelerator, looking at each would stop the host."""
ENOUGH = 16
"""Images that must have been seen before experts can be said to be the same for all."""
STATIC = 0.01
"""Gating with a smaller fraction of dynamic experts is static."""


class _Window(NamedTuple):
    """How many of so many images keep each expert, shape (N,)."""

    times_kept: Tensor
    images: int

    def __add__(self, other: '_Window') -> '_Window':  # type: ignore[override] # not a longer tuple
        return _Window(self.times_kept + other.times_kept, self.images + other.images)

    @property
    def dynamic(self) -> float:
        return dynamic_share(self.times_kept, self.images).item()


class GateWatch:
    """Looks at the experts that training passes keep, and warns once of each failure.

    Attributes:
        warn: takes the text of a warning; by default Python's logging does.
    """

    def __init__(self) -> None:
        self.warn: Callable[[str], Any] = _logger.warning
        self._warned: set[str] = set()
        self._settings = ''
        self._images = 0
        self._was_dynamic = False
        self._last: _Window | None = None
        self._window: _Window | None = None
        self._passes = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return GateWatch, ()  # a copy trains on its own, and a logger cannot be copied

    def see(self, kept: Tensor, settings: str, recovers: bool) -> None:
        """Look at one pass.

        Args:
            kept: which experts each image keeps, (B, N), boolean.
            settings: what to change if it fails, for the message.
            recovers: closed gates open again by themselves.
        """
        self._settings = settings
        window = _Window(kept.sum(0), len(kept))
        has_same_experts = self._window is not None and self._window.times_kept.shape == window.times_kept.shape
        self._window = self._window + window if self._window is not None and has_same_experts else window
        self._passes += 1
        self._images += len(kept)
        if not recovers and (kept.device.type == 'cpu' or self._passes == WINDOW) and not kept.any():
            self._warn_once(
                'closed',
                f'No image keeps any expert, and closed gates get no gradient to open again. Start again from an '
                f'earlier checkpoint with a smaller gate_loss_weight ({settings}), or with target_kept.',
            )
        if self._passes == WINDOW:
            is_static = self._window.dynamic < STATIC
            if is_static and self._was_dynamic:
                self._warn_of_static(self._window)
            self._was_dynamic |= not is_static
            self._last, self._window, self._passes = self._window, None, 0

    def finish(self) -> None:
        """Look at the latest passes once training has ended."""
        seen = [window for window in (self._last, self._window) if window is not None]
        if self._images < ENOUGH or len({window.times_kept.shape for window in seen}) > 1:
            return
        window = seen[0] + seen[1] if len(seen) > 1 else seen[0]
        if window.dynamic < STATIC:
            self._warn_of_static(window)

    def _warn_of_static(self, window: _Window) -> None:
        share = window.times_kept.float().mean().item() / window.images
        if not share:  # that is the other failure
            return
        exception = f' (but for {window.dynamic:.1%})' if window.dynamic else ''
        self._warn_once(
            'static',
            f'All images keep the same {share:.0%} of the experts{exception}: the gates do not look at the image. '
            f'Start from a trained network with deepmoe_plugin.warm_start (deepmoe compress does), or train the gates '
            f'longer before they are frozen, with target_kept, another gate_loss_weight ({self._settings}) or '
            f'embed_loss_weight > 0.',
        )

    def _warn_once(self, failure: str, text: str) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if failure not in self._warned and not (distributed and torch.distributed.get_rank()):
            self.warn(text)
        self._warned.add(failure)
