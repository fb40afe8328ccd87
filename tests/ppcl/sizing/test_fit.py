"""What is refused because it does not fit, and the change that is advised: it makes it fit, and no smaller one does."""

import re
from dataclasses import replace

import pytest

from jobs.stage import stages_for
from jobs.stages.registry import STAGES
from ppcl.config.schema import Config
from ppcl.errors import UserError
from ppcl.sizing.device import Device
from ppcl.sizing.fit import USABLE, Place, check_fits, job_sentences, laid_out, refusal, too_large
from ppcl.sizing.job import assumed_shortlist, job_size
from ppcl.sizing.memory import longest_pipeline
from ppcl.sizing.model import TeacherSize
from ppcl.sizing.stages import worker_sizes

GB = 1e9


@pytest.fixture(scope="module")
def qwen():
    return TeacherSize.named("qwen-image", 1024, 1024)


def job_of(teacher, **sections):
    config = Config(teacher="t", prompts="p", finetuning={"steps": 1000, **sections.pop("finetuning", {})}, **sections)
    return job_size(config, teacher, 1000, 4, Device())


def worker(job, stage, kind="rank"):
    return next(one for one in worker_sizes(job) if (one.stage, one.worker) == (stage, kind))


def test_every_stage_of_the_default_job_is_sized(qwen):
    found = [(one.stage, one.worker) for one in worker_sizes(job_of(qwen))]
    names = [stage.name for stage in stages_for("evaluation", STAGES)]
    assert list(dict.fromkeys(stage for stage, _ in found)) == names
    assert "finetuning" not in {one.stage for one in worker_sizes(job_of(qwen, finetuning={"steps": 0}))}


def test_a_method_that_measures_nothing_has_neither_evaluators_of_detection_nor_screening(qwen):
    found = {(one.stage, one.worker) for one in worker_sizes(job_of(qwen, detection={"method": "first_difference"}))}
    assert ("detection", "task") in found and ("detection", "evaluator") not in found
    assert not {"screening", "selection"} & {stage for stage, _ in found}
    # Without a short distillation, all of the shortlist is distilled to the end.
    unscreened = job_of(qwen, detection={"screening_steps": 0})
    assert "screening" not in {one.stage for one in worker_sizes(unscreened)}
    assert len(unscreened.replacements.students) == 30 and len(job_of(qwen).replacements.students) == 15


def test_a_shortlist_is_assumed_with_the_fewest_places_to_cut(qwen):
    settings = job_of(qwen).config.detection
    shortlist = assumed_shortlist(settings, qwen.model)
    assert len(set(shortlist)) == len(shortlist) == 30
    # Chains of seven blocks at most.
    assert longest_pipeline(qwen.model, shortlist) == 9
    few = assumed_shortlist(settings.model_copy(update={"max_candidates": 3, "max_length": 2}), qwen.model)
    assert len(few) == 3 and all(len(interval.blocks) == 2 for interval in few)


def test_every_kind_of_worker_that_does_not_fit_gets_advice(qwen):
    job = job_of(qwen)
    for one in worker_sizes(job):
        if one.device_bytes:
            assert re.search(
                "; (set .* to .*|no setting makes it fit; use devices of .* GB or more)$",
                refusal(job, one, Place(30 * GB)),
            )


def test_no_pipeline_is_advised_that_overlapping_intervals_may_not_be_cut_into(qwen):
    said = refusal(job_of(qwen), worker(job_of(qwen), "screening"), Place(80 * GB))
    assert said.endswith("; set distillation.pipeline_parallel to 6 or more")
    said = refusal(job_of(qwen), worker(job_of(qwen), "screening"), Place(60 * GB))
    found = re.search(
        r"set distillation.pipeline_parallel to (\d+) or more and detection.max_candidates to (\d+) or", said
    )
    ranks, most = map(int, found.groups())
    settings = job_of(qwen, detection={"max_candidates": most}).config.detection
    assert ranks <= longest_pipeline(qwen.model, assumed_shortlist(settings, qwen.model))


