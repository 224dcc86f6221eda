"""`torch_npu.npu_fusion_attention` in plain PyTorch, as its documentation has it, for what this package asks of it.

Source: Ascend op-plugin, docs/context/torch_npu-npu_fusion_attention.md; `torch_npu/_op_plugin_docs.py` has the same text.
The signature is that of torch_npu 2.13 (`npu_native_functions_by_codegen.yaml`). What the documentation forbids raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

EVERYTHING = 2147483647


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: None = None,
    padding_mask: None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = EVERYTHING,
    next_tockens: int = EVERYTHING,
    inner_precise: int = 0,
    prefix: None = None,
    actual_seq_qlen: None = None,
    actual_seq_kvlen: None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: None = None,
    dropout_mask: None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    assert input_layout == "BNSD", "the stand-in knows no other layout"
    assert keep_prob == 1.0, "nor dropout"
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    assert head_num == heads, "head_num is the number of query heads"
    assert query.dtype == key.dtype == value.dtype, "one dtype for query, key and value"
    assert key.shape == value.shape, "key and value have one shape"
    assert key.shape[0] == batch, "one batch size"
    assert key.shape[3] == width, "query and key are equally wide"
    assert 1 <= width <= 768
    assert 1 <= heads <= 256
    assert heads % key.shape[1] == 0, "the number of key heads divides that of query heads"
    hidden = _hidden(atten_mask, sparse_mode, pre_tockens, next_tockens, batch, heads, queries, keys)
    groups = heads // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = scores.float().softmax(-1).to(value.dtype)
    softmax = query.new_zeros(batch, heads, queries, 8, dtype=torch.float32)
    return weights @ value.repeat_interleave(groups, 1), softmax, softmax, query.new_empty(0), 0, 0, 0


def _hidden(
    mask: Tensor | None, mode: int, before: int, behind: int, batch: int, heads: int, queries: int, keys: int
) -> Tensor | None:
    """What the call hides, True = hidden, (queries, keys) or with batch and heads before it."""
    if mask is None:
        return None  # sparse_mode, pre_tockens and next_tockens are not looked at
    assert mask.dtype in (torch.bool, torch.uint8)
    mask = mask.bool()
    shape = (queries, keys)
    query_at, key_at = torch.arange(queries, device=mask.device)[:, None], torch.arange(keys, device=mask.device)
    if mode in (0, 1):
        shapes = [shape, (1, 1, *shape), (batch, 1, *shape), (batch, heads, *shape)]
        assert mask.shape in shapes, f"a whole mask is one of {shapes}, not {tuple(mask.shape)}"
        if mode == 0 and (before, behind) != (EVERYTHING, EVERYTHING):
            raise AssertionError("the stand-in's mode 0 takes the mask alone")
        return mask
    assert mode in (2, 3, 4), f"the stand-in knows no sparse_mode {mode}"
    assert mask.shape == (2048, 2048), "modes 2, 3 and 4 take the triangle of 2048 x 2048"
    assert torch.equal(mask, torch.ones_like(mask).triu(1)), "which hides what comes later"
    if mode == 2:
        return key_at > query_at
    at = query_at + keys - queries  # modes 3 and 4 count from the lower right corner
    if mode == 3:
        return key_at > at
    assert before + behind >= 0, "pre_tockens and next_tockens must meet"
    return (key_at > at + behind) | (key_at < at - before)
