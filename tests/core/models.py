"""The table of models: name -> case. Importing the files fills it."""

from __future__ import annotations

from . import models_control, models_fallback, models_linen, models_mesh, models_nnx, models_raw  # noqa: F401
from .case import CASES, Built, Case, Weight, case

__all__ = ["CASES", "Built", "Case", "Weight", "case"]
