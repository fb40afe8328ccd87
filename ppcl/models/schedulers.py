"""What ppcl can do with a teacher's scheduler: which it takes, with which pipeline, and what each remembers.

Everything samples by the stock pipeline's own call, so a scheduler works where the pipeline accepts it, where the
transformer's output is the velocity of a flow to it, and where an image depends on its seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ppcl.errors import UserError

EULER = "FlowMatchEulerDiscreteScheduler"
_USE_EULER = f"save the pipeline with a {EULER}, which every teacher takes"

# The pipelines that ask their scheduler for its own sigmas. All others hand it sigmas, and the shift `mu`.
_OWN_SIGMAS = ("StableDiffusion3Pipeline",)
# These hand it none where it has `use_flow_sigmas`.
_OWN_FLOW_SIGMAS = ("FluxPipeline", "Flux2Pipeline", "Flux2KleinPipeline")


def _is_flow(config: Mapping[str, Any]) -> str | None:
    if not config.get("use_flow_sigmas") or config.get("prediction_type") != "flow_prediction":
        return (
            "takes the transformer's output for noise; set use_flow_sigmas: true and prediction_type: flow_prediction"
        )
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"):
        if config.get(key):
            return f"has {key}, whose sigmas are not those of a flow; set {key}: false"
    return None


def _euler(config: Mapping[str, Any]) -> str | None:
    if config.get("stochastic_sampling"):
        return (
            "has stochastic_sampling, with which an image does not depend on its seed alone; set stochastic_sampling: "
            "false"
        )
    if config.get("invert_sigmas"):
        return "has invert_sigmas, with which noise is at 0 and not at 1; set invert_sigmas: false"
    return None


def _dpm(config: Mapping[str, Any]) -> str | None:
    algorithm = config.get("algorithm_type", "dpmsolver++")
    if algorithm != "dpmsolver++":
        return f"has the algorithm_type {algorithm!r}, which ppcl does not run; set algorithm_type: dpmsolver++"
    return _is_flow(config)


def _unipc(config: Mapping[str, Any]) -> str | None:
    if config.get("solver_p"):
        return "has a solver_p, which ppcl does not run; leave solver_p out"
    return _is_flow(config)


@dataclass(frozen=True)
class Solver:
    """A scheduler's class that ppcl takes.

    `refusal`: why it does not take one with this configuration, as the end of a sentence, or None. `histories`:
    attributes of the scheduler that hold tensors of the latents' shape between two evaluations, or lists of such.
    `counters`: attributes that hold numbers, None before the first evaluation. `takes_sigmas`: whether a pipeline can
    hand it sigmas.
    """

    refusal: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    histories: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    takes_sigmas: bool = True


SOLVERS = {
    EULER: Solver(_euler),
    "FlowMatchHeunDiscreteScheduler": Solver(
        histories=("prev_derivative", "sample"), counters=("dt",), takes_sigmas=False
    ),
    "UniPCMultistepScheduler": Solver(_unipc, ("model_outputs", "last_sample"), ("lower_order_nums", "this_order")),
    "DPMSolverMultistepScheduler": Solver(_dpm, ("model_outputs",), ("lower_order_nums",), takes_sigmas=False),
}

# Why others are not taken; what is neither here nor above is not known to fit a flow.
_OTHERS = {
    "FlowMatchLCMScheduler": "draws new noise at every step, with which an image does not depend on its seed alone",
}


def check_scheduler(place: str, name: str, config: Mapping[str, Any], pipeline: str, sigmas: bool = False) -> None:
    """Raise `UserError` for a scheduler that would fail, or sample something else than images of their seeds.

    `place`: the teacher's, for the message. `name`: the scheduler's class, `config`: its configuration as stored.
    `pipeline`: the class that calls it. `sigmas`: whether `sampling.arguments` gives the pipeline sigmas.
    """
    start = f"{place}/scheduler is a {name}, which"
    if name not in SOLVERS:
        reason = _OTHERS.get(name, "is not known to sample flows")
        raise UserError(f"{start} {reason}; {_USE_EULER} (ppcl takes {', '.join(SOLVERS)})")
    if refusal := SOLVERS[name].refusal(config):
        raise UserError(f"{start} {refusal} in scheduler_config.json, or {_USE_EULER}")
    if refusal := _not_for(name, config, pipeline, sigmas):
        raise UserError(f"{start} {refusal}")


def _not_for(name: str, config: Mapping[str, Any], pipeline: str, sigmas: bool) -> str | None:
    """Why a pipeline's call fails with this scheduler, as the end of a sentence, or None."""
    takes_sigmas = SOLVERS[name].takes_sigmas
    if sigmas and not takes_sigmas:
        return f"takes no sigmas; leave sigmas out of sampling.arguments, or {_USE_EULER}"
    if pipeline in _OWN_SIGMAS:
        return None
    by_flow = pipeline in _OWN_FLOW_SIGMAS and bool(config.get("use_flow_sigmas"))
    if not takes_sigmas and not by_flow:
        return f"does not take the sigmas that a {pipeline} gives; {_USE_EULER}"
    if name == "DPMSolverMultistepScheduler" and not config.get("use_dynamic_shifting"):
        return (
            f"does not take the shift that a {pipeline} gives; set use_dynamic_shifting: true in "
            f"scheduler_config.json, or {_USE_EULER}"
        )
    return None


# Words in a model's name that say that it was distilled for few steps.
_FEW_STEP_NAMES = ("turbo", "schnell", "lightning", "klein", "hyper", "lcm", "few-step")
# Most published few-step models take 1 to 9.
_FEW_STEPS = 12


def few_step_note(
    place: str,
    index: Mapping[str, Any],
    transformer: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    steps: int,
) -> str | None:
    """A warning where a teacher looks distilled for few steps and the job asks for many; None elsewhere.

    `index`: `model_index.json`. `transformer`, `scheduler`: their configurations. It is a guess from what published
    models have in them, so it refuses nothing.
    """
    if steps <= _FEW_STEPS:
        return None
    folder = place.rstrip("/").rsplit("/", 1)[-1]
    names = [folder, *(str(part.get("_name_or_path", "")) for part in (index, transformer))]
    named = next((word for word in _FEW_STEP_NAMES for name in names if word in name.lower()), None)
    shifts = scheduler.get("base_shift"), scheduler.get("max_shift")
    if index.get("is_distilled"):
        reason = "model_index.json has is_distilled: true"
    elif index.get("_class_name") == "FluxPipeline" and transformer.get("guidance_embeds") is False:
        reason = "its FLUX.1 transformer has guidance_embeds: false, as FLUX.1-schnell"
    elif scheduler.get("use_dynamic_shifting") and shifts[0] == shifts[1] is not None:
        reason = "its scheduler has the same base_shift and max_shift, as Qwen-Image-Lightning"
    elif named:
        reason = f"its name has {named!r} in it"
    else:
        return None
    return (
        f"the teacher looks distilled for few steps ({reason}), but sampling.steps is {steps}; set sampling.steps and "
        "the guidance in sampling.arguments to what it was distilled for"
    )
