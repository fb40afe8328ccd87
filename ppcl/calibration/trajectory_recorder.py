"""Record states of the teacher's own sampling trajectories by a hook on the transformer of the stock pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ppcl.calibration.encoding import TEXT, EncodedPrompts, collate, pipeline_arguments
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

    `sample_id`: see `StateSettings.sample_id`.
    """

    sample_id: int
    prompt_id: int
    embedding_id: int
    timestep: float
    latents: torch.Tensor


@dataclass(frozen=True)
class StateSettings:
    """How the states of a prompt are made: the pipeline's call, how many, and the seed of their noise and timesteps."""

    sampling: Sampling
    states_per_prompt: int
    seed: int

    def sample_id(self, prompt_id: int, slot: int, conditional: bool = True) -> int:
        """The id of a prompt's state number `slot`: even on the conditional side of guidance, one more on the other."""
        return 2 * (self.states_per_prompt * prompt_id + slot) + (not conditional)


@dataclass(frozen=True)
class Call:
    """The transformer's arguments that all samples share: those that depend on nothing but the image's size.

    `each`: one value per sample, the same for all. `whole`: a tensor without a batch axis, as nested lists.
    `timesteps (n,)`, `sigmas (n + 1,)`: the schedule of a trajectory, see `ppcl.calibration.schedules.Schedule`;
    timesteps as the transformer is given them. Empty where it was not recorded.
    """

    each: dict[str, Any]
    whole: dict[str, Any]
    timesteps: list[float] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)


def check_arguments(pipeline_class: type, sampling: Sampling) -> None:
    """Raise `UserError` for an argument that the pipeline's call does not have, or that is not the user's to set."""
    free = [name for name in inspect.signature(pipeline_class.__call__).parameters if name not in _RESERVED]
    for name in sampling.arguments:
        if name not in free:
            raise UserError(
                f"sampling.arguments has {name!r}, which cannot be set for {pipeline_class.__name__}; it takes "
                f"{', '.join(free)}"
            )


def call_of(adapter: ModelAdapter, arguments: dict[str, Any]) -> Call:
    """The shared part of a transformer call: vectors and lists have one value per sample, matrices no batch axis."""
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

    `text`: the prompts' embeddings as the pipeline is given them. `choose(row, steps)`: the denoising steps to keep of
    a prompt, by its row in the batch. `kept`: by row, denoising step and side of guidance, the timestep and latents.
    A denoising step is one evaluation: a scheduler of second order makes two of a step of its own.
    `timesteps`: of each evaluation.
    """

    def __init__(
        self, pipeline: Any, adapter: ModelAdapter, text: torch.Tensor, choose: Callable[[int, int], list[int]]
    ):
        self.pipeline, self.adapter, self.text, self.choose = pipeline, adapter, text, choose
        self.steps: list[list[int]] = []
        self.kept: dict[tuple[int, int, bool], tuple[float, torch.Tensor]] = {}
        self.call: Call | None = None
        self.timesteps: dict[int, float] = {}

    def __call__(self, module: torch.nn.Module, args: tuple, arguments: dict[str, Any]) -> None:
        if arguments.get("skip_layers") is not None:  # an extra call of SD3's skip-layer guidance, not the model itself
            return
        prompts = len(self.text)
        if self.call is None:
            self.call = call_of(self.adapter, arguments)
            self.steps = [self.choose(row, self.pipeline.num_timesteps) for row in range(prompts)]
        step = self.pipeline.scheduler.step_index or 0
        latents, timesteps = arguments[self.adapter.latents], arguments[self.adapter.timestep]
        self.timesteps[step] = timesteps[0].item()
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
    pipeline: Any, adapter: ModelAdapter, prompts: EncodedPrompts, settings: StateSettings
) -> tuple[list[State], Call]:
    """Sample an image's latents for each prompt and keep `states_per_prompt` timesteps of each trajectory.

    Noise comes from (seed, prompt id) alone: up to rounding the states do not depend on which prompts share a batch.
    With guidance, both sides of each kept timestep are states. Raises `UserError` for an argument of the sampling that
    cannot be set.
    """
    sampling, seed = settings.sampling, settings.seed
    check_arguments(type(pipeline), sampling)
    device = str(pipeline._execution_device)
    arguments = pipeline_arguments(collate(prompts.embeddings, adapter), device)
    # The pipeline may reshape the embeddings it is given; their values are what the transformer sees.
    text = arguments["prompt_embeds"]
    if prompts.negative is not None:
        negative = collate([prompts.negative] * len(prompts.ids), adapter)
        arguments |= pipeline_arguments(negative, device, negative=True)

    def choose(row: int, steps: int) -> list[int]:
        return chosen_steps(seed, prompts.ids[row], settings.states_per_prompt, steps)

    recorder = _Recorder(pipeline, adapter, text, choose)
    hook = pipeline.transformer.register_forward_pre_hook(recorder, with_kwargs=True)
    try:
        pipeline(
            **{k: v for k, v in sampling.arguments.items() if k != "negative_prompt"},
            **arguments,
            height=sampling.height,
            width=sampling.width,
            num_inference_steps=sampling.steps,
            generator=[generator("trajectory", seed, prompt_id) for prompt_id in prompts.ids],
            output_type="latent",
        )
    finally:
        hook.remove()
    if recorder.call is None:
        raise RuntimeError(f"{type(pipeline).__name__} did not call its transformer")
    schedule = [recorder.timesteps[step] for step in sorted(recorder.timesteps)], sigmas_of(pipeline)
    call = replace(recorder.call, timesteps=schedule[0], sigmas=schedule[1])
    return _states(recorder, prompts.ids, settings), call


def sigmas_of(pipeline: Any) -> list[float]:
    """The noise levels of the pipeline's last call, `(n + 1,)`."""
    return pipeline.scheduler.sigmas.double().tolist()


def _states(recorder: _Recorder, prompt_ids: Sequence[int], settings: StateSettings) -> list[State]:
    """The recorded states, by prompt, timestep and side of guidance."""
    states = []
    for row, steps in enumerate(recorder.steps):
        prompt_id = prompt_ids[row]
        for slot, step in enumerate(steps):
            for conditional in (True, False):
                if (row, step, conditional) in recorder.kept:
                    timestep, latents = recorder.kept[row, step, conditional]
                    sample_id = settings.sample_id(prompt_id, slot, conditional)
                    embedding_id = prompt_id if conditional else NEGATIVE
                    states.append(State(sample_id, prompt_id, embedding_id, timestep, latents))
    return states
