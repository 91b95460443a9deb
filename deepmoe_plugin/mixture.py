"""What networks that mix experts with softmax gates share: their terms of the loss and of the log, and their checks."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .arguments import check_whole
from .experts import deepmoe_networks
from .information import gate_entropy, mutual_information, use_entropy
from .specialisation import SpecialisationConfig
from .terms import Criterion, Passes, Terms, TermSource
from .tracing import is_traced


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


class Mixture(TermSource):
    """Mixin of networks whose gates sum to one in every layer.

    Attributes:
        specialisation: losses on the gates; none, unless a network sets some.
        in_chans, img_size: of the images.
    """

    if TYPE_CHECKING:
        in_chans: int
        img_size: tuple[int, int]

    specialisation = SpecialisationConfig()

    def __init__(self) -> None:
        super().__init__()
        self._passes = Passes()

    def look(self, x: Tensor) -> MixtureRecord:
        """What the network does with images (B, in_chans, H, W), in the mode that it is in; without gradient."""
        raise NotImplementedError

    @property
    def has_gates(self) -> bool:
        """Whether there is anything to choose."""
        raise NotImplementedError

    @property
    def passes(self) -> Passes:
        """What the training passes left."""
        return self._passes

    @property
    def expects_terms(self) -> bool:
        """Whether a forward pass would leave terms."""
        return self.training and self.has_gates

    def leave(self, output: Tensor, record: Callable[[], MixtureRecord], images: Tensor) -> Tensor:
        """Leave the record of a training pass; returns `output`, to be used in its place."""
        if not self.expects_terms or not self.passes.wanted(images):
            return output
        return self.passes.leave(record(), output)

    def terms(self, record: MixtureRecord, target: Any, criterion: Criterion | None) -> Terms:
        """Losses on the gates, weighted, and what the log shows of them, in bits.

        With several layers, the losses add up, and the names of the rest end in the number of the layer.
        """
        terms: Terms = {}
        for gates in record.gates:
            for name, value in self.specialisation.terms(gates, record.images).items():
                terms[name] = terms[name] + value if name in terms else value
        for i, gates in enumerate(record.gates):
            suffix = f'_{i + 1}' if len(record.gates) > 1 else ''
            entries = specialisation_of(gates, record.predicted, target if _is_class(target) else None)
            terms.update({name + suffix: value for name, value in entries.items()})
        return terms

    def check_images(self, x: Tensor) -> None:
        """Check the shape and the type of images.

        Raises:
            ValueError: they do not fit; the message says how to mend it.
        """
        if is_traced(x):
            return
        expected = (self.in_chans, *self.img_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f'Expected images of shape (batch, {", ".join(map(str, expected))}), got {tuple(x.shape)}: resize or '
                f'convert them, or create the model with their in_chans and img_size.'
            )
        if not x.is_floating_point():
            raise ValueError(f'Expected floating-point images, got {x.dtype}: scale and normalise them first.')


def mixture_record(model: nn.Module, images: Tensor, predicted: Tensor) -> MixtureRecord | None:
    """The gates that sum to one of a network, and what they lead to; None if it has none.

    Args:
        model: a `Mixture`; a DeepMoE network, whose latent mixture then is the gate; or any other network.
        images: shape (B, in_chans, H, W).
        predicted: class that the network predicts, shape (B,).

    Returns:
        On the CPU.
    """
    if isinstance(model, Mixture):
        record = model.look(images) if model.has_gates else None
    else:
        network = next(deepmoe_networks(model), None)
        record = None if network is None else MixtureRecord([network.gating.embedding(images)], predicted, images)
    if record is None:
        return None
    return MixtureRecord([gates.cpu() for gates in record.gates], record.predicted.cpu(), images)


def image_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width from the argument `img_size`.

    Raises:
        ValueError: it is neither one whole number nor two.
    """
    sides = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
    for side in sides:
        check_whole('img_size', side)
    if len(sides) != 2:
        raise ValueError(f'img_size must be one or two whole numbers, got {img_size!r}.')
    return sides[0], sides[1]


def refuse_pooling(global_pool: str | None) -> None:
    """Refuse a pooling of features that are vectors.

    Raises:
        ValueError: one is asked for.
    """
    if global_pool:
        raise ValueError(f'global_pool={global_pool!r} has no meaning for features that are vectors: leave it out.')


def refuse_checkpointing(enable: bool) -> None:
    """Refuse gradient checkpointing, which would count examples twice and save nothing on networks this small.

    Raises:
        ValueError: it is asked for.
    """
    if enable:
        raise ValueError('Gradient checkpointing is not supported by this network: leave out --grad-checkpointing.')


def _is_class(target: Any) -> bool:
    return isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point()


@torch.no_grad()
def specialisation_of(gates: Tensor, predicted: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
    """How sure and how even the choice of experts is, and what it tells, in bits.

    Args:
        gates: p(e|x), shape (B, experts).
        predicted: class that the chosen expert predicts, shape (B,).
        target: true class, shape (B,).

    Returns:
        `gate_entropy` (H_s), `use_entropy` (H_u), `prediction_information` (I(E;Y) of Krishnamurthy et al., with the
        predicted class) and, with a target, `class_information` (with the true class).
    """
    chosen = gates.argmax(1)
    entries = {
        'gate_entropy': gate_entropy(gates),
        'use_entropy': use_entropy(gates),
        'prediction_information': mutual_information(chosen, predicted),
    }
    if target is not None:
        entries['class_information'] = mutual_information(chosen, target)
    return entries
