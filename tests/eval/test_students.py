"""Students out of checkpoints are the students that were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_stages import (  # noqa: F401
    LATENT,
    cache_of_tests,
    make_data,
    make_stage1,
    make_stage2,
    make_trainer,
    session_cache,
    teacher_folder,
    tiny_corpus,
    tiny_tokenizer,
)

from pl_attnedit.callbacks import ResumableCheckpoint
from pl_attnedit.errors import UserError
from pl_attnedit.eval.students import load_pair, load_student


@pytest.mark.parametrize(
    ("stage", "precision", "options"),
    [
        ("make_stage1", "32-true", {"targets": LATENT}),
        ("make_stage2", "bf16-mixed", {"train": "layers", "dtype": "bfloat16"}),
        ("make_stage2", "32-true", {"train": "all"}),
        ("make_stage2", "bf16-mixed", {"dtype": "bfloat16"}),
    ],
)
def test_a_checkpoint_is_the_student_that_was_trained(
    stage: str, precision: Any, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    module = request.getfixturevalue(stage)(**options)
    module.hparams["liger"] = False  # as earlier versions' checkpoints have it
    trainer = make_trainer(ResumableCheckpoint(tmp_path), steps=2, enable_checkpointing=True, precision=precision)
    trainer.fit(module, request.getfixturevalue("make_data")())
    student = load_student(tmp_path / "last-00000002.ckpt")
    trained = module.student.state_dict()
    assert not student.training
    for name, value in student.state_dict().items():
        assert torch.equal(value, trained[name].to(value.dtype)), name
    assert {parameter.dtype for parameter in student.parameters()} == {student.dtype}
    assert student(torch.ones(1, 20, dtype=torch.long)).logits.shape == (1, 20, 300)
    for dtype in ("float32", "bfloat16"):
        cast = load_student(tmp_path / "last-00000002.ckpt", dtype)
        assert {parameter.dtype for parameter in cast.parameters()} == {getattr(torch, dtype)}
        assert cast.model.rotary_emb.inv_freq.dtype == torch.float32
        for name, value in cast.state_dict().items():
            assert torch.equal(value, student.state_dict()[name].to(value.dtype)), name


@pytest.mark.parametrize(
    ("train", "once"),
    [("attention", ("embed_tokens", "mlp", "norm", "lm_head")), ("layers", ("embed_tokens", "lm_head"))],
)
def test_what_did_not_train_is_in_memory_once(
    train: str, once: tuple[str, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    module = request.getfixturevalue("make_stage2")(train=train, learning_rate=1e-2)
    make_trainer(steps=2).fit(module, request.getfixturevalue("make_data")())
    module.student.save_pretrained(tmp_path)
    module.tokenizer.save_pretrained(tmp_path)
    teacher, student, _ = load_pair(tmp_path, request.getfixturevalue("teacher_folder")(), "bfloat16")
    for model in (teacher, student):
        model.to(torch.float32)  # as to another device
    theirs = {id(parameter) for parameter in teacher.parameters()}
    shared = {name for name, parameter in student.named_parameters(remove_duplicate=False) if id(parameter) in theirs}
    assert shared >= {name for name in student.state_dict() if any(part in name for part in once)}
    assert (train == "layers") != any("mlp" in name for name in shared)
    ids, alone = torch.ones(1, 20, dtype=torch.long), load_student(tmp_path, "bfloat16").to(torch.float32)
    assert torch.equal(student(ids).logits, alone(ids).logits)


def test_what_is_no_student(tmp_path: Path) -> None:
    for name, expected in (("last-00000002.ckpt", "no such file"), ("student", "must be the folder")):
        with pytest.raises(UserError, match=expected):
            load_student(tmp_path / name)
