"""Families that the package has no word of: their own layers run, their own attention is edited, or they are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from any_family import MIXED, REFUSED, ROWS
from transformers import DynamicCache, PreTrainedModel

from pl_attnedit import GatedDeltaNetConfig, GateSWAConfig, MLAConfig, UserError, edit_model
from pl_attnedit.attention import TargetConfig
from pl_attnedit.distillation.engine.forward_check import check_forward
from pl_attnedit.eval.bench.reference import plain_kl, plain_layer_losses
from pl_attnedit.eval.bench.step import StepBench, make_module
from pl_attnedit.modeling import edited_attention
from pl_attnedit.modeling.edit import assemble, load
from pl_attnedit.modeling.hf import edited_classes
from pl_attnedit.modeling.kv import held_bytes, on_meta, promised_bytes
from pl_attnedit.modeling.weights import copy_weights
from pl_attnedit.teachers import attention_of, layer_specs

Ids = Callable[..., torch.Tensor]
Make = Callable[..., PreTrainedModel]
LATENT = MLAConfig(24, 4, latent_norm=False)
NO_LATENT = {
    "mistral, windows": "sees a window of 6 tokens",
    "gemma2": "bounds its scores",
    "gpt_oss": "has learned sinks",
    "qwen3_next": "a gate, a latent",
    "deepseek_v3": "a gate, a latent",
}
NOT_CALIBRATED = {
    "hunyuan_v1_dense": "what follows the RoPE in HunYuanDenseV1Attention is not known",
    "nanochat": "what follows the RoPE in NanoChatAttention is not known",
}


@pytest.fixture(scope="module", params=sorted(ROWS))
def row(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(row: str, make_teacher: Make) -> Iterator[PreTrainedModel]:
    """One teacher for all tests of a row: none of them changes it."""
    teacher = make_teacher(row)
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    yield teacher
    assert all(torch.equal(before[name], parameter) for name, parameter in teacher.named_parameters())


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **given).logits


@torch.no_grad()
def cached_logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A prompt, then a token at a time, and some at once behind a cache."""
    cache, seen, found = DynamicCache(config=model.config), 0, []
    for count in (7, 1, 1, 3, 1, 1, 1, 1, 1, 1):
        now = slice(seen, seen + count)
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, now]
        given = {"attention_mask": mask[:, : seen + count], "position_ids": places}
        found.append(model(input_ids=ids[:, now], past_key_values=cache, use_cache=True, **given).logits)
        seen += count
    return torch.cat(found, dim=1)


def assert_decodes(student: PreTrainedModel, ids: torch.Tensor) -> None:
    """Cached decoding equals the whole pass, with and without padding."""
    for padding in (0, 5):
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        places, real = (mask.cumsum(-1) - 1).clamp(min=0), mask.bool()
        whole = logits(student, ids, attention_mask=mask, position_ids=places)
        torch.testing.assert_close(cached_logits(student, ids, mask)[real], whole[real], atol=1e-4, rtol=1e-4)


def window_of(teacher: PreTrainedModel, window: int | None, **fields: Any) -> GateSWAConfig:
    """A target for the layers that a pattern edits; no larger than the teacher's own."""
    own = [spec.window for spec in layer_specs(teacher.config) if spec is not None]
    return GateSWAConfig(own[0] if None not in own else window, **fields)


def windows_in(teacher: PreTrainedModel) -> list[int]:
    """The layers with windows of the teacher's own."""
    return [index for index, spec in enumerate(layer_specs(teacher.config)) if spec is not None and spec.window]


def test_a_window_longer_than_the_text_equals_the_teacher(source: PreTrainedModel, make_ids: Ids) -> None:
    for window, gate in ((64, "element"), (None, "head")):
        student = edit_model(source, window_of(source, window, gate=gate), pattern="S")
        check_forward(source, student)
        assert len(edited_attention(student)) >= 2
        torch.testing.assert_close(
            logits(student, make_ids(2, 24)), logits(source, make_ids(2, 24)), atol=1e-5, rtol=0.0
        )


