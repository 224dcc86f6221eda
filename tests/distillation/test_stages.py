"""Both stages through a real Trainer on tiny teachers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fixtures_stages import LATENT, STATE, WINDOW, Losses, make_trainer, same, weights
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from pl_attnedit.attention import target_from_dict
from pl_attnedit.callbacks import NaNGuard
from pl_attnedit.conversion.trainers import save_student
from pl_attnedit.data import Phase
from pl_attnedit.errors import UserError
from pl_attnedit.eval.bench.reference import TeacherForced, last_hidden
from pl_attnedit.modeling import edit_model, load

STAGES = ("make_stage1", "make_stage2")
Make = Callable[..., Any]


@pytest.fixture(params=STAGES)
def make_stage(request: pytest.FixtureRequest) -> Make:
    """One row per stage."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "target",
    [WINDOW, WINDOW | {"learned_sink": True}, LATENT, STATE],
    ids=["gate_swa", "learned_sink", "mla", "gated_deltanet"],
)
def test_the_loss_falls_and_only_the_new_attention_changes(
    make_stage: Make, make_data: Make, family: str, target: dict[str, Any]
) -> None:
    rate = 3e-2 if target is STATE else 1e-2  # states learn slower
    module, losses = make_stage(family, target, init="random", learning_rate=rate), Losses()
    trainer = make_trainer(losses, steps=30, limit_train_batches=10, max_epochs=3)
    start: dict[str, dict[str, torch.Tensor]] = {}
    module.on_fit_start = lambda: (  # type: ignore[method-assign]
        type(module).on_fit_start(module),
        start.update(teacher=weights(module.teacher), student=weights(module.student)),
    )
    trainer.fit(module, make_data())
    assert sum(losses.values[-10:]) < 0.9 * sum(losses.values[:10])
    assert same(weights(module.teacher), start["teacher"])
    edited = tuple(f"model.layers.{i}.self_attn." for i in (0, 1, 3))
    for name, value in weights(module.student).items():
        assert torch.equal(value, start["student"][name]) != name.startswith(edited), name
    shared = {id(p) for p in module.teacher.parameters()} & {id(p) for p in module.student.parameters()}
    trunk = [p for name, p in module.student.named_parameters() if not name.startswith(edited)]
    assert shared == {id(p) for p in trunk}  # one copy in memory


def test_supervised_blocks_train_the_attention_alone(make_stage1: Make, make_data: Make) -> None:
    module, losses = make_stage1("qwen3", LATENT, init="random", learning_rate=1e-2, supervise="block"), Losses()
    before = weights(make_configured(lambda: make_stage1("qwen3", LATENT, init="random")).student)
    trainer = make_trainer(losses, steps=30, limit_train_batches=10, max_epochs=3, limit_val_batches=1.0)
    trainer.fit(module, make_data())
    assert sum(losses.values[-10:]) < 0.9 * sum(losses.values[:10])
    edited = tuple(f"model.layers.{i}.self_attn." for i in (0, 1, 3))
    for name, value in weights(module.student).items():
        assert torch.equal(value, before[name]) != name.startswith(edited), name
    found = trainer.callback_metrics["val/nmse"].clone()
    attention = make_trainer(limit_val_batches=1.0)
    module.hparams["supervise"] = "attention"  # which validation does not look at
    [again] = attention.validate(module, make_data(), verbose=False)
    assert again["val/nmse"] == pytest.approx(found.item())


