"""The configuration of a compression job: every key, its default and its meaning, here and nowhere else.

`ppcl config` prints the defaults with their descriptions as YAML. Errors name the key, the value seen and what
is right.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from ppcl.config.checks import check_config
from ppcl.config.loading import Section, commented, current_keys, put, read_values, validated
from ppcl.config.location import Location, LocationLike
from ppcl.config.offload import Offload
from ppcl.errors import UserError


def _at_most_a_batch(replicas: int, info: ValidationInfo) -> int:
    size = info.data.get("batch_size", replicas)
    if replicas > size:
        raise ValueError(f"it must not be more than batch_size, {size}: each replica takes samples of every batch")
    return replicas


def _interval_or_text(item: Any) -> Any:
    if isinstance(item, str) or (isinstance(item, list | tuple) and [type(block) for block in item] == [int, int]):
        return item
    raise ValueError("write an interval as [first, last], and anything else as a text such as 'text:3-5'")


# Marks a key that says how a stage is run and not what comes out of it: a change of it makes nothing anew.
OPERATIONAL: dict[str, Any] = {"operational": True}

Decay = Annotated[float, Field(ge=0, lt=1)]
Replicas = Annotated[int, AfterValidator(_at_most_a_batch)]
Share = Annotated[float, Field(gt=0, lt=1)]
# VAEs shrink an image by 8, and published transformers take patches of 2 × 2 of what is left.
Pixels = Annotated[int, Field(ge=8, multiple_of=8)]
PlanItem = Annotated[tuple[int, int] | str, BeforeValidator(_interval_or_text)]


class Sampling(Section):
    """Arguments of the pipeline's call in calibration and evaluation."""

    steps: int = Field(20, ge=1, le=1000, description="denoising steps of a trajectory")
    height: Pixels = Field(
        1024, description="height of the images, pixels; a multiple of 8, of 16 for published models"
    )
    width: Pixels = Field(1024, description="width of the images, pixels; a multiple of 8, of 16 for published models")
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="further arguments of the pipeline's call, such as true_cfg_scale, negative_prompt, guidance_scale",
    )


class Calibration(Section):
    """Samples of the teacher. Their prompts are split: train to fit on, validation to choose on, test to report on."""

    renamed: ClassVar[dict[str, str]] = {"limit": "max_prompts", "held_out": "validation"}

    source: Literal["trajectories", "images"] = Field(
        "trajectories",
        description="trajectories: states of the teacher's own sampling trajectories (needs prompts only); "
        "images: noised VAE latents of the images named in image_column",
    )
    prompt_column: str = Field("prompt", description="column of the prompts in .jsonl, .csv and .parquet files")
    image_column: str = Field("image", description="column of the image paths, relative to the prompt file")
    max_prompts: int | None = Field(None, ge=1, description="maximum number of prompts to use; null: all")
    states_per_prompt: int = Field(
        4, ge=1, description="timesteps kept of each prompt's trajectory, or noised of each image"
    )
    validation: Share = Field(
        0.125,
        description="share of the prompts that CKA, sensitivities and plans are measured on; nothing is fitted on them",
    )
    test: Share = Field(
        0.125, description="share of the prompts that evaluation alone looks at; nothing is fitted or chosen on them"
    )
    batch_size: int = Field(16, json_schema_extra=OPERATIONAL, ge=1, description="prompts per batch")
    workers: int = Field(
        1, json_schema_extra=OPERATIONAL, ge=1, description="Ray actors that encode prompts and run the teacher"
    )

    @model_validator(mode="after")
    def _leaves_prompts_to_train_on(self) -> Calibration:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation and test are {self.validation:g} and {self.test:g}, which leaves no prompts to train on; "
                "give shares whose sum is below 1"
            )
        return self


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


