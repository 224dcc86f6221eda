"""Exported checkpoints: stock transformers, in a process without us, computes what the student computes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from vllm_deepseek import FIELDS, shapes

from pl_attnedit import GatedDeltaNetConfig, GateSWAConfig, MLAConfig, UserError, edit_model
from pl_attnedit.cli import main
from pl_attnedit.export import export
from pl_attnedit.export.deepseek_v3 import latent_scale

STOCK = """
import json, sys, torch, transformers
for line in sys.stdin:
    folder, kind, questions, answers = json.loads(line)
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    ids, options = torch.load(questions), dict(output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        cached = model.generate(ids, max_new_tokens=12, do_sample=False, **options)
    assert "pl_attnedit" not in sys.modules
    torch.save((logits, cached.sequences, torch.stack(cached.logits, 1)), answers)
    print("answered", flush=True)
"""

MLA_CASES = {
    "llama, tied, eps 1e-5": ("llama", {"rms_norm_eps": 1e-5}, MLAConfig(12, 4)),
    "qwen3": ("qwen3", {}, MLAConfig(12, 8)),
    "mistral, low-rank query, own widths": (
        "mistral",
        {},
        MLAConfig(10, 6, qk_nope_head_dim=7, v_head_dim=8, q_lora_rank=9),
    ),
    "llama, spread frequencies": ("llama", {}, MLAConfig(12, 4, rope_frequencies="spread")),
    "qwen3, graded frequencies": ("qwen3", {}, MLAConfig(12, 6, rope_frequencies="graded")),
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
}
SWA_CASES = {
    "head gate": ({"S": GateSWAConfig(window=5)}, "SSF"),
    "no gate, gated full layers": ({"S": GateSWAConfig(window=5, gate="none"), "G": GateSWAConfig(window=None)}, "SG"),
}


def randomised(student: PreTrainedModel) -> PreTrainedModel:
    """With norms and gates that are not the trivial ones of a fresh target."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "self_attn" in name and name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif "self_attn.gate_proj" in name or name.endswith("self_attn.sink"):
                parameter.normal_(std=0.3)
    return student.eval()


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`stock(folder, kind, questions, answers)`: stock transformers answers. One process, to import it once."""
    log = tmp_path_factory.mktemp("stock") / "errors"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", STOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(*arguments: Any) -> Any:
        print(json.dumps([*map(str, arguments)]), file=process.stdin, flush=True)
        assert process.stdout.readline() == "answered\n", log.read_text()
        return torch.load(arguments[-1])

    yield ask
    process.stdin.close()
    assert process.wait(60) == 0, log.read_text()


@torch.no_grad()
def check_stock(student: PreTrainedModel, kind: str, format: str, tmp_path: Path, stock: Callable[..., Any]) -> None:
    """Exports, lets stock transformers answer, compares logits and cached greedy generation."""
    student.save_pretrained(tmp_path / "student")
    out = export(tmp_path / "student", tmp_path / "out", format)
    ids = torch.randint(1, student.config.vocab_size, (2, 20))
    torch.save(ids, tmp_path / "ids.pt")
    logits, sequences, cached = stock(out, kind, tmp_path / "ids.pt", tmp_path / "answers.pt")
    assert (logits - student(input_ids=ids).logits).abs().max() < 1e-4
    ours = student.generate(ids, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(sequences, ours.sequences)
    assert (cached - torch.stack(ours.logits, 1)).abs().max() < 1e-4
    assert not list(out.glob("*.py"))


@pytest.mark.parametrize("case", MLA_CASES)
def test_deepseek_v3_equals_the_student(
    case: str, make_teacher: Callable[..., PreTrainedModel], tmp_path: Path, stock: Callable[..., Any]
) -> None:
    family, fields, target = MLA_CASES[case]
    student = randomised(edit_model(make_teacher(family, **fields), target, init="random"))
    check_stock(student, "AutoModelForCausalLM", "deepseek_v3", tmp_path, stock)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == "float32"
    # what vLLM asks for, as read
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == shapes(config)  # noqa: SIM118
    graded = target.rope_frequencies == "graded"  # vLLM must stop at these rather than take them for others
    fields = FIELDS | ({"rope_scaling": config["rope_parameters"]} if graded else {})
    assert {name: config[name] for name in FIELDS} == fields
    assert not graded or config["rope_scaling"]["factor"] is None
    assert config["first_k_dense_replace"] == config["num_hidden_layers"]


@pytest.mark.parametrize("case", SWA_CASES)
def test_step3p7_equals_the_student(
    case: str, make_teacher: Callable[..., PreTrainedModel], tmp_path: Path, stock: Callable[..., Any]
) -> None:
    pytest.importorskip("transformers.models.step3p7")
    targets, pattern = SWA_CASES[case]
    student = randomised(edit_model(make_teacher("qwen3"), targets, pattern=pattern, init="copy"))
    check_stock(student, "AutoModelForImageTextToText", "step3p7", tmp_path, stock)


GRANITE_CASES: dict[str, tuple[str, dict[str, Any], dict[str, GateSWAConfig], str]] = {
    "learned sinks, llama3's RoPE": (
        "llama",
        {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
        {"S": GateSWAConfig(window=5, gate="none", learned_sink=True)},
        "SSF",
    ),
    "qwen2, biases": ("qwen2", {}, {"S": GateSWAConfig(window=5, gate="none")}, "SF"),
    "mistral, heads of their own width, full layers with sinks": (
        "mistral",
        {"head_dim": 16},
        {
            "S": GateSWAConfig(window=5, gate="none", learned_sink=True),
            "G": GateSWAConfig(window=None, gate="none", learned_sink=True),
        },
        "SG",
    ),
}


@pytest.mark.parametrize("case", GRANITE_CASES)
def test_granite_swa_equals_the_student(
    case: str, make_teacher: Callable[..., PreTrainedModel], tmp_path: Path, stock: Callable[..., Any]
) -> None:
    pytest.importorskip("transformers.models.granite_swa")
    family, fields, targets, pattern = GRANITE_CASES[case]
    student = randomised(edit_model(make_teacher(family, **fields), targets, pattern=pattern, init="copy"))
    check_stock(student, "AutoModelForCausalLM", "granite_swa", tmp_path, stock)


def test_step3p5_is_the_text_of_step3p7(make_teacher: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    """transformers does not have it; tests/serving runs it in vLLM."""
    pytest.importorskip("transformers.models.step3p7")
    student = randomised(edit_model(make_teacher("qwen3"), GateSWAConfig(window=5), pattern="SF", init="copy"))
    student.save_pretrained(tmp_path / "s")
    text, whole = (
        load_file(export(tmp_path / "s", tmp_path / f, f) / "model.safetensors") for f in ("step3p5", "step3p7")
    )
    added = {name: text.pop(name) for name in list(text) if ".3.moe." in name}
    assert len(added) == 5
    assert not any(weight.any() for weight in added.values())
    expected = {name.replace("3.mlp", "3.share_expert"): w for name, w in whole.items() if "vision" not in name}
    expected = {name: weight for name, weight in expected.items() if "projector" not in name}
    assert text.keys() == {name.replace("language_model.", "") for name in expected}
    for name, weight in expected.items():
        assert torch.equal(text[name.replace("language_model.", "")], weight), name
    config = json.loads((tmp_path / "step3p5" / "config.json").read_text())
    assert (config["num_attention_groups"], config["sliding_window"]) == (2, 5)
    assert config["moe_layers_enum"] == "3"


@pytest.mark.parametrize("eps", [1e-8, 1e-6, 1e-5, 1e-3])
def test_latent_scale_makes_either_eps_weigh_at_most_what_the_students_does(eps: float) -> None:
    scale = latent_scale(eps)
    assert scale >= 1
    assert scale.is_integer()
    assert bin(int(scale)).count("1") == 1  # a power of two is exact in every dtype
    assert eps / scale**2 <= 1.0000001e-6


REFUSED = {
    "router": ("qwen3_moe", {}, MLAConfig(8, 4), "S", "deepseek_v3", "router"),
    "biases": ("qwen2", {}, MLAConfig(8, 4), "S", "deepseek_v3", "biases of the teacher"),
    "no norm": ("llama", {}, MLAConfig(8, 4, latent_norm=False), "S", "deepseek_v3", "latent_norm: true"),
    "full layers": ("llama", {}, MLAConfig(8, 4), "SF", "deepseek_v3", "every layer must be the same mla"),
    "another target": ("llama", {}, GateSWAConfig(window=4), "S", "deepseek_v3", "every layer must be mla"),
    "scaled frequencies": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        MLAConfig(8, 4),
        "S",
        "deepseek_v3",
        "rope_type 'default'",
    ),
    "uneven spread": ("qwen3", {}, MLAConfig(8, 6, rope_frequencies="spread"), "S", "deepseek_v3", "use 'high'"),
    "QK-norm": ("qwen3", {}, GateSWAConfig(window=4, gate="none"), "S", "granite_swa", "no QK-norm"),
    "a gate": ("llama", {}, GateSWAConfig(window=4), "S", "granite_swa", "gate: none"),
    "kept sinks": ("llama", {}, GateSWAConfig(window=4, gate="none", sinks=2), "S", "granite_swa", "sinks: 0"),
    "latents": ("llama", {}, MLAConfig(8, 4), "S", "granite_swa", "must be gate_swa or full"),
    "one key head": ("qwen3", {"num_key_value_heads": 1}, GateSWAConfig(window=4), "S", "step3p5", "use step3p7"),
    "llama.cpp, kept sinks": ("llama", {}, GateSWAConfig(window=4, sinks=2), "S", "gguf", "sinks: 0"),
    "llama.cpp, learned sink": ("llama", {}, GateSWAConfig(4, learned_sink=True), "S", "gguf", "learned_sink: false"),
    "llama.cpp, element gate": ("qwen3", {}, GateSWAConfig(4, gate="element"), "S", "gguf", "gate: head or none"),
    "llama.cpp, no window": ("llama", {}, GateSWAConfig(window=None), "S", "gguf", "no layer has a window"),
    "llama.cpp, activation": ("llama", {"hidden_act": "gelu"}, MLAConfig(8, 4), "S", "gguf", "a teacher with silu"),
    "llama.cpp, latents beside full layers": ("llama", {}, MLAConfig(8, 4), "SF", "gguf", "must be the same mla"),
    "llama.cpp, graded": (
        "qwen3",
        {},
        MLAConfig(12, 6, rope_frequencies="graded"),
        "S",
        "gguf",
        "convert with rope_frequencies: high",
    ),
    "llama.cpp, layers of V2-Lite": (
        "llama",
        {"num_hidden_layers": 26},
        MLAConfig(8, 4, q_lora_rank=6),
        "S",
        "gguf",
        "q_lora_rank of 26 layers = 6",
    ),
    "llama.cpp, biases": ("llama", {"mlp_bias": True}, GateSWAConfig(window=4), "S", "gguf", "biases of o_proj or mlp"),
    "llama.cpp, experts": ("qwen3_moe", {}, GateSWAConfig(window=4), "S", "gguf", "qwen3_moe teacher"),
    "family": ("llama", {}, GateSWAConfig(window=4), "S", "step3p7", "dense Qwen3"),
    "unknown family": ("granite", {}, GateSWAConfig(window=4), "S", "granite_swa", "needs one of llama, mistral"),
    "teacher's windows": ("mistral, windows", {}, GateSWAConfig(window=4), "SF", "granite_swa", "windows of its own"),
    "sinks": ("qwen3", {}, GateSWAConfig(window=4, sinks=1), "S", "step3p7", "sinks: 0"),
    "learned sink": ("qwen3", {}, GateSWAConfig(4, learned_sink=True), "S", "step3p7", "learned_sink: false"),
    "element gate": ("qwen3", {}, GateSWAConfig(window=4, gate="element"), "S", "step3p7", "gate: head"),
    "mla": ("qwen3", {}, MLAConfig(8, 4), "S", "step3p7", "must be gate_swa or full"),
    "states": ("llama", {}, GatedDeltaNetConfig(), "S", "deepseek_v3", "are gated_deltanet; every layer must be mla"),
    "llama.cpp, states": ("llama", {}, GatedDeltaNetConfig(), "S", "gguf", "are gated_deltanet; every layer must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_express_is_refused(
    case: str, make_teacher: Callable[..., PreTrainedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, fields, target, pattern, format, reason = REFUSED[case]
    edit_model(make_teacher(family, **fields), target, pattern=pattern, init="random").save_pretrained(tmp_path / "s")
    assert main(["export", str(tmp_path / "s"), str(tmp_path / "out"), "--format", format]) == 2
    assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["s"]  # nothing half-written


def test_two_windows_and_unknown_formats_are_refused(
    make_teacher: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    windows = {"S": GateSWAConfig(window=4), "T": GateSWAConfig(window=6)}
    edit_model(make_teacher("qwen3"), windows, pattern="ST", init="copy").save_pretrained(tmp_path / "s")
    with pytest.raises(UserError, match="same window"):
        export(tmp_path / "s", tmp_path / "out", "step3p7")
    with pytest.raises(UserError, match="deepseek_v3, gguf, granite_swa, qwen3_next, step3p5, step3p7"):
        export(tmp_path / "s", tmp_path / "out", "onnx")
    with pytest.raises(UserError, match="exists already"):
        export(tmp_path / "s", tmp_path, "step3p7")


def test_the_tokenizer_goes_along(make_teacher: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    edit_model(make_teacher("llama"), MLAConfig(8, 4), init="random").save_pretrained(tmp_path / "s")
    tokenizer.save_pretrained(tmp_path / "s")
    out = export(tmp_path / "s", tmp_path / "out", "deepseek_v3")
    assert AutoTokenizer.from_pretrained(out)("b a c")["input_ids"] == [2, 1, 0]
    assert (out / "generation_config.json").is_file()
