"""`deepmoe_plugin.set_budget`: another budget for a trained network, without training (ours)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .arguments import check_number
from .experts import GatedNetwork, find_deepmoe
from .gating.budget import find_threshold
from .stats import fraction_kept


@torch.no_grad()
def set_budget(
    model: nn.Module,
    images: Tensor | Iterable[Tensor | Sequence[Tensor]],
    *,
    macs: float | None = None,
    kept: float | None = None,
) -> float:
    """Move the threshold of the gates so that these images spend a budget on average; nothing trains.

        deepmoe_plugin.set_budget(model, loader, macs=0.4)

    The threshold is part of the state dict, so that a checkpoint keeps its budget. Gates that stay kept keep their
    value. A budget below the one of the training closes experts that the network has not learnt to do without:
    expect to lose accuracy.

    Args:
        model: holds one DeepMoE network; its threshold changes.
        images: some dozens of images as the network will see them: a batch (B, in_chans, H, W), or a loader of batches
            or of tuples that start with one.
        macs: fraction of the base network's dense MACs to spend, as `target_macs`; the gating network not included.
        kept: fraction of experts to keep, as `target_kept`; give one of both.

    Returns:
        The fraction that the images now spend; larger gates than the budget asks for cannot be had, so that it is below
        the budget where the network keeps less with all its gates.

    Raises:
        ValueError: not exactly one budget is given, or it lies outside of (0, 1], or cannot be reached; `model` holds
            no DeepMoE network or several; or there are no images.
    """
    name, goal = ('macs', macs) if kept is None else ('kept', kept)
    if goal is None or (macs is not None and kept is not None):
        raise ValueError('set_budget needs one budget: macs=0.4 or kept=0.5.')
    check_number(name, goal)
    if not 0 < goal <= 1:
        raise ValueError(f'{name} must be a fraction above 0 and at most 1, got {goal}.')
    network = find_deepmoe(model)
    if name == 'macs':
        network.check_target(goal)
    preact = _preactivations(network, images)
    cost = network.spent if name == 'macs' else fraction_kept
    threshold = network.gating.gates.threshold
    threshold.copy_(find_threshold(preact, cost, goal).to(threshold.dtype))
    return cost(preact > threshold).mean().item()


def _preactivations(network: GatedNetwork, images: Tensor | Iterable[Tensor | Sequence[Tensor]]) -> Tensor:
    """`W e` of all images, shape (images, N), with the norm statistics of inference."""
    gating = network.gating
    device = gating.gates.weight.device
    was_training = gating.training
    gating.eval()
    try:
        batches = [images] if isinstance(images, Tensor) else images
        first_items = (batch if isinstance(batch, Tensor) else batch[0] for batch in batches)
        found = [gating.gates(gating.embedding(batch.to(device))) for batch in first_items]
    finally:
        gating.train(was_training)
    if not found:
        raise ValueError('images is empty: there is nothing to find the threshold on.')
    return torch.cat(found)
