"""The loss hook for timm's training loop: any timm task that trains a network of this package optimises J (Eq. 7).

timm's train.py is not changed. PyTorch tells us when a module becomes the `trainable_module` of a timm task; if it
holds a network that has terms, the task gets a forward hook that adds them to the `loss` it returns. Every other
task, and every other model, stays exactly as it was.
"""

import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from timm.optim.muon import Muon
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .gating.heads import is_gate_matrix
from .terms import TermSource, gating_terms, term_sources


class _TrainLog(logging.Filter):
    """Appends the averages of the terms since the last line to the progress lines of timm's train.py.

    Those of the epoch so far go to W&B where train.py logs to it: uncommitted, they join the row that train.py commits
    once an epoch, and the last of them stand.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._sources: WeakSet[TermSource] = WeakSet()
        self._epoch: tuple[Any, str] = (None, '')
        self._epoch_sums: dict[str, float] = {}
        self._epoch_steps = 0

    def watch(self, sources: Iterable[TermSource]) -> None:
        """Ask these networks at the end of training whether something made it useless."""
        self._sources.update(sources)

    def add(self, terms: Mapping[str, Tensor]) -> None:
        for name, value in terms.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1

    def filter(self, record: logging.LogRecord) -> bool:
        if self._steps and isinstance(record.msg, str) and record.msg.startswith('Train: '):
            sums = {name: total.item() for name, total in self._sums.items()}
            self._log_to_wandb(record.msg.partition('[')[0], sums)
            record.msg += '  ' + '  '.join(f'{name}: {total / self._steps:#.3g}' for name, total in sums.items())
            self._sums, self._steps = {}, 0
        if isinstance(record.msg, str) and record.msg.startswith('*** Best metric'):  # the last line
            for source in self._sources:
                source.finish_training()
            self._sources.clear()
        return True

    def _log_to_wandb(self, epoch: str, sums: Mapping[str, float]) -> None:
        wandb: Any = sys.modules.get('wandb')
        if getattr(wandb, 'run', None) is None:
            return
        if self._epoch != (wandb.run, epoch):
            self._epoch, self._epoch_sums, self._epoch_steps = (wandb.run, epoch), {}, 0
        self._epoch_sums = {name: total + self._epoch_sums.get(name, 0) for name, total in sums.items()}
        self._epoch_steps += self._steps
        means = {f'train_{name}': total / self._epoch_steps for name, total in self._epoch_sums.items()}
        wandb.log(means, commit=False)


_train_log = _TrainLog()


def install() -> None:
    """Make timm tasks train DeepMoE networks with J; called once, on import of the package."""
    register_module_module_registration_hook(_on_registration)
    register_optimizer_step_pre_hook(_keep_gates_from_muon)


def _keep_gates_from_muon(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Let timm's Muon update gate heads by AdamW, as it does what its method is not made for.

    It orthogonalises what has the shape of a hidden layer's matrix. The heads have it, but are the rows of separate
    layers, side by side only for speed.
    """
    if not isinstance(optimizer, Muon):
        return
    is_gates = is_gate_matrix()
    for group in optimizer.param_groups:
        for parameter in group['params']:
            if is_gates(parameter) and 'use_muon' not in group:
                optimizer.state[parameter]['use_muon'] = False


def _add_terms(task: TrainingTask, args: tuple[Any, ...], kwargs: dict[str, Any], result: dict[str, Any]) -> None:
    """Forward hook of a task. It has no state, so that a copied task trains the copied network."""
    target = kwargs['target'] if 'target' in kwargs else args[1]
    terms = gating_terms(task.trainable_module, target, getattr(task, 'criterion', None), result['loss'])
    if not terms:
        return
    result.update(terms)
    result['loss'] = result['loss'] + sum(value for name, value in terms.items() if 'loss' in name)
    _train_log.add(terms)


def _on_registration(task: nn.Module, name: str, module: nn.Module | None) -> None:
    if name != 'trainable_module' or not isinstance(task, TrainingTask) or module is None:
        return
    sources = term_sources(module)
    for source in sources:
        source.check_terms()
    _train_log.watch(sources)
    if sources and _add_terms not in task._forward_hooks.values():
        task.register_forward_hook(_add_terms, with_kwargs=True)
        logging.getLogger('train').addFilter(_train_log)
