"""GateSWA: the module, the rolling cache of its window layers, and its inits."""

from pl_attnedit.attention.gate_swa.inits import INITS
from pl_attnedit.attention.gate_swa.module import GateSWA, GateSWAConfig

__all__ = ["INITS", "GateSWA", "GateSWAConfig"]
