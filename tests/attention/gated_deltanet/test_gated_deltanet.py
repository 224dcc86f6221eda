"""Gated DeltaNet: the recurrence token by token, the stock layer, what reaches the state, and the calibrated init."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, PreTrainedModel, Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from pl_attnedit import GatedDeltaNetConfig, UserError, edit_model
from pl_attnedit.attention.base import as_bool_mask
from pl_attnedit.attention.gated_deltanet import module
from pl_attnedit.attention.gated_deltanet.inits import GATE, INPUT
from pl_attnedit.attention.gated_deltanet.module import place_in_text
from pl_attnedit.attention.gated_deltanet.rule import delta_rule, solved
from pl_attnedit.attention.interface import heads_of
from pl_attnedit.modeling.calibration import collect_statistics
from pl_attnedit.modeling.edit import edited_attention

Teachers = Callable[..., PreTrainedModel]
Ids = Callable[..., Tensor]
NEAR: dict[str, float] = {"atol": 1e-4, "rtol": 1e-4}


def layer(teacher: PreTrainedModel, **fields: Any) -> Any:
    torch.manual_seed(0)
    student = edit_model(teacher, GatedDeltaNetConfig(**fields), pattern="S", init="random")
    return student.eval().model.layers[0].self_attn


def token_by_token(net: Any, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """The layer in plain PyTorch, from the formulas of arXiv:2412.06464."""
    keys, values = net.key_dim, net.value_dim
    query, key, value, gate = (
        net.in_proj_qkvz(hidden).unflatten(-1, (net.heads, -1)).split([keys, keys, values, values], -1)
    )
    beta, rate = net.in_proj_ba(hidden).unflatten(-1, (net.heads, 2)).unbind(-1)
    kept = torch.exp(-net.A_log.exp() * F.softplus(rate + net.dt_bias))
    mixed = torch.cat([query.flatten(2), key.flatten(2), value.flatten(2)], -1).transpose(1, 2)
    padding = net.target.conv_kernel - 1
    mixed = F.silu(F.conv1d(F.pad(mixed, (padding, 0)), net.conv1d.weight, groups=mixed.shape[1])).transpose(1, 2)
    query, key, value = mixed.split([net.heads * width for width in (keys, keys, values)], -1)
    query, key, value = (each.unflatten(-1, (net.heads, -1)) for each in (query, key, value))
    if rotation is not None:
        cos, sin = (each[:, :, None] for each in rotation)
        query, key = (x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (query, key))
    query, key = F.normalize(query, dim=-1) * keys**-0.5, F.normalize(key, dim=-1)
    state, outputs = hidden.new_zeros(len(hidden), net.heads, keys, values), []
    for t in range(hidden.shape[1]):
        state = state * kept[:, t, :, None, None]
        held = torch.einsum("bhk,bhkv->bhv", key[:, t], state)
        write = (value[:, t] - held) * beta[:, t].sigmoid()[..., None]
        state = state + key[:, t, :, :, None] * write[:, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state))
    output = torch.stack(outputs, 1)
    output = F.rms_norm(output, (values,), net.norm.weight, net.spec.rms_norm_eps) * F.silu(gate)
    return net.out_proj(output.flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("rope", [False, True])
def test_the_layer_is_the_recurrence(make_teacher: Teachers, rope: bool) -> None:
    teacher = make_teacher("qwen2")
    net = layer(teacher, rope=rope, conv_kernel=3)
    hidden = torch.randn(2, 70, 32)  # more than a chunk
    rotation = teacher.model.rotary_emb(hidden, torch.arange(70)[None])
    expected = token_by_token(net, hidden, rotation if rope else None)
    torch.testing.assert_close(net(hidden, position_embeddings=rotation)[0], expected, **NEAR)


@torch.no_grad()
def test_the_stock_layer_has_its_weights(make_teacher: Teachers) -> None:
    """Names, shapes and outputs are Qwen3-Next's, without biases and RoPE."""
    net = layer(make_teacher("llama"), heads=3, key_dim=6, value_dim=10, rope=False)
    config = Qwen3NextConfig(
        hidden_size=32,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=3,
        linear_num_value_heads=3,
        linear_key_head_dim=6,
        linear_value_head_dim=10,
        rms_norm_eps=net.spec.rms_norm_eps,
    )
    stock = Qwen3NextGatedDeltaNet(config, 0).eval()
    stock.load_state_dict(net.state_dict())
    hidden = torch.randn(2, 70, 32)
    torch.testing.assert_close(net(hidden)[0], stock(hidden), **NEAR)


