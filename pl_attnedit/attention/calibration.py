"""What the calibrated init knows of a teacher's attention: second moments over the calibration text."""

from __future__ import annotations

import torch


class LayerStatistics:
    """Placeholder for the experiments."""