def test_short_windows(source: Any, make_ids: Ids, tmp_path: Path) -> None:
    """Cached decoding, and a saved student that anybody loads."""
    sinks = 0 if None not in [spec.window for spec in layer_specs(source.config) if spec] else 2
    student, ids = edit_model(source, GateSWAConfig(4, sinks=sinks), pattern="SSF"), make_ids(2, 18)
    assert (logits(student, ids) - logits(source, ids)).abs().max() > 1e-2, "the window must matter"
    assert_decodes(student, ids)
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), ids), logits(student, ids))
    again = assemble(source, student.edit_plan)  # as a stage begins
    copy_weights(again, tmp_path, torch.float32)
    assert torch.equal(logits(again, ids), logits(student, ids))
    generated = student.generate(ids[:, :6], max_new_tokens=8, do_sample=False)
    assert generated.shape == (2, 14)


def test_states(source: Any, make_ids: Ids) -> None:
    """In place of any attention, since nothing is left of it."""
    student = edit_model(source, GatedDeltaNetConfig(), pattern="S", init="random")
    check_forward(source, student)
    assert_decodes(student, make_ids(2, 18))
    held, promised = held_bytes(on_meta(student.config, torch.float32), 64), promised_bytes(student, 64)
    assert all(held[index] == promised[index] > 0 for index in edited_attention(student))


def test_the_teachers_own_windows_can_be_made_smaller(source: PreTrainedModel, make_ids: Ids) -> None:
    ids, windows = make_ids(2, 18), windows_in(source)
    if not windows:
        pytest.skip("has none")
    same = edit_model(source, GateSWAConfig(6), layers=windows)
    torch.testing.assert_close(logits(same, ids), logits(source, ids), atol=1e-5, rtol=0.0)
    for layers in (windows[:1], windows):
        assert_decodes(edit_model(source, GateSWAConfig(3), layers=layers), ids)
    with pytest.raises(UserError, match="window = 7: must be at most 6"):
        edit_model(source, GateSWAConfig(7), layers=windows)
    with pytest.raises(UserError, match="sinks = 1: must be 0"):
        edit_model(source, GateSWAConfig(5, sinks=1), layers=windows)


def test_latents(row: str, source: PreTrainedModel, make_ids: Ids) -> None:
    """Calibrated they are nearer to the teacher than random ones."""
    if row in NO_LATENT:
        with pytest.raises(UserError, match=NO_LATENT[row]):
            edit_model(source, LATENT, init="random")
        return
    ids, text = make_ids(2, 18), [make_ids(4, 48, seed) for seed in range(1, 4)]
    wanted, off = logits(source, ids).log_softmax(-1), {}
    for init in ("random", "calibrated"):
        if init == "calibrated" and row in NOT_CALIBRATED:
            with pytest.raises(UserError, match=NOT_CALIBRATED[row]):
                edit_model(source, LATENT, init=init, calibration=text)
            return
        student = edit_model(source, LATENT, init=init, calibration=text)
        check_forward(source, student)
        off[init] = (wanted.exp() * (wanted - logits(student, ids).log_softmax(-1))).sum(-1).mean()
        assert_decodes(student, ids)
    assert off["calibrated"] < 0.35 * off["random"]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_step_has_the_gradients_of_plain_pytorch(
    row: str, source: PreTrainedModel, make_ids: Ids, stage: Any
) -> None:
    plans: list[tuple[TargetConfig, str]] = [(window_of(source, 5), "SSF")]
    plans += [] if row in NO_LATENT else [(LATENT, "SSF")]
    windows = windows_in(source)
    plans += [(GateSWAConfig(3), "".join("S" if i in windows else "F" for i in range(4)))] if windows else []
    batch = {"input_ids": make_ids(2, 16), "loss_mask": torch.rand(2, 16, generator=torch.manual_seed(0)) < 0.7}
    for target, pattern in plans:
        module: Any = make_module(source, StepBench(stage, target, pattern=pattern, compiled=False))
        module.configure_model()
        module.on_fit_start()
        module.log = module.log_dict = lambda *_, **__: None
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(module.training_step(batch, 0)["loss"], trained)
        if stage == "stage1":
            plain = torch.stack(list(plain_layer_losses(source, module.layer_modules(), batch).values())).sum()
        else:
            plain = plain_kl(source, module.student, batch)
        for ours, theirs in zip(found, torch.autograd.grad(plain, trained), strict=True):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


