"""Linear probes: residual affine maps in closed form, from sums that add up over batches, workers and nodes."""

from ppcl.probes.probe import Affine, Fit, Probe, affine_fit
from ppcl.probes.statistics import Statistics

__all__ = ["Affine", "Fit", "Probe", "Statistics", "affine_fit"]
