"""The documentation builds without a warning, its links lead somewhere, and its commands exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pl_attnedit.cli import main

ROOT = Path(__file__).parents[1]


def test_pages_build_without_a_warning_and_need_no_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([*command, "--site-dir", str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    elsewhere = re.compile(r"<(?:script|img|link)[^>]*(?:src|href)=.?(?:https?:)?//[^ >]+")
    for page in tmp_path.rglob("*.html"):
        assert not elsewhere.findall(page.read_text("utf-8")), page


def test_readmes_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", (ROOT / "README.md").read_text("utf-8"))
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def commands() -> list[str]:
    """What follows `pl-attnedit` in the code of README and docs."""
    found = []
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text("utf-8").replace("\\\n", "")  # a command may go over several lines
        found += re.findall(r"^ {4}[^`\n]*?pl-attnedit (.+)$", text, re.MULTILINE)
        found += re.findall(r"`[^`\n]*?pl-attnedit ([^`\n]+)`", text)
    return found


def test_commands_and_their_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    helps: dict[tuple[str, ...], set[str]] = {}
    for command in commands():
        words = shlex.split(command, comments=True)
        options = [re.split("[.=]", word)[0] for word in words if re.match("--?[a-z]", word)]
        named = tuple(words[: 2 if words[0] == "bench" else 1])
        if named == ("COMMAND",):
            continue
        if named not in helps:
            assert main([*named, "--help"]) == 0, command
            helps[named] = set(re.findall(r"--?[a-z][\w-]*", capsys.readouterr().out))
        assert set(options) <= helps[named], command
        for path in re.findall(r"configs/[\w/.-]+\.yaml", command):
            assert (ROOT / path).is_file(), command
    assert len(helps) > 15
