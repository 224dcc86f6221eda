"""Speed and memory of teacher and student: what the steps compute, whose bytes are counted, and the rows."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_stages import teacher_folder, tiny_tokenizer  # noqa: F401
from transformers import DynamicCache, PreTrainedModel

from pl_attnedit import GatedDeltaNetConfig, GateSWAConfig, MLAConfig, UserError, edit_model
from pl_attnedit.cli import main
from pl_attnedit.eval import decoding
from pl_attnedit.eval.bench.decode import decode_table, student_name
from pl_attnedit.eval.decoding import Decoder, hold
from pl_attnedit.eval.efficiency import _AliveBytes, decode_peak, largest_batch, measure_efficiency, weights_bytes
from pl_attnedit.modeling.kv import cache_bytes, promised_bytes
from pl_attnedit.modeling.plan import EditPlan
from pl_attnedit.teachers.sources.resolve import load_teacher

Teachers = Callable[..., PreTrainedModel]
TARGETS = {
    "S": GateSWAConfig(window=8, sinks=2),
    "M": MLAConfig(8, 4, rope_frequencies="spread"),
    "D": GatedDeltaNetConfig(),
}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["llama", "qwen3"])
def pair(request: pytest.FixtureRequest, make_teacher: Teachers) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A teacher, and a student of windows, MLA and full layers."""
    teacher = make_teacher(request.param)
    return teacher, edit_model(teacher, TARGETS, pattern="SMFD", init="random").eval()


@torch.no_grad()
@pytest.mark.parametrize("context", [5, 30])
def test_a_held_step_computes_what_a_growing_cache_does(
    pair: tuple[PreTrainedModel, PreTrainedModel],
    make_teacher: Teachers,
    make_ids: Callable[..., torch.Tensor],
    context: int,
) -> None:
    for model in (*pair, make_teacher("mistral", sliding_window=12), make_teacher("gemma3_text")):
        ids, new = make_ids(2, context), make_ids(3, 1, seed=1)
        growing, held = DynamicCache(config=model.config), DynamicCache(config=model.config)
        for cache in (growing, held):
            model(input_ids=ids, past_key_values=cache)
        growing.batch_select_indices(torch.zeros(3, dtype=torch.long))
        decoder = Decoder(model, held, batch=3)
        for _ in range(3):  # as often as one likes: nothing grows
            decoder.token.copy_(new)
            decoder()
        expected = model(input_ids=new, past_key_values=growing).logits
        torch.testing.assert_close(decoder.logits, expected, atol=1e-5, rtol=2e-5)
        assert torch.equal(decoder.token, expected.argmax(-1))
        assert held.get_seq_length() == context


