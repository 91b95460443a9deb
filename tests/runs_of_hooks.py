"""What the tests of the hooks share: their configs, hooks that watch a run, and J written by hand."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip('mmseg')

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import CheckpointLoader
from small_segmentors import CLASSES, backbone_config, segmentor

from deepmoe_plugin import count_macs, gate_statistics

LAMBDA, MU = 0.7, 0.3
LOSS = dict(type='DeepMoELossHook')
STATISTICS = dict(type='GateStatisticsHook')
SPARSE = dict(type='SparseInferenceHook')
WEIGHTS = dict(gate_loss_weight=LAMBDA, embed_loss_weight=MU, num_classes=CLASSES)
GATING = 'backbone.gating.'
State = dict[str, Tensor]
load_checkpoint = CheckpointLoader.load_checkpoint


def finetune(begin: int, by_epoch: bool = True) -> dict[str, Any]:
    return dict(type='DeepMoEFinetuneHook', begin=begin, by_epoch=by_epoch)


class Watch(Hook):
    """Remembers the data of each iteration, the gradients of each step and the state before each iteration."""

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.grads: list[State] = []
        self.states: list[State] = []

    def before_train(self, runner: Any) -> None:
        def remember(*_: Any) -> None:
            named = runner.model.named_parameters()
            grads = {name.removeprefix('module.'): p.grad.clone() for name, p in named if p.grad is not None}
            self.grads.append(grads)

        runner.optim_wrapper.optimizer.register_step_pre_hook(remember)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.batches.append(copy.deepcopy(data_batch))
        self.states.append(copy.deepcopy(runner.model.state_dict()))


class Kill(Hook):
    """Ends the process, as far as a test can, before an iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.iteration:
            raise KeyboardInterrupt


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """What AmpOptimWrapper does on an accelerator: forward pass and losses under autocast."""

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield


def hand_written_j(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """J, and its terms L_b, L_g and L_e, in plain torch."""
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    gating = model.backbone.gating
    mixture = gating.embedding(data['inputs'])
    with torch.autocast('cpu', enabled=False):  # gates are float32 under mixed precision too
        gates = (mixture @ gating.gates.weight.t()).clamp(min=0)
    layers = list(gates.split(gating.gates.widths, dim=1))
    gating.forward = lambda _: layers
    base = model.loss(data['inputs'], data['data_samples'])['decode.loss_ce']
    del gating.forward
    shown = torch.zeros(len(gates), CLASSES)
    for i, sample in enumerate(data['data_samples']):
        for label in sample.gt_sem_seg.data.unique().tolist():
            if label != 255:
                shown[i, label] = 1
    embed = F.binary_cross_entropy_with_logits(gating.class_scores(mixture * mixture.shape[1]), shown)
    return base + LAMBDA * gates.mean() + MU * embed, base, gates.mean(), embed


def gradient_of_j(model: nn.Module, batches: list[Any]) -> State:
    """Gradient of the mean of J over the batches."""
    model = model.train()
    (sum(hand_written_j(model, batch)[0] for batch in batches) / len(batches)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(grads: State, expected: State, tolerance: float = 1e-4) -> None:
    assert grads.keys() == expected.keys()
    assert any('gating.gates' in name for name in grads)
    for name, grad in grads.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(grad, expected[name], rtol=tolerance, atol=tolerance * max(scale, 1e-3), msg=name)
        assert scale > 0, name


def dense() -> nn.Module:
    return segmentor(backbone_config(gated=False))


def cost(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """GMACs and kept experts of each image."""
    backbone = model.backbone
    return count_macs(backbone, images).total.double() / 1e9, gate_statistics(backbone, images).by_image()


def normalised(model: nn.Module, item: Any) -> Tensor:
    return model.data_preprocessor(dict(inputs=[item['inputs']], data_samples=[item['data_samples']]))['inputs']
