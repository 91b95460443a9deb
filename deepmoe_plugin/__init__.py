"""DeepMoE (deep mixture of experts via shallow embedding) for timm and MMSegmentation.

Importing this package registers its models with timm and lets timm's training tasks optimise the DeepMoE objective;
importing `deepmoe_plugin.mmseg` registers backbones and hooks with MMSegmentation.
"""

from typing import Any

from . import timm_hook
from .gating import GatingConfig
from .losses import DeepMoELoss
from .macs import MacsReport, count_macs
from .models import deepmoe_resnet, deepmoe_vgg
from .network import DeepMoE, find_deepmoe, freeze_gating, unfreeze_gating
from .pruning import Pruning, prune
from .stats import GateStatistics, gate_statistics
from .terms import TermSource, gating_terms

__version__ = '0.1.0'

__all__ = [
    'DeepMoE',
    'DeepMoELoss',
    'GateStatistics',
    'GatingConfig',
    'MacsReport',
    'Pruning',
    'TermSource',
    '__version__',
    'count_macs',
    'deepmoe_resnet',
    'deepmoe_vgg',
    'find_deepmoe',
    'freeze_gating',
    'gate_statistics',
    'gating_terms',
    'prune',
    'sparsify',
    'unfreeze_gating',
]

timm_hook.install()


def __getattr__(name: str) -> Any:
    if name == 'sparsify':  # its module is needed for inference only
        from .sparse import sparsify

        return sparsify
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
