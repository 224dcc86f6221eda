"""Give a trained Hugging Face language model a cheaper attention, and recover its quality by distillation.

Importing the package registers converted models with transformers, so that `AutoModelForCausalLM.from_pretrained` loads
them.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

for _name in ("callbacks", "configs", "eval"):
    _link = Path(__file__).parent / _name
    if _link.is_file():  # an unpacked ZIP, or a checkout on a system without symbolic links
        raise ImportError(
            f"{_link} is a plain file where a symbolic link to ../{_name} belongs: install with pip from the repository, "
            "or clone it with git and core.symlinks=true"
        )

try:
    from pl_attnedit.attention import GateSWAConfig, MLAConfig
    from pl_attnedit.errors import UserError
    from pl_attnedit.modeling import EditPlan, edit_model, load
except (ImportError, RuntimeError) as error:  # torch and transformers import torch_npu wherever it is installed
    if "torch_npu" in sys.modules or find_spec("torch_npu") is None:
        raise
    raise ImportError(
        f"torch_npu is installed and cannot be imported, and so torch and transformers cannot: {error.__cause__ or error}. "
        "Source the set_env.sh of CANN, install the torch_npu that fits torch, or uninstall it"
    ) from None

__all__ = ["EditPlan", "GateSWAConfig", "MLAConfig", "UserError", "edit_model", "load"]