def test_rows_of_all_models_in_turn(
    pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = edit_model(pair[0], TARGETS, pattern="S", init="random").eval()
    models = {"teacher": pair[0], "student": pair[1], "other": other}
    order: list[str] = []
    for name, model in models.items():
        forward = type(model).forward

        def noted(*args: Any, name: str = name, forward: Any = forward, **kwargs: Any) -> Any:
            order.append(name)
            return forward(models[name], *args, **kwargs)

        monkeypatch.setattr(model, "forward", noted)
    rows = measure_efficiency(models, contexts=[16], batches=[1, 3], new_tokens=2, repeats=3, prefill_tokens=32)
    assert json.loads(json.dumps(rows)) == rows
    assert [(row["model"], row["batch"]) for row in rows] == [(name, batch) for batch in (1, 3) for name in models]
    turns = [name for name, before in zip(order, [None, *order]) if name != before]
    assert turns == [*models] * 8  # two batches, a warm-up and three repeats
    for row in rows:
        assert row["cache_bytes_per_token"] == sum(promised_bytes(models[row["model"]], 16)) / 16
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "first_token_s"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
        product = row["first_token_s"]["median"] * row["prefill_tokens_per_s"]["median"]
        assert product == pytest.approx(16 * row["batch"])  # medians of three values and of their reciprocals
        assert row["peak_bytes"] is None
        assert row["decode"] == "eager"


def test_bytes_alive_are_those_of_results_until_they_are_freed() -> None:
    start = torch.zeros(256)
    with _AliveBytes() as alive:
        kept = start + 1
        for _ in range(3):
            passing = kept * 2  # one at a time is replaced, so two are alive for a moment
        del passing
        start.view(16, 16).mul_(2)  # nothing new
        assert alive.now == 1024
    assert alive.peak == 3 * 1024
    assert kept.sum() == 256


def test_largest_batch_is_the_largest_that_fits(make_teacher: Teachers) -> None:
    teacher = make_teacher("qwen3")
    student = edit_model(teacher, TARGETS, pattern="SMMS", init="random").eval()
    found = {}
    for name, model in {"teacher": teacher, "student": student}.items():
        budget = weights_bytes(model) + 3_000_000
        found[name] = row = largest_batch(model, 200, budget)
        assert not row["run"]
        assert row["peak_bytes"] <= budget
        with torch.device("meta"):
            shadow = type(model)(model.config).eval()
        assert decode_peak(shadow, 200, row["batch"]) == row["peak_bytes"]
        assert decode_peak(shadow, 200, row["batch"] + 1) > budget
        caches = row["batch"] * sum(promised_bytes(model, 201))
        assert caches < row["peak_bytes"] - weights_bytes(model) < 1.3 * caches + 500_000
        assert largest_batch(model, 200, weights_bytes(model))["batch"] == 0
    assert found["student"]["batch"] > 3 * found["teacher"]["batch"]


@pytest.mark.parametrize("most", [0, 1, 2, 333])
def test_a_batch_for_which_memory_runs_out_does_not_fit(
    make_teacher: Teachers, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    attempts: list[weakref.ref[DynamicCache]] = []

    def scarce(cache: DynamicCache, batch: int) -> None:
        assert not any(attempt() for attempt in attempts)  # what an attempt allocated is freed before the next
        attempts.append(weakref.ref(cache))
        hold(cache, batch)
        if batch > most:
            raise torch.OutOfMemoryError("no more")

    student = edit_model(make_teacher("llama"), TARGETS, pattern="SMF", init="random").eval()
    enough = largest_batch(student, 64, 4 * 10**6)["batch"]
    assert 100 < enough < 333
    monkeypatch.setattr(decoding, "hold", scarce)
    for budget in (4 * 10**6, 10**10):
        found = largest_batch(student, 64, budget)
        assert found["batch"] == (min(most, enough) if budget < 10**10 else most)
        assert (found["peak_bytes"] is None) == (most == 0)
    assert len(attempts) < 50
    assert json.loads(json.dumps(found)) == found


def test_a_held_cache_is_allocated_once(make_teacher: Teachers, make_ids: Callable[..., torch.Tensor]) -> None:
    teacher = make_teacher("llama")
    student = edit_model(teacher, TARGETS, pattern="SMF", init="random").eval()
    cache = DynamicCache(config=student.config)
    with torch.no_grad():
        student(input_ids=make_ids(1, 40), past_key_values=cache)
    with _AliveBytes() as alive:
        hold(cache, 64)
    held = cache_bytes(cache)
    assert held < alive.peak < held * (1 + 6 / 64)  # beside it, little more than a sequence's layers on their way


def test_the_meta_device_counts_what_a_step_allocates(make_teacher: Teachers) -> None:
    """The activations that are added up are those of the same step with content, kernel for kernel."""
    teacher = make_teacher("llama")
    student = edit_model(teacher, TARGETS, pattern="SMF", init="random").eval()
    cache = DynamicCache(config=student.config)
    with torch.no_grad():
        student(input_ids=torch.ones(1, 40, dtype=torch.long), past_key_values=cache)
    decoder = Decoder(student, cache, batch=16)
    with _AliveBytes() as alive:
        decoder.step()
    with torch.device("meta"):
        shadow = type(student)(student.config).eval()
    counted = decode_peak(shadow, 40, 16) - weights_bytes(student) - cache_bytes(cache)
    assert counted == pytest.approx(alive.peak, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": [512]}, r"contexts = 512: must be below the model's limit of 512"),
        ({"contexts": [0]}, "contexts = 0"),
        ({"batches": [4, 0]}, "batches = 0"),
        ({"repeats": 0}, "repeats = 0"),
    ],
)
def test_mistakes(make_teacher: Teachers, changes: dict[str, Any], message: str) -> None:
    teacher = make_teacher("llama")
    with pytest.raises(UserError, match=message):
        measure_efficiency({"teacher": teacher}, **{"contexts": [8], "batches": [1], **changes})


def test_a_batch_that_the_device_does_not_hold(make_teacher: Teachers, monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(cache: DynamicCache, batch: int) -> None:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(decoding, "hold", scarce)
    teacher = make_teacher("llama")
    with pytest.raises(UserError, match=r"batches = 3: of 8 tokens each: mla 8\+4 runs out of the device's memory"):
        measure_efficiency({"mla 8+4": teacher}, contexts=[8], batches=[3])


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--layers", "2", "--contexts", "16", "--batches", "2", "--new-tokens", "1", "--repeats", "1"]
    arguments += ["--target", "{type: gate_swa, window: 4}", "--pattern", "S"]
    assert main(["bench", "decode", *arguments, "--budget-gb", "0.3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in result["efficiency"]] == ["teacher", "gate_swa 4"]
    (ratio,) = result["ratios"]
    assert ratio["cache_bytes_per_token"] == 3 / 16
    assert ratio["decode_tokens_per_s"] > 0
    teacher, student = result["largest_batch"]
    assert teacher["batch"] < student["batch"]
    assert main(["bench", "decode", *arguments]) == 0
    out = capsys.readouterr().out
    assert "gate_swa 4 / teacher" in out
    assert "decode: eager" in out


def test_the_command_with_several_students(
    teacher_folder: Callable[..., str],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher, _ = load_teacher(teacher_folder())
    for run in ("a", "b"):
        edit_model(teacher, TARGETS, pattern="SM", init="random").save_pretrained(tmp_path / run / "student")
    saved = [str(tmp_path / run / "student") for run in ("a", "b", "a")]
    sizes = ["--teacher", teacher_folder(), "--contexts", "8", "24", "--batches", "2", "--new-tokens", "1"]
    sizes += ["--repeats", "1", "--budget-gb", "0.001"]
    targets = ["--target", "{type: mla, kv_lora_rank: 8, qk_rope_head_dim: 4}", "{type: gate_swa, window: 4, sinks: 2}"]
    arguments = ["bench", "decode", *sizes, "--student", *saved, *targets, "--pattern", "S", "SF"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    students = ["a", "b", "a (2)", "mla 8+4", "gate_swa 4, sinks 2, SF"]
    for name, models in {"efficiency": ["teacher", *students], "ratios": students}.items():
        expected = [(model, context) for context in (8, 24) for model in models]
        assert [(row["model"], row["context"]) for row in result[name]] == expected
    cached = {(row["model"], row["context"]): row["cache_bytes_per_token"] for row in result["efficiency"]}
    for row in result["ratios"]:
        place = row["context"]
        assert row["cache_bytes_per_token"] == cached[row["model"], place] / cached["teacher", place]
    assert [row["model"] for row in result["largest_batch"]] == 2 * ["teacher", *students]
    table = decode_table(result)
    of_teacher, of_a = (row["batch"] for row in result["largest_batch"][6:8])
    assert f"largest batch in 0.001 GB at 24 tokens: teacher: {of_teacher}; a: {of_a}; b: " in table
    assert table.count("gate_swa 4, sinks 2, SF / teacher") == 2

    assert main([*arguments, "F", "--json"]) != 0
    assert "--pattern = ['S', 'SF', 'F']: must be one for all" in capsys.readouterr().err


def test_names_of_students() -> None:
    plans = {
        "mla 8+4, rope_frequencies spread": EditPlan("MM", {"M": TARGETS["M"]}),
        "gated_deltanet": EditPlan("DD", {"D": TARGETS["D"]}),
        "gate_swa 8, sinks 2, SSSF": EditPlan("SSSFSSSF", {"S": TARGETS["S"]}),
        "S = gate_swa 8, sinks 2, M = mla 8+4, rope_frequencies spread, SMF": EditPlan("SMF", TARGETS),
    }
    assert [student_name(plan) for plan in plans.values()] == list(plans)


@gpu
@torch.no_grad()
def test_a_graph_computes_what_the_step_does(
    pair: tuple[PreTrainedModel, PreTrainedModel], make_ids: Callable[..., torch.Tensor]
) -> None:
    for model in pair:
        model.to("cuda")
        cache = DynamicCache(config=model.config)
        model(input_ids=make_ids(1, 30).cuda(), past_key_values=cache)
        decoder = Decoder(model, cache, batch=3)
        given = make_ids(3, 1, seed=1).cuda()
        decoder.token.copy_(given)
        decoder.step()
        expected = decoder.logits.clone()
        decoder.capture()
        decoder.token.copy_(given)
        decoder()
        torch.testing.assert_close(decoder.logits, expected, atol=1e-4, rtol=1e-4)


@gpu
def test_largest_batch_is_run_on_the_gpu(make_teacher: Teachers) -> None:
    teacher = make_teacher("llama").to("cuda")
    row = largest_batch(teacher, 200, weights_bytes(teacher) + 30_000_000)
    assert row["run"]
    assert row["batch"] > 10
    assert decode_peak(teacher, 200, row["batch"] + 1) > row["budget_bytes"]
    (of_teacher,) = measure_efficiency({"teacher": teacher}, contexts=[64], batches=[4], new_tokens=4, repeats=2)
    assert of_teacher["decode"] == "cuda graph"
    assert of_teacher["peak_bytes"] > weights_bytes(teacher)