class Distillation(Section):
    """Distillation of depth and width replacements in one phase, non-sequential and segment-parallel (Eq. 6 to 9)."""

    renamed: ClassVar[dict[str, str]] = {
        "start": "init",
        "student_hidden": "student_keep_percent",
        "pipeline": "pipeline_parallel",
        "replicas": "data_parallel",
    }

    steps: int = Field(6000, ge=1, description="optimizer steps")
    batch_size: int = Field(16, ge=1, description="samples per step over all data-parallel ranks")
    learning_rate: float = Field(
        1e-4, gt=0, description="peak learning rate of AdamW; the schedule is a cosine to zero"
    )
    warmup: int = Field(100, ge=0, description="steps of linear learning-rate warm-up")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's betas (default: the paper's)")
    weight_decay: float = Field(0.02, ge=0, description="AdamW's weight decay (default: the paper's)")
    gradient_clip: float = Field(1.0, gt=0, description="largest gradient norm of each replacement")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of an exponential moving average of the parameters; 0: off")
    loss: Literal["relative", "normalized"] = Field(
        "relative",
        description="relative: squared error over the target's energy, which keeps magnitudes; normalized: Eq. 6",
    )
    train: Literal["students", "all"] = Field(
        "students",
        description="students: student blocks are trained by gradient, linear maps stay at their least-squares optimum"
        "; all: linear maps are trained too (the paper)",
    )
    init: Literal["affine", "first", "middle"] = Field(
        "affine",
        description="initialization of a student block: affine: block u followed by the closed-form affine map; first: "
        "block u "
        "(the paper); middle: the middle block (the reference code)",
    )
    student_keep_percent: int = Field(
        100,
        ge=1,
        le=100,
        description="percent of the hidden units that the students' FFNs keep, chosen by least squares; 100: all (the "
        "paper)",
    )
    ridge: float = Field(
        1e-4, ge=0, description="ridge regularization of the closed-form maps, as a share of a channel's variance"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on GPUs, float32 on CPUs"
    )
    moments_gb: float = Field(
        16.0,
        json_schema_extra=OPERATIONAL,
        gt=0,
        description="most memory of a rank, in GB, for the sums that closed-form maps are computed from; more take "
        "several passes over the samples",
    )
    pipeline_parallel: int = Field(
        1,
        json_schema_extra=OPERATIONAL,
        ge=1,
        description="pipeline-parallel ranks; each holds a segment of the teacher's blocks",
    )
    data_parallel: Replicas = Field(
        1, json_schema_extra=OPERATIONAL, ge=1, description="data-parallel replicas of the pipeline"
    )
    checkpoint_every: int = Field(500, json_schema_extra=OPERATIONAL, ge=1, description="steps between checkpoints")


class Finetuning(Section):
    """End-to-end fine-tuning of the replacements on the velocity; every step trains a random plan."""

    renamed: ClassVar[dict[str, str]] = {
        "own_states": "rollout_share",
        "recompute": "activation_checkpointing",
        "replicas": "data_parallel",
        "measured": "measured_plans",
    }

    steps: int = Field(0, ge=0, description="optimizer steps; 0: no fine-tuning; the paper: 1000")
    batch_size: int = Field(16, ge=1, description="samples per step over all data-parallel ranks")
    learning_rate: float = Field(
        1e-4, gt=0, description="peak learning rate of AdamW; the schedule is a cosine to zero"
    )
    warmup: int = Field(50, ge=0, description="steps of linear learning-rate warm-up")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's betas (default: the paper's)")
    weight_decay: float = Field(0.02, ge=0, description="AdamW's weight decay (default: the paper's)")
    gradient_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of an exponential moving average of the parameters; 0: off")
    rollout_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of a batch that comes from the variants' own trajectories (rollouts) instead of the "
        "teacher's",
    )
    plan: str = Field(
        "variants",
        description="plans to train: variants: a named variant or a part of one per step; any: any plan; the name of a "
        "variant, or a "
        "plan such as 3-5,ffn:7: this one alone",
    )
    variants: list[str] = Field(
        [], description="with plan: variants, the names of the variants to train, whole and in part; []: all"
    )
    activation_checkpointing: bool = Field(
        True,
        json_schema_extra=OPERATIONAL,
        description="recompute activations in the backward pass instead of keeping them; false is faster where they "
        "fit",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on GPUs, float32 on CPUs"
    )
    data_parallel: Replicas = Field(1, json_schema_extra=OPERATIONAL, ge=1, description="data-parallel ranks")
    shard: bool = Field(
        True,
        json_schema_extra=OPERATIONAL,
        description="shard the teacher, the replacements and the optimizer state over the ranks (FSDP2); false: each "
        "rank holds all, which is faster for small models",
    )
    measured_plans: int = Field(
        50,
        ge=0,
        description="random plans to measure before and after fine-tuning, in addition to the variants; they decide "
        "which other plans use the fine-tuned parameters",
    )
    checkpoint_every: int = Field(100, json_schema_extra=OPERATIONAL, ge=1, description="steps between checkpoints")


class Target(Section):
    """Limits of a variant; ppcl chooses the plan of the smallest velocity error that meets them."""

    parameters: Share | None = Field(None, description="largest share of the transformer's parameters")
    speedup: float | None = Field(
        None,
        gt=1,
        description="smallest speed-up of a step over the teacher, measured on the job's devices with a "
        "batch of evaluation",
    )

    @model_validator(mode="after")
    def _asks_for_something(self) -> Target:
        if self.parameters is None and self.speedup is None:
            raise ValueError("a target asks for parameters, for speedup or for both")
        return self