@pytest.mark.parametrize("family", REFUSED)
def test_others_are_refused_by_name(family: str, make_teacher: Make) -> None:
    """By the config, or where a training begins."""
    fields, reason = REFUSED[family]

    def begin() -> None:
        teacher = make_teacher(family, **fields)
        check_forward(teacher, edit_model(teacher, GateSWAConfig(window=8), pattern="S"))

    with pytest.raises(UserError, match=reason):
        begin()


def test_what_is_cached(source: PreTrainedModel) -> None:
    """Windows hold what their formula says; a hybrid's other layers hold something too."""
    student = edit_model(source, window_of(source, 4), pattern="SF")
    for model in (source, student):
        held = held_bytes(on_meta(model.config, torch.float32), 33)
        for layer, bytes, promised in zip(model.model.layers, held, promised_bytes(model, 33), strict=True):
            if attention_of(layer) is None:
                assert bytes > 0
            else:
                assert bytes == promised


def test_no_latents_beside_another_mixers_states(make_teacher: Make) -> None:
    with pytest.raises(UserError, match="target mla: this teacher's layers cache states of another mixer"):
        edit_model(make_teacher("falcon_h1", **REFUSED["falcon_h1"][0]), LATENT, init="random")


def test_a_decoder_without_rope(make_teacher: Make, make_ids: Ids) -> None:
    """Nothing makes cos and sin, and no `rope_parameters` are in its config."""
    teacher = make_teacher("jamba", attn_layer_period=2, attn_layer_offset=1, num_experts=2, use_mamba_kernels=False)
    student = edit_model(teacher, GateSWAConfig(window=None), pattern="S")
    check_forward(teacher, student)
    torch.testing.assert_close(logits(student, make_ids(2, 9)), logits(teacher, make_ids(2, 9)), atol=1e-5, rtol=0.0)
    assert promised_bytes(teacher, 9) == [0, 9 * 2 * 2 * 8 * 4] * 2


def test_kinds_of_layers_without_rope(make_teacher: Make, make_ids: Ids) -> None:
    """Beam's config has RoPE for its windows, and None for its full layers, which get no cos and sin."""
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
    teacher = make_teacher("beam", head_dim=8, **mixture, **MIXED)
    assert [spec.rope_pairs for spec in layer_specs(teacher.config) if spec] == [4, 0, 4, 0]
    student = edit_model(teacher, GateSWAConfig(64, gate="none"), pattern="S")
    check_forward(teacher, student)
    torch.testing.assert_close(logits(student, make_ids(2, 9)), logits(teacher, make_ids(2, 9)), atol=1e-5, rtol=0.0)
    assert held_bytes(on_meta(student.config, torch.float32), 33) == promised_bytes(student, 33)
    with pytest.raises(UserError, match="get no cos and sin"):
        edit_model(teacher, LATENT, init="random")


def test_experts_of_students_run_together() -> None:
    """In a process that has seen no teacher, too: transformers asks the class, before there is a model."""
    for family in ("phimoe", "qwen3_vl_moe_text"):  # of no other test
        assert edited_classes(family)[1]._can_set_experts_implementation()


def test_weights_outside_of_any_part(make_teacher: Make, make_ids: Ids) -> None:
    """Of the whole decoder and of its layers, as Zaya has them."""
    teacher: Any = make_teacher("llama")
    student: Any = edit_model(teacher, GateSWAConfig(window=None), pattern="S")
    for theirs, ours in ((teacher, student), (teacher.model, student.model)):
        assert theirs._parameters is ours._parameters
    assert {parameter.device.type for parameter in student.parameters()} == {"cpu"}
