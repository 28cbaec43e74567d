"""A model of the shipped kind that has learned nothing, and a geometry for what it looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from triage.nets.model import Model, load_model, save_model
from triage.nets.triagenet import TriageNet
from triage.records import Geometry, Recipe
from triage.training.targets import HEADS

__all__ = ["GEOMETRY", "untrained_model"]

GEOMETRY = Geometry(
    beam_center_x_px=200.0,
    beam_center_y_px=150.0,
    pixel_size_x_m=1e-4,
    pixel_size_y_m=1e-4,
    detector_distance_m=0.1,
    incident_wavelength_angstrom=1.0,
)


def untrained_model(
    folder: Path, calibration: dict[str, tuple[float, float]], **card: Any
) -> Model:
    """Without convolutions, with a veto from 0.5 on, read back from ``folder``; always the same.

    Args:
        calibration, card: fields of its card.
    """
    torch.manual_seed(5)
    net = TriageNet(HEADS, radial_bins=Recipe().radial_bins, convolutions=False).eval()
    thresholds = {"p_blank_veto": 0.5}
    written = {"recipe": Recipe(), "thresholds": thresholds, "calibration": calibration, **card}
    save_model(folder, net, "test", written)
    return load_model(folder)
