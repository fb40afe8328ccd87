"""What may be on a device at once."""

from __future__ import annotations

from pydantic import Field

from ppcl.config.loading import Section
from ppcl.config.offload import Offload
from ppcl.config.sections.fields import OPERATIONAL


class Memory(Section):
    """Memory where the teacher's pipeline runs: in calibration, variants, evaluation, ablation and `ppcl generate`."""

    offload: Offload = Field(
        "auto",
        json_schema_extra=OPERATIONAL,
        description="weights that are on the device at once: none: all; model: those of a text encoder, of the "
        "transformer or of the VAE, in turn; group: those of a block and the next one; auto: the first of these that "
        "fits; the numbers are the same",
    )
    device_gb: float | None = Field(
        None,
        json_schema_extra=OPERATIONAL,
        gt=0,
        description="most memory of a device to use for weights and activations, in GB; null: all that is free",
    )
    replacements_gb: float = Field(
        16.0,
        json_schema_extra=OPERATIONAL,
        gt=0,
        description="most memory for replacements, in GB; the least recently used ones are read again when they are "
        "needed",
    )
