"""A checkpoint under study: a network, and what its gates do with a folder of images."""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..macs import macs_table
from ..network import find_deepmoe
from ..stats import GateStatistics, gate_statistics
from .images import Images, create_images
from .networks import create_network, read_settings


class Subject(NamedTuple):
    """A network and what its gates do with images.

    Attributes:
        model: in evaluation mode.
        images: in the order of `labels`.
        labels: class of each image, shape (images,).
        mixtures: latent mixture weights of each image, shape (images, K).
        stats: experts that each image keeps.
    """

    model: nn.Module
    images: Images
    labels: Tensor
    mixtures: Tensor
    stats: GateStatistics

    @property
    def gmacs(self) -> Tensor:
        """MACs of each image in units of 1e9, gating included, shape (images,)."""
        size = self.images.loader.dataset[0][0].shape
        return macs_table(self.model, (size[1], size[2])).report(self.stats.kept).total / 1e9

    @property
    def class_usage(self) -> tuple[list[str], Tensor]:
        """Classes that have images, and how often these keep each expert, shape (classes, N)."""
        usage = self.stats.by_class(self.labels)
        there = [i for i in range(len(usage)) if not usage[i].isnan().any()]
        return [self.images.classes[i] for i in there], usage[there]

    def describe(self, index: int) -> dict[str, str]:
        """Which image it is, for a row of the table."""
        file = self.images.files[index] if self.images.files else str(index)
        return {'file': file, 'class': self.images.classes[int(self.labels[index])]}


def look(args: argparse.Namespace) -> Subject:
    """Load what the command line names and run the gating network over all images.

    Raises:
        FileNotFoundError, ValueError: something is not there or does not fit; the message names it.
    """
    settings = read_settings(args.network, args)
    images = create_images(args, settings)
    model = create_network(settings, args)
    network = find_deepmoe(model)
    mixtures: list[Tensor] = []
    labels: list[Tensor] = []

    def batches() -> Iterator[Tensor]:
        for batch, classes in tqdm(images.loader, desc='gates', unit='batch', ncols=100):
            labels.append(classes)
            yield batch

    hook = network.gating.embedding.register_forward_hook(lambda _module, _args, out: mixtures.append(out.cpu()))
    try:
        stats = gate_statistics(model, batches())
    finally:
        hook.remove()
    return Subject(model, images, torch.cat(labels), torch.cat(mixtures), stats)
