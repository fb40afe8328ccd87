"""Check the call of the teacher's pipeline that a configuration describes, before anything runs."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Union, get_args, get_origin

from ppcl.calibration.trajectory_recorder import check_arguments
from ppcl.config.schema import Sampling
from ppcl.errors import UserError
from ppcl.models.teacher import Teacher


def check_sampling(teacher: Teacher, sampling: Sampling) -> None:
    """Raise `UserError` for an argument or a size that the teacher's pipeline does not take, or would change."""
    import diffusers

    pipeline_class = getattr(diffusers, teacher.pipeline_class)
    check_arguments(pipeline_class, sampling)
    if "sigmas" in sampling.arguments:
        teacher.check_sigmas()
    for name, value in sampling.arguments.items():
        _check_type(pipeline_class, name, value)
    _check_negative_prompt(sampling)
    _check_clip_skip(teacher, sampling)
    longest = sampling.arguments.get("max_sequence_length", 1)
    if longest < 1:
        raise UserError(
            f"sampling.arguments has max_sequence_length {longest}; give the tokens of a prompt, at least 1"
        )
    check_size(teacher, sampling.height, sampling.width)
    _check_embedded_guidance(pipeline_class, teacher.config(), sampling)
    _check_inputs(teacher, pipeline_class, sampling)


def check_size(teacher: Teacher, height: int, width: int) -> None:
    """Raise `UserError` for an image that the pipeline would draw in another size, or cannot draw."""
    multiple, largest = teacher.pixels_a_token(), teacher.largest_side()
    wrong = {key: side for key, side in (("height", height), ("width", width)) if side % multiple}
    if wrong:
        nearest = "; ".join(f"the nearest to {side} are {_nearest(side, multiple)}" for side in wrong.values())
        sizes = " and ".join(f"sampling.{key} is {side}" for key, side in wrong.items())
        raise UserError(f"{sizes}, and a {teacher.pipeline_class} draws multiples of {multiple} pixels; {nearest}")
    for key, side in (("height", height), ("width", width)):
        if largest is not None and side > largest:
            raise UserError(
                f"sampling.{key} is {side}, and the positions of {teacher.place} reach to {largest} pixels "
                f"(pos_embed_max_size); give at most {largest}"
            )


def _nearest(side: int, multiple: int) -> str:
    below = side // multiple * multiple
    return " and ".join(str(size) for size in (below, below + multiple) if size)


def _check_type(pipeline_class: type, name: str, value: Any) -> None:
    parameter = inspect.signature(pipeline_class.__call__).parameters[name]
    if (value is None and parameter.default is None) or _fits(value, parameter.annotation):
        return
    takes = getattr(parameter.annotation, "__name__", None) or str(parameter.annotation)
    unquoted = "; write the number without quotes" if isinstance(value, str) and _is_number(value) else ""
    raise UserError(
        f"sampling.arguments has {name} {value!r}, and {pipeline_class.__name__} takes {takes} there{unquoted}"
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value of a YAML file is of an annotated type. What is not known fits."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inside[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(annotation, type) or annotation is inspect.Parameter.empty or isinstance(value, annotation)


def _check_negative_prompt(sampling: Sampling) -> None:
    negative = sampling.arguments.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        raise UserError(f"sampling.arguments has negative_prompt {negative!r}; give one prompt, as text")


def _check_clip_skip(teacher: Teacher, sampling: Sampling) -> None:
    """A CLIP of so many layers can skip all but one."""
    skipped = sampling.arguments.get("clip_skip")
    if skipped is None:
        return
    counts = [teacher.files.json(f"{part}/config.json").get("num_hidden_layers") for part in teacher.files.models]
    most = min(count for count in counts if count) - 1
    if not 0 <= skipped <= most:
        raise UserError(f"sampling.arguments has clip_skip {skipped}; the text encoders can skip 0 to {most} layers")


def _check_inputs(teacher: Teacher, pipeline_class: Any, sampling: Sampling) -> None:
    """Let the pipeline check the rest itself, without its components."""
    stand_in = SimpleNamespace(
        vae_scale_factor=teacher.pixels_a_token() // 2, patch_size=2, _callback_tensor_inputs=["latents"]
    )
    names = list(inspect.signature(pipeline_class.check_inputs).parameters)[1:]
    given = {"prompt": "a prompt", "height": sampling.height, "width": sampling.width, **sampling.arguments}
    try:
        pipeline_class.check_inputs(stand_in, **{name: given.get(name) for name in names})
    except ValueError as error:
        reason = " ".join(str(error).replace("`", "").split()).rstrip(".")
        raise UserError(
            f"{pipeline_class.__name__} does not take sampling.arguments as they are: {reason}; change them"
        ) from None
    except AttributeError:
        # What it asks of components is checked when it runs.
        return


def _check_embedded_guidance(pipeline_class: type, transformer: Mapping[str, Any], sampling: Sampling) -> None:
    parameters = inspect.signature(pipeline_class.__call__).parameters
    if not transformer.get("guidance_embeds") or "guidance_scale" not in parameters:
        return
    if sampling.arguments.get("guidance_scale", parameters["guidance_scale"].default) is None:
        raise UserError(
            "the teacher takes an embedded guidance scale (guidance_embeds: true), and none is set; set "
            "sampling.arguments.guidance_scale"
        )
