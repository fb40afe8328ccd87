"""Record states of the teacher's own sampling trajectories by a hook on the transformer of the stock pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ppcl.calibration.encoding import TEXT, Embedding, collate, pipeline_arguments
from ppcl.calibration.seeding import chosen_steps, generator
from ppcl.config.schema import Sampling
from ppcl.errors import UserError
from ppcl.models import ModelAdapter

NEGATIVE = -1
"""The embedding id of the negative prompt; other embeddings have the id of their prompt."""

# Set here, or by the configuration's own keys.
_RESERVED = {
    "self",
    "prompt",
    "prompt_2",
    "prompt_3",
    "negative_prompt_2",
    "negative_prompt_3",
    "height",
    "width",
    "num_inference_steps",
    "num_images_per_prompt",
    "generator",
    "latents",
    "prompt_embeds",
    "prompt_embeds_mask",
    "pooled_prompt_embeds",
    "negative_prompt_embeds",
    "negative_prompt_embeds_mask",
    "negative_pooled_prompt_embeds",
    "output_type",
    "return_dict",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
}


@dataclass(frozen=True)
class State:
    """One row of one transformer call. `timestep` is as the transformer is given it; `latents` are on the CPU.

    `sample_id` is `2 * (states_per_prompt * prompt_id + slot)`, plus 1 for the unconditional side of guidance.
    """

    sample_id: int
    prompt_id: int
    embedding_id: int
    timestep: float
    latents: torch.Tensor


@dataclass(frozen=True)
class Call:
    """What all samples share: the transformer's arguments that depend on nothing but the picture's size.

    `each`: one value a sample, the same for all; `whole`: a tensor without a batch axis, as nested lists.
    """

    each: dict[str, Any]
    whole: dict[str, Any]


def check_arguments(pipeline_class: type, sampling: Sampling) -> None:
    """Raises `UserError` for an argument that the pipeline's call does not have, or that is not the user's to set."""
    free = [name for name in inspect.signature(pipeline_class.__call__).parameters if name not in _RESERVED]
    for name in sampling.arguments:
        if name not in free:
            raise UserError(
                f"sampling.arguments has {name!r}, which cannot be set for {pipeline_class.__name__}; it takes "
                f"{', '.join(free)}"
            )


def call_of(adapter: ModelAdapter, arguments: dict[str, Any]) -> Call:
    """The shared part of a transformer call. Vectors and lists hold one value a sample, matrices none of the batch."""
    each, whole = {}, {}
    for name in adapter.shared_arguments:
        value = arguments.get(name)
        if isinstance(value, torch.Tensor) and value.ndim > 1:
            whole[name] = value.float().tolist()
        elif isinstance(value, torch.Tensor):
            each[name] = value[0].item()
        elif value is not None:
            each[name] = value[0]
    return Call(each, whole)


class _Recorder:
    """A forward pre-hook that keeps chosen rows of the transformer's calls.

    `kept`: (row of the prompt in the batch, denoising step, conditional) to (timestep, latents).
    """

    def __init__(self, pipeline: Any, adapter: ModelAdapter, text: torch.Tensor, choose: Any):
        self.pipeline, self.adapter, self.text, self.choose = pipeline, adapter, text, choose
        self.steps: list[list[int]] = []
        self.kept: dict[tuple[int, int, bool], tuple[float, torch.Tensor]] = {}
        self.call: Call | None = None

    def __call__(self, module: torch.nn.Module, args: tuple, arguments: dict[str, Any]) -> None:
        if arguments.get("skip_layers") is not None:  # an extra call of SD3's skip-layer guidance, not the model itself
            return
        prompts = len(self.text)
        if self.call is None:
            self.call = call_of(self.adapter, arguments)
            self.steps = [self.choose(row, self.pipeline.num_timesteps) for row in range(prompts)]
        step = self.pipeline.scheduler.step_index or 0
        latents, timesteps = arguments[self.adapter.latents], arguments[self.adapter.timestep]
        for row in range(len(latents)):
            # Guidance is a second call (Qwen-Image, FLUX.1) or a second half of the batch (SD3).
            prompt = row % prompts
            if step not in self.steps[prompt]:
                continue
            # Seen by the embedding. Where the prompt is the negative prompt, both calls are the same: the first counts.
            given, own = arguments[TEXT][row], self.text[prompt]
            conditional = given.shape == own.shape and torch.equal(given, own) and (prompt, step, True) not in self.kept
            self.kept[prompt, step, conditional] = (timesteps[row].item(), latents[row].detach().cpu().clone())


def record(
    pipeline: Any,
    adapter: ModelAdapter,
    prompt_ids: Sequence[int],
    embeddings: list[Embedding],
    negative: Embedding | None,
    sampling: Sampling,
    states_per_prompt: int,
    seed: int,
) -> tuple[list[State], Call]:
    """Sample an image's latents for each prompt and keep `states_per_prompt` timesteps of each trajectory.

    Noise comes from (seed, prompt id) alone: up to rounding the states do not depend on which prompts share a batch.
    With guidance, both sides of each kept timestep are states.
    """
    check_arguments(type(pipeline), sampling)
    device = str(pipeline._execution_device)
    arguments = pipeline_arguments(collate(embeddings, adapter), device)
    # The pipeline may reshape the embeddings it is given; their values are what the transformer sees.
    text = arguments["prompt_embeds"]
    if negative is not None:
        arguments |= pipeline_arguments(collate([negative] * len(embeddings), adapter), device, negative=True)
    recorder = _Recorder(
        pipeline,
        adapter,
        text,
        lambda row, steps: chosen_steps(seed, prompt_ids[row], states_per_prompt, steps),
    )
    hook = pipeline.transformer.register_forward_pre_hook(recorder, with_kwargs=True)
    try:
        pipeline(
            **{k: v for k, v in sampling.arguments.items() if k != "negative_prompt"},
            **arguments,
            height=sampling.height,
            width=sampling.width,
            num_inference_steps=sampling.steps,
            generator=[generator("trajectory", seed, prompt_id) for prompt_id in prompt_ids],
            output_type="latent",
        )
    finally:
        hook.remove()
    states = [
        State(
            sample_id=2 * (states_per_prompt * prompt_ids[row] + slot) + (not conditional),
            prompt_id=prompt_ids[row],
            embedding_id=prompt_ids[row] if conditional else NEGATIVE,
            timestep=recorder.kept[row, step, conditional][0],
            latents=recorder.kept[row, step, conditional][1],
        )
        for row, steps in enumerate(recorder.steps)
        for slot, step in enumerate(steps)
        for conditional in (True, False)
        if (row, step, conditional) in recorder.kept
    ]
    if recorder.call is None:
        raise RuntimeError(f"{type(pipeline).__name__} did not call its transformer")
    return states, recorder.call
