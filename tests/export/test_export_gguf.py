"""GGUF files: their fields, tensors and tokenizers; and, where there is a llama.cpp, what it computes from them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pl_attnedit import GateSWAConfig, MLAConfig, edit_model
from pl_attnedit.errors import UserError
from pl_attnedit.export import export
from pl_attnedit.export.gguf_file import CUTS

WINDOWS = GateSWAConfig(window=48)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
SMOLLM = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])


def qwen(words: str) -> Any:
    cut = pre_tokenizers.Split(Regex(words), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def tokenizer_of(cut: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a special token for 0."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = cut
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<end>"], vocab_size=270, initial_alphabet=letters)
    bpe.train_from_iterator(["one two 3"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


def exported(student: PreTrainedModel, folder: Path, cut: Any = None) -> gguf.GGUFReader:
    student.save_pretrained(folder / "s")
    if cut is not None:
        tokenizer_of(cut).save_pretrained(folder / "s")
    return gguf.GGUFReader(export(folder / "s", folder / "out", "gguf") / "model.gguf")


def student_of(teacher: PreTrainedModel, target: Any = WINDOWS, pattern: str = "SF") -> PreTrainedModel:
    torch.manual_seed(1)
    init = "copy" if isinstance(target, GateSWAConfig) else "random"
    student = edit_model(teacher, target, pattern=pattern, init=init).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "self_attn.gate_proj" in name:
                parameter.normal_(std=0.5)
            elif "a_layernorm" in name:  # of latents
                parameter.uniform_(0.5, 2)
    return student


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fields_and_tensors(dtype: torch.dtype, make_teacher: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    student = student_of(make_teacher("qwen3", vocab_size=280)).to(dtype)
    file = exported(student, tmp_path, SMOLLM)
    fields = {name: field.contents() for name, field in file.fields.items()}
    assert fields["step35.attention.sliding_window"] == 48
    assert fields["step35.attention.sliding_window_pattern"] == [True, False, True, False]
    assert fields["step35.rope.dimension_count"] == 2 * fields["step35.rope.dimension_count_swa"] == 32
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["tokenizer.ggml.tokens"][0] == "<end>"
    assert (len(fields["tokenizer.ggml.tokens"]), fields["tokenizer.ggml.eos_token_id"]) == (280, 0)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    assert len(tensors) == len(student.state_dict())
    assert ("blk.0.attn_gate.weight" in tensors, "blk.1.attn_gate.weight" in tensors) == (True, False)
    raw = tensors["blk.0.attn_gate.weight"].data
    found = (
        raw.view(np.float32)
        if dtype == torch.float32
        else (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    )
    assert np.array_equal(found, student.model.layers[0].self_attn.gate_proj.weight.detach().float().numpy())
    assert tensors["blk.0.attn_q_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_fields_and_tensors_of_latents(make_teacher: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    target = MLAConfig(12, 4, qk_nope_head_dim=7, v_head_dim=8, q_lora_rank=9)
    student = student_of(make_teacher("llama", rms_norm_eps=1e-5), target, "S")
    file = exported(student, tmp_path)
    fields = {name.removeprefix("deepseek2."): field.contents() for name, field in file.fields.items()}
    assert fields["leading_dense_block_count"] == fields["block_count"] == 4
    assert (fields["attention.key_length"], fields["attention.value_length"]) == (12 + 4, 12)
    assert (fields["attention.key_length_mla"], fields["attention.value_length_mla"]) == (7 + 4, 8)
    assert (fields["attention.kv_lora_rank"], fields["attention.q_lora_rank"]) == (12, 9)
    assert fields["rope.freq_base"] == pytest.approx(1e5 ** (4 / 8))
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in file.tensors}
    attention = student.model.layers[0].self_attn
    both = torch.cat([tensors["blk.0.attn_k_b.weight"].mT, tensors["blk.0.attn_v_b.weight"]], dim=1)
    assert torch.equal(both.flatten(0, 1), attention.kv_b_proj.weight)
    scaled = tensors["blk.0.attn_kv_a_mqa.weight"] / attention.kv_a_proj_with_mqa.weight
    assert scaled[:, 0].tolist() == [4] * 12 + [1] * 4  # the norm's eps there is the teacher's


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "gpt-2"])
def test_tokenizers_by_how_they_cut(name: str, make_teacher: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    words = next(words for words, known in CUTS.items() if known == name)
    file = exported(student_of(make_teacher("llama", vocab_size=280)), tmp_path, qwen(words) if words else BYTES)
    assert file.fields["tokenizer.ggml.pre"].contents() == name


def test_another_tokenizer_is_refused(make_teacher: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gguf: tokenizer = .* cannot be expressed"):
        exported(student_of(make_teacher("llama", vocab_size=280)), tmp_path, qwen(r"\w+"))
    assert not (tmp_path / "out").exists()


LLAMA = """
import json, sys
from llama_cpp import Llama
asked = json.load(sys.stdin)
settings = {"n_ctx": 2048, "n_batch": 512, "logits_all": True, "verbose": False, "type_k": 0, "type_v": 0}
model, found = Llama(model_path=asked["path"], **settings), []
for prompt in asked["prompts"]:
    model.reset()
    model.eval(prompt)
    logits, ids = model.scores[model.n_tokens - 1].tolist(), []
    for _ in range(64):
        ids.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(ids[-1:])
    found.append([ids, logits])
