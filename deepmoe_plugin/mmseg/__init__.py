"""DeepMoE for MMSegmentation.

Its types are known to mmengine as `deepmoe_plugin.DeepMoEResNet`, and without the prefix once
`custom_imports = dict(imports=['deepmoe_plugin.mmseg'])` has imported this package.
"""

from ..registry import HOOKS, MODELS
from .backbones import DeepMoEDRN, DeepMoEResNet, DeepMoEVGG
from .hooks import DeepMoEFinetuneHook, DeepMoELossHook, GateStatisticsHook, SparseInferenceHook
from .pretrained import allow_histories

__all__ = [
    'DeepMoEDRN',
    'DeepMoEFinetuneHook',
    'DeepMoELossHook',
    'DeepMoEResNet',
    'DeepMoEVGG',
    'GateStatisticsHook',
    'SparseInferenceHook',
]

for backbone in (DeepMoEDRN, DeepMoEResNet, DeepMoEVGG):
    MODELS.register_module(module=backbone)
for hook in (DeepMoEFinetuneHook, DeepMoELossHook, GateStatisticsHook, SparseInferenceHook):
    HOOKS.register_module(module=hook)

allow_histories()
