"""DeepMoE (deep mixture of experts via shallow embedding) for timm and MMSegmentation.

Importing this package registers its models with timm and lets timm's training tasks optimise the DeepMoE objective;
importing `deepmoe_plugin.mmseg` registers backbones and hooks with MMSegmentation.
"""

from typing import Any

from . import timm_hook
from .budgets import recalibrate_norms, set_budget
from .chosen import ChosenExperts, chosen_experts
from .gating import GatingConfig
from .losses import DeepMoELoss
from .macs import MacsReport, count_macs
from .models import deepmoe_convnext, deepmoe_resnet, deepmoe_vgg, specialised_moe, stacked_moe
from .network import DeepMoE, find_deepmoe, freeze_gating, unfreeze_gating
from .pruning import Pruning, prune
from .stats import GateStatistics, gate_statistics
from .terms import TermSource, gating_terms
from .warm_start import warm_start

__version__ = '0.1.0'

__all__ = [
    'ChosenExperts',
    'DeepMoE',
    'DeepMoELoss',
    'GateStatistics',
    'GatingConfig',
    'MacsReport',
    'Pruning',
    'TermSource',
    '__version__',
    'chosen_experts',
    'count_macs',
    'deepmoe_convnext',
    'deepmoe_resnet',
    'deepmoe_vgg',
    'find_deepmoe',
    'freeze_gating',
    'gate_statistics',
    'gating_terms',
    'prune',
    'recalibrate_norms',
    'set_budget',
    'sparsify',
    'specialised_moe',
    'stacked_moe',
    'unfreeze_gating',
    'warm_start',
]

timm_hook.install()


def __getattr__(name: str) -> Any:
    if name == 'sparsify':  # its module is needed for inference only
        from .sparse import sparsify

        return sparsify
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
