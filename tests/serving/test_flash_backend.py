"""What runs on NVIDIA GPUs, on the CPU: in Triton's interpreter, with stand-ins for vLLM's CUDA operators."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pl_attnedit.serving.gathered import attend_tiles, tiles_of

pytestmark = pytest.mark.vllm
BLOCK, WINDOW, SCALE = 16, 20, 0.3
COUNTS, LENGTHS = (1, 5, 30, 1, 0), (70, 10, 90, 3, 0)  # in mid-prompt and single tokens; the last one is padding


def test_kept_sinks_and_latents_are_what_plain_pytorch_computes() -> None:
    pytest.importorskip("vllm")
    pytest.importorskip("triton")
    command = [sys.executable, __file__]  # since the interpreter has to be chosen before Triton is imported
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def flash(query: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Any:
    """`flash_attn_varlen_func`, one request after the other."""
    starts, window = options["cu_seqlens_q"], (options.get("window_size") or [len(keys) * BLOCK])[0]
    q_v, out = options.get("q_v"), options.get("out")
    found = query.new_empty(*query.shape[:2], values.shape[-1]) if out is None else out
    sums = query.new_zeros(query.shape[1], len(query))
    for request, length in enumerate(options["seqused_k"].tolist()):
        rows = slice(int(starts[request]), int(starts[request + 1]))
        blocks = options["block_table"][request].long()
        groups = query.shape[1] // keys.shape[2]
        key, value = (x[blocks].flatten(0, 1)[:length].repeat_interleave(groups, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", query[rows], key)
        if q_v is not None:
            scores = scores + torch.einsum("qhd,khd->hqk", q_v[rows], value)
        place = torch.arange(length) - torch.arange(length - (rows.stop - rows.start), length)[:, None]
        scores = (options["softmax_scale"] * scores).masked_fill((place > 0) | (place < -window), float("-inf"))
        sums[:, rows] = scores.logsumexp(-1)
        found[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
    return (found, sums) if options.get("return_softmax_lse") else found


def batch() -> tuple[Tensor, Any]:
    """A table of blocks, and vLLM's metadata of a step."""
    counts, lengths = torch.tensor(COUNTS), torch.tensor(LENGTHS)
    starts = F.pad(counts.cumsum(0), (1, 0))
    table = torch.randperm(len(LENGTHS) * 6).view(len(LENGTHS), 6)
    slots = [
        int(table[request, place // BLOCK]) * BLOCK + place % BLOCK
        for request, (count, length) in enumerate(zip(COUNTS, LENGTHS))
        for place in range(length - count, length)
    ]
    common = SimpleNamespace(
        num_actual_tokens=int(counts.sum()),
        max_query_len=max(COUNTS),
        max_seq_len=max(LENGTHS),
        query_start_loc=starts,
        seq_lens=lengths,
        block_table_tensor=table,
        slot_mapping=torch.tensor(slots),
    )
    return table, SimpleNamespace(common=common, splits=0)


def compare(kind: str, width: int, rank: int = 0, kept: int = 0, learned: bool = False) -> None:
    from pl_attnedit.serving import flash_backend

    torch.manual_seed(0)
    heads, key_heads, (table, metadata) = 6, 1 if rank else 2, batch()
    common = metadata.common
    tokens, cached = common.num_actual_tokens, width if rank else 2 * width
    cache = torch.randn(table.numel(), key_heads, BLOCK, cached)
    query, new = torch.randn(tokens, heads, width), torch.randn(tokens, key_heads, cached)
    logits = torch.randn(heads) if learned else None
    expected_cache = cache.clone()
    expected_cache[common.slot_mapping // BLOCK, :, common.slot_mapping % BLOCK] = new
    layer = SimpleNamespace(_k_scale=None, _v_scale=None, sliding_window=WINDOW, kept=kept)
    impl = getattr(flash_backend, kind)(heads, width, SCALE, key_heads, None, WINDOW, "auto", sinks=logits)
    key, value = (new, None) if rank else new.split(width, dim=-1)
    found = torch.empty(tokens + 3, heads, rank or width).fill_(7)  # rows of padding stay
    impl.forward(layer, F.pad(query, (0, 0, 0, 0, 0, 3)), key, value, cache, metadata, found)
    assert torch.equal(cache, expected_cache)
    window = None if rank else WINDOW
    tiles = tiles_of(common.query_start_loc, common.seq_lens, table, BLOCK, cached, window, kept)
    expected = torch.empty_like(found).fill_(7)
    attend_tiles(query, cache, tiles, SCALE, expected, logits)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def main() -> None:
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends import fa_utils

    from pl_attnedit.serving import backends

    def write_keys(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *_: Any) -> None:
        keys[slots // BLOCK, slots % BLOCK], values[slots // BLOCK, slots % BLOCK] = key, value

    def write_latents(latent: Tensor, key_rope: Tensor, cache: Tensor, slots: Tensor, *_: Any) -> None:
        cache[slots // BLOCK, slots % BLOCK] = torch.cat([latent, key_rope], dim=-1)

    fakes: Any = {"reshape_and_cache_flash": write_keys, "concat_and_cache_mla": write_latents}
    for name, fake in fakes.items():
        setattr(ops, name, fake)
    fa_utils.flash_attn_varlen_func = flash  # type: ignore[attr-defined]
    for kept, learned in ((4, False), (4, True), (40, True)):
        compare("SinksImpl", 24, kept=kept, learned=learned)
    for width, rank in ((128, 104), (320, 256)):
        compare("LatentImpl", width, rank)

    def chosen(width: int, rank: int) -> str:
        return backends.latent_backend(width, rank).__name__

    assert (chosen(128, 104), backends.sinks_backend().__name__) == ("GatheredLatentBackend", "GatheredBackend")
    backends.flash_attention = lambda: True
    assert backends.sinks_backend().__name__ == "SinksBackend"
    assert {chosen(128, 104), chosen(576, 512), chosen(320, 256)} == {"LatentBackend"}
    assert {chosen(46, 36), chosen(640, 512), chosen(640, 576)} == {"GatheredLatentBackend"}


if __name__ == "__main__":
    main()
