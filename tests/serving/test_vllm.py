"""Converted models in vLLM against Hugging Face: run by `make test-vllm`, in an environment of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from engines import BLOCK, SHAPE, answer, build_student, compare, engine, greedy, scheduler
from safetensors.torch import load_file, save_file

from pl_attnedit import GatedDeltaNetConfig, GateSWAConfig, MLAConfig
from pl_attnedit.serving.memory import groups_of, held_bytes, layers_of

pytestmark = pytest.mark.vllm
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
pytest.importorskip(
    "vllm", reason="vLLM is not installed: `make test-vllm` runs these tests in an environment of their own"
)

LENGTHS = (5, 60, 300, 1500)
STUDENTS: dict[str, tuple[dict[str, Any], str]] = {
    "sinks_head_gate": ({"S": GateSWAConfig(window=48, sinks=4)}, "SSSF"),
    "no_sinks_no_gate": ({"S": GateSWAConfig(window=48, gate="none")}, "SSSF"),
    "learned_sink_element_gate": ({"S": GateSWAConfig(window=48, gate="element", learned_sink=True)}, "SSFS"),
    "all_windows": ({"S": GateSWAConfig(window=48, sinks=4)}, "S"),
    "several_windows": (
        {
            "S": GateSWAConfig(window=48, sinks=40),  # more than a block
            "T": GateSWAConfig(window=48, gate="none"),
            "U": GateSWAConfig(window=100, sinks=2, learned_sink=True),
            "G": GateSWAConfig(window=None, learned_sink=True),
        },
        "STUG",
    ),
    "mla": ({"M": MLAConfig(40, 16)}, "M"),
    "mla_graded_free": (
        {"M": MLAConfig(24, 8, qk_nope_head_dim=20, v_head_dim=16, q_lora_rank=30, rope_frequencies="graded")},
        "M",
    ),
    "mla_spread_no_norm": ({"M": MLAConfig(40, 8, latent_norm=False, rope_frequencies="spread")}, "MF"),
    "windows_and_mla": ({"S": GateSWAConfig(window=48, sinks=4), "M": MLAConfig(40, 16)}, "SSSM"),
    "states": ({"D": GatedDeltaNetConfig()}, "D"),
    "states_windows_mla_full": (
        {
            "D": GatedDeltaNetConfig(heads=2, key_dim=24, value_dim=40, conv_kernel=3, rope=False),
            "S": GateSWAConfig(window=48, sinks=4),
            "M": MLAConfig(24, 8),
        },
        "DSMF",
    ),
    "windows_mla_full": (
        {"S": GateSWAConfig(window=48, sinks=4), "M": MLAConfig(24, 8), "N": MLAConfig(64, 32)},
        "SMNF",
    ),
}


ROPE: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 512},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 256,
    },
}


def prompts(make_ids: Callable[..., Any], lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [make_ids(1, length, seed=length)[0].tolist() for length in lengths]


@pytest.mark.parametrize("name", [name for name in STUDENTS if name != "states_windows_mla_full"])  # in every family
def test_a_student_equals_hugging_faces(
    name: str, make_teacher: Callable[..., Any], make_ids: Callable[..., Any], tmp_path: Path
) -> None:
    student = build_student(make_teacher("llama", **SHAPE), *STUDENTS[name])
    student.save_pretrained(tmp_path)
    with engine(tmp_path) as llm:
        assert compare(llm, student, prompts(make_ids), 16) < 5e-5


@pytest.mark.parametrize(
    "target",
    [MLAConfig(512, 64), MLAConfig(104, 24, rope_frequencies="graded")],
    ids=lambda target: f"{target.kv_lora_rank}+{target.qk_rope_head_dim}",
)
def test_widths_of_published_conversions(
    target: MLAConfig, make_teacher: Callable[..., Any], make_ids: Callable[..., Any], tmp_path: Path
) -> None:
    fields = {"hidden_size": 512, "head_dim": 64, "num_hidden_layers": 2, "initializer_range": 0.05}
    student = build_student(make_teacher("qwen3", **{**SHAPE, **fields}), {"M": target}, "M")
    student.save_pretrained(tmp_path)
    with engine(tmp_path) as llm:
        assert compare(llm, student, prompts(make_ids, (5, 300)), 16) < 5e-5


@pytest.mark.parametrize("rope", [None, "llama3", "yarn"])
def test_every_family(
    family: str, rope: str | None, make_teacher: Callable[..., Any], make_ids: Callable[..., Any], tmp_path: Path
) -> None:
    if rope is not None and family != "qwen3":
        pytest.skip("scaled RoPE is tried in one family")
    fields = {**SHAPE, **({"rope_parameters": ROPE[rope]} if rope else {})}
    if family == "qwen2":  # has no field of this name: a head is a share of the hidden size
        fields = {"hidden_size": 4 * fields.pop("head_dim"), "max_position_embeddings": 2048}
    if family == "llama":
        fields = {**fields, "attention_bias": True}
    student = build_student(make_teacher(family, **fields), *STUDENTS["states_windows_mla_full"])
    student.save_pretrained(tmp_path)
    with engine(tmp_path) as llm:
        assert compare(llm, student, prompts(make_ids), 16) < 1e-4


def held(llm: Any) -> list[int]:
    """Blocks that each group of layers holds for the only running request."""
    managers = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
    return [sum(not block.is_null for block in next(iter(m.req_to_blocks.values()))) for m in managers]


LONG = {"max_position_embeddings": 32768, "num_hidden_layers": 8}


@pytest.mark.parametrize(
    "name", ["sinks_head_gate", "windows_and_mla", "several_windows", "mla", "states_windows_mla_full"]
)
def test_blocks_held_are_those_of_the_formula(
    name: str, make_teacher: Callable[..., Any], make_ids: Callable[..., Any], tmp_path: Path
) -> None:
    from vllm import SamplingParams

    student = build_student(make_teacher("llama", **{**SHAPE, **LONG}), *STUDENTS[name])
    student.save_pretrained(tmp_path)
    groups = groups_of(layers_of(student.config), BLOCK, itemsize=4)
    with engine(tmp_path, max_model_len=32768, max_num_batched_tokens=4096) as llm:
        config = scheduler(llm).kv_cache_config
        assert len(config.kv_cache_groups) == len(groups)
        tensors = config.kv_cache_tensors  # of vLLM 0.26 apart, later ones parts of one memory
        size = sum(t.size for t in tensors) if hasattr(tensors[0], "shared_by") else tensors[0].size
        page = size // config.num_blocks
        assert {4 * group.pages for group in groups} == {page}
        for length in (1000, 8000, 32000) if name == "sinks_head_gate" else (1000, 4000):
            prompt = {"prompt_token_ids": make_ids(1, length, seed=length)[0].tolist()}
            params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
            llm.llm_engine.add_request(str(length), prompt, params)
            tokens = 0
            while llm.llm_engine.has_unfinished_requests():
                for out in llm.llm_engine.step():
                    tokens = length + len(out.outputs[0].token_ids) - 1  # the newest one is not in the cache yet
                    if out.finished or tokens == length:
                        continue  # what a prompt needed more is given back when the second token is computed
                    found = held(llm)
                    assert sorted(found) == sorted(g.layer.blocks(tokens, g.block) for g in groups), tokens
                    assert sum(found) * page == held_bytes(student.config, tokens, 4, BLOCK)
            assert tokens > length


@pytest.mark.parametrize("name", ["sinks_head_gate", "several_windows", "states", "states_windows_mla_full", "mla"])
def test_prefix_hits_and_preempted_requests_give_the_same(
    name: str, make_teacher: Callable[..., Any], make_ids: Callable[..., Any], tmp_path: Path
) -> None:
    """A conversation that grows, others that begin alike, and so little memory that requests are thrown out."""
    student = build_student(make_teacher("llama", **SHAPE), *STUDENTS[name])
    student.save_pretrained(tmp_path)
    first = make_ids(1, 1300, seed=3)[0].tolist()
    branches = [first[:900] + make_ids(1, 200, seed=seed)[0].tolist() for seed in (4, 5)]
    texts = [first[:1000], first, *branches]
    with engine(tmp_path) as llm:
        found = [answer(llm, [text], 8, logprobs=False)[0] for text in texts]
    assert [list(out.outputs[0].token_ids) for out in found] == [greedy(student, text, 8) for text in texts]
    hits = [out.num_cached_tokens for out in found]
    assert hits[0] == 0, hits
    # vLLM keeps windows and states at ends of prompts, and where a second text branched off, as layers beside them say
    whole = any(layer.window is None for layer in layers_of(student.config))
    assert min(hits[1], hits[3] if whole else hits[1]) > 600, hits

    many = make_ids(8, 33)
    expected = student.generate(many, max_new_tokens=150, do_sample=False)[:, 33:].tolist()
    groups = groups_of(layers_of(student.config), BLOCK, itemsize=4)
    start, end = (sum(group.layer.blocks(tokens, group.block) for group in groups) for tokens in (34, 180))
    blocks = 1 + len(many) * (start + end) // 2  # vLLM needs one for itself
    with engine(tmp_path, max_model_len=256, num_gpu_blocks_override=blocks) as llm:
        preempted = []
        inner = scheduler(llm)._preempt_request
        scheduler(llm)._preempt_request = lambda *args, **kwargs: (preempted.append(args), inner(*args, **kwargs))
        found = answer(llm, many.tolist(), 150, logprobs=False)
    assert [list(out.outputs[0].token_ids) for out in found] == expected
    assert preempted, "memory must have been short, or this test shows nothing"


PRIVATE = [
    "vllm.v1.attention.backends.fa_utils:get_flash_attn_version",
    "vllm._custom_ops:reshape_and_cache_flash",
    "vllm._custom_ops:concat_and_cache_mla",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register",
    "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager._remove_blocks_in_range",
    "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager._get_num_evictable_blocks",
    "vllm.v1.core.kv_cache_utils:resolve_block_hashes",
    "vllm.v1.kv_cache_interface:AttentionSpec.unpadded_page_size_bytes",
    "vllm.config:CacheConfig.user_specified_block_size",
    "vllm.v1.core.kv_cache_utils:_get_kv_cache_groups_uniform_page_size",  # which `serving.memory` repeats
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.CUSTOM",
    "vllm.model_executor.model_loader.weight_utils:sharded_weight_loader",
    "vllm.model_executor.models.utils:PPMissingLayer",
]
SIGNATURES = {
    "get_num_blocks_to_allocate": ["request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens"],
    "add_local_computed_blocks": [
        "request_id",
        "new_computed_blocks",
        "num_local_computed_tokens",
        "num_external_computed_tokens",
    ],
    "remove_skipped_blocks": ["request_id", "processed_computed_tokens", "num_prompt_tokens"],
    "find_longest_cache_hit": ["block_hashes", "max_length", "kv_cache_group_ids", "block_pool", "kv_cache_spec"],
    "reachable_block_mask": ["start_block", "end_block", "alignment_tokens", "kv_cache_spec"],
}


def test_what_is_used_of_vllms_inside_is_as_it_was() -> None:
    """Says by name what a new version of vLLM has moved or changed."""
    gone = []
    for path in PRIVATE:
        module, _, names = path.partition(":")
        try:
            attrgetter(names)(import_module(module))
        except (ImportError, AttributeError):
            gone.append(path)
    manager = import_module("vllm.v1.core.single_type_kv_cache_manager").SlidingWindowManager
    for name, expected in SIGNATURES.items():
        found = [p for p in signature(getattr(manager, name)).parameters if p != "self"]
        if found[: len(expected)] != expected:
            gone.append(f"{name}({', '.join(found)})")
    assert not gone


EVERYTHING = (
    {
        "S": GateSWAConfig(window=48, sinks=4),
        "T": GateSWAConfig(window=48, gate="element", learned_sink=True),
        "M": MLAConfig(40, 16, rope_frequencies="graded"),
        "D": GatedDeltaNetConfig(),
    },
    "SMFTD",
)


def test_two_tensor_parallel_ranks(
    make_teacher: Callable[..., Any], make_ids: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes of their own, as the scheduler is then too."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else each rank wants a NUMA node
    student = build_student(make_teacher("llama", num_hidden_layers=5, **SHAPE), *EVERYTHING)
    student.save_pretrained(tmp_path)
    with engine(tmp_path, tensor_parallel_size=2) as llm:
        assert compare(llm, student, prompts(make_ids, (5, 300)), 16) < 5e-5


def test_a_student_without_some_of_its_weights_is_not_served(make_teacher: Callable[..., Any], tmp_path: Path) -> None:
    build_student(make_teacher("llama", num_hidden_layers=5, **SHAPE), *EVERYTHING).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    names = (
        "0.self_attn.gate_proj.weight",
        "0.self_attn.k_proj.weight",
        "1.self_attn.kv_b_proj.weight",
        "3.self_attn.sink",
    )
    for name in names:  # linear, one of three that vLLM stacks, and plain ones
        lost = f"model.layers.{name}"
        save_file({k: w for k, w in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
        with (
            pytest.raises(ValueError, match=f"missing: {lost} |not initialized from checkpoint.*{lost}"),
            engine(tmp_path),
        ):
            pass


def test_a_quantised_cache_is_refused_where_pytorch_reads_it() -> None:
    from pl_attnedit.serving.paged_backend import GatheredImpl

    with pytest.raises(ValueError, match="kv_cache_dtype = 'fp8'"):
        GatheredImpl(4, 32, 1.0, 2, None, None, "fp8")
