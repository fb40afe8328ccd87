"""The values of `memory.offload`, for the configuration and the command line."""

from typing import Literal

Offload = Literal["auto", "none", "model", "group"]
