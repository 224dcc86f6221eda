"""The tokenizer of a GGUF file. Every setting of the file is applied, or refused by name."""

from __future__ import annotations

from typing import Any

from gguf import GGUFReader
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from pl_attnedit.errors import UserError

try:  # how text is cut before merging, by `pre`: those that transformers sets itself
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
except ImportError:  # older ones set none
    GGUF_PRE_TOKENIZER_SPLITS = {}

# of llama.cpp's `llama-vocab.cpp`, as all that follows
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = dict.fromkeys(("llama3", "llama-v3", "llama-bpe"), _LLAMA3)
_SPLITS |= dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _LLAMA3.replace("{1,3}", ""))
_AS_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais"}
_DIGITS_ALONE = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_WORDS_WHOLE = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
_KNOWN = {"model", "pre", "tokens", "scores", "token_type", "merges", "add_bos_token", "add_eos_token"}
_KNOWN |= {"add_space_prefix", "token_type_count"}
_NEUTRAL = {"add_sep_token": False, "remove_extra_whitespaces": False}


def exact_tokenizer(tokenizer: Any, reader: GGUFReader) -> PreTrainedTokenizerBase:
    """transformers' tokenizer of the file, corrected by the keys that transformers ignores.

    Raises:
        UserError: a setting in the file that cannot be applied.
    """
    fields = {
        key.removeprefix("tokenizer.ggml."): field.contents() if len(field.data) == 1 else None
        for key, field in reader.fields.items()
        if key.startswith("tokenizer.ggml.")
    }
    for key, value in fields.items():
        if key not in _KNOWN and not key.endswith("_token_id") and value != _NEUTRAL.get(key, ...):
            raise UserError(f"says tokenizer.ggml.{key} = {str(value)[:60]}, which is not honoured")
    for kind in ("bos", "eos"):  # transformers 5.17 takes one for the other
        if (token := fields.get(f"{kind}_token_id")) is not None:
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(int(token)))
    bpe, pre = fields.get("model") == "gpt2", fields.get("pre")
    if bpe:
        _cut(tokenizer.backend_tokenizer, pre)
    elif tokenizer.tokenize("a")[0].startswith("▁") != fields.get("add_space_prefix", True):
        raise UserError(f"says tokenizer.ggml.add_space_prefix = {fields['add_space_prefix']}, which is not honoured")
    prefix = "tokenizer.chat_template."  # further ones, such as tool_use; transformers reads the first alone
    further = {
        key.removeprefix(prefix): field.contents() for key, field in reader.fields.items() if key.startswith(prefix)
    }
    if further:
        default = {"default": tokenizer.chat_template} if tokenizer.chat_template else {}
        tokenizer.chat_template = {**default, **further}
    _surround(tokenizer, "bos", bool(fields.get("add_bos_token", not bpe or pre in _WORDS_WHOLE)))
    _surround(tokenizer, "eos", bool(fields.get("add_eos_token")))
    return tokenizer


def ends_of(reader: GGUFReader) -> list[int] | None:
    """The tokens at which an answer ends: of a text (eos), a turn (eot) or a message (eom); None where none is named."""
    named = (reader.fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    return sorted({int(field.contents()) for field in named if field is not None}) or None


def _cut(backend: Any, pre: str | None) -> None:
    """Splits text the way that the merges were learned with."""
    if pre in _DIGITS_ALONE:
        digits, spelled = (
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, spelled])
    elif pre in _SPLITS:
        words = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, spelled])
    elif pre not in {*_AS_GPT2, *GGUF_PRE_TOKENIZER_SPLITS}:
        raise UserError(f"says tokenizer.ggml.pre = {pre!r}, which is not honoured")
    if pre in _WORDS_WHOLE:
        backend.model.ignore_merges = True


def _surround(tokenizer: Any, kind: str, wanted: bool) -> None:
    """Whether text gets a token before it (bos) or after it (eos)."""

    def does() -> bool:
        ids = tokenizer("a")["input_ids"]
        token = getattr(tokenizer, f"{kind}_token_id")
        return len(ids) > len(tokenizer("a", add_special_tokens=False)["input_ids"]) and ids[-(kind == "eos")] == token

    if does() != wanted:
        setattr(tokenizer, f"add_{kind}_token", wanted)
    if does() != wanted:
        raise UserError(f"says tokenizer.ggml.add_{kind}_token = {wanted}, which is not honoured")
