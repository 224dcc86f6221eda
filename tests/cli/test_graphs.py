"""What torch.compile makes of a whole conversion: one graph for each kind of layer, shape and mode; it never gives up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_stages import LATENT, WINDOW
from torch._dynamo.testing import CompileCounterWithBackend

from pl_attnedit.cli import main


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Of all that is compiled, which here is only traced."""
    counter, plain = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: plain(function, backend=counter, **options))
    torch._dynamo.reset()
    return counter


def test_graphs_of_a_whole_conversion_and_evaluation(
    graphs: CompileCounterWithBackend,
    recipe: Callable[..., Path],
    make_teacher: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each kind of layer is there twice, and compiled no more often than if it were there once."""
    monkeypatch.chdir(tmp_path)
    make_teacher("llama", vocab_size=300, num_hidden_layers=6).save_pretrained("teacher")
    tiny_tokenizer.save_pretrained("teacher")
    stage = {"steps": 2, "learning_rate": 1e-3, "options": {"compiled": True}}
    path = recipe(teacher="teacher", targets={"S": WINDOW, "M": LATENT}, pattern="SMF", stage1=stage, stage2=stage)
    assert main(["convert", "-c", str(path)]) == 0
    found = graphs.frame_count
    assert 0 < found <= 32
    Path("other.txt").write_text("\n\n".join(f"A text of {n}. " + "words and more of them " * n for n in range(9, 40)))
    Path("suite.yaml").write_text("name: small\nmax_length: 64\ntext: {documents: 8, document_chars: 200, cloze: 8}\n")
    options = ["--teacher", "teacher", "--suite", "suite.yaml", "--text", "other.txt"]
    assert main(["eval", "runs/tiny/student", *options]) == 0
    assert graphs.frame_count == found  # texts of many lengths, and nothing is compiled
