"""Text for training and evaluation: sources, packing, the held-out split and exact resume."""

from __future__ import annotations

from pl_attnedit.data.datamodule import TextDataModule
from pl_attnedit.data.phases import Phase
from pl_attnedit.data.sources import Source

__all__ = ["Phase", "Source", "TextDataModule"]
