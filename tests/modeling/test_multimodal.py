"""Multimodal checkpoints: the text model is the teacher, and the student is multimodal again."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from multimodal import IMAGE, ROWS, build_whole, question
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from pl_attnedit import GateSWAConfig, MLAConfig, UserError, edit_model, load
from pl_attnedit.distillation.engine.decoder import enter_decoder
from pl_attnedit.distillation.engine.forward_check import check_forward
from pl_attnedit.modeling.edit import assemble
from pl_attnedit.modeling.hf import put_back
from pl_attnedit.modeling.weights import copy_weights
from pl_attnedit.teachers import editable_layers
from pl_attnedit.teachers.multimodal import check_text, text_config, text_of
from pl_attnedit.teachers.sources.resolve import read_model, teacher_config


@pytest.fixture(scope="module", params=sorted(ROWS))
def row(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(row: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a multimodal teacher, with the names of published files."""
    path = tmp_path_factory.mktemp(row)
    build_whole(row).save_pretrained(path)
    return path


@torch.no_grad()
def logits(model: PreTrainedModel, **given: Any) -> torch.Tensor:
    return model(**given).logits


def test_a_window_longer_than_the_text_sees_what_the_teacher_sees(row: str, folder: Path) -> None:
    teacher, asked = read_model(folder, "auto", "cpu"), question(row)
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    answer = logits(whole, **asked)
    blind = {**asked, "pixel_values": -asked["pixel_values"]}
    assert (logits(whole, **blind) - answer).abs().max() > 1e-2, "the image must matter"
    student = edit_model(teacher, GateSWAConfig(64), layers=editable_layers(teacher_config(str(folder))))
    check_forward(teacher, student)
    edited, _ = put_back(student, folder, student.state_dict())
    torch.testing.assert_close(logits(edited, **asked), answer, atol=1e-5, rtol=0.0)


def test_a_saved_student_reads_images(row: str, folder: Path, tmp_path: Path) -> None:
    """The rest is the teacher's; the text model alone is the student; cached decoding equals the whole pass."""
    teacher, asked = read_model(folder, "auto", "cpu"), question(row)
    targets = {"S": GateSWAConfig(6, sinks=2), "M": MLAConfig(24, 4, latent_norm=False)}
    student = edit_model(teacher, targets, pattern="SM", calibration=[torch.randint(1, IMAGE, (4, 48))])
    whole, state = put_back(student, folder, student.state_dict())
    whole.save_pretrained(tmp_path, state_dict=state)
    loaded: Any
    loaded, found = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(loaded)
    before, after = AutoModelForImageTextToText.from_pretrained(folder).state_dict(), loaded.state_dict()
    rest = [name for name in before if not name.startswith(("model.language_model", "model.text_model", "lm_head"))]
    assert len(rest) > 5
    assert all(torch.equal(before[name], after[name]) for name in rest)

    answer = logits(loaded, **asked)
    torch.testing.assert_close(answer, logits(whole, **asked), atol=1e-5, rtol=0.0)
    written = loaded.generate(
        **asked, max_new_tokens=8, do_sample=False, suppress_tokens=list(range(IMAGE, IMAGE + 4)),
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    longer = {**asked, "input_ids": written.sequences[:, :-1]}
    for name in {"token_type_ids", "mm_token_type_ids"} & asked.keys():
        longer[name] = torch.nn.functional.pad(asked[name], (0, 7))
    torch.testing.assert_close(logits(loaded, **longer)[0, -8:], torch.cat(written.logits), atol=1e-4, rtol=1e-4)

    text = {"input_ids": torch.randint(1, IMAGE, (2, 18), generator=torch.manual_seed(0))}
    alone = load(tmp_path)
    assert type(alone) is type(student)
    assert torch.equal(logits(alone, **text), logits(student, **text))
    again = assemble(teacher, student.edit_plan)
    copy_weights(again, tmp_path, torch.float32)
    assert torch.equal(logits(again, **text), logits(student, **text))


def test_latents_turn_by_the_places_in_an_image(tmp_path: Path) -> None:
    """A latent with room for all that one head of keys and values has equals the teacher, at M-RoPE's positions too."""
    build_whole("qwen2_5_vl", num_key_value_heads=1).save_pretrained(tmp_path)
    teacher, asked = read_model(tmp_path, "auto", "cpu"), question("qwen2_5_vl")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path)
    text = [torch.randint(1, IMAGE, (8, 64), generator=torch.manual_seed(0))]
    student = edit_model(teacher, MLAConfig(16, 8, latent_norm=False), calibration=text)
    edited, _ = put_back(student, tmp_path, student.state_dict())
    torch.testing.assert_close(logits(edited, **asked), logits(whole, **asked), atol=1e-4, rtol=0.0)
    places = torch.arange(asked["input_ids"].shape[1]).expand(4, 1, -1)
    assert (logits(whole, **asked, position_ids=places) - logits(whole, **asked)).abs().max() > 1


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_documents_of_one_sequence_do_not_see_each_other(family: str) -> None:
    """M-RoPE takes the positions for its masks apart from those for RoPE."""
    whole = build_whole(family)
    teacher: Any = text_of(whole, text_config(whole.config))
    embedded = torch.randn(1, 9, 32)
    _, calls = enter_decoder(teacher.model, embedded, torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
    apart = calls[-1]["attention_mask"][0, 0]
    assert apart.shape == (9, 9)
    assert not apart[4:, :4].any()
    assert apart[8, 4:].all()


def test_others_are_refused_by_name() -> None:
    """A text model that answers otherwise, or has another form."""
    whole: Any = build_whole("llava")
    text: Any = text_of(whole, text_config(whole.config))
    check_text(whole, text)
    text.lm_head = deepcopy(whole.lm_head)
    text.lm_head.weight.data *= 2
    with pytest.raises(UserError, match="the text model in LlavaForConditionalGeneration alone is off by 100"):
        check_text(whole, text)
    whole.lm_head = torch.nn.Sequential()
    with pytest.raises(UserError, match="'llava': its text model has no Linear as lm_head"):
        text_of(whole, text_config(whole.config))
