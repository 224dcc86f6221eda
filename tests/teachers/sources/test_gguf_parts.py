"""A GGUF in several files is the model of the whole file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from pl_attnedit.errors import UserError
from pl_attnedit.teachers.sources.resolve import load_teacher

PACKAGE = "attnedit_tiny_gguf"


def assert_is(name: str, model: LlamaForCausalLM) -> None:
    loaded, _ = load_teacher(name)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key
    assert loaded.config.rope_parameters["rope_theta"] == model.config.rope_parameters["rope_theta"]


def test_shards_of_llama_cpp(model: LlamaForCausalLM, backend: Tokenizer, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", model, backend, split_max_tensors=8)
    shards = sorted(tmp_path.glob("*.gguf"))
    assert [shard.name for shard in shards] == [f"tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert_is(str(shards[0]), model)
    assert_is(str(shards[2]), model)
    shards[0].rename(tmp_path / "first.gguf")
    with pytest.raises(UserError, match=r"is one of 3 files; their names must be NAME-00001-of-00003\.gguf"):
        load_teacher(str(tmp_path / "first.gguf"))
    with pytest.raises(UserError, match=r"is one of 3 files, of which there is no tiny-00001-of-00003\.gguf beside it"):
        load_teacher(str(shards[1]))


def test_shards_that_do_not_belong_together(model: LlamaForCausalLM, backend: Tokenizer, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", model, backend, split_max_tensors=11)
    first, second = sorted(tmp_path.glob("*.gguf"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=r"its shards have 22 tensors where 21 are promised"):
        load_teacher(str(first))


@pytest.fixture
def package(model: LlamaForCausalLM, backend: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of its own for each of three pieces, and one with the sum of the whole."""
    write_gguf(tmp_path / "tiny.gguf", model, backend)
    content = (tmp_path / "tiny.gguf").read_bytes()
    size = len(content) // 3 + 1
    site = tmp_path / "site"
    for i in range(3):
        folder = site / f"{PACKAGE}_part{i + 1}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise ImportError('needs a runtime')")
        (folder / f"tiny.gguf.part0{i}").write_bytes(content[i * size : (i + 1) * size])
    whole = site / PACKAGE / "data"
    whole.mkdir(parents=True)
    (whole.parent / "__init__.py").write_text("raise ImportError('needs a runtime')")
    (whole / "SHA256SUMS").write_text(f"{hashlib.sha256(content).hexdigest()}  tiny.gguf\n")
    monkeypatch.syspath_prepend(str(site))
    return site


def test_pieces_in_packages(package: Path, model: LlamaForCausalLM) -> None:
    assert_is("package:attnedit-tiny-gguf", model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda file: file.write_bytes(b"x" + file.read_bytes()[1:]),
            "do not give the file of SHA256SUMS",
        ),
        (lambda file: file.unlink(), "has the pieces 0, 2 of tiny.gguf, and not the others"),
    ],
    ids=["changed", "missing"],
)
def test_pieces_that_are_not_all(package: Path, change: object, message: str) -> None:
    change(package / f"{PACKAGE}_part2" / "data" / "tiny.gguf.part01")  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        load_teacher("package:attnedit-tiny-gguf")
