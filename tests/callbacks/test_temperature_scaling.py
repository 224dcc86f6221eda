from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_stages import WINDOW, make_trainer, same, weights
from torch import nn

from pl_attnedit.callbacks import ResumableCheckpoint, TemperatureScaling
from pl_attnedit.callbacks.temperature_scaling import NEAR, scale_outputs
from pl_attnedit.errors import UserError

Make = Callable[..., Any]
TOKENS = 256


@torch.no_grad()
def excess(module: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """From whole logits: nats of the teacher for what the student samples, less those for what the teacher samples."""
    values = []
    for batch in batches:
        logs = [model(**batch).logits.double().log_softmax(-1) for model in (module.teacher, module.student)]
        values.append(((logs[0].exp() - logs[1].exp()) * logs[0]).sum(-1).flatten())
    return float(torch.cat(values).mean())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # whose norms' weights mean other things
def test_what_the_student_samples_is_as_likely_as_what_the_teacher_samples(
    make_stage2: Make, make_data: Make, family: str
) -> None:
    trained = {}
    for callbacks in ([], [scaling := TemperatureScaling(TOKENS)]):
        module, data = make_stage2(family, {**WINDOW, "window": 6, "sinks": 0}, train="layers"), make_data()
        make_trainer(*callbacks, steps=2).fit(module, data)
        trained[len(callbacks)] = module, excess(module, batches := data.calibration_batches(TOKENS))
    (plain, before), (scaled, after) = trained[0], trained[1]
    assert abs(before) > 10 * NEAR > 10 * abs(after)
    assert abs(scaling.factor - 1) > 0.01
    one, other = (model.student(**batches[0]).logits for model in (plain, scaled))
    torch.testing.assert_close(other, scaling.factor * one, rtol=1e-4, atol=1e-4)
    ours, teachers = scaled.student.state_dict(), scaled.teacher.state_dict()
    assert torch.equal(teachers["model.norm.weight"], plain.teacher.state_dict()["model.norm.weight"])
    assert not torch.equal(ours["model.norm.weight"], teachers["model.norm.weight"])


def test_a_training_that_was_over_is_not_scaled_twice(make_stage2: Make, make_data: Make, tmp_path: Path) -> None:
    def run(**options: Any) -> tuple[dict[str, torch.Tensor], TemperatureScaling]:
        scaling, module = TemperatureScaling(TOKENS), make_stage2(train="layers")
        keeping = ResumableCheckpoint(tmp_path)
        make_trainer(scaling, keeping, steps=2, enable_checkpointing=True).fit(module, make_data(), **options)
        return weights(module.student), scaling

    first, scaling = run()
    [last] = tmp_path.glob("last-*.ckpt")
    again, resumed = run(ckpt_path=str(last), weights_only=False)
    assert same(first, again)
    assert resumed.state_dict() == scaling.state_dict()
    assert scaling.factor != 1


@pytest.mark.parametrize("form", [nn.LayerNorm, nn.RMSNorm])
def test_weights_and_bias_are_scaled(form: type[nn.Module]) -> None:
    norm = form(8)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    states = torch.randn(3, 8)
    before = norm(states)
    scale_outputs(norm, 1.5)
    torch.testing.assert_close(norm(states), 1.5 * before)


def test_a_student_that_has_learned_nothing_stays_as_it_is(make_stage2: Make, make_data: Make) -> None:
    module, scaling = make_stage2(train="layers", init="random", learning_rate=1e-9), TemperatureScaling(TOKENS)
    with pytest.warns(UserWarning, match="too far from its teacher"):
        make_trainer(scaling, steps=1).fit(module, make_data())
    assert scaling.factor == 1
    norms = [model.state_dict()["model.norm.weight"] for model in (module.student, module.teacher)]
    torch.testing.assert_close(*norms, rtol=0, atol=1e-6)


def test_refused(make_stage1: Make, make_stage2: Make, make_data: Make) -> None:
    with pytest.raises(UserError, match="tokens = 0"):
        TemperatureScaling(0)
    for module in (make_stage1(), make_stage2(train="attention")):
        with pytest.raises(UserError, match="is for stage 2 with train: layers or all"):
            make_trainer(TemperatureScaling(), steps=1).fit(module, make_data())
    with pytest.raises(UserError, match="has no weights"):
        scale_outputs(nn.LayerNorm(8, elementwise_affine=False), 2.0)
