"""DeepMoE for MMSegmentation: `custom_imports = dict(imports=['deepmoe_plugin.mmseg'])` registers all of it."""

from .backbones import DeepMoEDRN, DeepMoEResNet, DeepMoEVGG
from .hooks import DeepMoELossHook
from .pretrained import allow_histories

__all__ = ['DeepMoEDRN', 'DeepMoELossHook', 'DeepMoEResNet', 'DeepMoEVGG']

allow_histories()
