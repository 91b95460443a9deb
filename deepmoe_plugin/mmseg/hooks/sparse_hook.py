"""Validation and testing at the speed of sparse execution."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

from ... import sparsify
from ...network import DeepMoE
from .lookup import model_of, network_of


@HOOKS.register_module()
class SparseInferenceHook(Hook):
    """Runs the backbone sparsely while validating and testing: same predictions to float rounding, less time.

    The sparse copy is made anew for each validation, after the EMA hook has put its weights in, and the backbone is
    back before a checkpoint is written.
    """

    priority = 'LOW'

    def __init__(self) -> None:
        self._swapped: tuple[nn.Module, str, DeepMoE] | None = None

    def _before_epoch(self, runner: Any, mode: str = 'train') -> None:
        """Put the sparse network in the backbone's place.

        Raises:
            ValueError: the model holds no DeepMoE network or several, or one that cannot run sparsely.
        """
        if mode == 'train':
            return
        model, network = model_of(runner), network_of(runner, self)
        path = next(name for name, module in model.named_modules() if module is network)
        model.set_submodule(path, sparsify(network))
        self._swapped = (model, path, network)

    def _after_epoch(self, runner: Any, mode: str = 'train') -> None:
        """Put the backbone back."""
        if self._swapped is None:  # after an epoch of training
            return
        model, path, network = self._swapped
        network.train(model.training)
        model.set_submodule(path, network)
        self._swapped = None
