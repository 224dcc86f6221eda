"""GateSWA: the module, and the rolling cache of its window layers."""

from pl_attnedit.attention.gate_swa.module import GateSWA, GateSWAConfig

__all__ = ["GateSWA", "GateSWAConfig"]
