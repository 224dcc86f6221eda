"""What importing the package costs, and what it registers all the same. Each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import pl_attnedit
from pl_attnedit import GateSWAConfig, edit_model
from pl_attnedit.cli import COMMANDS
from pl_attnedit.moved import MOVED

NO_TORCH = "import sys; assert not {'torch', 'transformers', 'lightning', 'mlflow'} & sys.modules.keys()"
OF_CLASSES = {"convert", "prepare", "fit", "validate"}  # their options are those of Lightning's classes


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_and_help_do_not_wait_for_torch() -> None:
    helps = [["--help"], *([name, "--help"] for name in COMMANDS if name not in OF_CLASSES)]
    printed = _python(
        f"import pl_attnedit\n{NO_TORCH}\nfrom pl_attnedit.cli import main\n"
        f"for arguments in {helps}:\n    assert main(arguments) == 0\n{NO_TORCH}"
    )
    assert all(f"usage: pl-attnedit {' '.join(arguments[:-1])}" in printed for arguments in helps)


@pytest.fixture(scope="module")
def student(make_teacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    edit_model(make_teacher("llama"), GateSWAConfig(window=4), init="copy").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import pl_attnedit\nfrom transformers import AutoConfig",
        "import pl_attnedit\nfrom transformers import LlamaForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport pl_attnedit",
    ],
)
def test_converted_models_load_whatever_is_imported_first(imports: str, student: Path) -> None:
    code = (
        f"{imports}\nimport sys, transformers\n"
        "config = transformers.AutoConfig.from_pretrained(sys.argv[1])\n"
        "print(type(config).__name__, type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    assert _python(code, str(student)).split() == ["EditedLlamaConfig", "EditedLlamaForCausalLM"]


def test_public_names() -> None:
    assert {*pl_attnedit.__all__} <= {*dir(pl_attnedit)}
    assert all(getattr(pl_attnedit, name).__name__ == name for name in pl_attnedit.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = pl_attnedit.no_such_name


def test_modules_are_found_under_the_names_they_had() -> None:
    assert not [new for new in MOVED.values() if find_spec(new) is None]
    for old in ("teachers.source", "trained_on", "eval.report_data"):
        name = f"pl_attnedit.{old}"
        assert import_module(name) is import_module(MOVED[name])

    from pl_attnedit.conversion import convert
    from pl_attnedit.eval.harness import evaluate_pair
    from pl_attnedit.eval.report import write_report

    modules = [function.__module__ for function in (convert, evaluate_pair, write_report)]
    assert modules == [
        f"pl_attnedit.{name}" for name in ("conversion.pipeline", "eval.harness.paired", "eval.report.page")
    ]
