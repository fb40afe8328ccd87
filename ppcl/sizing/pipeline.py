"""The weights of a pipeline on a worker's device, as `memory.offload` has them; see `ppcl.models.placement`."""

from __future__ import annotations

from dataclasses import dataclass

from ppcl.sizing.device import USABLE
from ppcl.sizing.job import JobSize

# A text encoder's embeddings and two of its layers, as a share of it: a fifth of Qwen-Image's, a ninth of FLUX.1's.
_LAYERS_SHARE = 4
# Those of `memory.offload`, from the fastest to the smallest.
_MODES = ["none", "model", "group"]


Bytes = dict[str, int]


@dataclass(frozen=True)
class Loaded:
    """The parts of the pipeline that a worker loads, and the bytes of its `activations`.

    `vae_call`: of those while the VAE encodes or decodes; then nothing else runs.
    """

    activations: int
    vae_call: int = 0
    encoders: bool = False
    vae: bool = True
    transformer: bool = False
    replacements: bool = False


def pipeline_memory(job: JobSize, loaded: Loaded) -> tuple[Bytes, Bytes]:
    """What is on the device at the fullest moment, and the weights that the host keeps where they come and go.

    `auto` is the first mode that fits the device, and group where none does; on a CPU nothing is anywhere else.
    """
    offload = job.config.memory.offload
    modes = ["none"] if job.cpu else _MODES if offload == "auto" else [offload]
    held: Bytes = {}
    for mode in modes:
        held = _fullest(job, loaded, mode)
        if sum(held.values()) <= USABLE * job.device.size:
            break
    return held, {} if mode == "none" else {"weights": _on_host(job, loaded)}


def _fullest(job: JobSize, loaded: Loaded, mode: str) -> Bytes:
    """Weights and activations at the fullest moment. Where weights come and go, none are there while the VAE runs."""
    weights = _on_device(job, loaded, mode)
    if mode == "none":
        return weights | {"activations": max(loaded.activations, loaded.vae_call)}
    running = weights | {"activations": loaded.activations}
    rest = job.number * job.model.rest if loaded.transformer else 0
    in_vae = {"VAE": weights.get("VAE", 0), "teacher": rest, "activations": loaded.vae_call}
    return max(running, in_vae, key=lambda held: sum(held.values()))


def _on_device(job: JobSize, loaded: Loaded, mode: str) -> Bytes:
    text = job.encoders if loaded.encoders else 0
    model, number = job.model, job.number
    rest = number * model.rest if loaded.transformer else 0
    blocks = number * sum(model.blocks) if loaded.transformer else 0
    held = {"VAE": job.other_components} if loaded.vae else {}
    if mode == "none":
        held |= {"teacher": rest + blocks, "text encoders": text}
        return held | ({"replacements": replacement_bytes(job)} if loaded.replacements else {})
    if mode == "group":
        text //= _LAYERS_SHARE
        blocks = 2 * number * max(model.blocks) if loaded.transformer else 0
    # They are there in turn.
    return held | ({"teacher": rest + blocks} if blocks >= text else {"teacher": rest, "text encoders": text})


def _on_host(job: JobSize, loaded: Loaded) -> int:
    weights = (job.encoders if loaded.encoders else 0) + (job.teacher if loaded.transformer else 0)
    return weights + (replacement_bytes(job) if loaded.replacements else 0)


def replacement_bytes(job: JobSize) -> int:
    """Replacements in memory at once, and blocks that were fine-tuned with one plan."""
    tuned = sum(job.model.blocks[block] for block in job.tuned_blocks)
    return min(job.number * (job.replacements.all + tuned), round(job.config.memory.replacements_gb * 1e9))
