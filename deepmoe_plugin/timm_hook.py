"""The loss hook for timm's training loop: any timm task that trains a DeepMoE network optimises J (Eq. 7).

timm's train.py is not changed. PyTorch tells us when a module becomes the `trainable_module` of a timm task; if it
is a DeepMoE network, the task gets a forward hook that adds the terms to the `loss` it returns. Every other
task, and every other model, stays exactly as it was.
"""

import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from .losses import TERMS, GatingLoss
from .network import deepmoe_networks, find_deepmoe

_gating_losses: WeakKeyDictionary[TrainingTask, GatingLoss] = WeakKeyDictionary()


class _TrainLog(logging.Filter):
    """Appends the averages of the terms since the last line to the progress lines of timm's train.py."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, terms: Mapping[str, Tensor]) -> None:
        for name, value in terms.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1

    def filter(self, record: logging.LogRecord) -> bool:
        if self._steps and isinstance(record.msg, str) and record.msg.startswith('Train: '):
            means = {name: (total / self._steps).item() for name, total in self._sums.items()}
            record.msg += '  ' + '  '.join(f'{name}: {mean:#.3g}' for name, mean in means.items())
            self._sums, self._steps = {}, 0
        return True


_train_log = _TrainLog()


def install() -> None:
    """Make timm tasks train DeepMoE networks with J; called once, on import of the package."""
    register_module_module_registration_hook(_on_registration)


def _on_registration(task: nn.Module, name: str, module: nn.Module | None) -> None:
    if name != 'trainable_module' or not isinstance(task, TrainingTask) or module is None or task in _gating_losses:
        return
    if isinstance(module, torch.jit.ScriptModule) and str(module.original_name).startswith('DeepMoE'):
        raise ValueError('A scripted DeepMoE network cannot be trained with J: leave out --torchscript.')
    if any(True for _ in deepmoe_networks(module)):
        _gating_losses[task] = GatingLoss(find_deepmoe(module))
        task.register_forward_hook(_add_terms, with_kwargs=True)
        logging.getLogger('train').addFilter(_train_log)


def _add_terms(task: TrainingTask, args: tuple[Any, ...], kwargs: dict[str, Any], result: dict[str, Any]) -> None:
    if task not in _gating_losses:  # a copy of a task
        _gating_losses[task] = GatingLoss(find_deepmoe(task.get_trainable_module()))
    gating_loss = _gating_losses[task]
    record = gating_loss.network.gating.take_record()
    if record is None:
        return
    target = kwargs['target'] if 'target' in kwargs else args[1]
    terms = gating_loss(record, target, getattr(task, 'criterion', None))
    result.update(terms)
    result['loss'] = result['loss'] + sum(terms[name] for name in TERMS if name in terms)
    _train_log.add(terms)
