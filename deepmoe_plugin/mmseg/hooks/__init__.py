"""Hooks for mmengine's Runner; they serve every framework on it, since they only look for a DeepMoE network."""

from .loss_hook import DeepMoELossHook

__all__ = ['DeepMoELossHook']
