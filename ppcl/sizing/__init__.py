"""Estimates of a job's memory, traffic and step time from a transformer's configuration alone; no weights are read."""

from ppcl.sizing.device import Device
from ppcl.sizing.memory import FORMULAS, Rank, layouts
from ppcl.sizing.model import Model, published, whole_pipelines

__all__ = ["FORMULAS", "Device", "Model", "Rank", "layouts", "published", "whole_pipelines"]
