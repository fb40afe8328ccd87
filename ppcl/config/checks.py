"""Rules between the keys of a job's configuration, which no key can check alone."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ppcl.config.plan_syntax import PLAN_SYNTAX, is_plan, is_replacement
from ppcl.config.variant_names import names_of
from ppcl.errors import UserError

if TYPE_CHECKING:
    from ppcl.config.schema import Config, Distillation, Evaluation, Finetuning, Sampling, Tracking, Variants

# The suite of `evaluation.prompts`, or of what stands in for them.
PROMPTS_SUITE = "prompts"
# Of scorers and suites.
BENCHMARK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_config(config: Config) -> None:
    """Raises `UserError` that names the key, the value seen and what would be right."""
    names = names_of(config.variants)
    _check_custom_variants(config.variants)
    _check_warmup("distillation", config.distillation)
    _check_warmup("finetuning", config.finetuning)
    _check_finetuned_variants(config.finetuning, names)
    _check_no_credentials(config.tracking)
    _check_benchmarks(config.evaluation)
    _check_sigmas(config.sampling)


def _check_custom_variants(settings: Variants) -> None:
    for name, plan in settings.custom.items():
        key = f"variants.custom.{name}"
        if not plan:
            raise UserError(f"{key} is empty; list what is on, {PLAN_SYNTAX}")
        for replacement in plan:
            if isinstance(replacement, str):
                if not is_replacement(replacement):
                    raise UserError(f"{key}: {replacement!r} is not a replacement; write {PLAN_SYNTAX}")
                continue
            first, last = replacement
            if not 0 <= first < last:
                raise UserError(
                    f"{key}: the interval [{first}, {last}] has fewer than two blocks; the first must be less than the "
                    "last, and blocks are counted from 0"
                )


def _check_warmup(section: str, settings: Distillation | Finetuning) -> None:
    # A short run may leave the default as it is.
    if "warmup" in settings.model_fields_set and settings.steps and settings.warmup > settings.steps:
        raise UserError(
            f"{section}.warmup is {settings.warmup}: it must not be more than {section}.steps, {settings.steps}"
        )


def _check_finetuned_variants(settings: Finetuning, names: list[str]) -> None:
    known = ", ".join(names)
    for index, name in enumerate(settings.variants):
        if name not in names:
            raise UserError(f"finetuning.variants: there is no variant {name!r}; there are {known}")
        if name in settings.variants[:index]:
            raise UserError(f"finetuning.variants names {name!r} twice; remove one")
    if settings.plan not in ("variants", "any", *names) and not is_plan(settings.plan):
        raise UserError(
            f"finetuning.plan is {settings.plan!r}: it is neither variants nor any, no variant ({known}) and no plan; "
            f"write {PLAN_SYNTAX}"
        )


def _check_no_credentials(settings: Tracking) -> None:
    """A configuration is stored with its result and shown to whoever may see that."""
    if settings.mlflow is not None and settings.mlflow.uri and "@" in urlsplit(settings.mlflow.uri).netloc:
        raise UserError(
            "tracking.mlflow.uri holds a user or a password, which no configuration may; set MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD in the environment"
        )


def _check_sigmas(settings: Sampling) -> None:
    sigmas = settings.arguments.get("sigmas")
    if sigmas is None:
        return
    numbers = isinstance(sigmas, list) and sigmas and all(isinstance(s, int | float) and 0 < s <= 1 for s in sigmas)
    if not numbers or any(later >= earlier for earlier, later in itertools.pairwise(sigmas)):
        raise UserError(
            f"sampling.arguments.sigmas is {sigmas!r}; give a falling list of numbers above 0 and at most 1, without "
            "the 0 at its end"
        )
    if len(sigmas) != settings.steps:
        raise UserError(
            f"sampling.arguments.sigmas has {len(sigmas)} values, and sampling.steps is {settings.steps}; set "
            f"sampling.steps to {len(sigmas)}"
        )


def _check_benchmarks(settings: Evaluation) -> None:
    for key, names in (("scorers", settings.scorers), ("suites", settings.suites)):
        for name in names:
            if not BENCHMARK_NAME.fullmatch(name):
                raise UserError(f"evaluation.{key}: {name!r} is no name; use letters, digits, '.', '_' and '-'")
    known = [PROMPTS_SUITE, *settings.suites]
    for name, scorer in settings.scorers.items():
        for suite in scorer.suites or ():
            if suite not in known:
                raise UserError(
                    f"evaluation.scorers.{name}.suites: there is no suite {suite!r}; there are {', '.join(known)}"
                )
    if PROMPTS_SUITE in settings.suites:
        raise UserError(
            f"evaluation.suites: {PROMPTS_SUITE!r} is the name of evaluation.prompts; choose another for the suite"
        )
