"""Strategies for several devices and for Ascend NPUs; importing this makes them known to Lightning."""

from pl_attnedit.strategies.fsdp2 import FSDP2Strategy
from pl_attnedit.strategies.npu_accelerator import NPUAccelerator
from pl_attnedit.strategies.npu_strategies import NPUDDPStrategy, NPUFSDPStrategy, NPUSingleStrategy, with_npu

__all__ = [
    "FSDP2Strategy",
    "NPUAccelerator",
    "NPUDDPStrategy",
    "NPUFSDPStrategy",
    "NPUSingleStrategy",
    "with_npu",
]
