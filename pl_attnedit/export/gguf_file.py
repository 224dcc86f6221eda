"""A converted dense model as one GGUF file for llama.cpp: an architecture of its, its tokenizer, and what all have.

The tokenizer goes into the file: byte-level BPE whose cutting of text into words llama.cpp knows by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoTokenizer, PreTrainedModel

from pl_attnedit.attention import MLAConfig
from pl_attnedit.export import gguf_deepseek2, gguf_step35
from pl_attnedit.export.checks import plan_of, refuse_unless
from pl_attnedit.export.gguf_step35 import FORMAT

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}
# how words are cut, the last part being bytes: the regular expression or the rule -> llama.cpp's name
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {"Digits": "smollm", _WORDS % "": "qwen2", _WORDS % "{1,3}": "llama-bpe", "": "gpt-2"}


def write(student: PreTrainedModel, folder: Path) -> None:
    """Saves model.gguf into `folder`, in the student's dtype: `deepseek2` where a layer is MLA, else `step35`.

    Raises:
        UserError: for what that architecture cannot express, or a tokenizer that llama.cpp does not know.
    """
    config, plan = student.config, plan_of(student)
    refuse_unless(config.hidden_act == "silu", FORMAT, "hidden_act", config.hidden_act, "it needs a teacher with silu")
    latents = any(isinstance(plan.targets.get(letter), MLAConfig) for letter in plan.letters)
    architecture = gguf_deepseek2 if latents else gguf_step35
    writer = gguf.GGUFWriter(folder / "model.gguf", architecture.ARCHITECTURE)
    weights = architecture.fill(writer, student)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.intermediate_size)  # asked for, and not used
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, Path(student.name_or_path or "."), config.vocab_size)
    names = NAMES | architecture.NAMES
    for name, tensor in weights.items():
        _add_tensor(writer, _name(name, names), tensor.detach())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str, names: dict[str, str]) -> str:
    """llama.cpp's name of a weight."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{names[module]}.{kind}"
    index, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{index}.{names[rest]}.{kind}"


def _add_tensor(writer: Any, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype == torch.bfloat16 and tensor.dim() > 1:
        raw = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:  # llama.cpp wants norms and biases in 32 bits
        writer.add_tensor(name, (tensor if tensor.dim() > 1 else tensor.float()).numpy())


def _add_tokenizer(writer: Any, folder: Path, size: int) -> None:
    if not (folder / "tokenizer_config.json").is_file():  # a model saved from Python may come without
        writer.add_tokenizer_model("none")
        return
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = json.loads(tokenizer.backend_tokenizer.to_str())
    cut = _cut(found)
    refuse_unless(
        cut is not None, FORMAT, "tokenizer", type(tokenizer).__name__, "llama.cpp's name of it is not known here"
    )
    words = {**found["model"]["vocab"], **{added["content"]: added["id"] for added in found["added_tokens"]}}
    special = {added["id"]: added["special"] for added in found["added_tokens"]}
    by_id = {index: word for word, index in words.items()}
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list([by_id.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types(
        [
            kinds[special[index]]
            if index in special
            else (gguf.TokenType.NORMAL if index in by_id else gguf.TokenType.UNUSED)
            for index in range(size)
        ]
    )
    merges = found["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name in ("bos", "eos", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    empty = tokenizer("")["input_ids"]
    writer.add_add_bos_token(bool(empty) and empty[0] == tokenizer.bos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _cut(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for the way in which a tokenizer cuts text; None = it has none, or we do not know it."""
    before = tokenizer["pre_tokenizer"] or {}
    parts = before.get("pretokenizers", [before])
    if tokenizer["model"]["type"] != "BPE" or tokenizer["normalizer"] not in (None, {"type": "NFC"}):
        return None
    if parts[-1].get("type") != "ByteLevel" or parts[-1]["add_prefix_space"] or len(parts) > 2:
        return None
    rules = [part["pattern"].get("Regex") if part["type"] == "Split" else part["type"] for part in parts[:-1]]
    name = CUTS.get("".join(filter(None, rules)))
    return name if parts[-1]["use_regex"] == (name in ("smollm", "gpt-2")) else None
