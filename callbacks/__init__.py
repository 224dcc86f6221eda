"""Lightning callbacks. Import them as ``pl_attnedit.callbacks``."""

from pl_attnedit.callbacks.checkpoint import ResumableCheckpoint
from pl_attnedit.callbacks.checkpoint_files import check_checkpoint, latest_checkpoint
from pl_attnedit.callbacks.nan_guard import NaNGuard, NonFiniteLossError
from pl_attnedit.callbacks.process_watch import ProcessWatch
from pl_attnedit.callbacks.progress import Progress
from pl_attnedit.callbacks.progressive_unfreezing import ProgressiveUnfreezing
from pl_attnedit.callbacks.teacher_forcing import TeacherForcing
from pl_attnedit.callbacks.temperature_scaling import TemperatureScaling
from pl_attnedit.callbacks.throughput import Throughput
from pl_attnedit.checkpoints.io import AtomicCheckpointIO

__all__ = [
    "AtomicCheckpointIO",
    "NaNGuard",
    "NonFiniteLossError",
    "ProcessWatch",
    "Progress",
    "ProgressiveUnfreezing",
    "ResumableCheckpoint",
    "TeacherForcing",
    "TemperatureScaling",
    "Throughput",
    "check_checkpoint",
    "latest_checkpoint",
]
