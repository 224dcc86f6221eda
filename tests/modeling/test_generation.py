"""Static caches, compiled decoding and assisted generation work, or say clearly that they do not; packed text."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

from pl_attnedit import GatedDeltaNetConfig, GateSWAConfig, MLAConfig, UserError, edit_model
from pl_attnedit.modeling import edited_attention

Teachers = Callable[..., PreTrainedModel]
Ids = Callable[..., torch.Tensor]

GROWING = {
    "mla": MLAConfig(12, 4),
    "gate": GateSWAConfig(window=None),
    "learned_sink": GateSWAConfig(window=None, learned_sink=True),
}
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}


def make_student(teacher: PreTrainedModel, target: Any, pattern: str = "SF") -> PreTrainedModel:
    torch.manual_seed(0)
    return edit_model(teacher, target, pattern=pattern, init="random").eval()


@pytest.mark.parametrize("target", GROWING)
def test_static_cache(teacher: PreTrainedModel, make_ids: Ids, target: str) -> None:
    student = make_student(teacher, GROWING[target])
    ids = make_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for prompt, options in ((ids, {}), (ids, {"attention_mask": mask}), (ids[:, :1], {})):
        growing = student.generate(prompt, **options, **GREEDY)
        static = student.generate(prompt, **options, **GREEDY, cache_implementation="static", disable_compile=True)
        assert torch.equal(growing, static)
    cache = StaticCache(config=student.config, max_cache_len=40)
    with torch.no_grad():
        parts = [student(part, past_key_values=cache).logits for part in ids.split([4, 3, 1, 1], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), student(ids, use_cache=False).logits, atol=1e-5, rtol=2e-5)


def test_compiled_decoding_of_mla(make_teacher: Teachers, make_ids: Ids) -> None:
    """One graph for a step over a static cache, as `generate` compiles it on accelerators."""
    student = make_student(make_teacher("llama", num_hidden_layers=2), GROWING["mla"])
    ids = make_ids(1, 8)
    cache = StaticCache(config=student.config, max_cache_len=16)
    step = torch.compile(student.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        student(ids[:, :5], past_key_values=cache)
        got = [step(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(5, 8)]
        expected = student(ids, use_cache=False).logits[:, 5:]
    torch.testing.assert_close(torch.cat(got, 1), expected, atol=1e-5, rtol=2e-5)


ALL: dict[str, Any] = {**GROWING, "window": GateSWAConfig(window=6, sinks=2), "state": GatedDeltaNetConfig()}
SAMPLE: dict[str, Any] = {"max_new_tokens": 10, "do_sample": True}
MODES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampling, several texts of a prompt": {**SAMPLE, "num_return_sequences": 3},
    "beams": {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
    "beams, sampled": {**SAMPLE, "num_beams": 3},
    "guidance": {**GREEDY, "guidance_scale": 1.5},
    "prefill in parts": {**GREEDY, "prefill_chunk_size": 3},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", ALL)
def test_modes_of_generate_equal_those_without_a_cache(
    target: str, mode: str, make_teacher: Teachers, make_ids: Ids
) -> None:
    student, ids = make_student(make_teacher("llama", num_hidden_layers=2), ALL[target]), make_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found = []
    for settings in (MODES[mode], {**MODES[mode], "use_cache": False, "prefill_chunk_size": None}):
        torch.manual_seed(3)
        found.append(student.generate(ids, attention_mask=mask, **settings))
    assert torch.equal(*found)


def test_compiled(make_teacher: Teachers, make_ids: Ids) -> None:
    """Prompt, a window's first tokens, and steps beyond it."""
    targets = {"S": ALL["window"], "M": ALL["mla"], "D": ALL["state"]}
    student = make_student(make_teacher("llama", num_hidden_layers=3), targets, "SMD")
    ids = make_ids(2, 5)
    expected = student.generate(ids, **GREEDY)
    student.forward = torch.compile(student.forward, backend="eager")
    assert torch.equal(student.generate(ids, **GREEDY), expected)


@pytest.mark.parametrize("target", ALL)
def test_exported(target: str, make_teacher: Teachers, make_ids: Ids) -> None:
    student, ids = make_student(make_teacher("llama", num_hidden_layers=2), ALL[target]), make_ids(2, 9)
    exported = torch.export.export(student, (ids,), {"use_cache": False}, strict=False).module()
    logits = student(ids, use_cache=False).logits
    torch.testing.assert_close(exported(ids, use_cache=False).logits, logits, atol=1e-5, rtol=2e-5)


