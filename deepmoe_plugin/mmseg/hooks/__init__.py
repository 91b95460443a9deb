"""Hooks for mmengine's Runner; they serve every framework on it, since they only look for a DeepMoE network."""

from .finetune_hook import DeepMoEFinetuneHook
from .loss_hook import DeepMoELossHook
from .sparse_hook import SparseInferenceHook
from .statistics_hook import GateStatisticsHook

__all__ = ['DeepMoEFinetuneHook', 'DeepMoELossHook', 'GateStatisticsHook', 'SparseInferenceHook']
