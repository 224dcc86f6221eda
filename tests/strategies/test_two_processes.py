"""DDP and FSDP2 on two CPU processes equal one: gradients, checkpoints, saved students, validation."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_trainings
import torch
from forked_ranks import Ranks

from pl_attnedit.callbacks import check_checkpoint, latest_checkpoint
from pl_attnedit.checkpoints.io import read_checkpoint
from pl_attnedit.errors import UserError
from pl_attnedit.eval.students import load_student
from pl_attnedit.modeling import load
from pl_attnedit.teachers.sources.fingerprint import model_fingerprint


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Callable[..., str]) -> Path:
    """Holds the teachers, and what every case has left."""
    path = tmp_path_factory.mktemp("two")
    for family in ("llama", "qwen3", "qwen3_moe"):
        (path / family).symlink_to(teacher_folder(family))
    return path


@pytest.fixture(scope="session")
def two(folder: Path, one: Any) -> Path:
    """All cases run by two processes."""
    for case in small_trainings.CASES:
        one(case)  # whose checkpoints the two load
    Ranks(folder, small_trainings.all_runs, folder).end(240)
    return folder


@pytest.fixture(scope="session")
def one(folder: Path) -> Callable[[str], dict[str, Any]]:
    """`one(case)`: the case by one process."""
    found: dict[str, Any] = {}

    def get(case: str) -> dict[str, Any]:
        if case not in found:
            found[case] = small_trainings.train(case, folder, folder / f"{case}-one")
        return found[case]

    return get


case = pytest.mark.parametrize("case", list(small_trainings.CASES))
runs = pytest.mark.parametrize(("case", "strategy"), small_trainings.RUNS)


def of(two: Path, case: str, strategy: str, rank: int = 0) -> dict[str, Any]:
    return torch.load(two / f"{case}-{strategy}" / f"found-{rank}.pt", weights_only=True)


@runs
def test_gradients_equal_those_of_one_process(two: Path, one: Any, case: str, strategy: str) -> None:
    expected, found = one(case)["gradients"], of(two, case, strategy)["gradients"]
    assert len(expected) == len(found) == small_trainings.STEPS
    for step, (plain, ours) in enumerate(zip(expected, found, strict=True)):
        assert plain.keys() == ours.keys(), step
        for name, gradient in plain.items():
            error = (ours[name] - gradient).norm() / gradient.norm()
            # later steps start from weights that Adam has moved apart by rounding
            assert error < (1e-5 if step == 0 else 1e-3), (step, name)
    trained = [len(step) for step in expected]
    assert (trained[0] < trained[-1]) == (case not in ("own-path", "experts"))  # unfrozen on the way


@runs
def test_validation_and_logged_loss_equal_those_of_one_process(two: Path, one: Any, case: str, strategy: str) -> None:
    expected = one(case)
    for rank in range(2):
        found = of(two, case, strategy, rank)
        assert found["validation"].keys() == expected["validation"].keys()
        for name, value in expected["validation"].items():
            torch.testing.assert_close(found["validation"][name], value, rtol=1e-3, atol=1e-5, msg=name)


@case
def test_only_fsdp2_shards_the_teacher(two: Path, one: Any, case: str) -> None:
    whole = one(case)["sizes"]
    assert of(two, case, "ddp")["sizes"] == whole
    shards = [of(two, case, "fsdp2", rank)["sizes"] for rank in range(2)]
    used = [a + b for a, b in zip(*shards, strict=True)]
    assert used == whole
    assert max(shards[0]) < max(whole)


@case
def test_stage_1_gathers_nothing_in_its_backward_pass(two: Path, case: str) -> None:
    """Its gradients are there by then. FSDP2 would gather layers that nobody reads, and keep them until the pass ends."""
    gathers = of(two, case, "fsdp2")["gathers"]
    assert len(gathers) == small_trainings.STEPS * small_trainings.CASES[case]["accumulate"]
    assert all((count > 0) == (small_trainings.CASES[case]["stage"] == "stage2") for count in gathers)


def checkpoint_of(path: Path) -> dict[str, Any]:
    return read_checkpoint(path)


def assert_same_content(found: dict[str, Any], expected: dict[str, Any], **tolerance: float) -> None:
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, **tolerance, msg=name)
    [ours], [theirs] = found["optimizer_states"], expected["optimizer_states"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(ours["state"][index][name], value, **tolerance, msg=f"{index} {name}")
    assert [group["params"] for group in ours["param_groups"]] == [group["params"] for group in theirs["param_groups"]]
    assert [group["lr"] for group in ours["param_groups"]] == [group["lr"] for group in theirs["param_groups"]]
    assert found["global_step"] == expected["global_step"] == small_trainings.STEPS
    ours, theirs = (json.dumps(each["pl_attnedit"], default=torch.Tensor.tolist) for each in (found, expected))
    assert ours == theirs


@runs
def test_checkpoints_have_the_content_of_one_process(two: Path, one: Any, case: str, strategy: str) -> None:
    one(case)
    found, expected = (checkpoint_of(small_trainings.last(two / f"{case}-{who}")) for who in (strategy, "one"))
    assert_same_content(found, expected, rtol=1e-3, atol=1e-4)
    assert len(found["pl_attnedit_random_states"]) == 2


@runs
def test_two_processes_load_a_checkpoint_of_one(two: Path, case: str, strategy: str) -> None:
    loaded, source = (
        checkpoint_of(two / f"{case}-{strategy}" / "loaded.ckpt"),
        checkpoint_of(small_trainings.last(two / f"{case}-one")),
    )
    assert_same_content(loaded, source, rtol=0, atol=0)


@runs
def test_one_process_loads_a_checkpoint_of_two(two: Path, case: str, strategy: str) -> None:
    source = small_trainings.last(two / f"{case}-{strategy}")
    loaded = two / f"{case}-{strategy}" / "loaded-by-one.ckpt"
    small_trainings.load_and_save(case, two, source, loaded)
    assert_same_content(checkpoint_of(loaded), checkpoint_of(source), rtol=0, atol=0)


@runs
def test_the_saved_student_is_that_of_the_checkpoint(two: Path, case: str, strategy: str) -> None:
    student = load(two / f"{case}-{strategy}" / "student").state_dict()
    saved = checkpoint_of(small_trainings.last(two / f"{case}-{strategy}"))["state_dict"]
    for name, value in saved.items():
        part, _, rest = name.partition(".")
        if part == "attention":
            index, _, rest = rest.partition(".")
            rest = f"model.layers.{index}.self_attn.{rest}"
        assert torch.equal(student[rest], value), name


@pytest.mark.parametrize("case", ["layers", "attention", "all"])  # of which all that is not the teacher's trains
def test_a_sharded_checkpoint_is_a_folder_and_can_be_evaluated(two: Path, one: Any, case: str) -> None:
    one(case)
    folder = two / f"{case}-fsdp2"
    newest = small_trainings.last(folder)
    assert latest_checkpoint(folder) == newest
    assert sorted(path.name for path in newest.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]
    assert check_checkpoint(folder / "best.ckpt")["stage"] == small_trainings.CASES[case]["stage"]
    assert not [path.name for path in folder.iterdir() if path.name.endswith((".partial", ".replaced"))]
    found, saved = load_student(newest).state_dict(), load(folder / "student").state_dict()
    assert found.keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in found.items())
    assert model_fingerprint(newest) != model_fingerprint(folder / "best.ckpt")


def test_a_sharded_checkpoint_that_is_not_whole_or_not_ours_is_passed_over(two: Path, tmp_path: Path) -> None:
    whole = small_trainings.last(two / "layers-fsdp2")
    for name in ("last-00000001.ckpt", "last-00000002.ckpt"):
        shutil.copytree(whole, tmp_path / name)
    shard = tmp_path / "last-00000002.ckpt" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"last-00000002.ckpt.*broken or truncated"):
        assert latest_checkpoint(tmp_path) == tmp_path / "last-00000001.ckpt"
    shard.unlink()
    with pytest.raises(UserError, match=r"last-00000002.ckpt.*broken or truncated"):
        check_checkpoint(tmp_path / "last-00000002.ckpt")
    (tmp_path / "last-00000001.ckpt" / ".metadata").write_bytes(pickle.dumps(os.getcwd))  # what a pickle can run
    with pytest.raises(UserError, match=r"is not a checkpoint of pl_attnedit \(\w+.getcwd"):
        check_checkpoint(tmp_path / "last-00000001.ckpt")


def test_a_killed_process_ends_the_other_with_a_message(folder: Path, tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, small_trainings.killed_run, folder)
    survivor, killed = ranks.processes
    killed.join(200)
    assert killed.exitcode == -signal.SIGKILL
    began = time.monotonic()
    survivor.join(60)
    assert time.monotonic() - began < 10
    text = ranks.outputs[0].read_text()
    assert survivor.exitcode == 1, text
    checkpoint = small_trainings.last(folder / "killed")
    assert "process 1 of 2 is gone" in text, text
    assert checkpoint.name in text, text
    small_trainings.load_and_save("layers", folder, checkpoint, folder / "resumed.ckpt")
    assert checkpoint_of(folder / "resumed.ckpt")["global_step"] == small_trainings.STEPS