def test_exported_for_texts_of_any_length(make_teacher: Teachers, make_ids: Ids) -> None:
    lengths = {"input_ids": {1: torch.export.Dim("time", min=2, max=256)}, "use_cache": None}
    for target in (ALL["mla"], ALL["window"]):
        student, ids = make_student(make_teacher("llama", num_hidden_layers=2), target), make_ids(2, 40)
        program = torch.export.export(
            student, (make_ids(2, 9),), {"use_cache": False}, dynamic_shapes=lengths, strict=False
        )
        found, expected = (model(ids, use_cache=False).logits for model in (program.module(), student))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=2e-5)


REFUSED: dict[str, tuple[str, str, Callable[[Any, torch.Tensor], Any]]] = {
    "static cache": (
        "window",
        "cache of type StaticCache: layers that do not keep every token need a DynamicCache",
        lambda student, ids: student.generate(ids, **GREEDY, cache_implementation="static"),
    ),
    "static cache of states": (
        "state",
        "cache of type StaticCache: layers that do not keep every token need a DynamicCache",
        lambda student, ids: student.generate(ids, **GREEDY, cache_implementation="static"),
    ),
    "quantised cache of states": (
        "state",
        "cache of type QuantizedCache: layers that do not keep every token need a DynamicCache",
        lambda student, ids: student(ids, past_key_values=QuantizedCache("fp8", student.config)),
    ),
    "quantised cache": (
        "window",
        "cache of type QuantizedCache: layers that do not keep every token need a DynamicCache",
        lambda student, ids: student(ids, past_key_values=QuantizedCache("fp8", student.config)),
    ),
    "quantised cache of latents": (
        "mla",
        "cache of type QuantizedCache: mla needs a DynamicCache",
        lambda student, ids: student(ids, past_key_values=QuantizedCache("fp8", student.config)),
    ),
    "continuous batching": (
        "learned_sink",
        r"continuous batching \(generate_batch\) .* serve the model with vLLM",
        lambda student, ids: student.generate_batch(ids.tolist()),
    ),
    "attention weights": (
        "gate",
        "output_attentions: edited layers return no attention weights",
        lambda student, ids: student.generate(ids, **GREEDY, output_attentions=True, return_dict_in_generate=True),
    ),
    "flash attention": (
        "gate",
        "does not support Flash Attention",
        lambda student, ids: student.set_attn_implementation("flash_attention_2"),
    ),
    "flex attention": (
        "mla",
        "does not support .*flex_attention",
        lambda student, ids: student.set_attn_implementation("flex_attention"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_answer_wrongly_is_refused(case: str, make_teacher: Teachers, make_ids: Ids) -> None:
    target, message, call = REFUSED[case]
    with pytest.raises((UserError, ValueError), match=message):
        call(make_student(make_teacher("llama", num_hidden_layers=2), ALL[target]), make_ids(2, 9))


def test_a_plan_for_tensor_parallelism_is_not_taken_over(make_teacher: Teachers) -> None:
    """It would cut projections, but neither gates nor sinks nor latents, and be wrong without a word."""
    student = make_student(make_teacher("llama"), ALL["window"])
    assert not student.tp_plan
    assert student.config.base_model_tp_plan is None


def test_hidden_states_of_teacher_and_student_in_turn(make_teacher: Teachers, make_ids: Ids) -> None:
    """Both share the full layers' modules."""
    teacher, ids = make_teacher("llama"), make_ids(1, 9)
    for model in (teacher, make_student(teacher, ALL["window"]), teacher):
        states = model(ids, output_hidden_states=True).hidden_states
        assert len(states) == 5
        assert torch.equal(states[-1], model.model(ids).last_hidden_state)


def test_transformers_serve_finds_the_class(make_teacher: Teachers, tmp_path: Path) -> None:
    """In a process that knows of us by the entry file alone."""
    make_student(make_teacher("llama", num_hidden_layers=1), ALL["window"]).save_pretrained(tmp_path)
    code = (
        "import sys; from transformers.cli.serving.model_manager import ModelManager; "
        "print(ModelManager(device='cpu', trust_remote_code=True)._load_model(sys.argv[1] + '@main'))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.startswith("EditedLlamaForCausalLM("), done.stderr


def test_a_cache_filled_by_the_teacher_is_refused(make_teacher: Teachers, make_ids: Ids) -> None:
    teacher = make_teacher("llama")
    student = make_student(teacher, GateSWAConfig(window=4))
    cache = DynamicCache(config=teacher.config)
    teacher(make_ids(1, 6), past_key_values=cache)
    with pytest.raises(UserError, match="cache layer 0: was filled by another model; start with an empty cache"):
        student(make_ids(1, 1), past_key_values=cache)


def test_assisted_generation(make_teacher: Teachers, make_ids: Ids) -> None:
    """Works where no token is dropped: MLA, gates without a window, windows longer than the text; refused elsewhere."""
    teacher, ids = make_teacher("qwen3"), make_ids(1, 9)
    for target in (*GROWING.values(), GateSWAConfig(window=32, sinks=2)):
        student = make_student(teacher, target, "S")
        alone = student.generate(ids, **GREEDY)
        assert torch.equal(student.generate(ids, **GREEDY, assistant_model=teacher), alone)
        assert torch.equal(student.generate(ids, **GREEDY, prompt_lookup_num_tokens=3), alone)
        drafted = teacher.generate(ids, **GREEDY, assistant_model=student)
        assert torch.equal(drafted, teacher.generate(ids, **GREEDY))
    with pytest.raises(UserError, match=r"window layer has already dropped tokens .* without assistant_model"):
        make_student(teacher, GateSWAConfig(window=4)).generate(ids, **GREEDY, assistant_model=teacher)
    with pytest.raises(UserError, match=r"state has dropped its tokens; .* without assistant_model"):
        make_student(teacher, GatedDeltaNetConfig()).generate(ids, **GREEDY, assistant_model=teacher)


def test_packed_documents_do_not_see_each_other(teacher: PreTrainedModel, make_ids: Ids) -> None:
    """Positions that start again mark documents: each is what it is alone, its sinks are its own first tokens."""
    targets = {
        "S": GateSWAConfig(window=3, sinks=2),
        "M": MLAConfig(8, 4),
        "E": GateSWAConfig(3, gate="element", learned_sink=True),
        "D": GatedDeltaNetConfig(),
    }
    torch.manual_seed(0)
    student = edit_model(teacher, targets, pattern="SMED", init="random").eval()
    lengths, ids = [[11, 1, 12], [3, 19, 2]], make_ids(2, 24)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.no_grad():
        packed = student(ids, position_ids=positions, use_cache=False).logits
        for row, documents in enumerate(lengths):
            start = 0
            for length in documents:
                alone = student(ids[row : row + 1, start : start + length], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, start : start + length], alone, atol=1e-5, rtol=2e-5)
                start += length


def test_gradients_reach_every_new_weight(teacher: PreTrainedModel, make_ids: Ids) -> None:
    """Gates have their gradient from the first step on, although their weight starts at zero."""
    targets = {
        "S": GateSWAConfig(window=3),
        "E": GateSWAConfig(4, "element", sinks=1, learned_sink=True),
        "M": MLAConfig(8, 4, q_lora_rank=6),
        "D": GatedDeltaNetConfig(),
    }
    student = edit_model(teacher, targets, pattern="SEMD", init="random").train()
    ids = make_ids(2, 12)
    student(ids, labels=ids, use_cache=False).loss.backward()
    for index, attention in edited_attention(student).items():
        for name, parameter in attention.named_parameters():
            assert parameter.grad is not None, (index, name)
            assert parameter.grad.abs().sum() > 0, (index, name)


def test_gradient_checkpointing_changes_nothing(make_teacher: Teachers, make_ids: Ids) -> None:
    student = make_student(make_teacher("qwen3"), GateSWAConfig(window=3, sinks=1)).train()
    ids, gate = make_ids(2, 12), edited_attention(student)[0].gate_proj.weight
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            student.gradient_checkpointing_enable()
        student.zero_grad()
        student(ids, labels=ids, use_cache=False).loss.backward()
        assert gate.grad is not None
        gradients.append(gate.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-5)
