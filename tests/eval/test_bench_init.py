"""`bench init`: the table of untrained students, on a tiny teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pl_attnedit import MLAConfig, UserError, edit_model
from pl_attnedit.eval.bench.init import ROWS, bench_init, init_table, sequences
from pl_attnedit.eval.bench.plain_svd import plain_svd
from pl_attnedit.modeling import edited_attention
from pl_attnedit.modeling.calibrate import collect_statistics


@pytest.fixture
def text(tmp_path: Path, documents: list[str]) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return str(path)


def test_sequences_are_the_documents_in_file_order_joined_by_eos(
    text: str, documents: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = [token for d in documents for token in [*tokenizer(d)["input_ids"], tokenizer.eos_token_id]]
    found = sequences("heldout", text, tokenizer, 3, 40)
    assert found.flatten().tolist() == expected[:120]
    with pytest.raises(UserError, match=r"calibration = .*100000"):
        sequences("calibration", text, tokenizer, 1000, 100)


def test_rows_that_fit_are_measured_and_the_others_named(
    make_teacher: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    teacher = make_teacher("llama", vocab_size=len(tokenizer))
    options = {"calibration": text, "heldout": text, "seq_len": 80, "calibration_sequences": 2, "heldout_sequences": 2}
    result = json.loads(json.dumps(bench_init(teacher, tokenizer, rows=["gate_swa", "mla 96+32, random"], **options)))
    swa, without_sinks, mla = sorted(result["rows"], key=lambda row: ("mla" in row["name"], "sinks" not in row["name"]))
    assert 0 < swa["kl"] < without_sinks["kl"] + 0.5
    assert 0 < swa["top1"] <= 1
    assert swa["kv_budget"] == pytest.approx(1 / 4 + 3 / 4 * 67 / 32768)
    assert "kv_lora_rank" in mla["does_not_fit"]
    assert "gate_swa 64, 4 sinks, SSSF" in init_table(result)
    with pytest.raises(UserError, match="rows"):
        bench_init(teacher, tokenizer, rows=["nothing like it"], **options)


def test_the_table_has_every_row_of_the_comparison() -> None:
    cached = {
        row.target.kv_lora_rank + row.target.qk_rope_head_dim for row in ROWS if isinstance(row.target, MLAConfig)
    }
    assert cached == {128, 192}
    assert {row.init for row in ROWS} == {"calibrated", "plain svd", "random"}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_plain_svd_is_exact_where_nothing_is_lost(make_teacher: Callable[..., PreTrainedModel], family: str) -> None:
    """One key head, all of whose pairs rotate, and a latent as wide as the values."""
    teacher = make_teacher(family, num_key_value_heads=1)
    target = MLAConfig(kv_lora_rank=8, qk_rope_head_dim=8, latent_norm=False)
    student = edit_model(teacher, target, init="random").eval()
    text = torch.randint(1, 64, (4, 32))
    statistics = collect_statistics(teacher, list(range(4)), [text])
    for index, module in edited_attention(student).items():
        plain_svd(module, teacher.model.layers[index].self_attn, statistics[index])
    assert (student(text).logits - teacher(text).logits).abs().max() < 1e-4
