"""`shape:NAME`: a teacher of a published shape whose weights are made where they are needed."""

from __future__ import annotations

import pytest
import torch

from pl_attnedit import shapes
from pl_attnedit.data.tokens import load_tokenizer
from pl_attnedit.errors import UserError
from pl_attnedit.teachers.sources.resolve import load_teacher, resolve_teacher, teacher_config, teacher_fingerprint

NAME = "shape:tiny-qwen3-moe"


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return load_teacher(NAME, dtype="float32")[0].state_dict()


def test_weights_are_the_same_each_time_and_like_a_fresh_model(weights: dict[str, torch.Tensor]) -> None:
    again, _ = load_teacher(NAME, dtype="float32")
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    assert not again.training
    for name, value in weights.items():
        if "norm" in name:
            assert (value == 1).all()
        else:
            assert abs(value.std().item() - 0.02) < 0.003, name
            assert abs(value.mean().item()) < 0.004, name
    # by a hash: these very numbers on every device
    first = weights["model.embed_tokens.weight"].flatten()[:3]
    torch.testing.assert_close(
        first, torch.tensor([-0.021326130256056786, -0.001943891984410584, 0.007489591836929321]), rtol=0, atol=0
    )


def test_weights_do_not_depend_on_how_many_are_drawn_at_once(
    weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "IN_CACHE", 1000)
    again, _ = load_teacher(NAME, dtype="float32")
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())


def test_bfloat16_is_the_default_and_frequencies_stay_exact() -> None:
    teacher, _ = load_teacher(NAME)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    assert teacher.model.rotary_emb.inv_freq.dtype == torch.float32
    logits = teacher(input_ids=torch.arange(8)[None]).logits
    assert logits.isfinite().all()


def test_each_byte_is_a_token() -> None:
    text = "naïve 東京 text\n"
    tokenizer = load_tokenizer(NAME)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text
    config = teacher_config(NAME)
    assert tokenizer.eos_token_id == config.eos_token_id == 256


def test_fingerprint_is_of_name_seed_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {teacher_fingerprint(NAME), teacher_fingerprint("shape:tiny-qwen3")}
    for name in ("SEED", "VERSION"):
        monkeypatch.setattr(shapes, name, 7)
        found.add(teacher_fingerprint(NAME))
        monkeypatch.undo()
    assert len(found) == 4


def test_unknown_shape_is_refused() -> None:
    for ask in (resolve_teacher, teacher_config, load_tokenizer):
        with pytest.raises(UserError, match=r"'shape:qwen4': there is no such shape; known are .*qwen3-30b-a3b"):
            ask("shape:qwen4")
