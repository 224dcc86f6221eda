"""Attention and doctor on simulated Ascend NPUs, whose operator is a stand-in written from its documentation."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from simulated_npu import on_simulated_npus
from transformers import PreTrainedModel

from pl_attnedit import GateSWAConfig, MLAConfig, edit_model
from pl_attnedit.attention.kernels.npu import SWITCH
from pl_attnedit.cli import main
from pl_attnedit.conversion import doctor

TRAINERS = Path(__file__).parents[2] / "configs" / "trainer"


def same_as_on_cpu(student: Any, switch: str, modes: set[int]) -> None:
    """Whole texts, documents, decoding, gradients."""
    import torch_npu

    os.environ[SWITCH] = switch
    calls, operator = [], torch_npu.npu_fusion_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["sparse_mode"])
        return operator(*args, **kwargs)

    torch_npu.npu_fusion_attention = counted
    ids = torch.randint(1, 60, (2, 40))
    places = torch.cat([torch.arange(25), torch.arange(15)]).expand(2, -1)  # two documents

    def run(device: str) -> list[torch.Tensor]:
        student.to(device)
        student.zero_grad()
        here = ids.to(device)
        whole = student(input_ids=here, use_cache=False).logits
        whole.log_softmax(-1)[..., 0].mean().backward()
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        with torch.no_grad():
            packed = student(input_ids=here, position_ids=places.to(device), use_cache=False).logits
            cache = student(input_ids=here[:, :-1], use_cache=True).past_key_values
            last = student(input_ids=here[:, -1:], past_key_values=cache).logits
        return [tensor.detach().cpu() for tensor in (whole, packed, last, *gradients)]

    expected = run("cpu")
    assert not calls
    for ours, plain in zip(run("npu"), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert set(calls) == modes


@pytest.mark.parametrize(("switch", "modes"), [("fused", {1, 2, 4}), ("sdpa", set())])
def test_a_student_computes_what_it_does_on_the_cpu(
    make_teacher: Callable[..., PreTrainedModel], switch: str, modes: set[int], tmp_path: Path
) -> None:
    """MLA, windows with and without sinks, a full layer."""
    targets = {"M": MLAConfig(16, 8), "S": GateSWAConfig(8, sinks=1), "W": GateSWAConfig(8)}
    torch.manual_seed(0)
    student = edit_model(make_teacher("qwen3"), targets, pattern="MSWF", init="random")
    on_simulated_npus(tmp_path, same_as_on_cpu, student, switch, modes)


def examined() -> None:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(["doctor", "-c", str(TRAINERS / "npu_8.yaml"), "--json"]) == 0, output.getvalue()
    found = json.loads(output.getvalue())
    npu = found["platforms"]["npu"]
    assert npu["problems"] == []
    assert len(npu["devices"]) == 8
    assert npu["process_group"] == {"backend": "hccl", "available": True}
    assert npu["attention"].startswith("torch_npu.npu_fusion_attention")
    assert found["config"]["runs"]
    for name in ("npu_single", "npu_multinode"):
        assert main(["doctor", "-c", str(TRAINERS / f"{name}.yaml")]) == 0, name

    platforms = doctor.examine()
    for trainer, reason in (
        ({"devices": 9}, "devices = 9: must be 1 to 8"),
        ({"devices": 2, "strategy": "ddp"}, "strategy = 'ddp'"),
        ({"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")}, "strategy = 'DDPStrategy'"),
        ({"devices": 1, "precision": "16-mixed"}, "float16 loses small gradients"),
    ):
        [found] = doctor.obstacles({"accelerator": "npu", **trainer}, platforms)
        assert reason in found

    right = doctor.attend
    doctor.attend = lambda query, *rest: right(query, *rest) * (1.1 if query.device.type == "npu" else 1)
    [causal, masked] = doctor.examine()["npu"].problems
    assert "attention causal on npu is off by" in causal
    assert "attention with a mask on npu is off by" in masked


def test_doctor_on_a_node_of_eight(tmp_path: Path) -> None:
    on_simulated_npus(tmp_path, examined, count=8)