@torch.no_grad()
def test_padding_leaves_no_trace_in_the_state(make_teacher: Teachers, make_ids: Ids) -> None:
    student = edit_model(make_teacher("llama"), GatedDeltaNetConfig(), pattern="S", init="random").eval()
    ids, padded, alone = make_ids(1, 9), DynamicCache(config=student.config), DynamicCache(config=student.config)
    student(ids, past_key_values=alone)
    mask = torch.tensor([[0] * 4 + [1] * 9])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    student(F.pad(ids, (4, 0), value=5), attention_mask=mask, position_ids=positions, past_key_values=padded)
    for ours, theirs in zip(padded.layers, alone.layers, strict=True):
        torch.testing.assert_close(ours.values, theirs.values, **NEAR)
        torch.testing.assert_close(ours.keys, theirs.keys, **NEAR)


def test_documents_and_padding_are_read_off_the_mask() -> None:
    """Left and right padding, two documents, a window; queries of a second chunk."""
    document = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 0], [1, 1, 1, 2, 3, 3, 3, 3]])  # 0 = padding
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    mask = ((document[:, :, None] == document[:, None]) & (document[:, None] > 0) & causal)[:, None]
    mask[0, 0, -1, 2:5] = True  # a padding token on the right may see what comes before
    real, first = place_in_text(mask[:, :, 3:])
    assert torch.equal(real, (document > 0)[:, 3:])
    assert first.tolist() == [[False, False, True, False, False], [True, True, False, False, False]]
    windowed = mask & torch.ones(8, 8, dtype=torch.bool).triu(-1)
    assert all(map(torch.equal, place_in_text(windowed[:, :, 3:]), (real, first)))


@torch.no_grad()
def test_the_state_stays_in_float32_under_autocast(
    make_teacher: Teachers, make_ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys and values have one dtype, which kernels of GPUs ask for, though RoPE's cos and sin have another."""
    student = edit_model(make_teacher("llama"), GatedDeltaNetConfig(), pattern="S", init="random").eval()
    cache, seen = DynamicCache(config=student.config), []
    monkeypatch.setattr(module, "delta_rule", lambda *given, **named: seen.append(given) or delta_rule(*given, **named))
    with torch.autocast("cpu", torch.bfloat16):
        for ids in (make_ids(1, 9), make_ids(1, 1)):
            student(ids, past_key_values=cache)
    assert {each.dtype for given in seen for each in given[:3]} == {torch.bfloat16}
    assert {given[3].dtype for given in seen} == {torch.float32}
    assert (cache.layers[0].keys.dtype, cache.layers[0].values.dtype) == (torch.bfloat16, torch.float32)


def directions(query: Tensor, key: Tensor) -> Tensor:
    """Cosines between all queries and keys (batch, time, heads, width) of a head."""
    return torch.einsum("bqhw,bkhw->bhqk", F.normalize(query, dim=-1), F.normalize(key, dim=-1))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "ernie4_5", "glm4", "nemotron"])
