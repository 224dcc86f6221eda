"""Stock checkpoints of `pl-attnedit export` in a real vLLM, by vLLM's own classes: run by `make test-vllm`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import SHAPE, build_student, compare, engine

from pl_attnedit import GateSWAConfig, MLAConfig
from pl_attnedit.export import export

pytestmark = pytest.mark.vllm
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
pytest.importorskip("vllm", reason="vLLM is not installed: see `make test-vllm`")

# vLLM's C++ operator for RoPE is wrong for DeepSeek's queries of three dimensions on a CPU
DEEPSEEK = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
CASES: dict[str, tuple[str, str, Any, str, dict[str, Any]]] = {
    "granite_swa": ("granite_swa", "llama", GateSWAConfig(window=48, gate="none", learned_sink=True), "SSF", {}),
    "granite_swa, qwen2": ("granite_swa", "qwen2", GateSWAConfig(window=48, gate="none"), "SSF", {}),
    "step3p5": ("step3p5", "qwen3", GateSWAConfig(window=48), "SSF", {}),
    "step3p5, gateless": ("step3p5", "qwen3", GateSWAConfig(window=48, gate="none"), "SSF", {}),
    "deepseek_v3": ("deepseek_v3", "qwen3", MLAConfig(512, 64), "M", DEEPSEEK),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stock_checkpoint_equals_the_student(
    case: str, make_teacher: Callable[..., Any], make_ids: Callable[..., Any], tmp_path: Path
) -> None:
    format, family, target, pattern, options = CASES[case]
    fields = {"hidden_size": 128, "max_position_embeddings": 2048} if family == "qwen2" else SHAPE
    if format == "deepseek_v3":
        fields = {**SHAPE, "hidden_size": 512, "head_dim": 64, "num_hidden_layers": 2, "initializer_range": 0.05}
    student = build_student(make_teacher(family, **fields), {pattern[0]: target}, pattern)
    student.save_pretrained(tmp_path / "student")
    out = export(tmp_path / "student", tmp_path / "out", format)
    with engine(out, **options) as llm:
        lengths = (5, 300, 1500)
        assert compare(llm, student, [make_ids(1, length, seed=length)[0].tolist() for length in lengths], 64) < 1e-4
