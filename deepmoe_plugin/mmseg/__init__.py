"""DeepMoE for MMSegmentation.

Its types are known to mmengine as `deepmoe_plugin.DeepMoEResNet`, and without the prefix once
`custom_imports = dict(imports=['deepmoe_plugin.mmseg'])` has imported this package.
"""

from ..registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from .backbones import DeepMoEDRN, DeepMoEResNet, DeepMoEVGG
from .convnext import DeepMoEConvNeXt
from .hooks import DeepMoEFinetuneHook, DeepMoELossHook, GateStatisticsHook, SparseInferenceHook
from .learning_rates import DeepMoELearningRateDecay
from .pretrained import allow_histories

__all__ = [
    'DeepMoEConvNeXt',
    'DeepMoEDRN',
    'DeepMoEFinetuneHook',
    'DeepMoELearningRateDecay',
    'DeepMoELossHook',
    'DeepMoEResNet',
    'DeepMoEVGG',
    'GateStatisticsHook',
    'SparseInferenceHook',
]

for backbone in (DeepMoEConvNeXt, DeepMoEDRN, DeepMoEResNet, DeepMoEVGG):
    MODELS.register_module(module=backbone)
for hook in (DeepMoEFinetuneHook, DeepMoELossHook, GateStatisticsHook, SparseInferenceHook):
    HOOKS.register_module(module=hook)
OPTIM_WRAPPER_CONSTRUCTORS.register_module(module=DeepMoELearningRateDecay)

allow_histories()
