"""Stage 2 of the paper's Procedure 1 in the same run: from some epoch or iteration on, only the base network trains."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop
from torch.nn.parallel import DistributedDataParallel

from .lookup import model_of, network_of


@HOOKS.register_module()
class DeepMoEFinetuneHook(Hook):
    """Freezes the gating network, norm statistics included, from an epoch or iteration on, with both loss weights at 0.

    A run resumed later starts frozen. The optimizer goes on holding the frozen parameters, so that checkpoints of both
    stages fit it; without gradients, neither momentum nor weight decay moves them.

    Args:
        begin: epochs or iterations of stage 1.
        by_epoch: whether `begin` counts epochs.

    Raises:
        ValueError: `begin` is not a whole number >= 0.
    """

    def __init__(self, begin: int, by_epoch: bool = True) -> None:
        if not isinstance(begin, int) or isinstance(begin, bool) or begin < 0:
            raise ValueError(f'begin must be a whole number >= 0, got {begin!r}.')
        self.begin = begin
        self.by_epoch = by_epoch

    def before_train(self, runner: Any) -> None:
        """Check that stage 2 can begin.

        Raises:
            ValueError: the model holds no DeepMoE network or several, stage 2 would never begin, or the wrapper of the
                model cannot leave out parameters halfway.
        """
        network_of(runner, self)
        if self.by_epoch and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ValueError('by_epoch=True never begins in an iteration-based loop: set by_epoch=False.')
        end = runner.max_epochs if self.by_epoch else runner.max_iters
        if self.begin >= end:
            raise ValueError(f'begin={self.begin} is not before the end of training, {end}: stage 2 would never begin.')
        if is_model_wrapper(runner.model) and not isinstance(runner.model, DistributedDataParallel):
            raise ValueError(
                f'{type(runner.model).__name__} cannot freeze parameters halfway: train stage 2 in a run of its own, '
                f'with freeze_gating=True of the backbone and load_from.'
            )

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Freeze once `begin` is reached, however training came here."""
        if (runner.epoch if self.by_epoch else runner.iter) < self.begin:
            return
        gating = network_of(runner, self).gating
        if gating.frozen:
            return
        gating.freeze()
        for parameter in gating.parameters():
            parameter.grad = None  # a zero gradient would still let momentum and weight decay move it
        if is_model_wrapper(runner.model):
            # The reducer waits for a gradient of every parameter that trained when it was made.
            runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), model_of(runner))
            runner._maybe_compile('train_step')
        runner.logger.info('Stage 2 begins: the gating network is frozen, its loss weights are 0.')
