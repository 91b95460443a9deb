"""DeepMoE (deep mixture of experts via shallow embedding) for timm and MMSegmentation."""

from .models import deepmoe_resnet, deepmoe_vgg
from .network import find_deepmoe, freeze_gating, unfreeze_gating
