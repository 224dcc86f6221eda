"""Students to evaluate: saved ones, exported ones, and those in the checkpoints of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pl_attnedit.callbacks import check_checkpoint
from pl_attnedit.checkpoints.io import read_checkpoint
from pl_attnedit.config_files import read_yaml
from pl_attnedit.distillation import STAGES
from pl_attnedit.errors import invalid
from pl_attnedit.modeling import load
from pl_attnedit.modeling.weights import share_weights
from pl_attnedit.teachers.sources.resolve import load_teacher


def load_student(path: str | Path, dtype: str | None = None) -> PreTrainedModel:
    """The student in a folder, or in a checkpoint that `fit` or `convert` wrote, in eval mode on the CPU.

    The folder holds a converted model, or one of Hugging Face's own classes, such as `pl_attnedit.export` writes.

    A checkpoint holds what was trained. The rest of the student comes from the teacher, and from `init_from` where the
    training had one; relative names of both begin in the training's working folder. What trained gets the dtype that the
    student would be saved in.

    Args:
        dtype: of the weights, such as float32; None = as saved.

    Raises:
        UserError: neither a causal language model nor a checkpoint of ours; teacher or `init_from` are not there any more,
            or others than they were.
    """
    path = Path(path)
    if path.suffix != ".ckpt":
        return load(path, stock=True, dtype=dtype or "auto")
    stage = check_checkpoint(path)["stage"]
    content = read_checkpoint(path)
    trained = content["state_dict"]
    saved = next(iter(trained.values())).dtype
    # LightningCLI adds names of its own, which begin with an underscore
    settings = {name: value for name, value in content["hyper_parameters"].items() if not name.startswith("_")}
    settings.pop("liger", None)  # here and below: of earlier versions
    if before := settings.pop("teacher_dtype", None):  # beside `dtype: float32`
        settings["dtype"] = before
    if saved == torch.float64:  # `64-true` is not in the settings
        settings["dtype"] = "float64"
    module = STAGES[stage](**settings)
    module.resuming = True  # no init: the weights follow
    module.configure_model()
    module.on_load_checkpoint(content)
    module.load_state_dict(trained)
    student = module.student
    for parameter in student.parameters():  # not `to`, which would round RoPE's frequencies as well
        saved_as = parameter.data.to(getattr(torch, module.hparams["dtype"]))
        parameter.data = saved_as if dtype is None else saved_as.to(getattr(torch, dtype))
    return student.eval()


def teacher_of(path: str | Path) -> str:
    """The teacher as the training was given it: its name is in a checkpoint, and in the recipe beside a student's folder.

    Raises:
        UserError: neither is there.
    """
    path = Path(path)
    if path.suffix == ".ckpt":
        check_checkpoint(path)
        return str(read_checkpoint(path, tensors=False)["hyper_parameters"]["teacher"])
    recipe = path.resolve().parent / "recipe.yaml"
    if not recipe.is_file():
        raise invalid("--teacher", None, f"must be given: there is no {recipe} that says whose student it is")
    return str(read_yaml(recipe, "recipe", "recipe")["teacher"])


def load_pair(
    student: str | Path, teacher: str, dtype: str | None = None, device: str | torch.device = "cpu"
) -> tuple[Any, Any, PreTrainedTokenizerBase]:
    """Teacher, student and the teacher's tokenizer; both models in the student's dtype, or in `dtype`, on `device`. What did
    not train is in memory once.

    Raises:
        UserError: as `load_student` and `load_teacher`; the student's vocabulary is not the teacher's.
    """
    of_student = load_student(student, dtype)
    of_teacher, tokenizer = load_teacher(teacher, of_student.dtype, device)
    sizes = [model.config.get_text_config().vocab_size for model in (of_student, of_teacher)]
    if sizes[0] != sizes[1]:
        raise invalid(
            "student", str(student), f"has a vocabulary of {sizes[0]} tokens, must have the teacher's {sizes[1]}"
        )
    if (Path(student) / "tokenizer_config.json").is_file():
        own = AutoTokenizer.from_pretrained(student).get_vocab()
        if not tokenizer.get_vocab().items() <= own.items():  # it may have got tokens of its own, for chats
            raise invalid(
                "student", str(student), "has other tokens than the teacher, must have the teacher's vocabulary"
            )
    share_weights(of_student, of_teacher)
    of_student.to(device)  # type: ignore[arg-type]
    return of_teacher, of_student, tokenizer
