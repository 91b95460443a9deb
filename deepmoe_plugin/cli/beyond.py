"""What a network knows beyond its embedding, by class: a figure of `deepmoe analyze`."""

import argparse

from matplotlib.figure import Figure
from torch import Tensor

from . import figures
from .evaluate import evaluate
from .images import create_images
from .networks import create_network, read_settings
from .shuffling import Rows

EMBEDDING, NETWORK, BEYOND = 'embedding alone', 'network', 'network, where the embedding is wrong'


def beyond(args: argparse.Namespace) -> tuple[Figure, Rows]:
    """how often the network is right, of all images and of those whose class its embedding alone does not find"""
    settings = read_settings(args.network, args)
    images = create_images(args, settings)
    result = evaluate(create_network(settings, args), images.loader)
    if result.handover is None:
        raise ValueError(f'{settings["model"]} has no gates, and so no embedding: choose a deepmoe model.')
    right, is_found = result.predicted == result.labels, result.handover.guessed == result.labels
    rows: Rows = []
    for label, name in enumerate(images.classes):
        own = result.labels == label
        if own.any():
            rows.append(
                {
                    'class': name,
                    'images': int(own.sum()),
                    EMBEDDING: _percent(is_found[own]),
                    NETWORK: _percent(right[own]),
                    BEYOND: _percent(right[own & ~is_found]),
                }
            )
    shares = {kind: [row[kind] for row in rows] for kind in (EMBEDDING, NETWORK, BEYOND)}
    return figures.draw_beyond([row['class'] for row in rows], shares), rows


def _percent(flags: Tensor) -> float:
    """Share of the flags that are set, in percent; NaN without flags."""
    return 100 * flags.double().mean().item()