def test_the_pipeline_that_is_advised_fits_and_half_of_it_does_not(qwen):
    job = job_of(qwen)
    said = refusal(job, worker(job, "students"), Place(80 * GB))
    assert re.match(r"students needs \d+ GB for each rank, most of it for its students, and the largest GPU here", said)
    advised = int(re.search(r"set distillation.pipeline_parallel to (\d+) or more$", said)[1])
    for ranks, fits in ((advised, True), (advised // 2, False)):
        changed = worker(job_of(qwen, distillation={"pipeline_parallel": ranks}), "students")
        assert (changed.device_bytes <= USABLE * 80 * GB) == fits


def test_keys_are_changed_together_where_one_alone_does_not_do(qwen):
    job = job_of(qwen, finetuning={"activation_checkpointing": False, "batch_size": 16})
    said = refusal(job, worker(job, "finetuning"), Place(40 * GB))
    assert "set finetuning.activation_checkpointing to true and finetuning.data_parallel to " in said


def test_what_no_setting_makes_fit_is_told_with_the_memory_that_does(qwen):
    job = job_of(qwen)
    sampler = worker(job, "calibration", "sampler")
    least = int(
        re.search(r"no setting makes it fit; use devices of (\d+) GB or more", refusal(job, sampler, Place(2 * GB)))[1]
    )
    smallest = worker(job_of(qwen, calibration={"batch_size": 1}), "calibration", "sampler").device_bytes
    assert least - 1 <= smallest / USABLE / GB <= least


def test_only_the_stages_that_will_run_are_refused(qwen):
    job = job_of(qwen)
    check_fits(job, [Place(80 * GB)], {"calibration", "detection"})
    with pytest.raises(UserError, match="^students needs .*; --no-memory-check starts all the same$"):
        check_fits(job, [Place(80 * GB)], {"calibration", "students"})


def test_a_layout_uses_all_gpus_and_its_ranks_become_smaller(qwen):
    config = job_of(qwen).config
    sizes = []
    for gpus in (2, 8, 16):
        made = laid_out(config, qwen, gpus, 4)
        assert made.distillation.pipeline_parallel * made.distillation.data_parallel == gpus
        assert made.finetuning.data_parallel == made.calibration.workers == made.detection.workers == gpus
        job = job_size(made, qwen, 1000, 4, Device())
        sizes.append([worker(job, stage).device_bytes for stage in ("probes", "students", "finetuning")])
    assert all(earlier > later for a, b in zip(sizes, sizes[1:]) for earlier, later in zip(a, b))


def test_a_job_that_fits_is_told_so(qwen):
    job = job_of(qwen)
    assert job_sentences(job, worker_sizes(job), 4000 * GB) == [
        "every worker fits 4e+03 GB, of which nine tenths are usable"
    ]
    assert too_large(job, worker_sizes(job), Place(4000 * GB)) == []


def test_guidance_doubles_the_teachers_work(qwen):
    once = job_of(qwen)
    twice = job_of(qwen, sampling={"arguments": {"negative_prompt": " ", "true_cfg_scale": 4.0}})
    assert twice.sides == 2 and twice.samples == 2 * once.samples
    assert worker(twice, "calibration", "sampler").seconds == 2 * worker(once, "calibration", "sampler").seconds
    assert replace(once, prompts=500).samples * 2 == once.samples


def test_weights_that_come_and_go_are_counted_as_they_are(qwen):
    def sizes(offload, size=80 * GB):
        job = job_of(qwen, memory={"offload": offload}, evaluation={"batch_size": 4})
        job = replace(job, device=Device(size=size))
        return [worker(job, *names) for names in (("calibration", "encoder"), ("evaluation", "evaluator"))]

    for none, model, group in zip(sizes("none"), sizes("model"), sizes("group"), strict=True):
        assert none.device_bytes >= model.device_bytes > group.device_bytes
        assert not none.host_bytes and model.host_bytes == group.host_bytes > 15 * GB
    # Each gets the first that fits its device.
    assert sizes("auto") == [sizes("none")[0], sizes("model")[1]]
    assert sizes("auto", 24 * GB) == [sizes("none")[0], sizes("group")[1]]
    assert sizes("auto", 12 * GB) == sizes("group")
    _, evaluator = sizes("model")
    assert evaluator.device["teacher"] == pytest.approx(41 * GB, rel=0.02) and "text encoders" not in evaluator.device
    said = refusal(job_of(qwen, memory={"offload": "none"}), sizes("none")[1], Place(80 * GB))
    assert said.endswith("set memory.offload to auto")


CPU_STAGES = [
    ("calibration", "encoder", {"calibration": {"workers": 4}}, "calibration.workers to 2 or less"),
    ("calibration", "sampler", {"calibration": {"workers": 4}}, "calibration.workers to 2 or less"),
    ("detection", "evaluator", {"detection": {"workers": 4}}, "detection.workers to 2 or less"),
    ("evaluation", "evaluator", {"evaluation": {"workers": 4}}, "evaluation.workers to 2 or less"),
]


@pytest.mark.parametrize(("stage", "kind", "sections", "advised"), CPU_STAGES)
def test_workers_that_share_a_node_need_their_own_memory_each_and_the_hosts(qwen, stage, kind, sections, advised):
    job = replace(job_of(qwen, **sections), cpu=True)
    one = worker(job, stage, kind)
    assert one.count == 4
    each = one.device_bytes + one.host_bytes
    # Room for three of them; for a GPU, which one has alone, this is plenty.
    place = Place(3.1 * each / USABLE, cpus=16)
    assert not place.fits(job, one)
    assert f"{kind}, most of it for its " in refusal(job, one, place)
    assert ", 4 of them share a node, and the largest node here has" in refusal(job, one, place)
    assert refusal(job, one, place).endswith(f"; set {advised}")
    # A node with fewer CPUs gets fewer of them.
    assert place._replace(cpus=3).fits(job, one)
    assert Place(4.01 * each / USABLE).fits(job, one) and not Place(3.99 * each / USABLE).fits(job, one)
    assert Place(1.01 * one.device_bytes / USABLE).fits(replace(job, cpu=False), one)


def test_what_a_process_keeps_beside_its_weights_counts_on_a_cpu(qwen):
    job = replace(job_of(qwen), cpu=True)
    rank = worker(job, "probes")
    assert rank.host_bytes > 0
    assert not Place((rank.device_bytes + rank.host_bytes / 2) / USABLE, cpus=1).fits(job, rank)
    assert Place((rank.device_bytes + rank.host_bytes) / USABLE + 1, cpus=1).fits(job, rank)


def test_a_job_fits_where_one_node_holds_the_workers_it_gets(qwen):
    job = replace(job_of(qwen, evaluation={"workers": 4}), cpu=True)
    each = worker(job, "evaluation", "evaluator")
    need = (each.device_bytes + each.host_bytes) / USABLE
    few, many = Place(1.1 * need, cpus=1), Place(2 * need, cpus=64)
    check_fits(job, [many, few], {"evaluation"})
    with pytest.raises(UserError, match="^evaluation needs .* 4 of them share a node.* set evaluation.workers to 2 or"):
        check_fits(job, [many], {"evaluation"})


def test_on_a_cpu_all_weights_are_in_its_memory(qwen):
    job = replace(job_of(qwen), cpu=True)
    assert worker(job, "evaluation", "evaluator").device["teacher"] == job.teacher
