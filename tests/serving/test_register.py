"""The plugin without vLLM: what it registers, which versions it takes, how weights are named, what is refused."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import pytest

from pl_attnedit import EditPlan, GatedDeltaNetConfig, GateSWAConfig, MLAConfig, UserError, edit_model
from pl_attnedit.modeling.hf import edited_config
from pl_attnedit.serving import VERSIONS, register
from pl_attnedit.serving.checks import attention_weights, check_config, vllm_name


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What was registered with a vLLM that only has a version."""
    registered: dict[str, str] = {}
    module: Any = ModuleType("vllm")
    module.__version__ = "0.32.0+cpu"
    module.ModelRegistry = type("Registry", (), {"register_model": registered.__setitem__})
    monkeypatch.setitem(sys.modules, "vllm", module)
    return registered


def test_importing_the_package_does_not_import_vllm() -> None:
    code = "import sys; from pl_attnedit.serving import checks, gathered, memory; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_family_is_registered_however_often(fake_vllm: dict[str, str]) -> None:
    register()
    register()
    assert fake_vllm == {
        f"Edited{name}ForCausalLM": f"pl_attnedit.serving.models:Edited{name}ForCausalLM"
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe")
    }


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "0.25.1"])
def test_another_version_is_one_line(version: str, fake_vllm: dict[str, str], caplog: Any) -> None:
    sys.modules["vllm"].__version__ = version
    with caplog.at_level(logging.WARNING):
        register()
    assert not fake_vllm
    (record,) = caplog.records
    assert " and ".join(VERSIONS) in record.getMessage()
    assert version in record.getMessage()


def test_the_installed_package_has_the_entry_point() -> None:
    found = [e.value for e in entry_points(group="vllm.general_plugins") if e.name == "pl_attnedit"]
    if not found:
        pytest.skip("installed before the entry point was added: pip install -e . again")
    assert set(found) == {"pl_attnedit.serving:register"}


def test_names_that_vllm_would_stack_are_others() -> None:
    targets = {"S": GateSWAConfig(window=4), "M": MLAConfig(8, 4), "D": GatedDeltaNetConfig()}
    plan = EditPlan.build(4, targets, pattern="SMFD")
    names = {
        "model.layers.0.self_attn.gate_proj.weight": "model.layers.0.self_attn.gate.weight",
        "model.layers.0.self_attn.q_proj.bias": "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.sink": "model.layers.0.self_attn.sink",
        "model.layers.0.mlp.gate_proj.weight": "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.self_attn.q_proj.weight": "model.layers.1.self_attn.query_proj.weight",
        "model.layers.1.self_attn.q_a_proj.weight": "model.layers.1.self_attn.q_a_proj.weight",
        "model.layers.1.self_attn.q_b_proj.weight": "model.layers.1.self_attn.query_proj.weight",
        "model.layers.1.self_attn.kv_b_proj.weight": "model.layers.1.self_attn.kv_b_proj.weight",
        "model.layers.2.self_attn.q_proj.weight": "model.layers.2.self_attn.q_proj.weight",
        "model.layers.3.self_attn.norm.weight": "model.layers.3.self_attn.output_norm.weight",
        "model.layers.3.self_attn.A_log": "model.layers.3.self_attn.A_log",
        "model.embed_tokens.weight": "model.embed_tokens.weight",
        "lm_head.weight": "lm_head.weight",
    }
    assert {name: vllm_name(name, plan) for name in names} == names


def test_what_vllm_would_run_otherwise_is_refused(make_teacher: Any) -> None:
    plan = EditPlan.build(4, GateSWAConfig(window=4))

    def config(family: str, **fields: Any) -> Any:
        return edited_config(make_teacher(family, **fields).config, plan)

    check_config(config("llama", attention_bias=True))
    with pytest.raises(UserError, match="attention_bias = True"):
        check_config(config("qwen3", attention_bias=True))
    with pytest.raises(UserError, match="head_dim = 16"):
        check_config(config("qwen2", head_dim=16))
    with pytest.raises(UserError, match="hybrid KV cache manager"):
        check_config(config("llama"), all_tokens=True)
    states = edited_config(make_teacher("llama").config, EditPlan.build(4, GatedDeltaNetConfig()))
    check_config(states)
    for option in ("all_tokens", "speculative"):
        with pytest.raises(UserError, match=r"hybrid KV cache manager|speculative decoding"):
            check_config(states, **{option: True})


def test_the_weights_that_must_come_are_those_that_are_saved(make_teacher: Any) -> None:
    targets = {
        "S": GateSWAConfig(window=4, learned_sink=True),
        "M": MLAConfig(8, 4, q_lora_rank=6, latent_norm=False),
        "N": MLAConfig(8, 4),
        "D": GatedDeltaNetConfig(),
    }
    student = edit_model(make_teacher("qwen3", num_hidden_layers=5), targets, pattern="SMNFD", init="random")
    saved = {name for name in student.state_dict() if "self_attn" in name and ".3." not in name}
    assert attention_weights(student.config) == saved
