"""Which experts which images keep."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .experts import GatedNetwork, find_deepmoe


class GateStatistics(NamedTuple):
    """Kept experts of a set of images.

    Attributes:
        kept: which experts each image keeps, boolean, shape (images, N), all gated layers side by side.
        layers: module name of the gated convolution of each layer.
        widths: number of experts of each layer; they sum to N.
    """

    kept: Tensor
    layers: tuple[str, ...]
    widths: tuple[int, ...]

    @property
    def kept_experts(self) -> float:
        """Fraction of experts kept, over all images and layers (0..1)."""
        return self.kept.float().mean().item()

    @property
    def dynamic_experts(self) -> float:
        """Fraction of experts that some images keep and others do not (0..1); see the function of that name."""
        return dynamic_experts(self.kept).item()

    def by_image(self) -> Tensor:
        """Fraction of experts that each image keeps, shape (images,)."""
        return self.kept.float().mean(1)

    def by_layer(self) -> dict[str, float]:
        """Fraction of experts kept in each layer, averaged over the images."""
        parts = self.kept.float().split(self.widths, dim=1)
        return {layer: part.mean().item() for layer, part in zip(self.layers, parts, strict=True)}

    def by_class(self, labels: Tensor) -> Tensor:
        """How often the images of each class keep each expert, shape (classes, N); NaN for a class without images.

        Args:
            labels: class index of each image, shape (images,), or which classes each shows, shape (images, classes).
        """
        shown = (nn.functional.one_hot(labels.long()) if labels.ndim == 1 else labels).to(torch.float32)
        return shown.T @ self.kept.float() / shown.sum(0)[:, None]

    def dead(self) -> dict[str, int]:
        """Number of experts in each layer that no image keeps."""
        parts = (~self.kept.any(0)).split(self.widths)
        return {layer: int(part.sum()) for layer, part in zip(self.layers, parts, strict=True)}

    def log_to(self, writer: Any, step: int, prefix: str = '') -> None:
        """Write fractions of kept experts as scalars (all, each layer) and histograms (over images, over experts), and
        the fraction of experts that some images keep and others do not.

        Args:
            writer: TensorBoard's `SummaryWriter`, which W&B mirrors after `wandb.init(sync_tensorboard=True)`.
            step: number of the training step or epoch.
            prefix: of all names, as 'val/'.
        """
        name = f'{prefix}kept_experts'
        writer.add_scalar(name, self.kept_experts, step)
        writer.add_scalar(f'{prefix}dynamic_experts', self.dynamic_experts, step)
        for layer, kept in self.by_layer().items():
            writer.add_scalar(f'{name}/{layer}', kept, step)
        writer.add_histogram(f'{name}/by_image', self.by_image(), step)
        writer.add_histogram(f'{name}/by_expert', self.kept.float().mean(0), step)


def dynamic_experts(kept: Tensor) -> Tensor:
    """Fraction of experts that more than 2 % and fewer than 98 % of the images keep, a scalar.

    Args:
        kept: which experts images keep, boolean, shape (images, N).
    """
    return dynamic_share(kept.sum(0), len(kept))


def dynamic_share(times_kept: Tensor, images: int) -> Tensor:
    """The same from how many of so many images keep each expert, shape (N,)."""
    share = times_kept.float() / images
    return ((share > 0.02) & (share < 0.98)).float().mean()


def fraction_kept(kept: Tensor) -> Tensor:
    """Fraction of experts that each image keeps, shape (images,), of boolean (images, N)."""
    return kept.double().mean(1)


def gate_statistics(model: nn.Module, images: Tensor | Iterable[Tensor | tuple[Tensor, ...]]) -> GateStatistics:
    """Collect which experts images keep; runs the gating network only.

    Args:
        model: holds one DeepMoE network.
        images: a batch (B, in_chans, H, W), or a loader of batches or of tuples that start with one.

    Raises:
        ValueError: the model holds no DeepMoE network, the images do not fit it, or there are none.
    """
    network = find_deepmoe(model)
    device = network.gating.gates.weight.device
    batches = [images] if isinstance(images, Tensor) else images
    kept = [kept_experts(network, _images_of(batch).to(device)).cpu() for batch in batches]
    if not kept:
        raise ValueError('images is empty: there is nothing to take statistics of.')
    return join_kept(network, kept)


def _images_of(batch: Any) -> Tensor:
    images = batch if isinstance(batch, Tensor) else batch[0] if isinstance(batch, Sequence) and len(batch) else None
    if not isinstance(images, Tensor):
        raise ValueError(
            f'Expected batches of images, or tuples that start with one, got a {type(batch).__name__}: pass '
            "(batch['image'] for batch in loader) or the like."
        )
    return images


def join_kept(network: GatedNetwork, kept: Sequence[Tensor]) -> GateStatistics:
    """Statistics of the experts of one network that batches of images keep, each (B, N)."""
    layers = tuple(layer.conv for layer in network.expert_layers)
    return GateStatistics(torch.cat(list(kept)), layers, tuple(network.gating.gates.widths))


@torch.no_grad()
def kept_experts(network: GatedNetwork, x: Tensor) -> Tensor:
    """Which experts each image keeps: boolean, shape (B, N), all gated layers side by side.

    Uses running norm statistics, as inference does, whatever mode the network is in.
    """
    gating = network.gating
    was_training = gating.training
    gating.eval()
    try:
        return gating.packed_gates(x) > 0
    finally:
        gating.train(was_training)
