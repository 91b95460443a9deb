"""The gating network of DeepMoE: its arguments, the shallow embedding, the gate heads and the budget."""

from .budget import GateBudget
from .config import GatingConfig
from .embedding import ShallowEmbedding
from .heads import GateHeads
from .network import GatingNetwork, GatingRecord

__all__ = ['GateBudget', 'GateHeads', 'GatingConfig', 'GatingNetwork', 'GatingRecord', 'ShallowEmbedding']
