"""Strategies for several devices: Lightning's own, how FSDP2 shards teacher and student, and layers dealt out."""

from pl_attnedit.strategies.fsdp2 import FSDP2Strategy
from pl_attnedit.strategies.layers import LayersStrategy

__all__ = ["FSDP2Strategy", "LayersStrategy"]
