"""Which layer gets which target, and a clear error for everything that does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaModel, PreTrainedModel

from pl_attnedit import EditPlan, GateSWAConfig, MLAConfig, UserError, edit_model
from pl_attnedit.attention import target_from_dict
from pl_attnedit.modeling import edited_attention

Teachers = Callable[..., PreTrainedModel]
WINDOW, LATENT = GateSWAConfig(window=4), MLAConfig(8, 4)


@pytest.mark.parametrize(
    ("targets", "pattern", "layers", "letters"),
    [
        (WINDOW, None, None, "SSSFSS"),
        (LATENT, None, None, "SSSSSS"),
        ({"W": WINDOW}, None, None, "WWWFWW"),
        (WINDOW, "FS", None, "FSFSFS"),
        ({"S": WINDOW, "M": LATENT}, "SSSM", None, "SSSMSS"),
        ({"S": WINDOW, "M": LATENT}, "SMFSMFSMF", None, "SMFSMF"),
        (LATENT, None, [5, 0, 2], "SFSFFS"),
        ({"M": LATENT}, None, [1], "FMFFFF"),
        (LATENT, None, [], "FFFFFF"),
    ],
)
def test_letters(targets: Any, pattern: str | None, layers: list[int] | None, letters: str) -> None:
    plan = EditPlan.build(6, targets, pattern, layers)
    assert plan.letters == letters
    assert plan.edited_layers == [i for i, letter in enumerate(letters) if letter != "F"]
    for index, letter in enumerate(letters):
        target = plan.target_of(index)
        assert (target is None) == (letter == "F")
    assert EditPlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (WINDOW, {"pattern": "SSX"}, "pattern = 'SSX': letter 'X' has no target; there are S, F"),
        (WINDOW, {"pattern": ""}, "pattern = '': must be letters"),
        (WINDOW, {"layers": [4]}, "layers = 4: must be a layer index from 0 to 3"),
        (WINDOW, {"layers": [-1]}, "layers = -1: must be a layer index from 0 to 3"),
        (WINDOW, {"layers": [True]}, "layers = True: must be a layer index"),
        (WINDOW, {"layers": [0], "pattern": "S"}, "pattern and layers: give one of them"),
        ({"S": WINDOW, "M": LATENT}, {"layers": [0]}, "layers = [0]: needs exactly one target, not 2"),
        ({"S": WINDOW, "M": LATENT}, {}, "pattern: is needed with several targets (S, M)"),
        ({}, {}, "targets = {}: must be a target config or a mapping"),
        ({"F": WINDOW}, {}, "targets = 'F': each key is one letter other than F"),
        ({"SW": WINDOW}, {}, "targets = 'SW': each key is one letter"),
        ({"S": {"window": 4}}, {}, "must be a target config or a mapping of pattern letters"),
        ("gate_swa", {}, "targets = 'gate_swa': must be a target config"),
        (WINDOW, {"init": "zero"}, "init = 'zero': gate_swa has random, copy, calibrated"),
        (LATENT, {"init": "copy"}, "init = 'copy': mla has random, calibrated, plain_svd"),
        (LATENT, {}, "calibration: init 'calibrated' needs an iterable"),
        (LATENT, {"init": "plain_svd"}, "calibration: init 'plain_svd' needs an iterable"),
        (WINDOW, {"init": "plain_svd"}, "init = 'plain_svd': gate_swa has random, copy, calibrated"),
        (
            {"M": LATENT, "S": WINDOW},
            {"pattern": "MS", "init": "plain_svd"},
            "init = 'plain_svd': gate_swa has random, copy, calibrated",
        ),
        *(
            (target, {"init": "plain_svd", "calibration": [torch.ones(1, 4).long()]}, message)
            for target, message in (
                (MLAConfig(8, 4, qk_nope_head_dim=8), "qk_nope_head_dim = 8: init plain_svd needs the teacher's 16"),
                (MLAConfig(8, 4, v_head_dim=8), "v_head_dim = 8: init plain_svd needs the teacher's 16"),
                (MLAConfig(8, 4, q_lora_rank=8), "q_lora_rank = 8: plain_svd has a full-rank query only"),
            )
        ),
        (LATENT, {"calibration": []}, "calibration: yielded no batch"),
        (LATENT, {"calibration": ["text"]}, "calibration = 'str': must yield input ids of shape (batch, time)"),
        (
            LATENT,
            {"calibration": [torch.ones(1, 4).long(), torch.ones(1, 5).long()]},
            "calibration = (1, 5): all batches must have the same time 4",
        ),
        (MLAConfig(33, 4), {}, "kv_lora_rank = 33: must be at most the hidden size 32"),
        (MLAConfig(8, 18), {}, "qk_rope_head_dim = 18: must be at most the teacher's head dim 16"),
        (MLAConfig(8, 4, q_lora_rank=40), {}, "q_lora_rank = 40: must be at most the hidden size 32"),
        (MLAConfig(8, 4, v_head_dim=5), {}, "v_head_dim = 5: must divide the width 64 of the inherited o_proj"),
        (
            MLAConfig(8, 4, v_head_dim=8),
            {"calibration": [torch.ones(1, 4).long()]},
            "v_head_dim = 8: init calibrated needs the teacher's 16; or init 'random'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make_teacher: Teachers, targets: Any, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        edit_model(make_teacher("qwen3"), targets, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GateSWAConfig(window=0), "window = 0: must be a whole number of at least 1 or None"),
        (lambda: GateSWAConfig(window=-3), "window = -3: must be"),
        (lambda: GateSWAConfig(window=2.5), "window = 2.5: must be"),  # type: ignore[arg-type]
        (lambda: GateSWAConfig(window=4, sinks=-1), "sinks = -1: must be a whole number of at least 0"),
        (lambda: GateSWAConfig(window=4, learned_sink=1), "learned_sink = 1: must be true or false"),  # type: ignore[arg-type]
        (lambda: GateSWAConfig(window=4, gate="all"), "gate = 'all': must be one of head, element, none"),  # type: ignore[arg-type]
        (lambda: MLAConfig(0, 4), "kv_lora_rank = 0: must be"),
        (lambda: MLAConfig(8, 3), "qk_rope_head_dim = 3: must be even"),
        (lambda: MLAConfig(8, 4, qk_nope_head_dim=0), "qk_nope_head_dim = 0: must be"),
        (lambda: MLAConfig(8, 4, latent_norm="no"), "latent_norm = 'no': must be true or false"),  # type: ignore[arg-type]
        (lambda: MLAConfig(8, 4, rope_frequencies="low"), "rope_frequencies = 'low': must be"),  # type: ignore[arg-type]
        (lambda: target_from_dict({"type": "linear"}), "target type = 'linear': known targets are gate_swa"),
        (lambda: target_from_dict({"window": 4}), "must be a mapping with `type` (one of gate_swa"),
        (
            lambda: target_from_dict({"type": "gate_swa", "window": 4, "size": 2}),
            "target gate_swa: unknown field 'size'; its fields are window, gate, sinks",
        ),
        (lambda: target_from_dict({"type": "mla", "kv_lora_rank": 4}), "qk_rope_head_dim"),
        (lambda: target_from_dict({"type": ["mla"]}), "target type = ['mla']: known targets are gate_swa"),
        (lambda: EditPlan.from_dict({"letters": "S"}), "attention_edit = {'letters': 'S'}: must hold `layers`"),
        (
            lambda: EditPlan.from_dict({"layers": 4, "targets": {}}),
            "attention_edit = {'layers': 4, 'targets': {}}: must",
        ),
        (lambda: EditPlan.from_dict({"layers": "S", "targets": [WINDOW]}), "must hold `layers`"),
        (lambda: EditPlan.build(4, WINDOW, layers=0), "layers = 0: must be a list of layer indices"),  # type: ignore[arg-type]
        (lambda: EditPlan.build(4, WINDOW, layers="01"), "layers = '01': must be a list"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_config_names_field_value_and_what_is_allowed(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make()


def test_models_that_are_no_teachers(make_teacher: Teachers) -> None:
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    encoder = BertForMaskedLM(BertConfig(vocab_size=8, **tiny))
    with pytest.raises(UserError, match="'bert': transformers has no decoder"):
        edit_model(encoder, WINDOW)
    with pytest.raises(UserError, match="'gpt2': transformers has no decoder"):
        edit_model(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8)), WINDOW)
    llama = make_teacher("llama")
    with pytest.raises(UserError, match="teacher of type LlamaModel: must be a LlamaForCausalLM"):
        edit_model(LlamaModel(llama.config), WINDOW)
    with pytest.raises(UserError, match="must be a Hugging Face causal LM"):
        edit_model(nn.Linear(2, 2), WINDOW)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is a converted model already"):
        edit_model(edit_model(llama, WINDOW), LATENT)


def test_the_teacher_stays_as_it_was(make_teacher: Teachers) -> None:
    teacher, same = make_teacher("qwen3"), make_teacher("qwen3")
    config = teacher.config.to_dict()
    edit_model(teacher, {"S": WINDOW, "M": LATENT}, pattern="SM", calibration=[torch.arange(1, 25)[None]])
    for (name, mine), (_, theirs) in zip(teacher.named_parameters(), same.named_parameters()):
        assert torch.equal(mine, theirs), name
    assert teacher.config.to_dict() == config
    assert not any(module._forward_pre_hooks for module in teacher.modules())


@pytest.mark.parametrize("init", ["random", "copy", "calibrated"])
def test_o_proj_is_inherited(teacher: PreTrainedModel, init: Any) -> None:
    """Doubled where a gate of one half follows."""
    gated = edited_attention(edit_model(teacher, WINDOW, pattern="S", init=init))
    plain = edited_attention(edit_model(teacher, GateSWAConfig(4, gate="none"), pattern="S", init=init))
    for index, layer in enumerate(teacher.model.layers):
        inherited = layer.self_attn.o_proj.weight
        assert torch.equal(gated[index].o_proj.weight, 2 * inherited)
        assert torch.equal(plain[index].o_proj.weight, inherited)
        same = torch.equal(plain[index].q_proj.weight, layer.self_attn.q_proj.weight)
        assert same == (init != "random")


@pytest.mark.parametrize(
    ("letters", "pattern"), [("SSSFSSSF", "SSSF"), ("SSSFSS", "SSSF"), ("SSSS", "S"), ("SFFS", "SFF"), ("FSSM", "FSSM")]
)
def test_shortest_pattern(letters: str, pattern: str) -> None:
    plan = EditPlan(letters, {"S": GateSWAConfig(window=8), "M": GateSWAConfig(window=4)})
    assert plan.pattern == pattern


def test_a_quantised_teacher_is_refused(make_teacher: Callable[..., Any]) -> None:
    class Packed(nn.Linear):
        """As FP8Linear: its weight means something only with a scale."""

    teacher = make_teacher("llama")
    teacher.model.layers[1].self_attn.k_proj.__class__ = Packed
    with pytest.raises(
        UserError, match=r"1\.self_attn\.k_proj is a Packed of torch\.float32; load the model unquantised"
    ):
        edit_model(teacher, GateSWAConfig(8))
