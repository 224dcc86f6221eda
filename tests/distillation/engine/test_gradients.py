"""Gradients of both stages against plain PyTorch: two whole passes, whole graphs, all logits."""

from __future__ import annotations

import copy
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fixtures_stages import LATENT, STATE, WINDOW
from torch import Tensor
from torch.func import grad_and_value
from torch.nn.parallel import DistributedDataParallel

from pl_attnedit.distillation.engine import operations
from pl_attnedit.distillation.engine.local_gradients import compile_whole
from pl_attnedit.eval.bench.reference import last_hidden, plain_kl, plain_layer_losses

Make = Callable[..., Any]
Named = dict[str, Tensor]
families = pytest.mark.parametrize("family", ["llama", "qwen3"])
targets = pytest.mark.parametrize("target", [WINDOW, LATENT, STATE], ids=["gate_swa", "mla", "gated_deltanet"])
texts = pytest.mark.parametrize("packed", [False, True], ids=["whole", "documents"])


def make_batch(seed: int = 0, packed: bool = False) -> Named:
    """(2, 24) tokens of which some do not count; packed = two documents, each with positions of its own."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 24, generator=generator) < 0.7
    batch = {"input_ids": torch.randint(1, 300, (2, 24), generator=generator), "loss_mask": mask}
    if packed:
        batch["position_ids"] = torch.cat([torch.arange(9), torch.arange(15)]).expand(2, -1)
    return batch


def configured(make: Make, *args: Any, **options: Any) -> Any:
    """A stage's module outside of a Trainer; random weights, so that nothing is as good as solved."""
    module = make(*args, **{"init": "random", **options})
    module.configure_model()
    module.log = module.log_dict = lambda *_, **__: None
    return module


def plain_block_losses(teacher: Any, attention: dict[int, Any], batch: Named, share: float = 1.0) -> dict[int, Tensor]:
    """By Hugging Face's own layers, with another attention: each block's error over the energy of the teacher's update."""
    calls: list[tuple[Tensor, dict[str, Any], Tensor]] = []
    keep = [
        layer.register_forward_hook(lambda _, args, kwargs, out: calls.append((args[0], kwargs, out)), with_kwargs=True)
        for layer in teacher.model.layers
    ]
    with torch.no_grad():
        last_hidden(teacher, batch)
    for hook in keep:
        hook.remove()
    own, losses = calls[0][0], {}
    for index, (layer, (entered, kwargs, left)) in enumerate(zip(teacher.model.layers, calls, strict=True)):
        block = copy.copy(layer)
        block._modules = {**layer._modules, "self_attn": attention.get(index, layer.self_attn)}
        output = block(share * entered + (1 - share) * own, **kwargs)
        if index in attention:
            losses[index] = (output - left).square().sum() / (left - entered).square().sum()
        own = output.detach()
    return losses


def engine_gradients(module: Any, *batches: Named) -> Named:
    module.zero_grad()
    for number, batch in enumerate(batches):
        module.training_step(batch, number)["loss"].backward()
    return {name: p.grad.float().clone() for name, p in module.student.named_parameters() if p.grad is not None}


def plain_gradients(module: Any, *batches: Named, models: tuple[Any, Any] | None = None) -> Named:
    """By the reference, on the module's own teacher and student or on other copies of them."""
    teacher, student = models or (module.teacher, module.student)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    total: Named = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trained.items()}
    for batch in batches:
        if module.stage == "stage1":
            attention = {i: student.model.layers[i].self_attn for i in module.trained_layers}
            if module.hparams.supervise == "block":
                losses = plain_block_losses(teacher, attention, batch, module.teacher_share)
            else:
                losses = plain_layer_losses(teacher, attention, batch)
            loss = torch.stack(list(losses.values())).sum()
        else:
            loss = plain_kl(teacher, student, batch)
            if weight := module.hparams.feature_weight:
                loss = loss + weight * plain_feature_loss(teacher, student, batch)
        for gradient, into in zip(torch.autograd.grad(loss, list(trained.values())), total.values(), strict=True):
            into += gradient
    return total


def plain_feature_loss(teacher: Any, student: Any, batch: Named) -> Tensor:
    """Mean over layers of 1 - cosine between what leaves the layers."""
    outputs = []
    for model in (teacher, student):
        seen: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out)) for layer in model.model.layers
        ]
        last_hidden(model, batch)
        for hook in hooks:
            hook.remove()
        outputs.append(seen)
    mask = batch["loss_mask"]
    terms = [
        ((1 - F.cosine_similarity(s.float(), t.float(), dim=-1)) * mask).sum() / mask.sum()
        for t, s in zip(*outputs, strict=True)
    ]
    return torch.stack(terms).mean()


