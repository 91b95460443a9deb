"""DeepMoE for MMSegmentation: `custom_imports = dict(imports=['deepmoe_plugin.mmseg'])` registers all of it."""

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

allow_histories()
