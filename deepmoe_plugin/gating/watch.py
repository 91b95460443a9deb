"""Warnings of gating that has failed: a number in the log that nobody looks at would hide it."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

WINDOW = 50
"""Training passes that are looked at together; on an accelerator, looking at each would stop the host."""


ENOUGH = 16
"""Images that must have been seen before experts can be said to be the same for all."""


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
        self._last: tuple[Tensor, Tensor] | None = None
        self._window: tuple[Tensor, Tensor] | None = None
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
        some, every = kept.any(0), kept.all(0)
        if self._window is not None and self._window[0].shape == some.shape:
            some, every = some | self._window[0], every & self._window[1]
        self._window = some, every
        self._passes += 1
        self._images += len(kept)
        if not recovers and (kept.device.type == 'cpu' or self._passes == WINDOW) and not kept.any():
            self._warn_once(
                'closed',
                f'No image keeps any expert, and closed gates get no gradient to open again. Start again from an '
                f'earlier checkpoint with a smaller gate_loss_weight ({settings}), or with target_kept.',
            )
        if self._passes == WINDOW:
            if self._is_static(self._window) and self._was_dynamic:
                self._warn_of_static(self._window)
            self._was_dynamic |= not self._is_static(self._window)
            self._last, self._window, self._passes = self._window, None, 0

    def finish(self) -> None:
        """Look at the latest passes once training has ended."""
        seen = [window for window in (self._last, self._window) if window is not None]
        if self._images < ENOUGH or len({window[0].shape for window in seen}) > 1:
            return
        some = torch.stack([window[0] for window in seen]).any(0)
        every = torch.stack([window[1] for window in seen]).all(0)
        if self._is_static((some, every)):
            self._warn_of_static((some, every))

    @staticmethod
    def _is_static(window: tuple[Tensor, Tensor]) -> bool:
        return torch.equal(*window)

    def _warn_of_static(self, window: tuple[Tensor, Tensor]) -> None:
        share = window[0].float().mean().item()
        if not share:  # that is the other failure
            return
        self._warn_once(
            'static',
            f'All images keep the same {share:.0%} of the experts: the gates do not look at the image. Train the gates '
            f'longer before they are frozen, with another gate_loss_weight ({self._settings}), with target_kept, or '
            f'with embed_loss_weight > 0.',
        )

    def _warn_once(self, failure: str, text: str) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if failure not in self._warned and not (distributed and torch.distributed.get_rank()):
            self.warn(text)
        self._warned.add(failure)
