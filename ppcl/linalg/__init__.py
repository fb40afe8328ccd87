"""Linear probes: residual affine maps in closed form, from sums that add up over batches, workers and nodes."""

from ppcl.linalg.affine_fit import Affine, Fit, Probe, affine_fit
from ppcl.linalg.moments import Statistics

__all__ = ["Affine", "Fit", "Probe", "Statistics", "affine_fit"]
