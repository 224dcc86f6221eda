"""Small teachers of the real Hugging Face classes: seeded random ones of every family, and two trained for real."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.nn.functional as F
from any_family import ATTENTION, BASE, MODEL_TYPES, ROWS, VOCAB
from drawing import Drawing
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers import AutoConfig, PreTrainedModel

from pl_attnedit.attention import INITS, TARGETS, Init, Target, TargetConfig
from pl_attnedit.teachers import model_class

with suppress(ImportError):  # the environment of vLLM draws nothing
    import vl_convert

    vl_convert.vegalite_to_svg = Drawing()
# what was compiled is kept from one session to the next, unlike all else in the cache folder of the tests
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
torch._dynamo.config.fail_on_recompile_limit_hit = True  # elsewhere torch.compile only warns where it gives up


def pytest_collection_finish() -> None:
    """What has been imported stays, so that `gc.collect`, which ours and others call often, need not look at it again."""
    gc.collect()
    gc.freeze()


# what is particular to each family, names and proportions as in its published models
PARTICULAR: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "qwen3": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
    },
}
FAMILIES = sorted(PARTICULAR)  # of the tests that try everything; `any_family.ROWS` has many more


def build_teacher(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model in eval mode whose norms, QK-norms and biases are not the trivial ones of a fresh model."""
    particular = ROWS.get(family) or PARTICULAR.get(family, {})
    config = AutoConfig.for_model(MODEL_TYPES.get(family, family), **{**BASE, **deepcopy(particular), **overrides})
    config._attn_implementation = ATTENTION.get(family, "sdpa")
    torch.manual_seed(seed)
    model = model_class(config)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(("bias", "sinks")):
                parameter.normal_(std=0.5)
    return model.eval()


@pytest.fixture(scope="session")
def make_teacher() -> Callable[..., PreTrainedModel]:
    """`make_teacher(family, seed=0, **config_fields)`: a new tiny random teacher of a family."""
    return build_teacher


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """One row per family."""
    return request.param


@pytest.fixture
def teacher(family: str) -> PreTrainedModel:
    """A tiny random teacher of each family."""
    return build_teacher(family)


def random_ids(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    """(batch, time) token ids without the pad token."""
    return torch.randint(1, VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def make_ids() -> Callable[..., torch.Tensor]:
    """`make_ids(batch, time, seed=0)`: random token ids, none of them the pad token 0."""
    return random_ids


@dataclass(frozen=True)
class AloneConfig(TargetConfig):
    """A token sees itself alone. The field means nothing; GateSWA has one of this name."""

    window: int = 3

    type: ClassVar[str] = "alone"
    default_pattern: ClassVar[str] = "S"


class Alone(Target):
    config_class = AloneConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.o_proj = torch.nn.Linear(self.spec.hidden_size, self.spec.hidden_size)

    def forward(self, hidden_states: torch.Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            past_key_values.update(hidden_states[:, None], hidden_states[:, None, :, :0], self.layer_idx)
        return self.o_proj(hidden_states), None

    def cached_bytes(self, context: int, itemsize: int) -> int:
        return context * self.spec.hidden_size * itemsize


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> AloneConfig:
    """A target that nothing in the package knows, among those that it does."""
    monkeypatch.setitem(TARGETS, "alone", Alone)
    monkeypatch.setitem(INITS, "alone", {name: Init(lambda *given: None) for name in ("random", "calibrated")})
    return AloneConfig()


TONGUES = 4  # languages of the trained teachers' text: each follows a bigram rule of its own


def tongue_text(batch: int, time: int, seed: int) -> torch.Tensor:
    """Text that needs attention: the first token says which of four bigram rules holds, and the last but one shifts it.

    x[t + 1] = rule[x[0]][x[t]] + x[t - 1] mod 2, replaced by noise for one token in twelve.
    """
    rules = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(r)) for r in range(TONGUES)])
    generator = torch.Generator().manual_seed(seed)
    tongue = torch.randint(TONGUES, (batch,), generator=generator)
    noise = torch.randint(32, (batch, time), generator=generator)
    noisy = torch.rand(batch, time, generator=generator) < 1 / 12
    text = torch.empty(batch, time, dtype=torch.long)
    text[:, 0], text[:, 1] = 32 + tongue, noise[:, 1]
    for t in range(2, time):
        text[:, t] = (rules[tongue, text[:, t - 1] % 32] + text[:, t - 2] % 2) % 32
        text[:, t] = torch.where(noisy[:, t], noise[:, t], text[:, t])
    return text


@pytest.fixture(scope="session")
def make_text() -> Callable[[int, int, int], torch.Tensor]:
    """`make_text(batch, time, seed)`: token ids of the language that the trained teachers know."""
    return tongue_text


def language_loss(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 1:-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())


def train_teacher(family: str, **overrides: Any) -> PreTrainedModel:
    """A two-layer model trained until it reads the first and the last but one token through its attention."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": 0.08}
    model = build_teacher(family, **{**shape, **overrides}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    steps = 160
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        language_loss(model, tongue_text(32, 32, seed=step)).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        ids = tongue_text(32, 32, seed=10**6)
        alone = torch.eye(32, dtype=torch.bool).expand(32, 1, 32, 32)  # every token sees itself only
        loss, blind = language_loss(model, ids).item(), language_loss(model, ids, alone).item()
    assert blind > loss + 1.0, f"{family}: attention does not matter, loss {loss:.2f} and without attention {blind:.2f}"
    return model


@pytest.fixture(scope="session")
def trained_llama() -> PreTrainedModel:
    """A small Llama that reads its language (`make_text`). Shared by all tests: copy it before changing it."""
    return train_teacher("llama", head_dim=16)


@pytest.fixture(scope="session")
def trained_qwen3() -> PreTrainedModel:
    """A small Qwen3, with QK-norm far from trivial, that reads its language. Shared: copy it before changing it."""
    return train_teacher("qwen3", head_dim=16)
