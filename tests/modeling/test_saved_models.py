"""Converted models on disk: Hugging Face's own save and load, and clear errors for folders that are something else."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, pipeline

from pl_attnedit import GatedDeltaNetConfig, GateSWAConfig, MLAConfig, UserError, edit_model, load

Teachers = Callable[..., PreTrainedModel]
Ids = Callable[..., torch.Tensor]
PLAN: dict[str, Any] = {
    "targets": {
        "S": GateSWAConfig(window=4, sinks=2, learned_sink=True),
        "M": MLAConfig(8, 4, q_lora_rank=6),
        "D": GatedDeltaNetConfig(),
    },
    "pattern": "SMFD",
}


def trained(teacher: PreTrainedModel) -> PreTrainedModel:
    """A student whose weights all differ from their init, as after training."""
    torch.manual_seed(0)
    student = edit_model(copy.deepcopy(teacher), **PLAN, init="random")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return student.eval()


def assert_same_weights(one: PreTrainedModel, other: PreTrainedModel) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_survive_bit_for_bit(
    teacher: PreTrainedModel, tmp_path: Path, make_ids: Ids, dtype: torch.dtype
) -> None:
    student = trained(teacher).to(dtype)
    student.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert {file.suffix for file in tmp_path.iterdir()} <= {".json", ".safetensors", ".py", ".md"}, "no pickle"
    auto = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    ours = load(tmp_path, dtype=dtype)
    assert type(auto) is type(ours) is type(student)
    assert not ours.training
    assert ours.edit_plan == student.edit_plan
    for loaded in (auto.eval(), ours):
        assert_same_weights(loaded, student)
        tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert tied == teacher.config.tie_word_embeddings
        if dtype == torch.float32:  # `.to(bfloat16)` rounds the student's RoPE frequencies, loading does not
            with torch.no_grad():
                got, expected = loaded(make_ids(1, 12)).logits, student(make_ids(1, 12)).logits
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_pickled_student_is_the_same(teacher: PreTrainedModel, make_ids: Ids) -> None:
    student = trained(teacher)
    again = pickle.loads(pickle.dumps(student))
    assert [type(each) for each in again.modules()] == [type(each) for each in student.modules()]
    assert torch.equal(again(make_ids(1, 12)).logits, student(make_ids(1, 12)).logits)


def test_shards_and_device_map(make_teacher: Teachers, tmp_path: Path) -> None:
    student = trained(make_teacher("qwen3"))
    student.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_weights(load(tmp_path), student)
    assert_same_weights(load(tmp_path, device_map="auto"), student)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match=r"path = .*: its weights cannot be read"):
        load(tmp_path)


def test_a_loaded_model_can_be_saved_again(make_teacher: Teachers, tmp_path: Path) -> None:
    student = trained(make_teacher("qwen2"))
    student.save_pretrained(tmp_path / "first")
    load(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert_same_weights(load(tmp_path / "second"), student)


def test_rope_theta_is_readable_for_transformers_4_and_checked(make_teacher: Teachers, tmp_path: Path) -> None:
    trained(make_teacher("qwen3")).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1000000.0
    file.write_text(json.dumps({**config, "rope_theta": 10000.0}))
    with pytest.raises(UserError, match=r"rope_theta = 10000.0: .*rope_parameters.rope_theta = 1000000.0"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    del config["rope_parameters"]  # as transformers 4 writes it
    file.write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 1000000.0


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "path = .*has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "path = .*config.json cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "path = .*its weights cannot be read"),
        (truncate, "path = .*its weights cannot be read"),
        (
            lambda folder: edit_config(folder, attention_edit={"layers": "SSSS", "targets": {"S": {"type": "ring"}}}),
            "target type = 'ring': known targets are gate_swa",
        ),
        (
            lambda folder: edit_config(
                folder, attention_edit={"layers": "FFFS", "targets": {"S": {"type": "gate_swa", "window": 4}}}
            ),
            "path = .*its weights do not fit its config.json: ",
        ),
        (
            lambda folder: edit_config(folder, num_hidden_layers=3),
            "attention_edit = 'SMFD': needs a letter for each of 3",
        ),
    ],
)
def test_broken_folders(make_teacher: Teachers, tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    trained(make_teacher("llama")).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_teachers_folder_is_no_converted_model(make_teacher: Teachers, tmp_path: Path) -> None:
    make_teacher("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds a model of type 'llama', which is not a converted model"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"has no config\.json"):
        load(tmp_path / "nowhere")


def test_text_generation_pipeline(make_teacher: Teachers, tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w1", padding_side="left")
    student = trained(make_teacher("qwen3"))
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts = ["w3 w9 w20 w7 w7 w11", "w5 w40"]
    generator = pipeline("text-generation", model=str(tmp_path))
    assert type(generator.model) is type(student)
    options = {"max_new_tokens": 9, "return_full_text": False}
    batched = [out[0]["generated_text"] for out in generator(prompts, batch_size=2, do_sample=False, **options)]
    for prompt, text in zip(prompts, batched):
        ids = student.generate(tokenizer(prompt, return_tensors="pt").input_ids, max_new_tokens=9, do_sample=False)
        assert text.split() == tokenizer.decode(ids[0]).split()[-9:]
    torch.manual_seed(0)
    sampled = generator(prompts[0], do_sample=True, temperature=2.0, **options)[0]["generated_text"]
    assert sampled != batched[0]
