"""The weights of a pipeline on a worker's device, as `memory.offload` has them; see `ppcl.models.placement`."""

from __future__ import annotations

from ppcl.sizing.job import JobSize

# A text encoder's embeddings and two of its layers, as a share of it: a fifth of Qwen-Image's, a ninth of FLUX.1's.
_LAYERS_SHARE = 4


def mode_of(job: JobSize) -> str:
    """The mode that is sized. `auto` comes down to group where it has to; on a CPU nothing is anywhere else."""
    offload = job.config.memory.offload
    return "none" if job.cpu else "group" if offload == "auto" else offload


def pipeline_bytes(
    job: JobSize, encoders: bool = False, transformer: bool = False, replacements: bool = False
) -> dict[str, int]:
    """What is on the device at the fullest moment, without activations, of the parts that a worker loads."""
    text = job.encoders if encoders else 0
    model, number, mode = job.model, job.number, mode_of(job)
    rest = number * model.rest if transformer else 0
    blocks = number * sum(model.blocks) if transformer else 0
    held = {"VAE": job.other_components}
    if mode == "none":
        held |= {"teacher": rest + blocks, "text encoders": text}
        return held | ({"replacements": replacement_bytes(job)} if replacements else {})
    if mode == "group":
        text //= _LAYERS_SHARE
        blocks = 2 * number * max(model.blocks) if transformer else 0
    # They are there in turn.
    return held | ({"teacher": rest + blocks} if blocks >= text else {"teacher": rest, "text encoders": text})


def host_bytes(
    job: JobSize, encoders: bool = False, transformer: bool = False, replacements: bool = False
) -> dict[str, int]:
    """The weights that the host keeps where they come and go."""
    if mode_of(job) == "none":
        return {}
    weights = (job.encoders if encoders else 0) + (job.teacher if transformer else 0)
    return {"weights": weights + (replacement_bytes(job) if replacements else 0)}


def replacement_bytes(job: JobSize) -> int:
    """Replacements in memory at once."""
    return min(job.number * job.replacements.all, round(job.config.memory.replacements_gb * 1e9))
