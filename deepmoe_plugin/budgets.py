"""`deepmoe_plugin.set_budget`: another budget for a trained network, without training (ours)."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .arguments import check_number
from .experts import GatedNetwork, find_deepmoe
from .gating.budget import find_threshold
from .gating.norm_curve import read_norms
from .macs import GATING_GROUPS, MacsTable
from .stats import fraction_kept

Images = Tensor | Iterable[Tensor | Sequence[Tensor]]


@torch.no_grad()
def set_budget(
    model: nn.Module,
    images: Images | None = None,
    *,
    macs: float | None = None,
    kept: float | None = None,
) -> float:
    """Move the threshold of the gates so that images spend a budget on average; nothing trains.

        deepmoe_plugin.set_budget(model, loader, macs=0.4)   # on images, which also measures the budget curve
        deepmoe_plugin.set_budget(model, macs=0.6)           # by the curve

    Threshold and curve are part of the state dict, so that a checkpoint keeps its budget, and can be given others
    without images. Training the gates makes the network forget the curve. The values of kept gates do not change.
    Norm statistics follow the budget if `recalibrate_norms` has measured them at several; else they stay those of the
    old one. A budget that was not trained costs accuracy: experts close that the network has not learnt to do without.
    Train for a range of budgets (`target_macs=(0.35, 0.75)`) instead.

    Args:
        model: holds one DeepMoE network; its threshold, its curve and, if they were measured, its norms change.
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
    network = find_deepmoe(model)
    threshold = network.gating.gates.threshold
    if images is None:
        found, spends = _by_curve(network, name, goal)
        threshold.copy_(found.to(threshold.dtype))
        _move_norms(model)
        return spends
    _check_goal(network, name, goal)
    preact = _preactivations(network, images)
    network.gating.curve.measure(preact, network.spent)
    cost = network.spent if name == 'macs' else fraction_kept
    threshold.copy_(find_threshold(preact, cost, goal).to(threshold.dtype))
    _move_norms(model)
    return cost(preact > threshold).mean().item()


def _check_goal(network: GatedNetwork, name: str, goal: float) -> None:
    check_number(name, goal)
    if not 0 < goal <= 1:
        raise ValueError(f'{name} must be a fraction above 0 and at most 1, got {goal}.')
    if name == 'macs':
        network.check_target(goal)


def _by_curve(network: GatedNetwork, name: str, goal: float) -> tuple[Tensor, float]:
    """The threshold of a budget by the budget curve, and what is spent there."""
    _check_goal(network, name, goal)
    if not network.gating.curve.is_measured:
        raise ValueError(
            f'This network has no budget curve: give images once, as set_budget(model, images, {name}={goal}), and '
            f'save the network after it. Training the gates makes it forget the curve.'
        )
    return network.gating.curve.find('macs' if name == 'macs' else 'kept', goal)


@torch.no_grad()
def recalibrate_norms(model: nn.Module, images: Images, macs: Sequence[float] = ()) -> None:
    """Measure the statistics of the batch norms anew, with the gates as they are now or at several budgets.

    Another budget closes other experts, and what the norms behind them see has another mean and variance (Yu and Huang
    2019, universally slimmable networks). Nothing trains:

        deepmoe_plugin.set_budget(model, loader, macs=0.6)
        deepmoe_plugin.recalibrate_norms(model, train_loader)

    With several budgets, the state dict keeps the statistics of each, and `set_budget` interpolates between them:

        deepmoe_plugin.recalibrate_norms(model, train_loader, macs=(0.35, 0.45, 0.55, 0.65, 0.75))
        deepmoe_plugin.set_budget(model, macs=0.6)

    Args:
        model: holds one DeepMoE network; the running statistics of its batch norms change, those of the gating network
            and of frozen norms do not.
        images: some thousands as the network was **trained** on, augmented alike: a batch (B, in_chans, H, W), or a
            loader of batches or of tuples that start with one, run through once for each budget. A padded border, for
            one, is part of the statistics.
        macs: budgets as `set_budget` takes them; the network needs a budget curve, and ends at the budget that it had.
            Further training, or norms measured anew, make these statistics useless; they are ignored from then on.

    Raises:
        ValueError: there are no images, a budget cannot be set, or `model` holds no DeepMoE network or several.
    """
    network = find_deepmoe(model)
    gating, norms = network.gating, _norms_of(model)
    thresholds = [_by_curve(network, 'macs', budget)[0] for budget in macs]
    if not thresholds:
        _measure_norms(model, norms, images)
        gating.norm_curve.forget()
        return
    before = gating.gates.threshold.clone()
    points = []
    try:
        for threshold in thresholds:
            gating.gates.threshold.copy_(threshold.to(before.dtype))
            _measure_norms(model, norms, images)
            points.append((gating.gates.threshold.clone(), read_norms(norms)))
    finally:
        gating.gates.threshold.copy_(before)
    gating.norm_curve.measure(norms, points)
    _move_norms(model)


def _move_norms(model: nn.Module) -> None:
    """Give the norms the statistics that were measured for the present threshold, if any were."""
    gating = find_deepmoe(model).gating
    if gating.norm_curve.is_measured:
        gating.norm_curve.apply_to(_norms_of(model), gating.gates.threshold)


def _norms_of(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms outside of the gating network whose running statistics depend on the budget."""
    gating = set(find_deepmoe(model).gating.modules())
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None and m not in gating]


def _measure_norms(model: nn.Module, norms: Sequence[_BatchNorm], images: Images) -> None:
    # Not by torch.optim.swa_utils.update_bn: it trains all modules, gating and dropout among them.
    before = [(norm.momentum, [buffer.clone() for buffer in norm.buffers()]) for norm in norms]
    trained = [module for module in model.modules() if module.training]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches
        norm.train()
    is_empty = True
    try:
        for batch in _batches(images, find_deepmoe(model).gating.gates.weight.device):
            model(batch)
            is_empty = False
    finally:
        for norm, (momentum, buffers) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.eval()
            if not norm.num_batches_tracked:  # it did not run, as an auxiliary head
                for buffer, old in zip(norm.buffers(), buffers, strict=True):
                    buffer.copy_(old)
        for module in trained:
            module.training = True
    if is_empty:
        raise ValueError('images is empty: there is nothing to measure the norms on.')


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


def _batches(images: Images, device: torch.device) -> Iterator[Tensor]:
    for batch in [images] if isinstance(images, Tensor) else images:
        yield (batch if isinstance(batch, Tensor) else batch[0]).to(device)


def _preactivations(network: GatedNetwork, images: Images) -> Tensor:
    """`W e` of all images, shape (images, N), with the norm statistics of inference."""
    gating = network.gating
    was_training = gating.training
    gating.eval()
    try:
        found = [gating.gates(gating.embedding(batch)) for batch in _batches(images, gating.gates.weight.device)]
    finally:
        gating.train(was_training)
    if not found:
        raise ValueError('images is empty: there is nothing to find the threshold on.')
    return torch.cat(found)
