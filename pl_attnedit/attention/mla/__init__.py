"""MLA: the module, and its inits from the teacher."""

from pl_attnedit.attention.mla.module import MLA, MLAConfig

__all__ = ["MLA", "MLAConfig"]
