"""The configuration of a compression job: every key, its default and what it means, here and nowhere else.

`ppcl config` prints this file's defaults with their descriptions as YAML. Unknown keys and values out of range are
errors that name the key, the value seen and what would be right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationInfo

from ppcl.config.loading import Section, commented, current_keys, put, read_values, validated
from ppcl.config.location import Location, is_url


def _at_most_a_batch(replicas: int, info: ValidationInfo) -> int:
    size = info.data.get("batch_size", replicas)
    if replicas > size:
        raise ValueError(f"it must not be more than batch_size, {size}: each replica takes samples of every batch")
    return replicas


Decay = Annotated[float, Field(ge=0, lt=1)]
Replicas = Annotated[int, AfterValidator(_at_most_a_batch)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Sampling(Section):
    """How the pipeline is called, for calibration and for evaluation."""

    steps: int = Field(20, ge=1, le=1000, description="denoising steps of a trajectory")
    height: int = Field(1024, ge=8, description="height of the pictures, pixels")
    width: int = Field(1024, ge=8, description="width of the pictures, pixels")
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="further arguments of the pipeline's call, such as true_cfg_scale, negative_prompt, guidance_scale",
    )


class Calibration(Section):
    """The samples everything is fitted and measured on: latents, timestep and prompt embedding."""

    renamed: ClassVar[dict[str, str]] = {"limit": "max_prompts"}

    source: Literal["trajectories", "images"] = Field(
        "trajectories",
        description="trajectories: states on the teacher's own sampling trajectories (prompts only); images: noised VAE "
        "latents of the pictures named in image_column",
    )
    prompt_column: str = Field("prompt", description="column of the prompts in .jsonl, .csv and .parquet files")
    image_column: str = Field("image", description="column of the pictures' paths, relative to the prompt file")
    max_prompts: int | None = Field(None, ge=1, description="maximum number of prompts to use; null: all")
    states_per_prompt: int = Field(
        4, ge=1, description="timesteps kept of each prompt's trajectory, or noised of each picture"
    )
    held_out: float = Field(
        0.125, gt=0, lt=1, description="share of the prompts kept for CKA and velocity errors, never fitted on"
    )
    batch_size: int = Field(16, ge=1, description="prompts a batch")
    workers: int = Field(1, ge=1, description="actors that encode prompts and run the teacher")


class Probes(Section):
    """Linear probes, one residual affine map a block and stream (Eq. 1, 2)."""

    ridge: float = Field(1e-4, ge=0, description="ridge, as a share of the mean diagonal of the scaled Gram matrix")
    batch_size: int = Field(32, ge=1, description="samples a forward")
    tokens_per_sample: int = Field(
        64, ge=1, description="tokens of each stream kept of a sample for CKA; the fit takes them all"
    )
    workers: int = Field(1, ge=1, description="Ray Train workers; each fits its own blocks")


class Detection(Section):
    """Contiguous redundant intervals (Eq. 3 to 5, Algorithm 1)."""

    method: Literal["first_difference"] = Field("first_difference", description="Algorithm 1 of the paper, exactly")
    stream: Literal["img", "txt", "mean"] = Field(
        "mean", description="the stream whose CKA is read, or the mean of both"
    )
    standardize: bool = Field(
        False, description="z-score every channel before CKA, which undoes shared outlier channels"
    )


class Width(Section):
    """What linear maps replace within blocks (Eq. 7 to 9)."""

    renamed: ClassVar[dict[str, str]] = {
        "hidden": "ffn_keep_percents",
        "ffns": "linear_ffns",
        "modulations": "low_rank_modulations",
    }

    text: bool = Field(True, description="replace text streams, in runs of blocks that hardly change them")
    text_similarity: float = Field(
        0.95, gt=0, le=1, description="CKA that the text stream behind a run's first block keeps up to its last one"
    )
    low_rank_modulations: bool = Field(
        True, description="compute all modulations in the few directions the timestep moves them in"
    )
    modulation_error: float = Field(
        1e-4,
        gt=0,
        lt=1,
        description="share of the modulations' input that may be lost by it, of its variance over timesteps",
    )
    ffn_keep_percents: list[Annotated[int, Field(ge=1, le=99)]] = Field(
        [50, 25, 12],
        description="percent of their hidden units that FFNs keep, one replacement a block and number; []: none",
    )
    linear_ffns: int | None = Field(
        None,
        ge=0,
        description="replace so many whole FFNs by linear maps, those of the smallest error of the closed-form fit; null: all; 0: none",
    )


class Distillation(Section):
    """Distillation of depth and width in one phase, non-sequential and segment-parallel (Eq. 6 to 9)."""

    renamed: ClassVar[dict[str, str]] = {
        "start": "init",
        "student_hidden": "student_keep_percent",
        "pipeline": "pipeline_parallel",
        "replicas": "data_parallel",
    }

    steps: int = Field(6000, ge=1, description="optimizer steps")
    batch_size: int = Field(16, ge=1, description="samples a step, over all data-parallel replicas")
    learning_rate: float = Field(1e-4, gt=0, description="AdamW's peak rate, cosine schedule to zero")
    warmup: int = Field(100, ge=0, description="steps of linear warm-up")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's betas (the paper's)")
    weight_decay: float = Field(0.02, ge=0, description="AdamW's weight decay (the paper's)")
    gradient_clip: float = Field(1.0, gt=0, description="largest gradient norm, of each student alone")
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of an exponential moving average of the students; 0 turns it off"
    )
    loss: Literal["relative", "normalized"] = Field(
        "relative", description="relative: squared error over the target's energy, keeps magnitude; normalized: Eq. 6"
    )
    train: Literal["students", "all"] = Field(
        "students",
        description="students: student blocks are trained by gradient, linear maps stay at their least-squares optimum; "
        "all: linear maps are trained too (the paper)",
    )
    init: Literal["affine", "first", "middle"] = Field(
        "affine",
        description="a student's start: block u followed by the closed-form affine map; block u (the paper); the middle "
        "block (the reference)",
    )
    student_keep_percent: int = Field(
        100,
        ge=1,
        le=100,
        description="percent of their hidden units that the students' FFNs keep, the best ones by least squares; 100: all (the paper)",
    )
    ridge: float = Field(1e-4, ge=0, description="ridge of the closed-form maps, as a share of a channel's variance")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on GPUs, float32 on CPUs"
    )
    pipeline_parallel: int = Field(
        1, ge=1, description="pp: ranks that share the teacher's blocks, each with its own segment"
    )
    data_parallel: Replicas = Field(1, ge=1, description="dp: data-parallel replicas of that pipeline")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")


class Finetuning(Section):
    """Fine-tuning of the replacements end to end on the velocity, over plans drawn anew at every step."""

    renamed: ClassVar[dict[str, str]] = {
        "own_states": "rollout_share",
        "recompute": "activation_checkpointing",
        "replicas": "data_parallel",
        "measured": "measured_plans",
    }

    steps: int = Field(0, ge=0, description="optimizer steps; 0 leaves fine-tuning out; the paper takes 1000")
    batch_size: int = Field(16, ge=1, description="samples a step, over all replicas")
    learning_rate: float = Field(1e-4, gt=0, description="AdamW's peak rate, cosine schedule to zero")
    warmup: int = Field(50, ge=0, description="steps of linear warm-up")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's betas (the paper's)")
    weight_decay: float = Field(0.02, ge=0, description="AdamW's weight decay (the paper's)")
    gradient_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of an exponential moving average; 0 turns it off")
    rollout_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of a batch that comes from the variants' own trajectories instead of the teacher's",
    )
    plan: str = Field(
        "variants",
        description="variants: every step trains a named variant or a part of one; any: any plan at all; a variant's name or a "
        "plan such as 3-5,ffn:7: this one alone",
    )
    variants: list[str] = Field(
        [], description="with plan: variants, those that are trained, whole and in part; []: all named ones"
    )
    activation_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass instead of keeping them"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on GPUs, float32 on CPUs"
    )
    data_parallel: Replicas = Field(1, ge=1, description="data-parallel replicas")
    measured_plans: int = Field(
        50,
        ge=0,
        description="drawn plans measured before and after, beside the variants; by them it is known which others are better with what was trained",
    )
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")


class Target(Section):
    """What a variant must keep to; it is the least damaging plan that does."""

    parameters: Share | None = Field(None, description="share of the transformer's parameters, at most")
    speedup: float | None = Field(
        None,
        gt=1,
        description="times the teacher's speed at least, of a step, measured where the job runs on a batch of evaluation",
    )


class Variants(Section):
    """The named variants of the result."""

    budgets: list[Share] = Field(
        [0.9, 0.8, 0.7], description="shares of the transformer's parameters, one variant each"
    )
    blocks: list[Annotated[int, Field(ge=1)]] = Field(
        [],
        description="numbers of blocks that run, one variant each, by intervals alone: blocks are what a step's time goes into",
    )
    targets: dict[str, Target] = Field(
        default_factory=dict,
        description="name: {parameters: share at most, speedup: times the teacher's speed at least}",
    )
    custom: dict[str, list[tuple[int, int] | str]] = Field(
        default_factory=dict,
        description="name: list of what is on: intervals [u, v], blocks from 0, inclusive; text runs 'text:u-v'; FFNs 'ffn:u'",
    )


class Evaluation(Section):
    """What is measured of every variant."""

    renamed: ClassVar[dict[str, str]] = {"world": "checker", "limit": "max_prompts"}

    prompts: Location | None = Field(
        None, description="prompts of the test pictures; default: those of calibration, held out"
    )
    max_prompts: int | None = Field(64, ge=1, description="maximum number of test prompts to use; null: all")
    batch_size: int = Field(16, ge=1, description="pictures at once")
    checker: Literal["shapes"] | None = Field(
        None, description="the checker that scores pictures by category; shapes: the demo teacher's world"
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="level of the confidence intervals")
    workers: int = Field(1, ge=1, description="actors that make pictures")


class Ablation(Section):
    """`ppcl ablate`: what each part of the method adds, and other ways to choose the blocks that go."""

    removed: int | None = Field(
        None, ge=1, description="blocks that go; null: two fifths, at most what Algorithm 1 finds"
    )
    seeds: int = Field(3, ge=1, description="runs with seeds of their own, for intervals of confidence")
    steps: int = Field(1000, ge=1, description="distillation steps of every row")
    batch_size: int = Field(16, ge=1, description="samples a distillation step")
    finetuning_steps: int = Field(300, ge=1, description="steps of the rows with fine-tuning")
    gate_steps: int = Field(200, ge=1, description="steps of the learned gates")
    ffns: int = Field(3, ge=0, description="FFNs that become linear maps in the row that has them")
    workers: int = Field(1, ge=1, description="seeds at once")


class Config(Section):
    """A compression job."""

    renamed: ClassVar[dict[str, str]] = {"patience": "worker_timeout_s"}

    teacher: Location = Field(..., description="folder of a diffusers pipeline, or s3://bucket/key")
    prompts: Location = Field(
        ..., description="calibration prompts: .txt (one a line), .jsonl, .csv or .parquet; a path or s3://bucket/key"
    )
    output: Location = Field(Path("runs/ppcl"), description="folder of the result, or s3://bucket/key")
    seed: int = Field(0, ge=0, description="seed of everything that is drawn at random")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU where there is one, or where the cluster's autoscaler can add one"
    )
    worker_timeout_s: float = Field(
        300.0,
        gt=0,
        description="seconds after which a worker that gives no sign of life is taken for dead, and which a stage waits for nodes "
        "that it needs and that are not there; while the cluster's autoscaler has nodes on their way, up to four times as long",
    )
    sampling: Sampling = Sampling()
    calibration: Calibration = Calibration()
    probes: Probes = Probes()
    detection: Detection = Detection()
    width: Width = Width()
    distillation: Distillation = Distillation()
    finetuning: Finetuning = Finetuning()
    variants: Variants = Variants()
    evaluation: Evaluation = Evaluation()
    ablation: Ablation = Ablation()


def load_config(path: str | Path, overrides: list[str] | None = None, output: str | Path | None = None) -> Config:
    """Read a YAML file; `overrides` are `key.sub=value` with YAML values. Relative paths are relative to the file.

    Raises `UserError` that names the key, the value seen and what would be right.
    """
    path = Path(path)
    values = read_values(Config, path, "ppcl config")
    values = current_keys(Config, values, str(path))
    _resolve_paths(values, path.absolute().parent)
    for override in overrides or []:
        put(Config, values, override, "distillation.steps=100")
    if output is not None:
        values["output"] = str(output)
    return validated(Config, values, str(path))


def _resolve_paths(values: dict[str, Any], base: Path) -> None:
    """The file's own relative paths are relative to the file; `output` is relative to where the command runs."""
    for section, key in ((values, "teacher"), (values, "prompts"), (values.get("evaluation"), "prompts")):
        if isinstance(section, dict) and isinstance(section.get(key), str) and not is_url(section[key]):
            section[key] = str(base / section[key])


def commented_defaults() -> str:
    """The full default configuration as YAML, every key described."""
    return commented(Config)
