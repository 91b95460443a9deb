"""Sparse execution: an expert that an image's gates closed costs it no time."""

from .engine import SparseNetwork
from .sparsify import sparsify

__all__ = ['SparseNetwork', 'sparsify']
