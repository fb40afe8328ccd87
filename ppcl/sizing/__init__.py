"""What a job needs of a cluster, computed from a transformer's configuration alone: no weight is read."""

from ppcl.sizing.device import Device
from ppcl.sizing.model import Model, published
from ppcl.sizing.plan import FORMULAS, Rank, layouts

__all__ = ["FORMULAS", "Device", "Model", "Rank", "layouts", "published"]
