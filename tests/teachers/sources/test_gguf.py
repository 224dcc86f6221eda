"""A GGUF is honoured in all that it says, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import CONFIG, THETA, write_gguf
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pl_attnedit.errors import UserError
from pl_attnedit.teachers.sources import gguf as gguf_file
from pl_attnedit.teachers.sources.resolve import load_teacher, resolve_teacher

IDS = torch.arange(60)[None] * 7 % 300
Change = Callable[[gguf.GGUFWriter], Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_ATTNEDIT_CACHE", str(tmp_path / "cache"))


def llama(**fields: Any) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG | {"initializer_range": 0.3} | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def scaled(kind: str, factor: float = 4.0, **fields: Any) -> Any:
    return llama(rope_parameters={"rope_type": kind, "rope_theta": THETA, "factor": factor, **fields})


def says(**values: Any) -> Change:
    """Keys of the architecture; `__` stands for a dot."""

    def write(writer: gguf.GGUFWriter) -> None:
        for name, value in values.items():
            key = name.replace("__", ".")
            key = key if "." in key and key.startswith(("tokenizer.", "general.", "split.")) else f"llama.{key}"
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)

    return write


def without(name: str) -> Change:
    return lambda writer: writer.kv_data[0].pop(f"llama.{name}")


def factors(model: Any) -> Change:
    """As llama.cpp's converter writes Llama 3.1's scaling."""
    plain = THETA ** -(torch.arange(0, 8, 2).float() / 8)
    found = plain / ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")[0]
    return lambda writer: writer.add_tensor("rope_freqs.weight", found.numpy())


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 32}


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: scaled("linear"), says(rope__scaling__type="linear", rope__scaling__factor=4.0)),
        (lambda: scaled("linear"), says(rope__scaling__factor=4.0)),
        (lambda: scaled("linear"), says(rope__scale_linear=4.0)),
        (lambda: scaled("yarn", original_max_position_embeddings=32), says(**YARN)),
        (
            lambda: scaled("yarn", original_max_position_embeddings=32, beta_fast=8.0, beta_slow=2.0),
            says(**YARN, rope__scaling__yarn_beta_fast=8.0, rope__scaling__yarn_beta_slow=2.0),
        ),
        (lambda: scaled("llama3", 8.0, **LLAMA3), lambda writer: factors(scaled("llama3", 8.0, **LLAMA3))(writer)),
        (llama, says(rope__scaling__type="none", rope__scaling__factor=4.0)),
        (llama, lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))),
        (lambda: llama(attention_bias=True, mlp_bias=True), says(rope__dimension_count=8, attention__key_length=8)),
        (lambda: llama(head_dim=16), says(rope__dimension_count=16, attention__key_length=16)),
        (lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4}), without("rope.freq_base")),
    ],
    ids=["linear", "no type", "old key", "yarn", "betas", "llama3", "none", "ones", "biases", "head_dim", "no theta"],
)
def test_what_a_file_says_is_honoured(
    tmp_path: Path, backend: Tokenizer, make: Callable[[], Any], change: Change
) -> None:
    model = make()
    write_gguf(tmp_path / "tiny.gguf", model, backend, change)
    read, _ = load_teacher(str(tmp_path / "tiny.gguf"))
    with torch.no_grad():
        torch.testing.assert_close(read(IDS).logits, model(IDS).logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_other_families(tmp_path: Path, backend: Tokenizer, make_teacher: Callable[..., Any], family: str) -> None:
    model = make_teacher(family, vocab_size=320)
    write_gguf(tmp_path / "tiny.gguf", model, backend, keep=lambda name: name != "lm_head.weight" or family != "qwen2")
    read, _ = load_teacher(str(tmp_path / "tiny.gguf"))
    with torch.no_grad():
        torch.testing.assert_close(read(IDS).logits, model(IDS).logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (says(rope__scaling__type="longrope", rope__scaling__factor=4.0), "rope.scaling.type = 'longrope'"),
        (says(**YARN, rope__scaling__yarn_attn_factor=1.3), "rope.scaling.yarn_attn_factor = 1.2"),
        (says(**YARN, rope__scaling__yarn_ext_factor=0.5), "rope.scaling.yarn_ext_factor = 0.5"),
        (says(logit_scale=0.5), "logit_scale = 0.5"),
        (says(attention__scale=0.5), "attention.scale = 0.5"),
        (says(attention__sliding_window=8), "attention.sliding_window = 8"),
        (says(rope__dimension_count=4, attention__key_length=8), "rope.dimension_count = 4"),
        (says(expert_count=4), "expert_count = 4"),
        (says(feed_forward_length=40), r"another shape to the weights model\.layers\.0\.mlp\.down_proj"),
        (says(something_new=4), "something_new = 4"),
        (without("attention.layer_norm_rms_epsilon"), "does not say attention.layer_norm_rms_epsilon"),
        (without("context_length"), "does not say context_length"),
        (says(split__count=2), r"one of 2 files; their names must be"),
        (says(general__type="adapter"), "holds no model"),
        (says(tokenizer__ggml__pre="martian"), "tokenizer.ggml.pre = 'martian'"),
        (says(tokenizer__ggml__something=1), "tokenizer.ggml.something = 1"),
        (lambda writer: writer.add_tensor("blk.0.attn_q_norm.weight", np.ones(8, np.float32)), "attn_q_norm.weight"),
        (
            lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(32, np.float32)),
            "the weights lack .*k_proj.bias",
        ),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.arange(4, dtype=np.float32) + 1), "other factors in"),
        (lambda writer: writer.add_tensor("rope_factors_long.weight", np.ones(4, np.float32)), "rope_factors_long"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_honoured_is_refused(
    tmp_path: Path, backend: Tokenizer, model: Any, change: Change, message: str
) -> None:
    write_gguf(tmp_path / "tiny.gguf", model, backend, change)
    with pytest.raises(UserError, match=message) as error:
        resolve_teacher(str(tmp_path / "tiny.gguf"))
    assert len(str(error.value).splitlines()) == 1


def test_files_that_are_not_whole(tmp_path: Path, backend: Tokenizer, model: Any) -> None:
    write_gguf(tmp_path / "part.gguf", model, backend, keep=lambda name: ".1.mlp.up_proj" not in name)
    with pytest.raises(UserError, match=r"the weights lack model\.layers\.1\.mlp\.up_proj\.weight"):
        resolve_teacher(str(tmp_path / "part.gguf"))
    write_gguf(tmp_path / "big.gguf", model, backend, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UserError, match="is big-endian"):
        resolve_teacher(str(tmp_path / "big.gguf"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (says(), (False, False)),
        (says(tokenizer__ggml__add_bos_token=True), (True, False)),
        (says(tokenizer__ggml__add_bos_token=True, tokenizer__ggml__add_eos_token=True), (True, True)),
        (says(tokenizer__ggml__pre="llama-bpe"), (True, False)),  # llama.cpp's default of it
        (says(tokenizer__ggml__pre="llama-bpe", tokenizer__ggml__add_bos_token=False), (False, False)),
    ],
)
def test_tokens_around_a_text(
    tmp_path: Path, backend: Tokenizer, model: Any, change: Change, expected: tuple[bool, bool]
) -> None:
    write_gguf(tmp_path / "tiny.gguf", model, backend, change)
    _, tokenizer = load_teacher(str(tmp_path / "tiny.gguf"))
    ids = tokenizer("import this").input_ids
    assert (ids[0] == 7, ids[-1] == 0) == expected
    assert tokenizer.decode(ids, skip_special_tokens=True).removeprefix("&") == "import this"


def test_sentencepiece(tmp_path: Path, backend: Tokenizer, model: Any) -> None:
    """Text gets BOS and a space before it unless the file says otherwise."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    pieces += [f"w{i}" for i in range(320 - len(pieces))]

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(61)])
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 61)  # unknown, control, bytes, normal
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        for part in writer.kv_data:
            part.pop("tokenizer.ggml.merges", None)

    for name, more, ids in (("plain", {}, [1, 264]), ("bare", {"tokenizer__ggml__add_bos_token": False}, [264])):
        file = tmp_path / f"{name}.gguf"
        write_gguf(file, model, backend, lambda writer, more=more: (change(writer), says(**more)(writer)))
        _, tokenizer = load_teacher(str(file))
        assert tokenizer("ab").input_ids == ids
        assert tokenizer.decode(tokenizer("ab ab").input_ids, skip_special_tokens=True) == "ab ab"


