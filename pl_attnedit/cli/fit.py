"""`pl-attnedit fit` and `validate`: one stage through plain LightningCLI."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from pl_attnedit.data import TextDataModule
from pl_attnedit.distillation import DistillationModule
from pl_attnedit.tracking import LogConfigCallback


class AttentionEditingCLI(LightningCLI):
    """LightningCLI with the data's tokenizer taken from the model's teacher."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.init_args.teacher", "data.tokenizer")


def main(arguments: Sequence[str]) -> int:
    """arguments: the subcommand, then LightningCLI's own arguments."""
    args: ArgsType = list(arguments)
    AttentionEditingCLI(
        DistillationModule,
        TextDataModule,
        subclass_mode_model=True,
        save_config_callback=LogConfigCallback,
        trainer_defaults={
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "logger": {"class_path": "pl_attnedit.tracking.TrackingLogger"},
            "callbacks": [
                {"class_path": f"pl_attnedit.callbacks.{name}"} for name in ("Progress", "Throughput", "NaNGuard")
            ],
        },
        parser_kwargs={"prog": "pl-attnedit"},
        args=args,
    )
    return 0
