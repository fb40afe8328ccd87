"""What a job needs of a cluster, computed from a transformer's configuration alone: no weight is read."""

from ppcl.sizing.device import Device
from ppcl.sizing.memory import FORMULAS, Rank, layouts
from ppcl.sizing.model import Model, published

__all__ = ["FORMULAS", "Device", "Model", "Rank", "layouts", "published"]
