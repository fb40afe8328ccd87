"""Least squares from sums over tokens, which add up over batches and workers: affine maps, and which units to keep."""

from ppcl.linalg.affine_fit import Affine, Fit, Probe, fit_affine
from ppcl.linalg.elimination import (
    FittedMap,
    PrunedGroups,
    PrunedUnits,
    eliminate_groups,
    eliminate_units,
)
from ppcl.linalg.moments import Moments

__all__ = [
    "Affine",
    "Fit",
    "FittedMap",
    "Moments",
    "Probe",
    "PrunedGroups",
    "PrunedUnits",
    "eliminate_groups",
    "eliminate_units",
    "fit_affine",
]
