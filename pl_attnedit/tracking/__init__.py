"""MLflow: runs that log in the background, the runs of a conversion, and what a run was made with."""

import os

# Before mlflow is imported for the first time: it sends usage data from then on.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # at the end of every run on a server

from pl_attnedit.tracking.client import connect, resolve_tracking_uri
from pl_attnedit.tracking.config_callback import LogConfigCallback
from pl_attnedit.tracking.conversion import (
    ConversionRuns,
    deliver_pending,
    open_conversion,
    start_child,
    start_conversion,
)
from pl_attnedit.tracking.datasets import evaluation_text, training_text
from pl_attnedit.tracking.environment import environment, git_commit, log_config, log_environment
from pl_attnedit.tracking.logger import TrackingLogger
from pl_attnedit.tracking.models import check_registered_name, student_model
from pl_attnedit.tracking.run import TrackedRun

__all__ = [
    "ConversionRuns",
    "LogConfigCallback",
    "TrackedRun",
    "TrackingLogger",
    "check_registered_name",
    "connect",
    "deliver_pending",
    "environment",
    "evaluation_text",
    "git_commit",
    "log_config",
    "log_environment",
    "open_conversion",
    "resolve_tracking_uri",
    "start_child",
    "start_conversion",
    "student_model",
    "training_text",
]
