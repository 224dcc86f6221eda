"""Converted models in vLLM against Hugging Face: run by `make test-vllm`, in an environment of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import SHAPE, build_student, compare, engine

from pl_attnedit import GateSWAConfig, MLAConfig

pytestmark = pytest.mark.vllm
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
pytest.importorskip(
    "vllm", reason="vLLM is not installed: `make test-vllm` runs these tests in an environment of their own"
)

LENGTHS = (5, 60, 300, 1500)
STUDENTS: dict[str, tuple[dict[str, Any], str]] = {
    "sinks_head_gate": ({"S": GateSWAConfig(window=48, sinks=4)}, "SSSF"),
    "no_sinks_no_gate": ({"S": GateSWAConfig(window=48, gate="none")}, "SSSF"),
    "learned_sink_element_gate": ({"S": GateSWAConfig(window=48, gate="element", learned_sink=True)}, "SSFS"),
    "all_windows": ({"S": GateSWAConfig(window=48, sinks=4)}, "S"),
    "several_windows": (
        {
            "S": GateSWAConfig(window=48, sinks=40),  # more than a block
            "T": GateSWAConfig(window=48, gate="none"),
            "U": GateSWAConfig(window=100, sinks=2, learned_sink=True),
            "G": GateSWAConfig(window=None, learned_sink=True),
        },
        "STUG",
    ),
    "mla": ({"M": MLAConfig(40, 16)}, "M"),
    "mla_graded_free": (
        {"M": MLAConfig(24, 8, qk_nope_head_dim=20, v_head_dim=16, q_lora_rank=30, rope_frequencies="graded")},
        "M",
    ),
    "mla_spread_no_norm": ({"M": MLAConfig(40, 8, latent_norm=False, rope_frequencies="spread")}, "MF"),
    "windows_and_mla": ({"S": GateSWAConfig(window=48, sinks=4), "M": MLAConfig(40, 16)}, "SSSM"),
    "windows_mla_full": (
        {"S": GateSWAConfig(window=48, sinks=4), "M": MLAConfig(24, 8), "N": MLAConfig(64, 32)},
        "SMNF",
    ),
}


ROPE: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 512},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 256,
    },
}


def prompts(make_ids: Callable[..., Any], lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [make_ids(1, length, seed=length)[0].tolist() for length in lengths]


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_equals_hugging_faces(
    name: str, make_teacher: Callable[..., Any], make_ids: Callable[..., Any], tmp_path: Path
) -> None:
    student = build_student(make_teacher("llama", **SHAPE), *STUDENTS[name])
    student.save_pretrained(tmp_path)
    with engine(tmp_path) as llm:
        assert compare(llm, student, prompts(make_ids), 16) < 5e-5


@pytest.mark.parametrize("rope", [None, "llama3", "yarn"])
def test_every_family(
    family: str, rope: str | None, make_teacher: Callable[..., Any], make_ids: Callable[..., Any], tmp_path: Path
) -> None:
    if rope is not None and family != "qwen3":
        pytest.skip("scaled RoPE is tried in one family")
    fields = {**SHAPE, **({"rope_parameters": ROPE[rope]} if rope else {})}
    if family == "qwen2":  # has no field of this name: a head is a share of the hidden size
        fields = {"hidden_size": 4 * fields.pop("head_dim"), "max_position_embeddings": 2048}
    if family == "llama":
        fields = {**fields, "attention_bias": True}
    student = build_student(make_teacher(family, **fields), *STUDENTS["windows_mla_full"])
    student.save_pretrained(tmp_path)
    with engine(tmp_path) as llm:
        assert compare(llm, student, prompts(make_ids), 16) < 1e-4
