"""What `deepmoe compress` does to a segmentor in mmengine's Runner: a warm start, a teacher, the last threshold."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from ...budgets import draw_budget, set_budget
from ...gating import GateBudget
from ...hints import StageHints
from ...network import find_deepmoe
from ...warm_start import warm_start
from .lookup import model_of, network_of

SCENES = 32
"""Training images that the last threshold is set on."""


class Stages(NamedTuple):
    """Where the training of a gated segmentor changes.

    Attributes:
        ramp: share of the training in which the budget falls to the target.
        begin: epochs or iterations before stage 2.
        by_epoch: whether `begin` counts epochs.
        dynamic_experts: share of the experts that depend on the image, for `warm_start`.
    """

    ramp: float
    begin: int
    by_epoch: bool
    dynamic_experts: float


class Teacher:
    """Adds to a segmentor's losses the divergence from the teacher's logits, pixel by pixel, and its stages' hints.

    Args:
        segmentor: the trained one.
        weight: of the divergence, from 0 to 1; the losses on the labels get the rest.
        temperature: the logits of both are divided by it.
        hint: weight of the error of each stage of the backbone; see `StageHints`.
    """

    def __init__(self, segmentor: Any, weight: float, temperature: float, hint: float = 0.0) -> None:
        self.segmentor = segmentor.eval().requires_grad_(False)
        self.weight = weight
        self.temperature = temperature
        self.hint = hint
        self._logits: Tensor | None = None

    def teach(self, model: Any) -> None:
        """Watch a segmentor from now on.

        Raises:
            ValueError: its head has no layer that all logits come from.
        """
        head = _head_of(model)
        if not isinstance(getattr(head, 'conv_seg', None), nn.Module):
            raise ValueError(
                f'{type(head).__name__} has no conv_seg, whose logits a teacher teaches: give --distill 0 --hint 0.'
            )
        self.segmentor.to(next(model.parameters()).device)
        head.conv_seg.register_forward_hook(self._keep)
        hints = StageHints(model.backbone, self.segmentor.backbone, None if self.hint else ())

        def watch(module: nn.Module, _args: Any) -> None:
            if module.training:
                hints.watch()

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], losses: Any) -> None:
            try:
                self._add(args, kwargs, losses, hints)
            finally:
                hints.stop()

        model.register_forward_pre_hook(watch)
        model.register_forward_hook(add, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if module.training:
            self._logits = output

    def _add(self, args: tuple[Any, ...], kwargs: dict[str, Any], losses: Any, hints: StageHints) -> None:
        logits, self._logits = self._logits, None
        if not isinstance(losses, dict) or logits is None:  # mode is not 'loss'
            return
        with torch.no_grad():
            wanted = self.segmentor(kwargs['inputs'] if 'inputs' in kwargs else args[0])
        for name, value in losses.items():
            if 'loss' in name and name.startswith('decode.'):
                losses[name] = (1 - self.weight) * value
        divergence = F.kl_div(
            (logits / self.temperature).log_softmax(1),
            (wanted / self.temperature).log_softmax(1),
            log_target=True,
            reduction='none',
        )
        losses['loss_distill'] = self.weight * self.temperature**2 * divergence.sum(1).mean()
        if self.hint:
            losses['loss_hint'] = self.hint * hints.take()


class CompressHook(Hook):
    """Starts a segmentor from dense weights, warms up its gates, and sets their last threshold.

    Args:
        weights: state dict of the trained dense segmentor.
        teacher: if there is one.
        stages: of a gated segmentor. After the warm start only the threshold of its gates changes. The last threshold
            is set before stage 2 or at the end, on training images that are prepared as in tests.
    """

    priority = 'ABOVE_NORMAL'  # the threshold is set before DeepMoEFinetuneHook freezes the gates

    def __init__(self, weights: dict[str, Tensor], teacher: Teacher | None, stages: Stages | None = None) -> None:
        self.weights = weights
        self.teacher = teacher
        self.stages = stages

    def before_train(self, runner: Any) -> None:
        """Load the weights and warm up the gates, unless training goes on from a checkpoint."""
        model: Any = model_of(runner)
        if self.stages is not None:
            _budget_of(model).steps = max(1, int(self.stages.ramp * runner.max_iters))
        if runner.iter == 0:
            model.load_state_dict(self.weights)
            if self.stages is not None:
                warm_start(
                    model, TrainingBatches(runner), _criterion(model), dynamic_experts=self.stages.dynamic_experts
                )
        if self.teacher is not None:
            self.teacher.teach(model)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Keep the gates; set the threshold where stage 2 begins, and draw that of a step from then on."""
        if self.stages is None:
            return
        gating = network_of(runner, self).gating
        if gating.frozen:
            draw_budget(model_of(runner), runner.iter)
            return
        # The gates know what the images use; from the task they would learn to hand over the classes.
        gating.requires_grad_(False)
        gating.embedding.eval()
        if (runner.epoch if self.stages.by_epoch else runner.iter) == self.stages.begin:
            self._calibrate(runner)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Save and validate at the smallest budget."""
        if self.stages is not None and network_of(runner, self).gating.frozen:
            draw_budget(model_of(runner))

    def after_train(self, runner: Any) -> None:
        """Set the threshold if there was no stage 2."""
        if self.stages is not None and not network_of(runner, self).gating.curve.is_measured:
            self._calibrate(runner)

    def _calibrate(self, runner: Any) -> None:
        """Set the threshold on training images that run as they do in tests: whole, or in windows."""
        model: Any = model_of(runner)
        network = network_of(runner, self)
        was_training = model.training
        model.eval()
        seen: list[Tensor] = []
        handle = network.gating.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        try:
            for batch in itertools.islice(_as_tested(runner), SCENES):
                model.test_step(batch)
        finally:
            handle.remove()
            model.train(was_training)
        set_budget(model, seen, macs=_budget_of(model).target)


def _budget_of(model: nn.Module) -> GateBudget:
    budget = find_deepmoe(model).gating.budget
    assert budget is not None
    return budget


class TrainingBatches:
    """The training images of a Runner, augmented, once for each iteration, as pairs of images and data samples."""

    def __init__(self, runner: Any) -> None:
        loader = copy.deepcopy(runner.cfg.train_dataloader)
        loader.sampler = dict(type='DefaultSampler', shuffle=True)
        loader.persistent_workers = False
        self._loader = Runner.build_dataloader(loader, seed=runner.seed)
        model: Any = model_of(runner)
        self._prepare = model.data_preprocessor

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        for batch in self._loader:
            data = self._prepare(batch, True)
            yield data['inputs'], data['data_samples']


def _head_of(model: Any) -> Any:
    """The decode head, the last one of a cascade."""
    return model.decode_head[-1] if isinstance(model.decode_head, nn.ModuleList) else model.decode_head


def _criterion(model: Any) -> Any:
    """The losses of the decode head, from (logits, data samples) to a scalar."""
    head = _head_of(model)

    def criterion(logits: Tensor, data_samples: Any) -> Tensor:
        losses = head.loss_by_feat(logits, data_samples)
        return sum((value for name, value in losses.items() if 'loss' in name), logits.new_zeros(()))

    return criterion


def _as_tested(runner: Any) -> Any:
    """Training images, shuffled, with the pipeline of the tests."""
    loader = copy.deepcopy(runner.cfg.test_dataloader)
    dataset = copy.deepcopy(runner.cfg.train_dataloader.dataset)
    while 'dataset' in dataset or dataset.get('datasets'):  # wrappers repeat or join others
        dataset = dataset.dataset if 'dataset' in dataset else dataset.datasets[0]
    dataset.pipeline = loader.dataset.pipeline
    loader.update(dataset=dataset, sampler=dict(type='DefaultSampler', shuffle=True), persistent_workers=False)
    return Runner.build_dataloader(loader, seed=runner.seed)