def test_a_checkpoint_holds_what_was_trained_and_nothing_else(
    make_stage: Make, make_data: Make, tmp_path: Path
) -> None:
    module = make_stage()
    trainer = make_trainer(steps=1)
    trainer.fit(module, make_data())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    checkpoint = torch.load(tmp_path / "c.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"attention"}
    assert {name.split(".")[1] for name in checkpoint["state_dict"]} == {"0", "1", "3"}
    assert checkpoint["pl_attnedit"]["plan"]["layers"] == "SSFS"
    assert checkpoint["pl_attnedit"]["stage"] == module.stage
    trained = sum(p.numel() for p in module.attention.parameters()) * 4 * 3  # weights and AdamW's two moments
    assert (tmp_path / "c.ckpt").stat().st_size < trained + 100_000


def test_a_resumed_run_ends_bit_equal(make_stage: Make, make_data: Make, tmp_path: Path) -> None:
    unbroken = make_stage(init="random")
    make_trainer(steps=6).fit(unbroken, make_data())
    first = make_trainer(steps=3)
    broken = make_stage(init="random")
    broken.lr_share = lambda step: unbroken_share(step)  # the schedule of six steps
    first.fit(broken, make_data())
    first.save_checkpoint(tmp_path / "c.ckpt")
    resumed = make_stage(init="random")
    torch.manual_seed(99)
    make_trainer(steps=6).fit(resumed, make_data(), ckpt_path=str(tmp_path / "c.ckpt"), weights_only=True)
    assert same(weights(resumed.student), weights(unbroken.student))


def test_the_rate_goes_from_each_phase_to_the_next(make_stage: Make, make_data: Make) -> None:
    def train(**options: Any) -> tuple[list[float], list[float]]:
        losses, rates = Losses(), Rates()
        make_trainer(losses, rates, steps=8).fit(make_stage(init="random", warmup_steps=2), make_data(**options))
        return losses.values, rates.values

    plain = train()
    assert train(phases=[Phase(32, 2, 8, 3e-3)]) == plain
    _, rates = train(phases=[Phase(32, 2, 4, 3e-3), Phase(64, 1, 4, 1e-3)])
    assert rates == pytest.approx([1.5e-3, 3e-3, 3e-3, 2e-3, *(1e-3 * unbroken_share(step) for step in range(2, 6))])


class Rates(Callback):
    """The learning rate of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.values.append(trainer.optimizers[0].param_groups[0]["lr"])


def unbroken_share(step: int) -> float:
    import math

    return (step + 1) / 2 if step < 2 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 4))


def test_a_checkpoint_from_before_a_field_of_the_target_existed(make_stage1: Make) -> None:
    module = make_stage1(init="random")
    module.configure_model()
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    target = checkpoint["pl_attnedit"]["plan"]["targets"]["S"]
    assert target.pop("learned_sink") is False
    module.on_load_checkpoint(checkpoint)
    target["learned_sink"] = True
    with pytest.raises(UserError, match="checkpoint: was written for the plan"):
        module.on_load_checkpoint(checkpoint)


def test_stage_2_starts_from_saved_weights(
    make_stage1: Make, make_stage2: Make, make_data: Make, tmp_path: Path
) -> None:
    first = make_stage1()
    make_trainer(steps=2).fit(first, make_data())
    first.student.save_pretrained(tmp_path)
    second = make_stage2(init_from=str(tmp_path))
    second.configure_model()
    assert same(weights(second.student), weights(first.student))
    with pytest.raises(UserError, match="another edit plan"):
        make_stage2(init_from=str(tmp_path), pattern="SSSF").configure_model()
    with pytest.raises(UserError, match=r"no config\.json"):
        make_stage2(init_from=str(tmp_path / "none")).configure_model()


@pytest.mark.parametrize("train", ["attention", "layers"])
def test_saved_weights_keep_their_precision(make_stage2: Make, make_data: Make, tmp_path: Path, train: str) -> None:
    first = make_stage2(dtype="bfloat16", train=train)
    make_trainer(steps=2, precision="bf16-mixed").fit(first, make_data())
    first.student.save_pretrained(tmp_path)
    second = make_stage2(dtype="bfloat16", init_from=str(tmp_path))
    make_trainer(precision="bf16-mixed", limit_val_batches=1).validate(second, make_data(), verbose=False)
    expected, found = weights(first.student), weights(second.student)
    assert {name: value.dtype for name, value in found.items()} == {
        name: value.dtype for name, value in expected.items()
    }
    assert same(found, expected)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in found.values())


def test_float64_is_that_of_all_weights(make_stage: Make, make_data: Make) -> None:
    module = make_stage()
    make_trainer(steps=1, precision="64-true", limit_val_batches=1.0, val_check_interval=1).fit(module, make_data())
    assert {p.dtype for p in module.student.parameters()} == {torch.float64}


def test_no_step_is_logged_where_none_is_wanted(make_stage: Make, make_data: Make) -> None:
    make_trainer(steps=2, log_every_n_steps=0).fit(module := make_stage(), make_data())
    assert not module.logs_this_step


def test_training_all_unshares_the_trunk(make_stage2: Make, make_data: Make, tmp_path: Path) -> None:
    module = make_stage2(train="all")
    trainer = make_trainer(steps=3)
    before = weights(make_configured(make_stage2).teacher)
    trainer.fit(module, make_data())
    assert same(weights(module.teacher), before)
    assert not {id(p) for p in module.teacher.parameters()} & {id(p) for p in module.student.parameters()}
    teacher = dict(module.teacher.named_parameters())
    for name, value in module.student.named_parameters():
        if name in teacher:
            assert not torch.equal(value, teacher[name]), name  # every part of the trunk has been trained
    assert module.student.lm_head.weight is module.student.model.embed_tokens.weight  # tied, as the teacher's
    # what follows starts from it, trunk included, and goes on with it when resumed
    module.student.save_pretrained(tmp_path / "student")
    next_stage = make_stage2(init_from=str(tmp_path / "student"))
    again = make_trainer(steps=1)
    again.fit(next_stage, make_data())
    again.save_checkpoint(tmp_path / "c.ckpt")
    resumed = make_stage2(init_from=str(tmp_path / "student"))
    make_trainer(steps=1).fit(resumed, make_data(), ckpt_path=str(tmp_path / "c.ckpt"), weights_only=True)
    assert same(weights(resumed.student), weights(next_stage.student))


def make_configured(make: Make) -> Any:
    module = make()
    module.configure_model()
    return module


def test_feature_matching_adds_the_mean_cosine_distance(make_stage2: Make, make_data: Make) -> None:
    plain, matched = make_configured(make_stage2), make_configured(lambda: make_stage2(feature_weight=0.5))
    batch = next(iter(make_data().train_dataloader()))
    for module in (plain, matched):
        module.log = module.log_dict = lambda *_, **__: None
    teacher, student = layer_outputs(plain.teacher, batch), layer_outputs(plain.student, batch)
    distances = [1 - F.cosine_similarity(s, t, dim=-1).mean() for s, t in zip(student, teacher, strict=True)]
    added = matched.training_step(batch, 0)["loss"] - plain.training_step(batch, 0)["loss"]
    torch.testing.assert_close(added, 0.5 * torch.stack(distances).mean(), rtol=1e-4, atol=1e-6)


def layer_outputs(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What enters the next layer, or the final norm; on a copy that shares nothing."""
    alone, into_norm = copy.deepcopy(model), []
    alone.model.norm.register_forward_pre_hook(lambda _, args: into_norm.append(args[0]))
    inside = alone(**inputs(batch), output_hidden_states=True).hidden_states[1:-1]
    return [*inside, *into_norm]


def inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}


