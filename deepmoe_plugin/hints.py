"""Hints: what the stages of a trained network compute teaches those of another (FitNets, Romero et al. 2015)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class StageHints:
    """Compares what two networks compute at the end of each stage, from forward passes on the same images.

    A network that lost some of its experts keeps the maps between its stages. The logits say what is wrong with all of
    them together; the maps say it stage by stage.

    Args:
        student: the network that learns.
        teacher: the trained one.
        stages: dotted names of modules that both have, `stage_names` by default.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, stages: Sequence[str] | None = None) -> None:
        self.stages = list(stage_names(student) if stages is None else stages)
        self._pairs = [(_end_of(student, name), _end_of(teacher, name)) for name in self.stages]
        self._found: dict[nn.Module, Tensor] = {}
        self._hooks: list[Any] = []

    def watch(self) -> None:
        """Keep the latest maps of both networks from now on; their forward passes must not be compiled."""
        self._hooks = [module.register_forward_hook(self._keep) for pair in self._pairs for module in pair]

    def stop(self) -> None:
        """Let the networks alone."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._found.clear()

    def __enter__(self) -> 'StageHints':
        self.watch()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def _keep(self, module: nn.Module, _args: Any, output: Tensor) -> None:
        self._found[module] = output

    def take(self) -> Tensor:
        """Sum over stages of the squared error of the student's map over the mean square of the teacher's; a scalar.

        Stages that one of the networks did not run, or whose maps have different shapes, are left out. The graph leads
        to the student alone.
        """
        total: Tensor | None = None
        for pair in self._pairs:
            found, wanted = (self._found.pop(module, None) for module in pair)
            if found is not None and wanted is not None and found.shape == wanted.shape:
                wanted = wanted.detach().float()
                error = (found.float() - wanted).square().mean() / wanted.square().mean().clamp(min=1e-12)
                total = error if total is None else total + error
        return torch.zeros(()) if total is None else total


def _end_of(network: nn.Module, stage: str) -> nn.Module:
    """The last block of a stage: gates go to each block, so that the sequence of them is not called."""
    module = network.get_submodule(stage)
    while isinstance(module, nn.Sequential):
        module = module[-1]
    return module


def stage_names(network: Any) -> list[str]:
    """The modules that end the stages of a network, as timm's `feature_info` names them."""
    return [info['module'] for info in network.feature_info]