def test_templates_and_tokens_of_a_chat(tmp_path: Path, backend: Tokenizer, model: Any) -> None:
    """With tools the template that is for them, and whole tokens that are not special."""

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_chat_template([{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}])
        tokens, types, merges = (writer.kv_data[0][f"tokenizer.ggml.{n}"] for n in ("tokens", "token_type", "merges"))
        merges.value = [merge for merge in merges.value if merge.replace(" ", "") != tokens.value[-1]]
        tokens.value, types.value = [*tokens.value[:-1], "<tool>"], [*types.value[:-1], gguf.TokenType.USER_DEFINED]

    write_gguf(tmp_path / "tiny.gguf", model, backend, change)
    _, tokenizer = load_teacher(str(tmp_path / "tiny.gguf"))
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "plain"
    assert tokenizer.apply_chat_template(chat, tokenize=False, tools=[{"name": "tide"}]) == "tools"
    assert tokenizer("a<tool>b").input_ids.count(319) == 1


def test_a_template_for_tools_alone(tmp_path: Path, backend: Tokenizer, model: Any) -> None:
    only = lambda writer: writer.add_string("tokenizer.chat_template.tool_use", "tools")  # noqa: E731
    write_gguf(tmp_path / "tiny.gguf", model, backend, only)
    _, tokenizer = load_teacher(str(tmp_path / "tiny.gguf"))
    assert tokenizer.get_chat_template(None, tools=[{"name": "tide"}]) == "tools"


def test_an_answer_ends_with_the_turn(tmp_path: Path, backend: Tokenizer, model: Any) -> None:
    write_gguf(tmp_path / "tiny.gguf", model, backend, says(tokenizer__ggml__eot_token_id=2))
    read, tokenizer = load_teacher(str(tmp_path / "tiny.gguf"))
    assert read.generation_config.eos_token_id == [0, 2]
    assert tokenizer.eos_token_id == 0


def test_digits_alone(tmp_path: Path, backend: Tokenizer, model: Any) -> None:
    """SmolLM's merges were learned from text whose digits stand alone."""
    write_gguf(tmp_path / "tiny.gguf", model, backend)
    _, tokenizer = load_teacher(str(tmp_path / "tiny.gguf"))
    words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1999")]
    assert words == ["in", "Ġ", "1", "9", "9", "9"]


def test_a_conversion_belongs_to_what_made_it(
    tmp_path: Path, backend: Tokenizer, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, model, backend)
    made = [resolve_teacher(str(file))]
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "CONVERTER", 0)
        made.append(resolve_teacher(str(file)))
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file.transformers, "__version__", "0")
        made.append(resolve_teacher(str(file)))
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file.metadata, "version", lambda package: "0")
        made.append(resolve_teacher(str(file)))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    made.append(resolve_teacher(str(file)))
    assert len(set(made)) == len(made)
