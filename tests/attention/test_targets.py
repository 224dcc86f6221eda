"""What holds for every target that is named in `TARGETS`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pl_attnedit
from pl_attnedit.attention import INITS, TARGETS

PACKAGE = Path(pl_attnedit.__file__).parent


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_has_a_folder_and_the_inits_that_everything_else_relies_on(name: str) -> None:
    assert TARGETS[name].config_class.type == name
    assert (PACKAGE / "attention" / name).is_dir()
    assert {"random", "calibrated"} <= set(INITS[name])


def test_modules_do_not_import_each_other_in_circles() -> None:
    """Imports inside functions and for type checkers included."""
    files = {
        ".".join(("pl_attnedit", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for folder in (PACKAGE, PACKAGE / "callbacks", PACKAGE / "eval")  # the last two are links
        for path in folder.rglob("*.py")
    }
    needs = {name: _imported(path, files) - {name} for name, path in files.items()}
    while free := {name for name, others in needs.items() if not others & needs.keys()}:
        needs = {name: others for name, others in needs.items() if name not in free}
    assert not needs, sorted(needs)


def _imported(path: Path, files: dict[str, Path]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {whole if (whole := f"{node.module}.{name.name}") in files else node.module for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found & files.keys()
