"""The loss hook for mmengine: any model with a DeepMoE backbone optimises J (Eq. 7)."""

from typing import Any

import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor, nn

from ...network import DeepMoE
from ...terms import gating_terms
from .lookup import model_of, network_of


def class_presence(data_samples: Any, num_classes: int, ignore_index: int) -> Tensor:
    """Which classes each image shows: shape (B, num_classes), 1 for present; ignored pixels show none.

    Raises:
        ValueError: the samples hold no segmentation maps.
    """
    if not all(hasattr(sample, 'gt_sem_seg') for sample in data_samples):
        raise ValueError(
            'embed_loss_weight > 0 needs the classes that an image shows, read from gt_sem_seg of the data samples, '
            'which these do not have: set embed_loss_weight=0.'
        )
    labels = torch.stack([sample.gt_sem_seg.data.flatten() for sample in data_samples]).long()
    labels = torch.where(labels == ignore_index, num_classes, labels)
    present = torch.zeros(len(labels), num_classes + 1, device=labels.device)
    return present.scatter_(1, labels, 1.0)[:, :num_classes]


class _AddTerms:
    """Forward hook of a model."""

    def __init__(self, ignore_index: int) -> None:
        self._ignore_index = ignore_index

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], losses: Any) -> None:
        if not isinstance(losses, dict):  # mode is not 'loss'
            return
        data_samples = kwargs['data_samples'] if 'data_samples' in kwargs else args[1]
        losses.update(gating_terms(model, data_samples, self._presence_loss, losses))

    def _presence_loss(self, logits: Tensor, data_samples: Any) -> Tensor:
        target = class_presence(data_samples, logits.shape[1], self._ignore_index)
        return F.binary_cross_entropy_with_logits(logits, target)


@HOOKS.register_module()
class DeepMoELossHook(Hook):
    """Adds `loss_gate` and `loss_embed` to the losses of the model, and `kept_experts` to its log.

    The weights are arguments of the backbone. The target of `loss_embed` in segmentation is which classes an image
    shows, its criterion the binary cross-entropy of each class.
    """

    def before_train(self, runner: Any) -> None:
        """Watch the model from its first training step on; after it, a compiled one would not notice.

        Raises:
            ValueError: the model holds no DeepMoE network or several, or its class count differs from the embedding's.
        """
        model, network = model_of(runner), network_of(runner, self)
        if any(isinstance(hook, _AddTerms) for hook in model._forward_hooks.values()):
            return
        head = getattr(model, 'decode_head', None)
        head = head[-1] if isinstance(head, nn.ModuleList) else head
        self._check_classes(network, getattr(head, 'num_classes', None))
        self._warn_of_decay(network, runner)
        network.check_terms()
        network.watch.warn = runner.logger.warning
        hook = _AddTerms(getattr(head, 'ignore_index', 255))
        model.register_forward_hook(hook, with_kwargs=True)

    def after_train(self, runner: Any) -> None:
        """Warn if the gates turned out not to look at the image."""
        network_of(runner, self).finish_training()

    @staticmethod
    def _check_classes(network: DeepMoE, num_classes: int | None) -> None:
        classifier = network.gating.class_scores
        if classifier is not None and num_classes not in (None, classifier.out_features):
            raise ValueError(
                f'num_classes={classifier.out_features} of the backbone differs from num_classes={num_classes} of the '
                f'decode head: set both to the number of classes of the dataset.'
            )

    @staticmethod
    def _warn_of_decay(network: DeepMoE, runner: Any) -> None:
        groups = runner.optim_wrapper.param_groups
        gates = network.gating.gates.weight
        for group in groups if isinstance(groups, list) else ():
            if group.get('weight_decay') and any(parameter is gates for parameter in group['params']):
                runner.logger.warning(
                    'Weight decay closes gates that the loss wants kept: exempt the gate heads with '
                    "optim_wrapper.paramwise_cfg=dict(custom_keys={'gating.gates': dict(decay_mult=0.0)})."
                )
