"""What can be replaced: probes, the choice of intervals, and the kinds of smaller parts."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ppcl.config.loading import Section
from ppcl.config.sections.fields import OPERATIONAL


class Probes(Section):
    """Linear probes: one residual affine map per block and stream (Eq. 1, 2)."""

    ridge: float = Field(
        1e-4, ge=0, description="ridge regularization, as a share of the mean diagonal of the scaled Gram matrix"
    )
    batch_size: int = Field(32, ge=1, description="samples per forward pass")
    tokens_per_sample: int = Field(
        64, ge=1, description="tokens of each stream kept per sample for CKA; the fit uses all tokens"
    )
    workers: int = Field(
        1, json_schema_extra=OPERATIONAL, ge=1, description="Ray Train workers; each fits the probes of its own blocks"
    )


class Detection(Section):
    """Contiguous redundant intervals: by measured sensitivity, or from similarities (Eq. 3 to 5, Algorithm 1)."""

    method: Literal["measured", "first_difference", "cka_threshold", "uniform"] = Field(
        "measured",
        description="measured: the velocity error of every interval in closed form, then of the best after a short "
        "distillation; first_difference: Algorithm 1 of the paper, exactly; cka_threshold: as far as CKA stays above a "
        "threshold; uniform: blocks spread evenly",
    )
    max_length: int = Field(5, ge=2, description="measured: blocks of the longest interval that is tried")
    samples: int = Field(64, ge=2, description="measured: samples of the split validation on which intervals are tried")
    resamples: int = Field(
        50, ge=0, description="measured: resamples of the samples, which tell how certain the choice is"
    )
    fit_tokens: int = Field(
        8192, ge=1, description="measured: tokens of each stream that the closed forms of intervals are fitted on"
    )
    max_candidates: int | None = Field(
        None,
        ge=1,
        description="measured: intervals that are distilled for a short time, at most; null: half as many as the "
        "teacher has blocks, and 16 at least",
    )
    screening_steps: int = Field(
        500,
        ge=0,
        description="measured: optimizer steps of the short distillation, after which intervals are chosen again; 0: "
        "the first choice is distilled as it is",
    )
    removed: int | None = Field(
        None, ge=1, description="cka_threshold, uniform: blocks to remove; null: two fifths of all, as in the paper"
    )
    workers: int = Field(
        1, json_schema_extra=OPERATIONAL, ge=1, description="measured: Ray actors, each with the whole teacher"
    )
    stream: Literal["img", "txt", "mean"] = Field("mean", description="stream whose CKA is used, or the mean of both")
    standardize: bool = Field(
        False, description="z-score every channel before CKA, which removes the effect of shared outlier channels"
    )
    compare_standardized: bool = Field(
        False, description="compute CKA both with and without z-scored channels, for the report; costs as much again"
    )
    tokens: int = Field(
        4096,
        ge=4,
        description="maximum tokens of a stream for CKA, of the split validation, whose standard error is reported",
    )

    @property
    def screens(self) -> bool:
        """Whether a short distillation of all shortlisted intervals comes before those of the students are chosen."""
        return self.method == "measured" and self.screening_steps > 0


class Width(Section):
    """Width pruning: what linear maps replace within blocks (Eq. 7 to 9)."""

    renamed: ClassVar[dict[str, str]] = {
        "hidden": "ffn_keep_percents",
        "ffns": "linear_ffns",
        "modulations": "low_rank_modulations",
    }

    text: bool = Field(
        True, description="replace text streams by linear projectors in runs of blocks that hardly change them"
    )
    text_similarity: float = Field(
        0.95,
        gt=0,
        le=1,
        description="smallest CKA between the text stream behind a run's first block and behind its last one",
    )
    low_rank_modulations: bool = Field(
        True, description="compute all modulations in low rank, in the directions that the timestep moves them in"
    )
    modulation_error: float = Field(
        1e-4,
        gt=0,
        lt=1,
        description="largest share of the variance over timesteps of the modulations' input that may be lost",
    )
    ffn_keep_percents: list[Annotated[int, Field(ge=1, le=99)]] = Field(
        [50, 25, 12],
        description="percents of hidden units that pruned FFNs keep, one replacement per block and percent; []: none",
    )
    head_keep_percents: list[Annotated[int, Field(ge=1, le=99)]] = Field(
        [],
        description="percents of attention heads that blocks keep, one replacement per block and percent; []: none",
    )
    linear_ffns: int | None = Field(
        None,
        ge=0,
        description="number of whole FFNs to replace by linear maps, those of the smallest closed-form error first; "
        "null: all; 0: none",
    )
