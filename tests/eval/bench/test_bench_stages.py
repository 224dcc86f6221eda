from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pl_attnedit import GatedDeltaNetConfig, GateSWAConfig, MLAConfig, edit_model
from pl_attnedit.cli import main
from pl_attnedit.eval.bench.flops import score_flops, step_flops
from pl_attnedit.eval.bench.memory import kept_values
from pl_attnedit.eval.bench.stages import bench_step, step_table
from pl_attnedit.eval.bench.step import StepBench

KEYS = {"step_ms", "bound_ms", "step_over_bound", "tokens_per_s", "flop_utilisation", "peak_bytes"}
LATENT = MLAConfig(kv_lora_rank=8, qk_rope_head_dim=4)


@pytest.mark.parametrize(
    "options",
    [
        {"stage": "stage1", "targets": LATENT},
        {"stage": "stage2", "targets": GateSWAConfig(window=8, sinks=1)},
        {"stage": "stage2", "targets": LATENT, "train": "all", "activation_checkpointing": True},
    ],
)
def test_ours_bound_and_naive_are_measured_in_one_run(
    make_teacher: Callable[..., Any], options: dict[str, Any]
) -> None:
    result = bench_step(
        make_teacher("qwen3"), StepBench(batch=2, seq=32, repeats=3, warmup=1, compiled=False, **options)
    )
    assert result.keys() >= KEYS
    assert result["variants"].keys() == {"ours", "bound_eager", "naive"}
    ours = result["variants"]["ours"]
    assert ours["min_ms"] <= ours["median_ms"] == result["step_ms"] <= ours["max_ms"]
    assert result["step_over_bound"] == pytest.approx(result["step_ms"] / result["bound_ms"])
    assert result["tokens_per_s"] == pytest.approx(2 * 32 / result["step_ms"] * 1e3)
    assert result["seconds_to_first_step"] > 0
    json.dumps(result)
    assert "tokens/s" in step_table(result)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_layers_of_a_kind_share_their_graphs(
    make_teacher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Neither a training step nor its bound takes longer to compile for more layers."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    graphs = []
    for layers in (2, 6):
        torch._dynamo.reset()
        counter.clear()
        teacher = make_teacher("qwen3_moe", num_hidden_layers=layers)
        options = StepBench(stage, LATENT, batch=1, seq=16, repeats=1, warmup=1, compiled=True, beside=("bound",))
        bench_step(teacher, options)
        graphs.append((counter.frame_count, counter.op_count))
    assert graphs[0] == graphs[1] > (0, 0)
    torch._dynamo.reset()


@pytest.mark.parametrize(("stage", "block_loss"), [("stage1", False), ("stage1", True), ("stage2", False)])
def test_flops_are_those_of_the_matrix_products(make_teacher: Callable[..., Any], stage: str, block_loss: bool) -> None:
    """Against what torch counts, where attention to a single token leaves nothing but the linear layers."""
    from torch.utils.flop_counter import FlopCounterMode

    teacher = make_teacher("llama").requires_grad_(False)
    student = edit_model(teacher, LATENT, init="random", pattern="S")
    ids = torch.randint(300, (1, 16))
    hidden = torch.randn(1, 16, teacher.config.hidden_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for layer in teacher.model.layers:
            layer.mlp(hidden)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                linear = getattr(layer.self_attn, name)
                linear(torch.randn(16, linear.in_features))
    forward = counter.get_total_flops() / 16
    if stage == "stage1" and not block_loss:  # ends with the last layer's attention
        forward -= sum(2 * p.numel() for p in teacher.model.layers[-1].mlp.parameters())
    options: dict[str, Any] = {"stage": stage, "trained": "attention", "block_loss": block_loss}
    ours = step_flops(teacher, student, seq_len=ids.shape[1], **options)
    new = sum(2 * p.numel() for layer in student.model.layers for p in layer.self_attn.parameters() if p.dim() == 2)
    mlp = sum(2 * p.numel() for layer in student.model.layers for p in layer.mlp.parameters())
    head = 2 * teacher.lm_head.weight.numel()
    attention = student.model.layers[0].self_attn
    scores = len(student.model.layers) * 2 * 8.5
    teacher_scores = scores * teacher.config.num_attention_heads * 2 * attention.spec.head_dim
    student_scores = scores * attention.num_heads * (attention.nope_dim + attention.rope_dim + attention.v_dim)
    no_input = sum(
        2 * linear.weight.numel()
        for layer in student.model.layers
        for linear in (layer.self_attn.q_proj, layer.self_attn.kv_a_proj_with_mqa)
    )
    expected = forward + teacher_scores + 3 * new + 3 * student_scores
    expected += -no_input if stage == "stage1" else 2 * mlp + 3 * head
    expected += 2 * mlp if block_loss else 0
    assert ours == pytest.approx(expected)


def test_a_window_counts_the_keys_that_are_seen(make_teacher: Callable[..., Any]) -> None:
    student = edit_model(make_teacher("llama"), GateSWAConfig(window=5, sinks=2), pattern="S", init="random")
    attention, config = student.model.layers[0].self_attn, student.config
    seen = sum(min(position + 1, 5 + 2) for position in range(16)) / 16
    spec = attention.spec
    assert score_flops(attention, config, 16) == pytest.approx(2 * seen * spec.num_heads * 2 * spec.head_dim)


def test_a_window_of_the_teachers_own_counts_the_keys_that_are_seen(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("gemma3_text")
    window, full = (score_flops(layer.self_attn, teacher.config, 16) for layer in teacher.model.layers[:2])
    seen = sum(min(position + 1, 6) for position in range(16)) / 16
    assert (window, full) == (2 * seen * 4 * 2 * 16, 2 * 17 / 2 * 4 * 2 * 16)


def test_a_state_costs_the_same_however_long_the_text(make_teacher: Callable[..., Any]) -> None:
    student = edit_model(make_teacher("qwen3"), GatedDeltaNetConfig(conv_kernel=2), pattern="SF", init="random")
    layer, full, config = *student.model.layers[:2], student.config
    products, convolution = 4 * 3 * 2 * 16 * 16, 2 * 2 * 4 * 3 * 16  # held, written, read by each of 4 heads
    assert [score_flops(layer.self_attn, config, n) for n in (16, 4096)] == [products + convolution] * 2
    more = kept_values(layer, config, False) - kept_values(full, config, False)
    assert more == 4 * (4 * 3 * 16 + 4 * 16) - 4 * 2 * (16 + 16)


def test_a_target_states_what_it_sees(make_teacher: Callable[..., Any], alone: Any, monkeypatch: Any) -> None:
    teacher = make_teacher("llama")
    student = edit_model(teacher, alone, init="random")
    new, old = (model.model.layers[0].self_attn for model in (student, teacher))
    assert score_flops(new, teacher.config, 16) == score_flops(old, teacher.config, 16), "unless it says otherwise"
    monkeypatch.setattr(type(new), "visible_per_token", lambda self, seq_len: 1.0)
    monkeypatch.setattr(type(new), "head_widths", lambda self: (3, 6, 10))
    assert score_flops(new, teacher.config, 16) == 2 * 3 * (6 + 10)


def test_flops_of_what_does_not_run_are_not_counted(make_teacher: Callable[..., Any]) -> None:
    teacher = make_teacher("llama")
    early, late = (edit_model(teacher, LATENT, init="random", layers=[index]) for index in (0, 3))

    def count(student: Any, **options: Any) -> float:
        return step_flops(teacher, student, seq_len=16, trained="attention", **options)

    attention = sum(2 * p.numel() for p in late.model.layers[3].self_attn.parameters() if p.dim() == 2)
    everything = edit_model(teacher, LATENT, init="random", pattern="S")
    assert count(early, stage="stage1") == count(everything, stage="stage1", train_layers=[0])
    assert (
        count(early, stage="stage1") < count(everything, stage="stage1", train_layers=[1]) < count(late, stage="stage1")
    )
    assert count(everything, stage="stage1", train_layers=[3]) < count(everything, stage="stage1") - 3 * attention
    mlp = sum(2 * p.numel() for p in teacher.model.layers[0].mlp.parameters())
    assert count(early, stage="stage2") - count(late, stage="stage2") > 3 * mlp  # no backward pass below what trains


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--layers",
        "1",
        "--batch",
        "1",
        "--seq",
        "16",
        "--repeats",
        "1",
        "--beside",
        "bound",
        "--compiled",
        "false",
    ]
    assert main(["bench", "stage1", "--json", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["step_ms"] > 0
    assert result["variants"].keys() == {"ours", "bound_eager"}


def test_a_checkpoint_is_timed_beside_the_steps(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pl_attnedit.checkpoints.io.SMALL", 0)  # in the background, as of large ones
    arguments = ["--layers", "1", "--batch", "1", "--seq", "16", "--folder", str(tmp_path), "--mb-per-s", "20"]
    assert main(["bench", "checkpoint", "--json", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["in_background"]
    assert result["mb_per_s"] <= 20
    assert result["seconds_blocked"] > 0
    assert result["seconds_between_checkpoints"] >= result["seconds_of_write"] + result["every_seconds"]
    assert 0 < result["share_blocked"] <= result["share"]
    assert result["share_blocked"] <= 0.05
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch = 0"),
        (["--target", "{type: nothing}"], "nothing"),
        (["--teacher", "/nowhere"], "/nowhere"),
    ],
)
def test_impossible_values_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "stage1", "--layers", "1", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_loss_needs_less_memory_than_full_logits(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--vocabulary", "20000", "--hidden", "16", "--tokens", "1024", "--json"]
    assert main(["bench", "loss", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["gradient_difference"] < 1e-5
    assert result["loss_bytes"] < result["reference_bytes"]
