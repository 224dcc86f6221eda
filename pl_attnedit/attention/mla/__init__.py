"""MLA: the module, and its inits."""

from pl_attnedit.attention.mla.inits import INITS
from pl_attnedit.attention.mla.module import MLA, MLAConfig

__all__ = ["INITS", "MLA", "MLAConfig"]
