"""A teacher is exactly the model in its folder: every tensor is read, none is made up, nothing lies on top."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FuyuConfig, IdeficsConfig

from pl_attnedit import edit_model, load
from pl_attnedit.attention import GateSWAConfig
from pl_attnedit.errors import UserError
from pl_attnedit.teachers.sources.resolve import load_teacher, resolve_teacher, teacher_config

Make = Callable[..., Any]
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path, make_teacher: Make, tiny_tokenizer: Any, cache_of_tests: None) -> Path:
    make_teacher("llama", vocab_size=300, tie_word_embeddings=False).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """A change of the folder's weights."""

    def write(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return write


def config(**fields: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        before = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(before | fields))

    return write


def shards(folder: Path) -> None:
    """The same weights in two files."""
    model, _ = load_teacher(str(folder))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="80KB")


def files_of_another_model(folder: Path) -> None:
    """As a smaller model leaves them, that is saved over a larger one."""
    shards(folder)
    model, _ = load_teacher(str(folder))
    (folder / "model.safetensors.index.json").unlink()
    model.save_pretrained(folder)
    (folder / "model-00001-of-00003.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')


def adapter_alone(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    adapter(folder)


def file_of_another_model(folder: Path) -> None:
    shards(folder)
    (folder / "model-00009-of-00009.safetensors").write_bytes(
        (folder / "model-00001-of-00003.safetensors").read_bytes()
    )


def lost_shard(folder: Path) -> None:
    shards(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def two_sets(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    shards(folder)
    (folder / "model.safetensors").write_bytes(before)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (weights(lambda tensors: tensors.__delitem__(UP)), f"the weights lack {UP}"),
        (
            weights(lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})),
            "no place",
        ),
        (weights(lambda tensors: tensors.update({UP: torch.ones(3, 32)})), f"another shape to the weights {UP}"),
        (weights(lambda tensors: tensors.update({UP: tensors[UP].char()})), rf"quantised, .* {UP} \(I8\)"),
        (
            weights(lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)})),
            r"quantised, .*\(F8_E4M3\)",
        ),
        (config(num_hidden_layers=3), r"no place for the weights model\.layers\.3"),
        (two_sets, "two sets of weights"),
        (file_of_another_model, "model-00009-of-00009.safetensors does not belong"),
        (files_of_another_model, "model-00001-of-00003.safetensors does not belong"),
        (lambda folder: (folder / "adapter_model.bin").touch(), "holds an adapter"),
        (lost_shard, "cannot be loaded"),
        (adapter, "holds an adapter"),
        (adapter_alone, "holds an adapter"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_weights_that_are_not_the_model(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    for read in (resolve_teacher, load_teacher):
        with pytest.raises(UserError, match=message) as error:
            read(str(folder))
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_no_numbers(folder: Path, number: float) -> None:
    """Also of a token that no text has."""
    weights(lambda tensors: tensors["model.embed_tokens.weight"][-1].fill_(number))(folder)
    with pytest.raises(UserError, match=r"its weight model\.embed_tokens\.weight holds nan or infinity"):
        load_teacher(str(folder))


@pytest.mark.parametrize(
    "change",
    [
        shards,
        weights(lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})),
        config(tie_word_embeddings=True),  # the head in the file is another one, and stays
    ],
    ids=["several files", "frequencies of old", "head that is not tied"],
)
def test_weights_that_are_the_model(folder: Path, change: Callable[[Path], None]) -> None:
    before = {name: weight.clone() for name, weight in load_teacher(str(folder))[0].state_dict().items()}
    change(folder)
    after = load_teacher(str(folder))[0].state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config(quantization_config={"quant_method": "mxfp4"}), r"quantised \(method mxfp4\)"),
        (config(quantization_config={"load_in_8bit": True}), r"quantised \(method unknown\)"),
        (config(compression_config={"quant_method": "compressed-tensors"}), "quantised"),
        (config(text_config={"quantization_config": {"quant_method": "awq"}}), r"quantised \(method awq\)"),
        (config(attn_implementation="flash_attention_9"), "attn_implementation = 'flash_attention_9'"),
        (config(_attn_implementation="no_such/kernel"), "attn_implementation = 'no_such/kernel'"),
        (config(rope_parameters={"rope_theta": 1e4, "factor": 4.0}), "has a factor, but no rope_type"),
        (config(rope_theta=7.0), "says rope_theta 7.0 and, in rope_parameters, 100000.0"),
        (
            config(rope_scaling={"rope_type": "linear", "factor": 4.0}),
            "says rope_type 'linear' and, in rope_parameters",
        ),
        (config(rope_parameters="yarn"), "cannot be read: .*'rope_parameters'"),
        (config(num_attention_heads=5), "cannot be read: .*not a multiple"),
        (config(hidden_act="nonsense"), "makes no model: KeyError"),
        (config(_attn_implementation=3), "makes no model: AttributeError"),
        (config(dtype="int8"), "dtype = 'torch.int8'"),
        (config(return_dict=False), "return_dict = False"),
        (config(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=0), "sliding_window = 0"),
        (config(architectures=["FooForCausalLM"]), "says FooForCausalLM, .*run as LlamaForCausalLM"),
        (config(auto_map={"AutoModelForCausalLM": "modeling.FooForCausalLM"}), "says FooForCausalLM"),
        (config(attention_edit={"letters": "SF"}), "is a converted model already"),
        (lambda folder: FuyuConfig().save_pretrained(folder), "'fuyu': .* no class for it .* that has a text model"),
        (
            lambda folder: IdeficsConfig(architectures=["IdeficsForVisionText2Text"]).save_pretrained(folder),
            "this is IdeficsForVisionText2Text",
        ),
        (config(model_type="attnedit_llama"), "is a converted model already"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_configs_of_no_teacher(folder: Path, change: Callable[[Path], None], message: str) -> None:
    """Also where there are no weights, as in a dry run."""
    change(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=message) as error:
        teacher_config(str(folder))
    assert len(str(error.value).splitlines()) == 1


def test_a_student_with_an_adapter(tmp_path: Path, make_teacher: Make) -> None:
    edit_model(make_teacher("llama"), GateSWAConfig(window=4)).save_pretrained(tmp_path)
    load(tmp_path)
    adapter(tmp_path)
    with pytest.raises(UserError, match="holds an adapter"):
        load(tmp_path)


def test_padding_that_the_model_has_no_embedding_for(folder: Path, tiny_tokenizer: Any) -> None:
    """Padding is masked wherever it stands, so any token will do."""
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == 301
    assert load_teacher(str(folder))[1].pad_token == "<eos>"
