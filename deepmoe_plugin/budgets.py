"""`deepmoe_plugin.set_budget`: another budget for a trained network, without training (ours)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .arguments import check_number
from .experts import GatedNetwork, find_deepmoe
from .gating.budget import find_threshold
from .macs import GATING_GROUPS, MacsTable
from .stats import fraction_kept


@torch.no_grad()
def set_budget(
    model: nn.Module,
    images: Tensor | Iterable[Tensor | Sequence[Tensor]] | None = None,
    *,
    macs: float | None = None,
    kept: float | None = None,
) -> float:
    """Move the threshold of the gates so that images spend a budget on average; nothing trains.

        deepmoe_plugin.set_budget(model, loader, macs=0.4)   # on images, which also measures the budget curve
        deepmoe_plugin.set_budget(model, macs=0.6)           # by the curve

    Threshold and curve are part of the state dict, so that a checkpoint keeps its budget, and can be given others
    without images. Training the gates makes the network forget the curve. The values of kept gates do not change. A
    budget that was not trained costs accuracy: experts close that the network has not learnt to do without. Train for a
    range of budgets (`target_macs=(0.35, 0.75)`) instead.

    Args:
        model: holds one DeepMoE network; its threshold and its curve change.
        images: some dozens of images as the network will see them: a batch (B, in_chans, H, W), or a loader of batches
            or of tuples that start with one. By default the curve in the checkpoint tells.
        macs: fraction of the base network's dense MACs to spend, as `target_macs`; the gating network not included.
        kept: fraction of experts to keep, as `target_kept`; give either `macs` or `kept`.

    Returns:
        The fraction that the images now spend, or that those of the curve spent. It is below the budget where the
        network spends less even with a threshold of zero.

    Raises:
        ValueError: not exactly one budget is given, or it lies outside of (0, 1], or cannot be reached; `model` holds
            no DeepMoE network or several; or there are no images, and no curve in their place.
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
    threshold, curve = network.gating.gates.threshold, network.gating.curve
    if images is None:
        if not curve.is_measured:
            raise ValueError(
                f'This network has no budget curve: give images once, as set_budget(model, images, {name}={goal}), and '
                f'save the network after it. Training the gates makes it forget the curve.'
            )
        found, spends = curve.find('macs' if name == 'macs' else 'kept', goal)
        threshold.copy_(found.to(threshold.dtype))
        return spends
    preact = _preactivations(network, images)
    curve.measure(preact, network.spent)
    cost = network.spent if name == 'macs' else fraction_kept
    threshold.copy_(find_threshold(preact, cost, goal).to(threshold.dtype))
    return cost(preact > threshold).mean().item()


def draw_budget(model: nn.Module, step: int | None = None) -> None:
    """Give a network with frozen gates and a range of targets the budget of a training step, by its curve.

    Args:
        model: holds one DeepMoE network; one without a range is left as it is.
        step: of the training; by default the training is over, and the smallest budget of the range is set.
    """
    budget = find_deepmoe(model).gating.budget
    if budget is not None and budget.drawn is not None:
        set_budget(model, macs=budget.target if step is None else budget.draw(step))


def base_target(fraction: float, dense_macs: int, table: MacsTable) -> float:
    """The `target_macs` with which an image costs a fraction of what a dense network costs, gating included.

    Args:
        fraction: of `dense_macs`.
        dense_macs: MACs of the dense network for one image.
        table: of the gated network, at the same image size.

    Raises:
        ValueError: gating and the layers without gates cost more.
    """
    gating = table.dense(GATING_GROUPS)
    target = (fraction * dense_macs - gating) / (table.dense() - gating)
    if target <= table.floor:
        floor = (table.floor * (table.dense() - gating) + gating) / dense_macs
        raise ValueError(
            f'A budget of {fraction} cannot be reached: gating and the layers without gates cost {floor:.3f} of the '
            f'dense MACs. Choose a larger one.'
        )
    return target


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
