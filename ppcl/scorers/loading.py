"""Find a scorer by its name, make it, and check what it gives."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np

from ppcl.errors import UserError

# Takes prompts, images and metadata; see `ppcl.scorers`.
Scorer = Callable[[list[str], np.ndarray, list[dict[str, Any]]], Sequence[float | bool]]

# The scorers that come with ppcl, by their name in `call`.
BUILT_IN = {
    "clip_score": "ppcl.scorers.clip:ClipScore",
    "pick_score": "ppcl.scorers.clip:PickScore",
    "image_reward": "ppcl.scorers.preference:ImageReward",
    "hpsv2": "ppcl.scorers.preference:HpsV2",
    "hpsv3": "ppcl.scorers.preference:HpsV3",
    "lpips": "ppcl.scorers.perceptual:Lpips",
    "dists": "ppcl.scorers.perceptual:Dists",
    "psnr": "ppcl.scorers.perceptual:psnr_to_teacher",
    "ssim": "ppcl.scorers.perceptual:ssim_to_teacher",
    "ocr": "ppcl.scorers.ocr:OcrAccuracy",
}


def load_scorer(name: str, call: str, arguments: Mapping[str, Any], device: str) -> Scorer:
    """The scorer `name` of the configuration.

    `call`: a built-in one, or `module:function`. `device`: given to a class that takes one. Raises `UserError`.
    """
    found = _found(name, call)
    is_class = inspect.isclass(found)
    takes_device = is_class and "device" in inspect.signature(found).parameters
    given: dict[str, Any] = ({"device": device} if takes_device else {}) | dict(arguments)
    try:
        inspect.signature(found).bind(*(() if is_class else (None,) * 3), **given)
    except TypeError as error:
        raise UserError(
            f"evaluation.scorers.{name}.arguments: {call} cannot be called with {_shown(dict(arguments))} ({error})"
        ) from None
    if not is_class:
        return partial(found, **given)
    try:
        made: Scorer = found(**given)
    except UserError as error:
        raise UserError(f"evaluation.scorers.{name}: {error}") from None
    except Exception as error:
        raise UserError(f"evaluation.scorers.{name}: {call} cannot be made: {_short(error)}; {_HELP}") from error
    return made


_HELP = "mend it, and run the same command again"


def _found(name: str, call: str) -> Any:
    """What `call` names. Raises `UserError`."""
    key = f"evaluation.scorers.{name}.call"
    if ":" not in call and call not in BUILT_IN:
        near = get_close_matches(call, BUILT_IN, n=1)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise UserError(f"{key} is {call!r}; write one of {', '.join(BUILT_IN)}, or module:function{hint}")
    module, _, attribute = BUILT_IN.get(call, call).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UserError(
            f"{key}: the module {module} cannot be imported ({error}); install what it needs where the workers run, or "
            f"name it in evaluation.scorers.{name}.runtime_env"
        ) from None
    except AttributeError:
        raise UserError(f"{key}: the module {module} has no {attribute}; correct the name") from None
    if not callable(found):
        raise UserError(f"{key}: {call} is a {type(found).__name__}; name a function or a class")
    return found


def checked_scores(
    name: str, scorer: Scorer, prompts: list[str], images: np.ndarray, metadata: list[dict[str, Any]]
) -> np.ndarray:
    """What the scorer `name` gives for some images, `(N,)` float64.

    Raises `UserError` where it fails, or gives something else than one finite number an image.
    """
    place = f"evaluation.scorers.{name}"
    try:
        scores = scorer(prompts, images, metadata)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    except Exception as error:
        raise UserError(f"{place} raised {_short(error)}; {_HELP}") from error
    try:
        array = np.asarray([float(score) for score in scores])
    except (TypeError, ValueError):
        raise UserError(f"{place} gave {_shown(scores)}; it must give one number, or true or false, an image") from None
    if len(array) != len(prompts):
        raise UserError(f"{place} gave {len(array)} scores for {len(prompts)} images; it must give one each")
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array))[0])
        raise UserError(f"{place} gave {array[bad]} for the image of {prompts[bad]!r}; it must give finite numbers")
    return array


def _short(error: BaseException) -> str:
    told = " ".join(str(error).split())
    return f"{type(error).__name__}: {told[:200]}" if told else type(error).__name__


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}…"
