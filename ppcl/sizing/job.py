"""What a whole job needs: every kind of worker of every stage, from the configuration and the teacher's structure.

Before detection nobody knows the replacements. `assumed_plan` has more than a job makes as a rule, so that what fits
here fits there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ppcl.calibration.guidance import Guidance
from ppcl.config.schema import Config, Detection
from ppcl.replacements import (
    Interval,
    LinearFfn,
    LowRankModulation,
    Plan,
    PrunedFfn,
    PrunedHeads,
    Replacement,
    TextRun,
    parse_text,
    sort_key,
)
from ppcl.search.shortlist import longest_chain, most_intervals
from ppcl.sizing.device import Device
from ppcl.sizing.memory import intervals
from ppcl.sizing.model import Model, SampleBytes, TeacherSize
from ppcl.sizing.vae import VaeMemory

# A low-rank modulation's directions are this share of the width, at most: five of 3072 in Qwen-Image.
_DIRECTIONS = 64


@dataclass(frozen=True)
class WorkerSize:
    """One kind of worker of a stage.

    `count`: how many work at once. `device`: by what they are for, the bytes that the fullest one holds on its device
    at its fullest moment; `host`: the same of the process's own memory. On a CPU both are the process's. `written`:
    bytes that the stage leaves in the job's folder. `sent`: bytes between its workers. `seconds`: of the stage's own
    work; None where it is not computed.
    """

    stage: str
    worker: str
    count: int
    device: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)
    written: int = 0
    sent: int = 0
    seconds: float | None = None

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


@dataclass(frozen=True)
class ReplacementSizes:
    """Parameters of a job's replacements, by kind.

    `students`: by interval. `text`: by run. `linear`, `pruned`: by block, of one linear FFN, and of all its pruned ones
    together. `widest`: by block, the largest of its FFNs' replacements. `heads`: by block, of all its attentions with
    fewer heads together; `most_heads`: by block, of the largest. `basis`: of the modulations' directions.
    """

    students: dict[Interval, int]
    text: dict[TextRun, int]
    linear: dict[int, int]
    pruned: dict[int, int]
    widest: dict[int, int]
    basis: int
    heads: dict[int, int] = field(default_factory=dict)
    most_heads: dict[int, int] = field(default_factory=dict)

    def within(self, blocks: range) -> ReplacementSizes:
        """Those that begin in some blocks."""
        return ReplacementSizes(
            {i: n for i, n in self.students.items() if i.first in blocks},
            {i: n for i, n in self.text.items() if i.first in blocks},
            {b: n for b, n in self.linear.items() if b in blocks},
            {b: n for b, n in self.pruned.items() if b in blocks},
            {b: n for b, n in self.widest.items() if b in blocks},
            self.basis,
            {b: n for b, n in self.heads.items() if b in blocks},
            {b: n for b, n in self.most_heads.items() if b in blocks},
        )

    @property
    def maps(self) -> int:
        """Parameters of all but the students."""
        kinds = (self.text, self.linear, self.pruned, self.heads)
        return sum(sum(sizes.values()) for sizes in kinds)

    @property
    def all(self) -> int:
        return sum(self.students.values()) + self.maps + self.basis

    @property
    def fine_tuned(self) -> int:
        """Parameters of the most that variants can hold together: all students and text runs, of a block one FFN and
        the most heads."""
        kinds = (self.students, self.text, self.widest, self.most_heads)
        return sum(sum(sizes.values()) for sizes in kinds)


@dataclass(frozen=True)
class JobSize:
    """What the sizes of a job are computed from.

    `model`: at the size of the configuration's images. `components`: by name, the parameters of the pipeline's other
    parts. `prompts`: their number. `replacements`: those that are made. `device`: what workers run on. `cpu`: that it
    is a CPU, where all is float32. `sides`: calls of the transformer a step, two with classifier-free guidance;
    `sides_at_once`: of them, in one batch. `vae`: what its calls take.
    """

    config: Config
    model: Model
    components: Mapping[str, int]
    prompts: int
    replacements: ReplacementSizes
    device: Device
    cpu: bool = False
    sides: int = 1
    sides_at_once: int = 1
    vae: VaeMemory = VaeMemory(SampleBytes(0, 0), SampleBytes(0, 0))

    @property
    def number(self) -> int:
        """Bytes of a number in the teacher's precision."""
        return self.model.dtype.itemsize

    @property
    def stream(self) -> int:
        """Bytes of both streams of a sample."""
        return self.model.stream_bytes

    @property
    def teacher(self) -> int:
        """Bytes of the whole transformer."""
        return self.number * self.model.parameters

    @property
    def encoders(self) -> int:
        """Bytes of the text encoders."""
        return self.number * sum(n for name, n in self.components.items() if name.startswith("text_encoder"))

    @property
    def other_components(self) -> int:
        """Bytes of all other parts of the pipeline: the VAE."""
        return self.number * sum(n for name, n in self.components.items() if not name.startswith("text_encoder"))

    @property
    def samples(self) -> int:
        return self.prompts * self.config.calibration.states_per_prompt * self.sides

    @property
    def validation(self) -> int:
        """Samples of that split, and so the two below."""
        return round(self.samples * self.config.calibration.validation)

    @property
    def test(self) -> int:
        return round(self.samples * self.config.calibration.test)

    @property
    def train(self) -> int:
        return self.samples - self.validation - self.test

    @property
    def forward_flops(self) -> int:
        """Operations of the whole transformer, a sample."""
        return self.model.rest_flops + sum(self.model.flops)

    @property
    def forward_peak(self) -> tuple[int, int]:
        """The most bytes a block's forward takes: a sample's, and what does not grow with samples."""
        most = max(self.model.memory, key=lambda memory: memory.forward.each).forward
        return most.each, most.fixed

    def forward_bytes(self, samples: int) -> int:
        each, fixed = self.forward_peak
        return samples * (each + self.stream) + fixed

    def compute_seconds(self, operations: float) -> float:
        return operations / (self.device.flops * self.device.utilisation)

    @property
    def fine_tuned(self) -> int:
        """Parameters that fine-tuning trains. In full, and where a name alone gives the plan: those of all blocks."""
        if self.config.finetuning.train != "all":
            return self.replacements.fine_tuned
        plan = self.plan_in_full
        if plan is None:
            # Every replacement has fewer than what it stands for.
            return sum(self.model.blocks)
        sizes = replacement_sizes(self.config, self.model, plan)
        own = sum(self.model.blocks[block] for block in self.tuned_blocks)
        # A replaced FFN is left out of the block that it is in.
        left_out = sum(ffn.parameters for block in sizes.widest for ffn in self.model.ffns[block].values())
        return sizes.fine_tuned + own - left_out

    @property
    def tuned_blocks(self) -> list[int]:
        """The teacher's own blocks of which fine-tuning trains copies, at most."""
        if self.config.finetuning.train != "all":
            return []
        gone = {block for one in self.plan_in_full or () if one.removed for block in one.blocks}
        return [block for block in range(len(self.model.blocks)) if block not in gone]

    @property
    def plan_in_full(self) -> Plan | None:
        """The plan that is trained in full, as far as the configuration gives more than a name."""
        name = self.config.finetuning.plan
        replacements = parse_text(name) or self.config.variants.custom.get(name)
        return None if replacements is None else Plan(replacements)

    @property
    def screened(self) -> JobSize:
        """The job with the intervals of a shortlist instead of the chosen ones; see `assumed_shortlist`."""
        shortlist = assumed_shortlist(self.config.detection, self.model)
        students = replacement_sizes(self.config, self.model, shortlist).students
        return replace(self, replacements=replace(self.replacements, students=students))

    @property
    def variants(self) -> int:
        """The number of variants, without the teacher and the one of all replacements."""
        variants = self.config.variants
        return len(variants.budgets) + len(variants.blocks) + len(variants.targets) + len(variants.custom)


