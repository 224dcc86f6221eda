"""The resolved config of a LightningCLI run goes to its MLflow run, with what it reads."""

from __future__ import annotations

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from pl_attnedit.tracking.client import KIND_TAG
from pl_attnedit.tracking.datasets import training_text
from pl_attnedit.tracking.environment import log_environment
from pl_attnedit.tracking.logger import TrackingLogger


class LogConfigCallback(SaveConfigCallback):
    """For ``LightningCLI(save_config_callback=LogConfigCallback)``: config and environment as artifacts and parameters, and
    the text as dataset inputs.

    Lightning's own callback writes into the logger's folder, which an MLflow server does not have. The run's kind becomes
    the module's stage.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        config_filename: str = "config.yaml",
        overwrite: bool = False,
        multifile: bool = False,
        save_to_log_dir: bool = False,
    ) -> None:
        super().__init__(parser, config, config_filename, overwrite, multifile, save_to_log_dir)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        text = data if hasattr(data, "train_sequences") else None
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            if isinstance(logger, TrackingLogger):
                log_environment(logger.run, config=settings, data_fingerprint=text and text.fingerprint)
                if text is not None:
                    logger.run.log_datasets(training_text(text))
                if hasattr(pl_module, "stage"):
                    logger.run.set_tags({KIND_TAG: pl_module.stage})
