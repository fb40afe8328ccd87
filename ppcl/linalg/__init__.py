"""Linear probes: residual affine maps in closed form, from sums that add up over batches, workers and nodes."""

from ppcl.linalg.affine_fit import Affine, Fit, Probe, fit_affine
from ppcl.linalg.moments import Moments

__all__ = ["Affine", "Fit", "Probe", "Moments", "fit_affine"]