def test_calibrated_has_the_teachers_heads(family: str, make_teacher: Teachers, make_ids: Ids) -> None:
    """Queries and keys turn as the teacher's do, also where RoPE turns neighbours, or a part of the head."""
    teacher, ids = make_teacher(family), make_ids(4, 64)
    student = edit_model(teacher, GatedDeltaNetConfig(), pattern="S", calibration=[ids])
    for index, net in edited_attention(student).items():
        source: Any = teacher.model.layers[index].self_attn
        seen: list[tuple[Tensor, dict[str, Any]]] = []
        hook = source.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append((args[0] if args else kwargs["hidden_states"], kwargs)),
            with_kwargs=True,
        )
        teacher(ids, use_cache=False)
        hook.remove()
        hidden, call = seen[0]
        heads = heads_of(source, hidden, {name: value for name, value in call.items() if name != "hidden_states"})
        query, key, value, gate = net.in_proj_qkvz(hidden).unflatten(-1, (net.heads, -1)).split([net.key_dim] * 4, -1)
        query, key = (net.turn(each, *call["position_embeddings"]) for each in (query, key))
        theirs = [each.repeat_interleave(net.heads // each.shape[1], 1).transpose(1, 2) for each in heads[:3]]
        ours, expected = directions(query, key), directions(*theirs[:2])  # whatever the order of a head's entries
        assert (ours - expected).norm() < 0.2 * expected.norm()  # no linear function has a QK-norm
        expected = INPUT * theirs[2] / theirs[2].square().mean((0, 1, 3), keepdim=True).sqrt()
        assert (value - expected).norm() < 0.1 * expected.norm()
        assert (gate / GATE - 1).square().mean() < 0.5  # of random teachers no linear function of the input is constant
        torch.testing.assert_close(net.in_proj_ba(hidden), torch.zeros_like(net.in_proj_ba(hidden)))


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "gemma2"])
def test_statistics_of_heads_are_those_before_the_output_projection(
    family: str, make_teacher: Teachers, make_ids: Ids
) -> None:
    """Of two documents, with learned sinks, bounded scores and windows."""
    teacher, seen = make_teacher(family), {}
    batch = {"input_ids": make_ids(2, 24), "position_ids": torch.cat([torch.arange(9), torch.arange(15)]).expand(2, -1)}
    found = collect_statistics(teacher, range(4), [batch, batch])
    for index, decoder in enumerate(teacher.model.layers):
        decoder.self_attn.o_proj.register_forward_pre_hook(lambda _, args, index=index: seen.update({index: args[0]}))
    teacher(**batch, use_cache=False)
    for index, statistics in found.items():
        heads = seen[index].unflatten(-1, (4, -1))
        expected = heads.square().mean((0, 1, 3)).sqrt().double()
        torch.testing.assert_close(statistics.output, expected, atol=1e-5, rtol=1e-4)


def test_shapes_that_the_calibrated_init_does_not_have_are_refused(make_teacher: Teachers, make_ids: Ids) -> None:
    for fields, message in (
        ({"heads": 3}, "heads = 3: init calibrated needs the teacher's 4"),
        ({"key_dim": 4}, "key_dim = 4: init calibrated needs the teacher's 8"),
        ({"key_dim": 5}, "key_dim = 5: must be even"),
    ):
        with pytest.raises(UserError, match=message):
            edit_model(make_teacher("llama"), GatedDeltaNetConfig(**fields), calibration=[make_ids(2, 16)])
    with pytest.raises(UserError, match="conv_kernel = 0: must be"):
        GatedDeltaNetConfig(conv_kernel=0)


def test_triangular_systems_are_solved_by_products() -> None:
    """On NPUs; that no linear algebra is left there is tested with the engine."""
    lower, right = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.randn(2, 3, 64, 5, dtype=torch.float64)
    lower = lower / 8
    expected = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    torch.testing.assert_close(solved(lower, right), expected)


def test_eager_masks_say_the_same(make_teacher: Teachers, make_ids: Ids) -> None:
    """Additive ones, where 0 is visible."""
    mask = torch.zeros(1, 1, 3, 3).masked_fill(~torch.ones(3, 3, dtype=torch.bool).tril(), float("-inf"))
    assert all(map(torch.equal, place_in_text(as_bool_mask(mask)), place_in_text(mask == 0)))


def test_a_compiled_layer_does_not_grow_with_the_text(make_teacher: Teachers) -> None:
    """The loop over chunks is not unrolled."""
    counts = []
    for tokens in (16, 640):
        torch._dynamo.reset()
        counter = CompileCounter()
        net = torch.compile(layer(make_teacher("llama"), rope=False), backend=counter)
        net(torch.randn(1, tokens, 32))[0].sum().backward()
        counts.append((counter.frame_count, counter.op_count))
    torch._dynamo.reset()
    assert counts[0] == counts[1] > (0, 0)
