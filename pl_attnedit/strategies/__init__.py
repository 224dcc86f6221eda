"""Strategies for several devices: Lightning's own, and how FSDP2 shards teacher and student."""

from pl_attnedit.strategies.fsdp2 import FSDP2Strategy

__all__ = ["FSDP2Strategy"]