class Variants(Section):
    """Named variants of the result."""

    budgets: list[Share] = Field(
        [0.9, 0.8, 0.7], description="shares of the transformer's parameters, one variant each"
    )
    blocks: list[Annotated[int, Field(ge=1)]] = Field(
        [],
        description="numbers of remaining blocks, one variant each, made of intervals alone",
    )
    targets: dict[str, Target] = Field(
        default_factory=dict,
        description="name: {parameters: largest share, speedup: smallest speed-up over the teacher}, one or both",
    )
    custom: dict[str, list[PlanItem]] = Field(
        default_factory=dict,
        description="name: list of replacements: intervals [u, v], blocks from 0, inclusive; text runs 'text:u-v'; "
        "FFNs 'ffn:u' (linear) or 'ffn:u/50' (half of the hidden units); heads 'heads:u/50' (half of them); "
        "'modulations'",
    )


class ScorerSettings(Section):
    """One scorer of images: under its name in `evaluation.scorers`."""

    call: str = Field(
        ...,
        description="clip_score, pick_score, image_reward, hpsv2, hpsv3, lpips, dists, psnr, ssim, ocr, or "
        "module:function of your own",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="its arguments, such as model: the path of its weights"
    )
    suites: list[str] | None = Field(
        None, description="names of the suites that it scores; prompts: evaluation.prompts or its stand-in; null: all"
    )
    higher_is_better: bool = Field(True, description="false: for distances, such as lpips and dists")
    batch_size: int = Field(16, json_schema_extra=OPERATIONAL, ge=1, description="images of a call")
    workers: int = Field(1, json_schema_extra=OPERATIONAL, ge=1, description="Ray actors that score images")
    cpus: float = Field(1, json_schema_extra=OPERATIONAL, ge=0, description="CPUs of a worker")
    gpus: float = Field(
        0, json_schema_extra=OPERATIONAL, ge=0, description="GPUs of a worker, or a share of one; 0: it runs on the CPU"
    )
    runtime_env: dict[str, Any] | None = Field(
        None,
        json_schema_extra=OPERATIONAL,
        description="Ray's runtime environment of its workers, such as {pip: [diffsynth]}; null: that of the job",
    )


class Evaluation(Section):
    """Measurements of every variant: velocity errors, image similarity, scores of a prompt checker and of scorers."""

    renamed: ClassVar[dict[str, str]] = {"world": "checker", "limit": "max_prompts"}

    prompts: Location | None = Field(
        None, description="prompts of the test images; null: the checker's, or those of calibration's split test"
    )
    suites: dict[str, Location] = Field(
        default_factory=dict,
        description="further test prompts by the name of the suite: JSON lines with prompt, and if you like id and "
        "category",
    )
    max_prompts: int | None = Field(
        64, ge=1, description="maximum number of test prompts to use, of each suite too; null: all"
    )
    batch_size: int = Field(16, ge=1, description="images per batch")
    checker: Literal["shapes"] | None = Field(
        None, description="prompt checker that scores images by category; shapes: that of the demo"
    )
    scorers: dict[str, ScorerSettings] = Field(
        default_factory=dict,
        # A stage of its own runs them: a new scorer draws no image again.
        json_schema_extra=OPERATIONAL,
        description="by a name of yours, what scores every image: a section ScorerSettings",
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="level of the confidence intervals")
    workers: int = Field(1, json_schema_extra=OPERATIONAL, ge=1, description="Ray actors that generate images")


class Ablation(Section):
    """`ppcl ablate`: the gain of each part of the method, and other ways to choose the blocks to remove."""

    removed: int | None = Field(
        None, ge=1, description="number of blocks to remove; null: two fifths, at most what Algorithm 1 finds"
    )
    seeds: int = Field(3, ge=1, description="number of runs with different seeds, for confidence intervals")
    steps: int = Field(1000, ge=1, description="distillation steps of every row")
    batch_size: int = Field(16, ge=1, description="samples per distillation step")
    finetuning_steps: int = Field(300, ge=1, description="fine-tuning steps of the rows that have it")
    gate_steps: int = Field(200, ge=1, description="training steps of the learned gates")
    ffns: int = Field(3, ge=0, description="number of FFNs to replace by linear maps in the row that has them")
    workers: int = Field(1, json_schema_extra=OPERATIONAL, ge=1, description="seeds to run at once")


def _no_url(folder: Any) -> Any:
    if "://" in str(folder):
        raise ValueError(
            "its files are appended to, which no bucket can do; give a folder of the coordinator's machine"
        )
    return folder


