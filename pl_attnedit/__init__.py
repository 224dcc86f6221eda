"""Give a trained Hugging Face language model a cheaper attention, and recover its quality by distillation.

Importing the package registers converted models with transformers, so that `AutoModelForCausalLM.from_pretrained` loads
them. torch and transformers are imported when they are first needed.
"""

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pl_attnedit.errors import UserError
from pl_attnedit.moved import find_moved
from pl_attnedit.registration import register_when_used

if TYPE_CHECKING:
    from pl_attnedit.attention import GatedDeltaNetConfig, GateSWAConfig, MLAConfig
    from pl_attnedit.modeling import EditPlan, edit_model, load

for _name in ("callbacks", "configs", "eval"):
    _link = Path(__file__).parent / _name
    if _link.is_file():  # an unpacked ZIP, or a checkout on a system without symbolic links
        raise ImportError(
            f"{_link} is a plain file where a symbolic link to ../{_name} belongs: install with pip from the repository, "
            "or clone it with git and core.symlinks=true"
        )

if PathFinder.find_spec("torch_npu") is not None:  # torch and transformers import it wherever it is installed
    try:
        import transformers.modeling_utils  # noqa: F401
    except (ImportError, RuntimeError) as error:
        if "torch_npu" in sys.modules:
            raise
        raise ImportError(
            "torch_npu is installed and cannot be imported, and so torch and transformers cannot: "
            f"{error.__cause__ or error}. "
            "Source the set_env.sh of CANN, install the torch_npu that fits torch, or uninstall it"
        ) from None

find_moved()
register_when_used()

__all__ = ["EditPlan", "GateSWAConfig", "GatedDeltaNetConfig", "MLAConfig", "UserError", "edit_model", "load"]

_MODULES = {
    "EditPlan": "modeling",
    "GateSWAConfig": "attention",
    "GatedDeltaNetConfig": "attention",
    "MLAConfig": "attention",
    "edit_model": "modeling",
    "load": "modeling",
}


def __getattr__(name: str) -> Any:
    """Imports what takes seconds when it is asked for."""
    if name in _MODULES.values():
        return import_module(f"pl_attnedit.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'pl_attnedit' has no attribute {name!r}")
    return getattr(import_module(f"pl_attnedit.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
