"""Layer-wise learning rates in MMSegmentation for networks of this package."""

import re
from collections.abc import Iterator
from typing import Any

from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmseg.engine.optimizers import LearningRateDecayOptimizerConstructor
from torch import nn

from ..network import deepmoe_networks

# timm's names of the parts of a ConvNeXt, and mmpretrain's, by which mmseg tells how deep a parameter lies.
_NAMES = (
    (r'^backbone\.stem\.', 'backbone.downsample_layers.0.'),
    (r'^backbone\.stages\.(\d+)\.downsample\.', r'backbone.downsample_layers.\1.'),
    (r'^backbone\.stages\.(\d+)\.blocks\.', r'backbone.stages.\1.'),
)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DeepMoELearningRateDecay(LearningRateDecayOptimizerConstructor):
    """mmseg's `LearningRateDecayOptimizerConstructor` for a segmentor on `DeepMoEConvNeXt`.

    Learning rates are those of mmpretrain's ConvNeXt: in mmseg's constructor, timm's names would give the stem the
    full rate, or fail. The gating network is new and has the full rate, its gate heads no weight decay.

    Args:
        optim_wrapper_cfg: of the optimizer.
        paramwise_cfg: `num_layers`, `decay_rate` and `decay_type` ('layer_wise' or 'stage_wise'), see mmseg.
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **kwargs: Any) -> None:
        """Add the parameters of a segmentor as groups with learning rates of their own.

        Raises:
            ValueError: the backbone is no ConvNeXt.
        """
        if 'ConvNeXt' not in type(getattr(module, 'backbone', None)).__name__:
            raise ValueError(
                'DeepMoELearningRateDecay needs a segmentor on DeepMoEConvNeXt: leave `constructor` out of '
                'optim_wrapper for other networks.'
            )
        super().add_params(params, _Renamed(module), **kwargs)
        spared = {network.gating.gates.weight for network in deepmoe_networks(module)}
        for group in list(params):
            found = [parameter for parameter in group['params'] if parameter in spared]
            if found:
                group['params'] = [parameter for parameter in group['params'] if parameter not in spared]
                params.append({**group, 'params': found, 'weight_decay': 0.0, 'group_name': 'gate_heads'})


class _Renamed:
    """What mmseg's constructor asks of a segmentor, in mmpretrain's names."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.backbone = module, module.backbone

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.module.named_parameters():
            for pattern, replacement in _NAMES:
                name = re.sub(pattern, replacement, name)
            yield name, parameter