class MlflowTracking(Section):
    """An MLflow server; its user, password or token come from MLflow's own environment variables."""

    uri: str | None = Field(
        None, min_length=1, description="URL of the tracking server, or a folder; null: MLFLOW_TRACKING_URI"
    )
    experiment: str = Field("ppcl", min_length=1, description="name of the experiment; made where it does not exist")


class WandbTracking(Section):
    """A project of Weights & Biases; its key comes from `WANDB_API_KEY` or `wandb login`."""

    project: str = Field("ppcl", min_length=1, description="name of the project")
    entity: str | None = Field(None, description="user or team; null: that of the key")
    mode: Literal["online", "offline"] = Field(
        "online", description="offline: files in the folder wandb of the output, for `wandb sync`"
    )


class Tracking(Section):
    """What a job logs to while it runs; a change makes nothing anew. Needs `ppcl[tracking]`."""

    tensorboard: Annotated[Path, BeforeValidator(_no_url)] | None = Field(
        None, json_schema_extra=OPERATIONAL, description="folder of TensorBoard's files, one folder a job in it"
    )
    mlflow: MlflowTracking | None = Field(
        None, json_schema_extra=OPERATIONAL, description="{uri, experiment} of an MLflow server"
    )
    wandb: WandbTracking | None = Field(
        None, json_schema_extra=OPERATIONAL, description="{project, entity, mode} of Weights & Biases"
    )


class Memory(Section):
    """Memory where the teacher's pipeline runs: in calibration, variants, evaluation, ablation and `ppcl generate`."""

    offload: Offload = Field(
        "auto",
        json_schema_extra=OPERATIONAL,
        description="weights that are on the device at once: none: all; model: those of a text encoder, of the "
        "transformer or of the VAE, in turn; group: those of a block and the next one; auto: the first of these that "
        "fits; the numbers are the same",
    )
    device_gb: float | None = Field(
        None,
        json_schema_extra=OPERATIONAL,
        gt=0,
        description="most memory of a device to use for weights and activations, in GB; null: all that is free",
    )
    replacements_gb: float = Field(
        16.0,
        json_schema_extra=OPERATIONAL,
        gt=0,
        description="most memory for replacements, in GB; the least recently used ones are read again when they are "
        "needed",
    )


class Config(Section):
    """A compression job."""

    renamed: ClassVar[dict[str, str]] = {"patience": "worker_timeout_s"}

    teacher: Location = Field(..., description="folder of a diffusers pipeline, or s3://bucket/key")
    prompts: Location = Field(
        ..., description="calibration prompts: .txt (one per line), .jsonl, .csv or .parquet; a path or s3://bucket/key"
    )
    output: Location = Field(Location("runs/ppcl"), description="folder of the result, or s3://bucket/key")
    seed: int = Field(0, ge=0, description="seed of all random numbers")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU if there is one or the cluster's autoscaler can add one, else the CPU"
    )
    worker_timeout_s: float = Field(
        300.0,
        gt=0,
        description="seconds without a heartbeat after which a worker is killed, and for which a stage waits for "
        "missing nodes; up to "
        "four times as long while the cluster's autoscaler starts nodes",
    )
    busy_timeout_s: float = Field(
        3600.0,
        gt=0,
        description="seconds for which a stage waits for CPUs or GPUs that other jobs of the cluster use",
    )
    memory: Memory = Memory()
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
    tracking: Tracking = Tracking()


def result_settings(section: Section) -> dict[str, Any]:
    """The values of a section that its results depend on: all but those marked operational, as JSON has them."""
    fields = type(section).model_fields
    operational = {name for name, field in fields.items() if field.json_schema_extra == OPERATIONAL}
    return section.model_dump(mode="json", exclude=operational)


def load_config(path: str | Path, overrides: list[str] | None = None, output: LocationLike | None = None) -> Config:
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
    config = validated(Config, values, str(path))
    try:
        check_config(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def _resolve_paths(values: dict[str, Any], base: Path) -> None:
    """The file's own relative paths are relative to the file; `output` is relative to where the command runs."""
    places = [(values, "teacher"), (values, "prompts")]
    evaluation = values.get("evaluation")
    if isinstance(evaluation, dict):
        places.append((evaluation, "prompts"))
        suites = evaluation.get("suites")
        if isinstance(suites, dict):
            places += [(suites, name) for name in suites]
    for section, key in places:
        if isinstance(section.get(key), str):
            # What is no location keeps its text, for the message that says so.
            with suppress(ValueError):
                location = Location(section[key])
                section[key] = str(location if location.is_url else base / location)


def commented_defaults() -> str:
    """The full default configuration as YAML, every key described."""
    return commented(Config)
