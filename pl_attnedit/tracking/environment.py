"""What a run was made with: code, packages, machine, data, teacher, settings."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_GIT_DIRTY, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE

from pl_attnedit.files import json_text
from pl_attnedit.tracking.client import WORKING_FOLDER_TAG
from pl_attnedit.tracking.run import TrackedRun

_PACKAGES = (
    "pl_attnedit",
    "torch",
    "torch_npu",
    "lightning",
    "transformers",
    "mlflow",
    "lm-eval",
    "datasets",
    "safetensors",
)


def log_environment(
    run: TrackedRun,
    *,
    config: Mapping[str, Any] | None = None,
    data_fingerprint: str | None = None,
    teacher_fingerprint: str | None = None,
    folder: str | Path = ".",
) -> None:
    """Log what is needed to repeat a run.

    Tags: `source_tags`, ``data_fingerprint``, ``teacher_fingerprint``, ``pl_attnedit.working_folder``; artifact
    ``environment.json`` (Python, packages, machine); the config, see `log_config`.

    Args:
        run: the run to write to.
        config: the resolved settings.
        data_fingerprint, teacher_fingerprint: as computed by the data module and the teacher source.
        folder: the folder whose git commit counts, by default the working folder.
    """
    tags = {
        **source_tags(folder),
        "data_fingerprint": data_fingerprint,
        "teacher_fingerprint": teacher_fingerprint,
        WORKING_FOLDER_TAG: str(Path.cwd()),
    }
    run.set_tags({key: value for key, value in tags.items() if value is not None})
    run.log_text(json_text(environment()), "environment.json")
    if config is not None:
        log_config(run, config)


def log_config(run: TrackedRun, config: Mapping[str, Any], name: str = "config.yaml") -> None:
    """Log settings in full as an artifact, and one by one as parameters under dotted names."""
    run.log_text(yaml.safe_dump(dict(config), sort_keys=False), name)
    run.log_params(config)


def environment() -> dict[str, Any]:
    """Python, package versions, processor count and accelerators of this machine, ready for JSON."""
    packages = {}
    for package in _PACKAGES:
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            packages[package] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "accelerators": [kind.get_device_name(i) for kind in _device_kinds() for i in range(kind.device_count())],
        "packages": packages,
    }


def _device_kinds() -> list[Any]:
    """torch.cuda, and torch.npu where a run has loaded torch_npu."""
    return [torch.cuda, *([torch.get_device_module("npu")] if hasattr(torch, "npu") else [])]


def source_tags(folder: str | Path = ".") -> dict[str, str]:
    """What MLflow shows as the source of a run: the command, and the git commit of `folder`, else that of this package; no
    commit where neither is in a repository."""
    script, package = Path(sys.argv[0]), Path(__file__).parents[1]
    ours = script.name == "pl-attnedit" or script.absolute().is_relative_to(package)
    name = " ".join(["pl-attnedit", *sys.argv[1:2]]) if ours else script.name
    tags = {MLFLOW_SOURCE_NAME: name or "python", MLFLOW_SOURCE_TYPE: "LOCAL"}
    if commit := git_commit(folder) or git_commit(package):
        clean = commit.removesuffix("-dirty")
        tags |= {MLFLOW_GIT_COMMIT: clean, MLFLOW_GIT_DIRTY: str(commit != clean).lower()}
    return tags


def git_commit(folder: str | Path = ".") -> str | None:
    """The commit checked out in ``folder``, with ``-dirty`` where tracked files differ; None outside a repository."""
    try:
        command = ["git", "-C", str(folder), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    [commit] = [line.split()[-1] for line in lines if line.startswith("# branch.oid ")]
    if commit == "(initial)":  # there is none yet
        return None
    return commit if all(line.startswith("#") for line in lines) else f"{commit}-dirty"
