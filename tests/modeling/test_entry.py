"""Saved models load in processes that do not import `pl_attnedit`, with trust_remote_code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pl_attnedit import GateSWAConfig, edit_model

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, copy = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("loaded without trust")
assert "pl_attnedit" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(12)[None]).logits, copy + ".pt")
model.save_pretrained(copy)
"""


def test_a_process_without_our_import_loads_and_saves_a_converted_model(make_teacher, tmp_path: Path) -> None:
    student = edit_model(make_teacher("llama"), GateSWAConfig(window=4), init="copy").eval()
    folder, copy = tmp_path / "student", tmp_path / "copy"
    student.save_pretrained(folder)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub")}
    run = [sys.executable, "-c", LOAD, str(folder), str(copy)]
    done = subprocess.run(
        run, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = student(input_ids=torch.arange(12)[None]).logits
    assert torch.equal(torch.load(f"{copy}.pt"), expected)
    # saved again: the same small entry file, not a copy of our source
    assert {path.name for path in copy.glob("*.py")} == {"load_with_pl_attnedit.py"}
    entry = "load_with_pl_attnedit.EditedLlama"
    for path in (folder, copy):
        auto_map = json.loads((path / "config.json").read_text())["auto_map"]
        assert auto_map == {"AutoConfig": f"{entry}Config", "AutoModelForCausalLM": f"{entry}ForCausalLM"}
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is type(student)  # here nothing needs to be trusted