def errors(found: Named, expected: Named) -> dict[str, float]:
    """Norm of the difference over the norm, of each parameter."""
    assert found.keys() == expected.keys()
    assert all(value.norm() > 0 for value in expected.values())
    return {name: ((found[name] - value).norm() / value.norm()).item() for name, value in expected.items()}


def assert_equal_gradients(found: Named, expected: Named, most: float = 1e-5) -> None:
    for name, error in errors(found, expected).items():
        assert error <= most, name


@pytest.mark.parametrize("stage", ["make_stage1", "make_stage2"])
@families
@targets
@texts
def test_both_stages(
    request: pytest.FixtureRequest, stage: str, family: str, target: dict[str, Any], packed: bool
) -> None:
    module, batch = configured(request.getfixturevalue(stage), family, target), make_batch(packed=packed)
    assert_equal_gradients(engine_gradients(module, batch), plain_gradients(module, batch))


def test_stage_1_on_the_students_own_path(make_stage1: Make) -> None:
    """Layer 0 sees the same as the teacher's; the next one a mixture with what the edited layer 0 has made of it."""
    module, batch = configured(make_stage1, train_layers=[0]), make_batch()
    expected = plain_gradients(module, batch)
    module.teacher_share = 0.25
    assert_equal_gradients(engine_gradients(module, batch), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
@targets
@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("layers", [None, [0, 1]], ids=["all", "not-the-last"])
def test_stage_1_of_blocks(
    make_stage1: Make, family: str, target: dict[str, Any], share: float, layers: list[int] | None
) -> None:
    module = configured(make_stage1, family, target, supervise="block", train_layers=layers)
    module.teacher_share = share
    batches = [make_batch(0), make_batch(1, packed=True)]
    assert_equal_gradients(engine_gradients(module, *batches), plain_gradients(module, *batches))
    assert not any(p.grad is not None for p in module.teacher.parameters())


@families  # llama ties its embeddings and its head, qwen3 does not
@pytest.mark.parametrize("train", ["attention", "layers", "all"])
def test_stage_2_with_feature_matching_and_checkpointing(make_stage2: Make, family: str, train: str) -> None:
    options = {"train": train, "feature_weight": 0.5, "activation_checkpointing": True}
    module, batch = configured(make_stage2, family, LATENT, **options), make_batch(packed=True)
    found, expected = engine_gradients(module, batch), plain_gradients(module, batch)
    assert_equal_gradients(found, expected)
    ends = {id(part.weight) for part in (module.student.model.embed_tokens, module.student.lm_head)}
    trunk = {id(p) for p in module.student.parameters()} - ends
    of_attention = {id(p) for layer in module.layer_modules().values() for p in layer.parameters()}
    assert len(found) == len({"attention": of_attention, "layers": trunk, "all": trunk | ends}[train])


@pytest.mark.parametrize("stage", ["make_stage1", "make_stage2"])
def test_what_routers_return_beside_hidden_states_is_in_no_loss(stage: str, request: pytest.FixtureRequest) -> None:
    """Where the teacher's config asks for its logits, and so for a loss that balances experts."""
    make, batch, found = request.getfixturevalue(stage), make_batch(), []
    for asked in (False, True):
        module = make("qwen3_moe", LATENT, init="random")
        teacher, *others = module.find_teacher(torch.float32)
        teacher.config.output_router_logits = asked
        module.find_teacher = lambda dtype, found=(teacher, *others): found
        torch.manual_seed(0)
        module.configure_model()
        module.log = module.log_dict = lambda *_, **__: None
        found.append(engine_gradients(module, batch))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("stage", ["make_stage1", "make_stage2"])
def test_accumulation(stage: str, request: pytest.FixtureRequest) -> None:
    module, batches = configured(request.getfixturevalue(stage)), [make_batch(0), make_batch(1)]
    assert_equal_gradients(engine_gradients(module, *batches), plain_gradients(module, *batches))


@pytest.mark.parametrize("stage", ["make_stage1", "make_stage2"])
@targets
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bf16_is_as_exact_as_plain_bf16(
    stage: str, target: dict[str, Any], dtype: str, request: pytest.FixtureRequest
) -> None:
    """Against float32 on the same weights the engine is off by no more than twice what plain autograd in bf16 is."""
    module = configured(request.getfixturevalue(stage), "qwen3", target, dtype=dtype, pattern="SSFS")
    models = tuple(model.float() for model in copy.deepcopy((module.teacher, module.student)))
    batches = [make_batch(seed) for seed in range(4)]  # a single parameter's error is a matter of luck
    exact = plain_gradients(module, *batches, models=models)
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = plain_gradients(module, *batches), engine_gradients(module, *batches)
    ours, theirs = errors(found, exact), errors(plain, exact)
    assert max(theirs.values()) > 1e-4  # it is bf16
    for name, error in ours.items():
        assert error <= 2 * theirs[name] + 2**-9, (name, error, theirs[name])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("stage", ["make_stage1", "make_stage2"])
@pytest.mark.parametrize("target", [LATENT, STATE], ids=["mla", "gated_deltanet"])
def test_compiled(stage: str, target: dict[str, Any], request: pytest.FixtureRequest) -> None:
    module = configured(request.getfixturevalue(stage), "qwen3", target, compiled=True, pattern="SF")
    batch = make_batch()
    most = 5e-5 if target is STATE else 1e-5  # small outputs are normalised, with their rounding
    assert_equal_gradients(engine_gradients(module, batch), plain_gradients(module, batch), most)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_compiled_stage_1_of_blocks(family: str, make_stage1: Make) -> None:
    module = configured(make_stage1, family, LATENT, compiled=True, pattern="SF", supervise="block")
    batch = make_batch()
    assert_equal_gradients(engine_gradients(module, batch), plain_gradients(module, batch))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_under_ddp(tmp_path: Path) -> None:
    """torch would cut what is compiled at the buckets of DDP, which local gradients do not stand."""

    class Two(torch.nn.Linear):
        def forward(self, entered: torch.Tensor) -> tuple[torch.Tensor, ...]:
            loss = lambda weights: (entered @ weights[0] + weights[1]).square().mean()  # noqa: E731
            return compile_whole(grad_and_value(loss))((self.weight, self.bias))

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        module = Two(64, 64)
        together = DistributedDataParallel(module, bucket_cap_mb=0.005)  # type: ignore[arg-type]
        (gradient, _), loss = together(torch.eye(64))
        (module.weight + module.bias).square().mean().backward()
        torch.testing.assert_close(gradient, module.weight.grad)
        assert loss > 0
    finally:
        torch.distributed.destroy_process_group()


class SavedBytes:
    """Counts, inside `hooks`, the bytes which autograd keeps for backward passes: `now` and at most (`peak`)."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.value)

    def _pack(self, value: Tensor) -> Any:
        held = _Held(value)
        size = 0 if isinstance(value, torch.nn.Parameter) else value.nbytes
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(held, self._free, size)
        return held

    def _free(self, size: int) -> None:
        self.now -= size


class _Held:
    def __init__(self, value: Tensor) -> None:
        self.value = value


@pytest.mark.parametrize("supervise", ["attention", "block"])
def test_activations_of_stage_1_do_not_grow_with_depth(make_stage1: Make, make_teacher: Make, supervise: str) -> None:
    peaks: dict[int, tuple[int, int]] = {}
    for layers in (4, 16):
        module = make_stage1(targets=LATENT, init="random", pattern="S", supervise=supervise)
        teacher = make_teacher("llama", vocab_size=300, num_hidden_layers=layers)
        module.find_teacher = lambda dtype, teacher=teacher: (teacher, None, "")
        module = configured(lambda module=module, **_: module)
        engine, plain = SavedBytes(), SavedBytes()
        with engine.hooks:
            loss = module.training_step(make_batch(), 0)["loss"]
        after = engine.now
        with plain.hooks:
            kept = plain_layer_losses(module.teacher, module.layer_modules(), make_batch())
        peaks[layers] = engine.peak, plain.peak
        assert after < 0.1 * engine.peak, layers
        del loss, kept
    assert peaks[16][0] < 1.05 * peaks[4][0]
    assert peaks[16][1] > 3.5 * peaks[4][1]  # the reference's do


def test_layers_without_attention_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hybrid's linear attention: its loops over the text would be unrolled, and a view in its backward pass fails."""
    monkeypatch.setattr(operations, "compile_whole", lambda function: lambda layer, hidden, call: "compiled")
    run, hidden = operations.Operations(compiled=True).run_layer, torch.ones(1, 2, 3)
    assert run(torch.nn.Identity(), hidden, {}) is hidden
    assert run(torch.nn.ModuleDict({"self_attn": torch.nn.Identity()}), hidden, {}) == "compiled"