@pytest.mark.parametrize("respect_documents", [False, True])
def test_validation_equals_a_direct_computation(make_stage: Make, make_data: Make, respect_documents: bool) -> None:
    module, data = make_stage(), make_data(respect_documents=respect_documents)
    trainer = make_trainer(limit_val_batches=1.0)
    trainer.validate(module, data, verbose=False)
    found = trainer.callback_metrics
    error, energy = torch.zeros(3), torch.zeros(3)
    logs: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for number, batch in enumerate(data.val_dataloader()):
            logs.append(
                tuple(
                    m(**inputs(batch), use_cache=False).logits.log_softmax(-1) for m in (module.teacher, module.student)
                )
            )
            if number < module.hparams.nmse_batches:
                with TeacherForced(module.teacher, module.layer_modules()) as forced:
                    last_hidden(module.teacher, batch)
                for place, (index, attention) in enumerate(module.layer_modules().items()):
                    target = forced.teacher_output(index)
                    error[place] += (forced.student_output(index, attention) - target).square().sum()
                    energy[place] += target.square().sum()
    teacher, student = (torch.cat([pair[i] for pair in logs]) for i in (0, 1))
    assert len(teacher) == 5  # batches of 2, 2 and 1
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert found["val/kl"].item() == pytest.approx(kl.item(), rel=1e-4)
    assert found["val/kl"] > 1e-3
    assert found["val/top1"].item() == pytest.approx((teacher.argmax(-1) == student.argmax(-1)).float().mean().item())
    for place, index in enumerate((0, 1, 3)):
        nmse = (error[place] / energy[place]).item()
        assert found[f"val/nmse/layer_{index:02d}"].item() == pytest.approx(nmse, rel=1e-4)
    assert found["val/nmse"].item() == pytest.approx((error / energy).mean().item(), rel=1e-4)
    trainer.validate(module, data, verbose=False)  # now with the teacher's part from memory
    assert trainer.callback_metrics["val/kl"] == found["val/kl"]