json.dump(found, sys.stdout)
"""
SHAPE = {"head_dim": 32, "hidden_size": 64, "max_position_embeddings": 2048}
CASES: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "llama": ("llama", SHAPE, WINDOWS, "SSSF"),
    "llama, no gate": ("llama", SHAPE, GateSWAConfig(48, gate="none"), "SSF"),
    "qwen3": ("qwen3", SHAPE, WINDOWS, "SF"),
    "mistral": ("mistral", SHAPE, WINDOWS, "S"),
    "qwen2, biases": ("qwen2", {"hidden_size": 128, "max_position_embeddings": 2048}, WINDOWS, "SSF"),
    "llama, latents": ("llama", {**SHAPE, "rms_norm_eps": 1e-5}, MLAConfig(40, 16), "S"),
    "qwen3, spread": ("qwen3", SHAPE, MLAConfig(40, 16, rope_frequencies="spread"), "S"),
    "mistral, low-rank query, own widths": (
        "mistral",
        SHAPE,
        MLAConfig(24, 10, qk_nope_head_dim=7, v_head_dim=16, q_lora_rank=20),
        "S",
    ),
    "512+64": (
        "qwen3",
        {**SHAPE, "hidden_size": 512, "head_dim": 64, "initializer_range": 0.05},
        MLAConfig(512, 64),
        "S",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(
    case: str, make_teacher: Callable[..., PreTrainedModel], make_ids: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    """By the Python that `PL_ATTNEDIT_LLAMA_CPP` names, where llama-cpp-python is installed (it was 0.3.36)."""
    python = os.environ.get("PL_ATTNEDIT_LLAMA_CPP")
    if python is None:
        pytest.skip("PL_ATTNEDIT_LLAMA_CPP names no Python with llama-cpp-python")
    family, fields, target, pattern = CASES[case]
    student = student_of(make_teacher(family, **fields), target, pattern)
    exported(student, tmp_path)
    prompts = [make_ids(1, length, seed=length) for length in (5, 300, 1500)]
    asked = {"path": str(tmp_path / "out" / "model.gguf"), "prompts": [prompt[0].tolist() for prompt in prompts]}
    done = subprocess.run([python, "-c", LLAMA], input=json.dumps(asked), capture_output=True, text=True, check=True)
    for prompt, (ids, logits) in zip(prompts, json.loads(done.stdout)):
        expected = student(prompt).logits[0, -1]
        assert (torch.tensor(logits) - expected).abs().max() < 1e-3  # of about 20
        assert ids == student.generate(prompt, max_new_tokens=64, do_sample=False)[0, prompt.shape[1] :].tolist()
