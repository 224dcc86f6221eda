"""Gated DeltaNet: the module, its state in a cache, and its inits."""

from pl_attnedit.attention.gated_deltanet.inits import INITS
from pl_attnedit.attention.gated_deltanet.module import GatedDeltaNet, GatedDeltaNetConfig

__all__ = ["INITS", "GatedDeltaNet", "GatedDeltaNetConfig"]
