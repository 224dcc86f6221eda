"""`bench init`: the table of untrained students, on a tiny teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pl_attnedit import MLAConfig, UserError, edit_model
from pl_attnedit.distillation.losses import kl_divergence
from pl_attnedit.eval.bench.init import ROWS, Row, bench_init, init_table, last_hidden, measure, sequences
from pl_attnedit.modeling.calibration import collect_statistics


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
    with pytest.raises(UserError, match=r"heldout = .*: holds 0 new tokens"):  # all of it is calibration text
        bench_init(teacher, tokenizer, rows=["96+32, plain"], **options)
    pieces = {"calibration": f"lookups:{text}", "calibration_sequences": 1}
    with pytest.raises(UserError, match=r"heldout = .*: holds 0 new tokens"):  # or has pieces of it
        bench_init(teacher, tokenizer, rows=["96+32, plain"], **options | pieces)
    with pytest.raises(UserError, match=r"heldout = 'lookups:.*': must be text as it is, lookups: is for training"):
        bench_init(teacher, tokenizer, rows=["gate_swa"], **options | {"heldout": f"lookups:{text}"})
    with pytest.raises(UserError, match="rows"):
        bench_init(teacher, tokenizer, rows=["nothing like it"], **options)


def test_statistics_of_a_hybrid_are_of_its_full_layers(
    make_teacher: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, text: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(Path(text).read_text().upper())
    options = {"calibration": text, "heldout": str(other), "seq_len": 40}
    options |= {"calibration_sequences": 1, "heldout_sequences": 1}
    teacher = make_teacher("lfm2_moe", vocab_size=len(tokenizer))
    [row] = bench_init(teacher, tokenizer, rows=["96+32, plain"], **options)["rows"]
    assert "kv_lora_rank" in row["does_not_fit"]


@torch.no_grad()
@pytest.mark.parametrize("init", ["calibrated", "plain_svd"])
def test_a_row_measures_what_edit_model_makes(make_teacher: Callable[..., PreTrainedModel], init: str) -> None:
    teacher, (text, asked) = make_teacher("llama"), torch.randint(1, 64, (2, 4, 32))
    target = MLAConfig(kv_lora_rank=8, qk_rope_head_dim=4, latent_norm=False)
    statistics = collect_statistics(teacher, list(range(4)), [text])
    found = measure(Row("small", target, init), teacher, statistics, asked, last_hidden(teacher, asked))
    student = edit_model(teacher, target, init=init, calibration=[text]).eval()
    expected = kl_divergence(student(asked).logits, teacher(asked).logits).mean().item()
    assert found["kl"] == pytest.approx(expected, rel=1e-4)


def test_the_table_has_every_row_of_the_comparison() -> None:
    cached = {
        row.target.kv_lora_rank + row.target.qk_rope_head_dim for row in ROWS if isinstance(row.target, MLAConfig)
    }
    assert cached == {128, 192}
    assert {row.init for row in ROWS} == {"calibrated", "plain_svd", "random"}