def assumed_shortlist(settings: Detection, model: Model) -> list[Interval]:
    """As many intervals as a shortlist has at most, spread over the blocks in chains of overlapping ones.

    The chains are as long as they may be. So a full shortlist leaves the fewest places where a pipeline can be cut; one
    of few intervals may leave more than are found in the end.
    """
    most, length = most_intervals(settings, len(model.blocks)), longest_chain(settings, len(model.blocks))
    chains = [chain for span in model.block_ranges for chain in _parts(span, -(-len(span) // length))]
    borders = [round(most * chain.stop / len(model.blocks)) for chain in chains]
    counts = [behind - before for before, behind in zip([0, *borders], borders)]
    return [i for chain, count in zip(chains, counts) for i in _overlapping(chain, count, settings.max_length)]


def _overlapping(chain: range, count: int, longest: int) -> list[Interval]:
    """At most `count` intervals over these blocks, as long as they may be, then shorter ones; by their blocks."""
    found: list[Interval] = []
    for length in range(min(longest, len(chain)), 1, -1):
        firsts = range(chain.start, chain.stop - length + 1)
        found += [Interval(first, first + length - 1) for first in _spread(firsts, count - len(found))]
    return sorted(found, key=sort_key)


def _parts(span: range, count: int) -> list[range]:
    """Cut a list of blocks into so many runs of about the same length."""
    borders = [span.start + i * len(span) // count for i in range(count + 1)]
    return [range(first, stop) for first, stop in zip(borders, borders[1:])]


def _spread(numbers: range, count: int) -> list[int]:
    """At most `count` of them, spread evenly, the first and the last among them."""
    last = len(numbers) - 1
    return sorted({numbers[round(i * last / max(1, count - 1))] for i in range(count)})


def assumed_plan(config: Config, model: Model, interval: int) -> list[Replacement]:
    """What is distilled to the end at most: a student and a text run for every `interval` blocks, all kinds of FFN, and
    heads.

    Where intervals are measured and not screened, the whole shortlist is distilled.
    """
    width, detection = config.width, config.detection
    depth = intervals(model, interval)
    if detection.method == "measured" and not detection.screens:
        depth = assumed_shortlist(detection, model)
    runs = [
        TextRun(i.first, i.last)
        for i in intervals(model, interval)
        if width.text and all("txt" in model.ffns[b] for b in i.blocks)
    ]
    blocks = [block for block, ffns in enumerate(model.ffns) if ffns]
    alone = [block for block in blocks if not any(ffn.fused for ffn in model.ffns[block].values())]
    linear = [LinearFfn(block) for block in alone[: width.linear_ffns]]
    pruned = [PrunedFfn(block, percent) for block in blocks for percent in sorted(set(width.ffn_keep_percents))]
    heads = [PrunedHeads(block, percent) for block in blocks for percent in sorted(set(width.head_keep_percents))]
    low_rank = [LowRankModulation()] if width.low_rank_modulations and blocks else []
    return [*depth, *runs, *linear, *pruned, *heads, *low_rank]


def replacement_sizes(config: Config, model: Model, plan: Iterable[Replacement]) -> ReplacementSizes:
    """The sizes of the replacements of a plan, which may conflict."""
    map_size = model.width * (model.width + 1)
    sizes = ReplacementSizes({}, {}, {}, {}, {}, 0)
    for one in plan:
        if isinstance(one, Interval):
            ffns = model.ffns[one.first].values()
            less = sum(ffn.parameters - ffn.kept(config.distillation.student_keep_percent) for ffn in ffns)
            affine = model.affine if config.distillation.init == "affine" else 0
            sizes.students[one] = model.blocks[one.first] - less + affine
        elif isinstance(one, TextRun):
            sizes.text[one] = len(one.blocks) * map_size
        elif isinstance(one, LinearFfn):
            sizes.linear[one.block] = map_size * len(model.ffns[one.block])
            _widen(sizes, one.block, sizes.linear[one.block])
        elif isinstance(one, PrunedFfn):
            kept = sum(ffn.kept(one.keep_percent) for ffn in model.ffns[one.block].values())
            sizes.pruned[one.block] = sizes.pruned.get(one.block, 0) + kept
            _widen(sizes, one.block, kept)
        elif isinstance(one, PrunedHeads) and (attention := model.attentions[one.block]):
            kept = attention.kept(one.keep_percent)
            sizes.heads[one.block] = sizes.heads.get(one.block, 0) + kept
            sizes.most_heads[one.block] = max(sizes.most_heads.get(one.block, 0), kept)
    basis = model.width * model.width // _DIRECTIONS if LowRankModulation() in plan else 0
    return replace(sizes, basis=basis)


def _widen(sizes: ReplacementSizes, block: int, parameters: int) -> None:
    sizes.widest[block] = max(sizes.widest.get(block, 0), parameters)


def job_size(
    config: Config, teacher: TeacherSize, prompts: int, interval: int, device: Device, cpu: bool = False
) -> JobSize:
    """The size of a job before detection: a student for every `interval` blocks; see `assumed_plan`."""
    guided = Guidance.of(teacher.adapter, teacher.pipeline_class, config.sampling) is not None
    at_once = 2 if guided and not teacher.adapter.packed_latents else 1
    plan = assumed_plan(config, teacher.model, interval)
    return JobSize(
        config=config,
        model=teacher.model,
        components=teacher.components,
        prompts=prompts,
        replacements=replacement_sizes(config, teacher.model, plan),
        device=device,
        cpu=cpu,
        sides=2 if guided else 1,
        sides_at_once=at_once,
        vae=VaeMemory.of(teacher.vae, config.sampling.height, config.sampling.width, teacher.model.dtype),
    )
