"""Least squares from sums over tokens, which add up over batches and workers: affine maps, and which units to keep."""

from ppcl.linalg.affine_fit import Affine, Fit, Probe, fit_affine
from ppcl.linalg.elimination import PrunedUnits, eliminate_units
from ppcl.linalg.moments import Moments

__all__ = ["Affine", "Fit", "Moments", "Probe", "PrunedUnits", "eliminate_units", "fit_affine"]
