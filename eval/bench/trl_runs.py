"""One training run of `bench trl` in a process of its own: `python -m pl_attnedit.eval.bench.trl_runs JSON`.

Both sides start from the same teacher and the same converted model, which our stage module builds, and get the same batches
of equally long sequences that exist before the first step. TRL trains the converted model as it would any other.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from pl_attnedit.attention import MLAConfig
from pl_attnedit.eval.bench.step import RandomTokens, StepBench, make_module
from pl_attnedit.memory import current_bytes, peak_bytes, reset_peak

CPU = torch.device("cpu")
LEARNING_RATE = 1e-3  # constant, and high enough for a wrong gradient to show within a few steps
HEAD_DIM = 64


@dataclass(frozen=True)
class TrlBench:
    """What both sides train: a small Qwen3 with random weights in float32, MLA at a quarter of its cache in every layer.

    batch: sequences; seq: tokens of each; steps: timed ones, after `warmup` others.
    """

    train: str = "attention"  # attention | all
    batch: int = 4
    seq: int = 256
    steps: int = 4
    warmup: int = 2
    vocabulary: int = 151936
    hidden: int = 256
    layers: int = 8


@dataclass
class Steps:
    """Loss of each step, and when it ended."""

    losses: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)


def measure(name: str, bench: TrlBench) -> dict[str, Any]:
    """Trains as `name` says: ours, distillation or gkd, then options after a +, e.g. `gkd+checkpointing`.

    Returns:
        `step_seconds` of the timed steps and the `losses` of all; bytes of memory: of the process at its highest during
        training, once the libraries were loaded, once the models were made.
    """
    side, *options = name.split("+")
    fit: Callable[..., Steps] = OurRun() if side == "ours" else TrlRun(side, options)
    libraries = current_bytes(CPU)
    torch.manual_seed(0)
    module = make_module(
        random_teacher(bench),
        StepBench(
            stage="stage2",
            targets=MLAConfig(kv_lora_rank=3 * bench.hidden // 16, qk_rope_head_dim=bench.hidden // 16),
            train=bench.train,
            activation_checkpointing="checkpointing" in options,
        ),
    )
    module.hparams.update(learning_rate=LEARNING_RATE, final_lr_share=1.0)
    module.configure_model()
    count = bench.warmup + bench.steps
    batches = RandomTokens(bench.vocabulary, bench.seq, count * bench.batch).ids.split(bench.batch)
    gc.collect()
    made = current_bytes(CPU)
    reset_peak(CPU)
    steps = fit(module, list(batches))
    return {
        "step_seconds": [end - start for start, end in zip(steps.ends, steps.ends[1:])][bench.warmup - 1 :],
        "losses": steps.losses,
        "peak_bytes": peak_bytes(CPU),
        "libraries_bytes": libraries,
        "models_bytes": made,
    }


def random_teacher(bench: TrlBench) -> Any:
    """Weights five times the usual ones, so that teacher and student differ by more than rounding."""
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=bench.vocabulary,
        hidden_size=bench.hidden,
        intermediate_size=3 * bench.hidden,
        num_hidden_layers=bench.layers,
        num_attention_heads=bench.hidden // HEAD_DIM,
        num_key_value_heads=bench.hidden // HEAD_DIM // 2,
        head_dim=HEAD_DIM,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


class OurRun:
    """`Trainer.fit` of the stage module."""

    def __call__(self, module: Any, batches: list[torch.Tensor]) -> Steps:
        steps = Steps()

        class Record(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                steps.losses.append(trainer.callback_metrics["train/kl"].item())
                steps.ends.append(time.perf_counter())

        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=len(batches),
            callbacks=[Record()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        mask = torch.ones_like(batches[0], dtype=torch.bool)
        mask[:, -1] = False  # TRL counts what has a next token in the sequence
        items = [{"input_ids": ids, "loss_mask": mask} for ids in batches]
        trainer.fit(module, DataLoader(items, batch_size=None))  # type: ignore[arg-type]
        return steps


class TrlRun:
    """`train` of one of TRL's trainers: the same parameters, optimiser and loss, the dataset's own sequences.

    Up to TRL 1.8 `DistillationTrainer` takes them with `lmbda=0`. Later ones always let the student write the sequences and
    name `GKDTrainer` for data of one's own; there the batch is put where the generated one would be.
    """

    def __init__(self, side: str, options: list[str]) -> None:
        self.options = options
        if side == "gkd":
            from trl.experimental.gkd import GKDConfig as Config
            from trl.experimental.gkd import GKDTrainer as Base
        else:
            try:
                from trl import DistillationConfig as Config
                from trl import DistillationTrainer as Base
            except ImportError:
                from trl.experimental.distillation import DistillationConfig as Config
                from trl.experimental.distillation import DistillationTrainer as Base
        self.Config, self.Base = Config, Base
        fields = Config.__dataclass_fields__
        self.takes_data = "lmbda" in fields
        self.settings: dict[str, Any] = {"lmbda": 0.0} if self.takes_data else {}
        if "loss_top_k" in fields:
            self.settings["loss_top_k"] = 0  # the whole vocabulary
        if "liger" in options:
            self.settings["use_liger_kernel"] = True

    def __call__(self, module: Any, batches: list[torch.Tensor]) -> Steps:
        steps = Steps()
        with tempfile.TemporaryDirectory() as folder:
            trainer = self._trainer(module, batches, steps, folder)
            trainer.args.use_liger_kernel = False  # the loss is already chosen, and Liger's layers would need Triton
            trainer.train()
        return steps

    def _trainer(self, module: Any, batches: list[torch.Tensor], steps: Steps, folder: str) -> Any:
        from datasets import Dataset
        from transformers import TrainerCallback

        tokenizer = any_tokenizer()
        tokenizer.save_pretrained(folder)
        module.teacher.config._name_or_path = folder  # where TRL looks for the teacher's tokenizer
        feed, takes_data = self._inputs(batches), self.takes_data

        class Recording(self.Base):  # type: ignore[name-defined]
            def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
                loss = super().training_step(*args, **kwargs)
                steps.losses.append(loss.item())
                return loss

            def _prepare_inputs(self, batch: Any) -> Any:
                return super()._prepare_inputs(batch) if takes_data else next(feed)

        class Record(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                steps.ends.append(time.perf_counter())

        rows = len(batches) * len(batches[0])
        collator = {"data_collator": lambda _: next(feed)} if takes_data else {}
        return Recording(
            model=module.student,
            teacher_model=module.teacher,
            args=self._arguments(batches, folder),
            train_dataset=Dataset.from_dict({"prompt": ["not read"] * rows}),
            processing_class=tokenizer,
            callbacks=[Record()],
            **collator,
        )

    def _arguments(self, batches: list[torch.Tensor], folder: str) -> Any:
        return self.Config(
            output_dir=folder,
            per_device_train_batch_size=len(batches[0]),
            max_steps=len(batches),
            beta=0.0,  # KL(teacher || student); 1 is KL(student || teacher)
            temperature=1.0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=0.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing="checkpointing" in self.options,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            **self.settings,
        )

    def _inputs(self, batches: list[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """The batches as the trainer's loss wants them: a prompt of one token, the rest to be learned."""
        for ids in batches:
            ones = torch.ones_like(ids)
            if self.takes_data:
                labels = ids.clone()
                labels[:, 0] = -100
                prompt = {"prompts": ids[:, :1], "prompt_attention_mask": ones[:, :1]}
                yield {"input_ids": ids, "attention_mask": ones, "labels": labels, **prompt}
            else:
                yield {
                    "prompt_ids": ids[:, :1],
                    "prompt_mask": ones[:, :1],
                    "completion_ids": ids[:, 1:],
                    "completion_mask": ones[:, 1:],
                    "num_items_in_batch": ones[:, 1:].sum(),
                }


def any_tokenizer() -> PreTrainedTokenizerFast:
    """TRL wants one, though nothing is tokenised."""
    backend = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", padding_side="left")


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(measure(asked["name"], TrlBench(**asked["bench"]))))
