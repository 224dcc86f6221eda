"""Every name of torch_npu in our sources against the real wheel, since nobody here has the hardware. Opt-in: `-m npu_wheel`.

The wheel is `PL_ATTNEDIT_NPU_WHEEL`, else the one for the installed torch, fetched from the package index.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from npu_operator import npu_fusion_attention
from npu_wheel import Use, Wheel, uses_in
from simulated_npu import SimulatedNPU

pytestmark = [pytest.mark.npu_wheel, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
FOLDERS = ("pl_attnedit", "callbacks", "eval", "tests")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("PL_ATTNEDIT_NPU_WHEEL")
    if given is not None:
        return Path(given)
    folder = tmp_path_factory.mktemp("wheel")
    wanted = f"torch_npu=={torch.__version__.split('+')[0]}.*"
    platforms = [f"--platform=manylinux_{version}_x86_64" for version in ("2_28", "2_24", "2_17")]
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.11", *platforms, "--dest", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, wanted], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{wanted} cannot be fetched: {done.stderr[-300:]}")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(path: Path) -> Wheel:
    return Wheel(path)


@pytest.fixture(scope="module")
def uses() -> list[Use]:
    return uses_in(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py")))


def test_every_name_is_there(wheel: Wheel, uses: list[Use]) -> None:
    names = {use.name for use in uses}
    assert "torch_npu.npu_fusion_attention" in names
    missing = [f"{use.name} ({use.where})" for use in uses if not wheel.has(use.name)]
    print(f"\n{len(uses)} uses of {len(names)} names: {', '.join(sorted(names))}")
    assert not missing


def test_every_argument_is_there(wheel: Wheel, uses: list[Use]) -> None:
    calls = [use for use in uses if use.arguments is not None]
    wrong, unread = [], set()
    for use in calls:
        parameters = wheel.parameters(use.name)
        if parameters is None:
            unread.add(use.name)
            continue
        unknown = [] if "**" in parameters else [name for name in use.keywords if name not in parameters]
        if unknown or ("*" not in parameters and (use.arguments or 0) > len(parameters)):
            wrong.append(f"{use.name} ({use.where}): {use.arguments} positional, {use.keywords} against {parameters}")
    print(f"\n{len(calls)} calls; without a signature to read: {', '.join(sorted(unread)) or 'none'}")
    assert not wrong


def test_the_stand_in_has_the_operators_signature(wheel: Wheel) -> None:
    """So what the other tests pass to the stand-in by keyword is what the operator takes."""
    ours = inspect.signature(npu_fusion_attention).parameters
    schema = wheel.schema("npu_fusion_attention")
    assert schema is not None
    for (name, default), parameter in zip(schema, ours.values()):  # older wheels have fewer
        assert parameter.name == name
        if default is None:
            assert parameter.default is inspect.Parameter.empty
        else:
            assert parameter.default == ast.literal_eval(default)
    used = {"atten_mask", "scale", "pre_tockens", "next_tockens", "sparse_mode"}
    assert used <= {name for name, _ in schema}


def test_the_simulated_device_has_real_functions_only(wheel: Wheel) -> None:
    functions = {name: value for name, value in vars(SimulatedNPU).items() if callable(value) and name != "__init__"}
    for name, function in functions.items():
        assert wheel.has(f"torch_npu.npu.{name}"), name
        real = wheel.parameters(f"torch_npu.npu.{name}")
        ours = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
        assert real is None or ours == real[: len(ours)], name
    print(f"\n{len(functions)} functions: {', '.join(sorted(functions))}")


def test_environment_variables_are_read_by_torch_npu(wheel: Wheel) -> None:
    ours = {
        name
        for folder in FOLDERS[:-1]
        for file in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"\b(?:ASCEND|HCCL)_[A-Z_]+", file.read_text("utf-8"))
    }
    assert "ASCEND_RT_VISIBLE_DEVICES" in ours
    assert [name for name in ours if not wheel.mentions(name)] == []


def test_a_name_that_was_invented_is_found(wheel: Wheel, tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "import torch\nimport torch_npu\nfrom torch_npu.npu.utils import get_cann_versions\nnpu = torch.npu\n"
        "npu.device_counts()\ntorch_npu.npu_fusion_attentions()\ntorch.npu.mem_get_info(devices=0)\ntorch.npu.Stream.waits()\n"
    )
    uses = uses_in([source])
    missing = {use.name.removeprefix("torch_npu.") for use in uses if not wheel.has(use.name)}
    assert missing == {"npu.utils.get_cann_versions", "npu.device_counts", "npu_fusion_attentions", "npu.Stream.waits"}
    [call] = [use for use in uses if use.name.endswith("mem_get_info")]
    assert not set(call.keywords) <= set(wheel.parameters(call.name) or [])


@pytest.mark.parametrize("autoload", ["1", "0"])
def test_torch_npu_without_cann(path: Path, autoload: str, tmp_path: Path) -> None:
    """On a machine that has torch_npu and neither CANN nor a device every command says so in its last line."""
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    places = os.pathsep.join([str(ROOT), str(tmp_path)])
    environment = {**os.environ, "PYTHONPATH": places, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    command = [sys.executable, "-m", "pl_attnedit.cli", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: torch_npu is installed and cannot be imported")
    assert "libhccl.so" in last
    assert "set_env.sh" in last
