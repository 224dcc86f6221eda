"""Which attention backend computes what none of vLLM's own does: kept sinks, and latents of any width."""

from __future__ import annotations

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

from pl_attnedit.serving.paged_backend import GatheredBackend, GatheredLatentBackend


def flash_attention() -> bool:
    """Whether FlashAttention 3 computes: an NVIDIA GPU of the Hopper kind, and weights in 16 bits."""
    found = current_platform.is_cuda() and get_flash_attn_version() == 3
    return found and torch.get_default_dtype() in (torch.float16, torch.bfloat16)


def sinks_backend() -> type[GatheredBackend]:
    """What computes a window with kept sinks."""
    if not flash_attention():
        return GatheredBackend
    from pl_attnedit.serving.flash_backend import SinksBackend  # Triton and CUDA operators

    return SinksBackend


def latent_backend(width: int, rank: int) -> type[GatheredBackend]:
    """What computes attention to latents of `width` values, of which the first `rank` are the value."""
    # of FlashAttention: keys of 256 values, or 64 with values of up to 512 that are keys too; each in steps of 16 bytes
    fits = width <= 256 or (width - rank <= 64 and rank <= 512 and rank % 8 == 0)
    if not (flash_attention() and fits and width % 8 == 0):
        return GatheredLatentBackend
    from pl_attnedit.serving.flash_backend import LatentBackend

    return LatentBackend
