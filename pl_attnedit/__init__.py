"""Give a trained Hugging Face language model a cheaper attention, and recover its quality by distillation.

Importing the package registers converted models with transformers, so that `AutoModelForCausalLM.from_pretrained` loads
them.
"""

from pathlib import Path

for _name in ("callbacks", "configs", "eval"):
    _link = Path(__file__).parent / _name
    if _link.is_file():  # an unpacked ZIP, or a checkout on a system without symbolic links
        raise ImportError(
            f"{_link} is a plain file where a symbolic link to ../{_name} belongs: install with pip from the repository, "
            "or clone it with git and core.symlinks=true"
        )

from pl_attnedit.attention import GateSWAConfig, MLAConfig  # noqa: E402
from pl_attnedit.errors import UserError  # noqa: E402
from pl_attnedit.modeling import EditPlan, edit_model, load  # noqa: E402

__all__ = ["EditPlan", "GateSWAConfig", "MLAConfig", "UserError", "edit_model", "load"]
