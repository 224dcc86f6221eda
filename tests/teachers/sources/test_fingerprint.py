"""Fingerprints: of the content of a model's files, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from pl_attnedit.teachers.sources import fingerprint
from pl_attnedit.teachers.sources.fingerprint import file_sha256, model_fingerprint


@pytest.fixture
def folder(tmp_path: Path, model: LlamaForCausalLM) -> Path:
    model.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_fingerprint(folder: Path, tmp_path: Path) -> None:
    before = model_fingerprint(folder)
    assert len(before) == 64
    moved = folder.rename(tmp_path / "elsewhere")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9"}))
    assert model_fingerprint(moved) == before
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert model_fingerprint(moved) != before
    (moved / "config.json").write_text(json.dumps(config))
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    assert model_fingerprint(moved) != before


def test_digest_of_a_large_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_DIGEST_CACHED_FROM", 1)
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = file_sha256(file)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "sha256_of", lambda path: pytest.fail("hashed again"))
        assert file_sha256(file) == first
    file.write_bytes(b"other")
    assert file_sha256(file) != first


def test_a_checkpoint_is_known_by_what_its_files_hold(tmp_path: Path) -> None:
    one, shards = tmp_path / "one.ckpt", tmp_path / "shards.ckpt"
    one.write_bytes(b"one")
    assert model_fingerprint(one) == file_sha256(one)
    shards.mkdir()
    found = set()
    for name, content in (("a", b"1"), ("b", b"2"), ("b", b"3")):
        (shards / name).write_bytes(content)
        found.add(model_fingerprint(shards))
    assert len(found) == 3
