"""What networks that mix experts with softmax gates share: their terms of the loss and of the log, and their checks."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .information import gate_entropy, mutual_information, use_entropy
from .specialisation import SpecialisationConfig


class MixtureRecord(NamedTuple):
    """What one pass did.

    Attributes:
        gates: of each layer that has some, p(e|x), shape (B, experts).
        predicted: class that the chosen expert predicts, or the network where experts predict none, shape (B,).
        images: as the network got them, shape (B, in_chans, H, W).
    """

    gates: list[Tensor]
    predicted: Tensor
    images: Tensor


class Mixture(nn.Module):
    """Mixin of networks whose gates sum to one in every layer.

    Attributes:
        specialisation: losses on the gates.
        in_chans, img_size: of the images.
    """

    if TYPE_CHECKING:
        specialisation: SpecialisationConfig
        in_chans: int
        img_size: tuple[int, int]

    _record: MixtureRecord | None = None

    def look(self, x: Tensor) -> MixtureRecord:
        """What the network does with images (B, in_chans, H, W)."""
        raise NotImplementedError

    def leave_record(self, record: MixtureRecord) -> None:
        """Keep what a training pass did for its loss."""
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_exporting():
            self._record = record

    def take_terms(self, target: Tensor | None = None, criterion: Any = None) -> dict[str, Tensor]:
        record, self._record = self._record, None
        return {} if record is None else self.terms_of(record, target)

    def terms_of(self, record: MixtureRecord, target: Tensor | None) -> dict[str, Tensor]:
        """Losses on the gates, weighted, and what the log shows of them, in bits.

        With several layers, the names of what the log shows end in the number of the layer.
        """
        terms: dict[str, Tensor] = {}
        for gates in record.gates:
            for name, value in self.specialisation.terms(gates, record.images).items():
                terms[name] = terms[name] + value if name in terms else value
        for i, gates in enumerate(record.gates):
            suffix = f'_{i + 1}' if len(record.gates) > 1 else ''
            terms.update({name + suffix: value for name, value in log_entries(gates, record.predicted, target).items()})
        return terms

    def __getstate__(self) -> dict[str, Any]:
        # A copy (EMA, deepcopy, pickle) starts without a pending record: its graph belongs to this module.
        return {**self.__dict__, '_record': None}

    def check_images(self, x: Tensor) -> None:
        """Check the shape and the type of images.

        Raises:
            ValueError: they do not fit; the message says how to mend it.
        """
        expected = (self.in_chans, *self.img_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f'Expected images of shape (batch, {", ".join(map(str, expected))}), got {tuple(x.shape)}: resize or '
                f'convert them, or create the model with their in_chans and img_size.'
            )
        if not x.is_floating_point():
            raise ValueError(f'Expected floating-point images, got {x.dtype}: scale and normalise them first.')


@torch.no_grad()
def log_entries(gates: Tensor, predicted: Tensor, target: Tensor | None) -> dict[str, Tensor]:
    """What the log shows of the gates of a batch, in bits.

    Args:
        gates: p(e|x), shape (B, experts).
        predicted: class that the chosen expert predicts, shape (B,).
        target: true class, shape (B,); others (soft, several labels) are left out.

    Returns:
        `gate_entropy` (H_s), `use_entropy` (H_u), `prediction_information` (I(E;Y), with the predicted class), and
        `class_information` (with the true class).
    """
    chosen = gates.argmax(1)
    entries = {
        'gate_entropy': gate_entropy(gates),
        'use_entropy': use_entropy(gates),
        'prediction_information': mutual_information(chosen, predicted),
    }
    if target is not None and target.ndim == 1 and not target.is_floating_point():
        entries['class_information'] = mutual_information(chosen, target)
    return entries