def test_accumulation_is_the_mean_over_all_tokens_that_count(make_stage2: Make, make_data: Make) -> None:
    """Four batches of unequal numbers of tokens that count, in one optimiser step, are as one batch of all of them."""
    torch.manual_seed(3)
    ids, mask = torch.randint(1, 300, (4, 16)), torch.zeros(4, 16, dtype=torch.bool)
    for row, count in enumerate((16, 1, 0, 7)):
        mask[row, :count] = True
    found = []
    for size in (4, 1):
        rows = [{"input_ids": i, "loss_mask": m} for i, m in zip(ids, mask)]
        module = make_stage2(feature_weight=0.1, warmup_steps=0)
        gradients: dict[str, torch.Tensor] = {}

        def keep(optimizer: Any, module: Any = module, gradients: dict[str, torch.Tensor] = gradients) -> None:
            type(module).on_before_optimizer_step(module, optimizer)
            gradients.update({name: p.grad.clone() for name, p in module.named_parameters()})

        module.on_before_optimizer_step = keep
        trainer = make_trainer(NaNGuard(), steps=1, accumulate_grad_batches=4 // size)
        trainer.fit(module, DataLoader(rows, batch_size=size))
        found.append(gradients)
    assert found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_validation_knows_the_teachers_states_of_its_own_dtype(make_stage2: Make, make_data: Make) -> None:
    data, known = make_data(), {}
    for dtype in ("bfloat16", "float32"):
        module = make_stage2(dtype=dtype, nmse_batches=1)
        module.teacher_hidden = known
        [shared] = make_trainer(limit_val_batches=1.0, precision="bf16-mixed").validate(module, data, verbose=False)
    module.teacher_hidden = {}
    [alone] = make_trainer(limit_val_batches=1.0, precision="bf16-mixed").validate(module, data, verbose=False)
    assert alone == shared
    assert len(known) == 2 * (3 - 1)  # the batches whose layers are measured run through the teacher every time


def test_one_edited_layer(make_stage: Make, make_data: Make) -> None:
    module = make_stage(pattern="FSFF")
    trainer = make_trainer(steps=2, limit_val_batches=1.0, val_check_interval=2)
    trainer.fit(module, make_data())
    found = trainer.callback_metrics
    assert found["val/nmse"] == found["val/nmse/layer_01"] > 0


def test_no_token_that_counts_in_a_step_leaves_the_weights(make_stage2: Make) -> None:
    module = make_stage2()
    rows = [{"input_ids": torch.ones(16, dtype=torch.long), "loss_mask": torch.zeros(16, dtype=torch.bool)}] * 8
    before: dict[str, torch.Tensor] = {}
    module.on_train_start = lambda: before.update(weights(module))
    make_trainer(steps=1, accumulate_grad_batches=8).fit(module, DataLoader(rows, batch_size=1))
    assert before
    assert same(weights(module), before)


def test_gradients_are_clipped_under_mixed_precision(make_stage: Make, make_data: Make) -> None:
    module, norms = make_stage(), []

    class Norms(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.optimizers[0].register_step_post_hook(self.note)

        def note(self, optimizer: Any, *_: Any) -> None:
            gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
            norms.append(torch.stack(gradients).norm().item())

    make_trainer(Norms(), steps=3, precision="bf16-mixed", gradient_clip_val=1e-3).fit(module, make_data())
    assert norms == pytest.approx([1e-3] * 3, rel=0.01)


def test_float64_keeps_the_positions_of_a_trunk_that_trains(make_stage2: Make, make_data: Make) -> None:
    module = make_stage2(train="all")
    make_trainer(steps=2, precision="64-true").fit(module, make_data())
    exact = make_configured(make_stage2).teacher.model.rotary_emb.inv_freq
    assert torch.equal(module.student.model.rotary_emb.inv_freq, exact)
    assert torch.equal(module.teacher.model.rotary_emb.inv_freq, exact)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_what_loses_updates_is_refused(make_stage: Make, make_data: Make, precision: str) -> None:
    with pytest.raises(UserError, match=f"precision = '{precision}'.*use bf16-mixed"):
        make_trainer(steps=1, precision=precision).fit(make_stage(), make_data())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "best"}, "init = 'best'"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"dtype": "floaty"}, "dtype = 'floaty'"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0"),
        ({"final_lr_share": 2.0}, "final_lr_share = 2.0"),
        ({"warmup_steps": -1}, "warmup_steps = -1"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
        ({"nmse_batches": 0}, "nmse_batches = 0"),
        ({"targets": {}}, "targets"),
    ],
)
def test_impossible_settings_are_named(make_stage: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_stage(**options)


def test_settings_of_stage_1_alone(make_stage1: Make) -> None:
    with pytest.raises(UserError, match="supervise = 'mlp': must be 'attention' or 'block'"):
        make_stage1(supervise="mlp")


def test_settings_of_stage_2_alone(make_stage2: Make) -> None:
    with pytest.raises(UserError, match="train = 'norms'"):
        make_stage2(train="norms")
    with pytest.raises(UserError, match="feature_weight = -1"):
        make_stage2(feature_weight=-1.0)


def test_an_endless_training_has_no_schedule(make_stage: Make, make_data: Make) -> None:
    with pytest.raises(UserError, match="max_steps = -1"):
        make_trainer(steps=-1, max_epochs=-1).fit(make_stage(), make_data())


@pytest.mark.parametrize("init", ["calibrated", "plain_svd"])
def test_a_stage_starts_from_what_edit_model_makes(make_stage1: Make, make_data: Make, init: Any) -> None:
    module, data = make_stage1("qwen3", LATENT, init=init, learning_rate=1e-30), make_data()  # which moves nothing
    make_trainer(steps=1).fit(module, data)
    target, text = target_from_dict(LATENT), data.calibration_batches(128)
    expected = edit_model(module.teacher, target, pattern="SSFS", init=init, calibration=text)
    for name, value in weights(expected).items():
        torch.testing.assert_close(module.student.state_dict()[name], value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("init", ["calibrated", "plain_svd"])
def test_an_init_from_text_says_what_it_needs(make_stage1: Make, init: str) -> None:
    rows = [{"input_ids": torch.ones(16, dtype=torch.long), "loss_mask": torch.ones(16, dtype=torch.bool)}]
    with pytest.raises(UserError, match=f"init = '{init}': this target needs a TextDataModule"):
        make_trainer(steps=1).fit(make_stage1(targets=LATENT, init=init), DataLoader(rows))


def test_a_foreign_checkpoint_is_refused(make_stage1: Make, make_stage2: Make, make_data: Make, tmp_path: Path) -> None:
    trainer = make_trainer(steps=1)
    trainer.fit(make_stage1(), make_data())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    for other, what in (
        (make_stage2(), "stage"),
        (make_stage1("qwen3"), "teacher"),
        (make_stage1(pattern="S"), "plan"),
    ):
        with pytest.raises(UserError, match=f"written for the {what}"):
            make_trainer(steps=2).fit(other, make_data(), ckpt_path=str(tmp_path / "c.ckpt"), weights_only=True)
    foreign = torch.load(tmp_path / "c.ckpt", weights_only=True)
    del foreign["pl_attnedit"]
    torch.save(foreign, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="not one of pl_attnedit"):
        make_trainer(steps=2).fit(
            make_stage1(), make_data(), ckpt_path=str(tmp_path / "foreign.ckpt"), weights_only=True
        )


def test_a_checkpoint_of_other_weights_to_train_is_refused(make_stage2: Make, make_data: Make) -> None:
    module = make_stage2(train="all")
    make_trainer(steps=1).fit(module, make_data())
    checkpoint = {"hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)
    module.hparams["train"] = "attention"
    with pytest.raises(UserError, match="checkpoint: was trained with train 'all', this run has 'attention'"):
        module.on_load_checkpoint(checkpoint)


def test_the_student_can_be_saved_and_loaded(make_stage: Make, make_data: Make, tmp_path: Path) -> None:
    module = make_stage()
    make_trainer(steps=1).fit(module, make_data())
    module.student.save_pretrained(tmp_path)
    assert same(weights(load(tmp_path)), weights(module.student))


def test_a_student_saved_without_its_trunk_goes_on_with_the_teachers(make_stage1: Make, tmp_path: Path) -> None:
    """As it lies between the phases of a conversion."""
    module = make_stage1(init="random")
    module.configure_model()
    save_student(module, tmp_path, trunk=False)
    after = make_stage1(init_from=str(tmp_path))
    after.configure_model()
    for name, value in after.student.state_dict().items():
        assert torch.equal(value, module.student.state_dict()[name]), name
    assert after.student.lm_head is after.teacher.lm_head  # still shared
    with pytest.raises(UserError, match="its weights do not fit its config"):
        load(tmp_path)
