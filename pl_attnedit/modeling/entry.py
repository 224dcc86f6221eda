"""The entry file of a saved model: what lets programs load it that do not import `pl_attnedit` first.

Hugging Face runs it where `trust_remote_code=True` is given, e.g. by `lm_eval --model hf`; it only imports the installed
package. After `import pl_attnedit` it is not used, and nothing needs to be trusted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

ENTRY_MODULE = "load_with_pl_attnedit"
ENTRY_TEXT = '''"""Loads this converted model with the installed package: pip install pl_attnedit."""

from pl_attnedit.modeling.hf import {config}, {model}

__all__ = ["{config}", "{model}"]
'''


class WithEntryFile:
    """Mixin of converted models: `save_pretrained` adds the entry file and names it in config.json."""

    config: PreTrainedConfig

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """As Hugging Face's, with the entry file."""
        config = type(self.config).__name__
        model, autos = config.removesuffix("Config"), ["AutoModelForCausalLM"]  # FSDP renames the model's own class
        if model.endswith("ForConditionalGeneration"):
            autos += ["AutoModelForImageTextToText", "AutoModelForMultimodalLM"]
        else:
            model += "ForCausalLM"
        models = dict.fromkeys(autos, f"{ENTRY_MODULE}.{model}")
        self.config.auto_map = {"AutoConfig": f"{ENTRY_MODULE}.{config}", **models}
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]
        if is_main_process:
            text = ENTRY_TEXT.format(config=config, model=model)
            (Path(save_directory) / f"{ENTRY_MODULE}.py").write_text(text, "utf-8")


class OwnEntryFile:
    """Mixin of configs and models: Hugging Face shall not copy our source into saved folders."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "") -> None:
        """Called for classes that came through an entry file; they are saved with one, not with their source."""
