"""Tiny students in a real vLLM engine in this process, beside the same students in Hugging Face."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from pl_attnedit import edit_model
from pl_attnedit.modeling import edited_attention

BLOCK = 32  # what the kernel for windows and full layers wants on a CPU: a multiple of it
SHAPE = {
    "head_dim": 32,
    "hidden_size": 64,
    "max_position_embeddings": 2048,
}  # heads narrower than 32 have no kernel there


def build_student(teacher: PreTrainedModel, targets: Any, pattern: str) -> PreTrainedModel:
    """With gates open to different degrees and sinks of different shares; MLA and states at random."""
    torch.manual_seed(1)
    student = edit_model(teacher, targets, pattern=pattern, init="random").eval()
    with torch.no_grad():
        for attention in edited_attention(student).values():
            for name, parameter in attention.named_parameters():
                if name in ("gate_proj.weight", "sink", "in_proj_qkvz.weight", "A_log"):
                    parameter.normal_(std=0.5)
    return student


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """vLLM's `LLM` of a saved model without a tokenizer, whose scheduler is in this process too."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.models import registry

    defaults = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "block_size": BLOCK,
        "max_model_len": 2048,
        "max_num_batched_tokens": 256,  # so that longer prompts come in parts
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 2**26,
    }
    # a class is looked at here, not in a process for each, which takes ten seconds; `vllm serve` does so in its tests
    with patch.object(registry, "_run_in_subprocess", lambda look: look(), create=True):
        llm = LLM(str(folder), **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answer(llm: Any, prompts: list[list[int]], tokens: int, logprobs: bool = True) -> list[Any]:
    """Greedy continuations, and the log-probabilities of the prompts' own tokens."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, prompt_logprobs=0 if logprobs else None
    )
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


@torch.no_grad()
def compare(llm: Any, student: PreTrainedModel, prompts: list[list[int]], tokens: int) -> float:
    """The largest difference of a prompt's log-probabilities; raises where greedy tokens differ."""
    worst = 0.0
    for prompt, found in zip(prompts, answer(llm, prompts, tokens)):
        ids = torch.tensor([prompt])
        rows = student(input_ids=ids).logits[0, :-1].log_softmax(-1)
        expected = rows.gather(1, ids[0, 1:, None])[:, 0]
        got = torch.tensor([found.prompt_logprobs[i][token].logprob for i, token in enumerate(prompt) if i])
        worst = max(worst, (got - expected).abs().max().item())
        assert list(found.outputs[0].token_ids) == greedy(student, prompt, tokens), f"{len(prompt)} tokens"
    return worst


def greedy(student: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    """Hugging Face's continuation."""
    return student.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)[0, len(prompt) :].tolist()


def scheduler(llm: Any) -> Any:
    """The engine's scheduler: its KV cache manager knows who holds which block."""
    return llm.llm_engine.engine_core.engine_core.scheduler
