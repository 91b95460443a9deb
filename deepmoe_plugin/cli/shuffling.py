"""Gate-embedding shuffling (section 5.3.1): what is left of the accuracy with the latent mixtures of other images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..network import find_deepmoe
from .subject import Subject

Rows = list[dict[str, Any]]


def shuffle_mixtures(
    subject: Subject,
    labels: Sequence[int],
    groups: Sequence[str],
    num_donors: int,
    repeats: int,
    batch_size: int,
    generator: torch.Generator,
) -> Rows:
    """Give the images of some classes the latent mixtures of random images of other classes.

    Args:
        labels: the classes to look at, in turn.
        groups: the coarse category of every class.
        num_donors: classes of other categories that give mixtures, chosen at random; the own category gives all.
        repeats: mixtures drawn for each image.

    Returns:
        `class`, `donor`, `group` (own class, in-group, out-of-group), and the accuracy on the class (%) with its
        standard deviation over the repeats.
    """
    classes = subject.images.classes
    rows: Rows = []
    for label in tqdm(labels, desc='shuffle', unit='class', ncols=100):
        others = [i for i in range(len(classes)) if i != label and (subject.labels == i).any()]
        outside = [i for i in others if groups[i] != groups[label]]
        chosen = torch.randperm(len(outside), generator=generator)[:num_donors].tolist()
        donors = {
            'own class': [label],
            'in-group': [i for i in others if groups[i] == groups[label]],
            'out-of-group': [outside[i] for i in chosen],
        }
        for kind, indices in donors.items():
            for donor in indices:
                accuracies = _accuracies(subject, label, donor, repeats, batch_size, generator)
                values = {'accuracy': accuracies.mean().item(), 'std': accuracies.std(correction=0).item()}
                rows.append({'class': classes[label], 'donor': classes[donor], 'group': kind, **values})
    return rows


def group_means(rows: Rows) -> list[tuple[str, float, float]]:
    """Accuracy of each class in-group and out-of-group, averaged over the donors."""
    points = []
    for name in dict.fromkeys(row['class'] for row in rows):
        means = []
        for kind in ('in-group', 'out-of-group'):
            own = [row['accuracy'] for row in rows if (row['class'], row['group']) == (name, kind)]
            means.append(float(np.mean(own)) if own else float('nan'))
        if not np.isnan(means).any():
            points.append((name, *means))
    if not points:
        raise ValueError('No class has others inside and outside of its group: --groups separates nothing.')
    return points


@torch.no_grad()
def _accuracies(
    subject: Subject, label: int, donor: int, repeats: int, batch_size: int, generator: torch.Generator
) -> Tensor:
    """Accuracy (%) on one class, each image with the mixture of a random image of class `donor`, shape (repeats,)."""
    own = (subject.labels == label).nonzero()[:, 0].tolist()
    x = torch.stack([subject.images.loader.dataset[i][0] for i in own])
    pool = subject.mixtures[subject.labels == donor]
    drawn = pool[torch.randint(len(pool), (repeats * len(own),), generator=generator)]
    device = next(subject.model.parameters()).device
    given: list[Tensor] = []
    gating = find_deepmoe(subject.model).gating
    hook = gating.embedding.register_forward_hook(lambda _module, _args, _out: given.pop())
    hits = []
    try:
        turns = torch.arange(repeats * len(own)).remainder(len(own))
        for mixtures, images in zip(drawn.split(batch_size), turns.split(batch_size), strict=True):
            given.append(mixtures.to(device))
            hits.append(subject.model(x[images].to(device)).argmax(1).cpu() == label)
    finally:
        hook.remove()
    return 100 * torch.cat(hits).view(repeats, len(own)).double().mean(1)
