"""From probes to a variant on teachers with blocks that take text and image tokens as one stream."""

import numpy as np
import pytest
import torch

from ppcl.config.schema import Detection, Distillation, Probes, Width
from ppcl.detection.fit_probes import fit_probes, probe_file
from ppcl.evaluation.velocity_error import sensitivities
from ppcl.models import swapped
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval
from ppcl.replacements.assembly import block_map
from ppcl.replacements.io import files_in
from ppcl.replacements.student_block import StudentBlock
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.training.distillation.trainer import distil
from ppcl.training.parallel_dims import ParallelDims
from ppcl.training.run_context import RunContext
from tests import tiny_families, tiny_pipelines
from tests.detecting import detect

# FLUX.2 has two streams and then one, Lumina 2 one from the start.
CASES = {
    "Flux2KleinPipeline": [Interval(0, 1), Interval(3, 5)],
    "Lumina2Pipeline": [Interval(0, 1), Interval(2, 3)],
}


class Samples:
    """Random samples of a teacher, the last quarter of validation."""

    def __init__(self, model, count=96):
        self.count, self.inputs = count, tiny_families.inputs(model, samples=count)

    def ids(self, split):
        border = self.count - self.count // 4
        return np.arange(border) if split == "train" else np.arange(border, self.count)

    def batch(self, ids, device="cpu", dtype=torch.float32):
        rows = torch.as_tensor(np.asarray(ids))
        shared = ("img_ids", "txt_ids")
        return {n: x if n in shared else x[rows] for n, x in self.inputs.items()}


@pytest.mark.parametrize("name", CASES)
def test_probes_detection_students_and_a_variant(name, tmp_path):
    torch.manual_seed(0)
    make, _ = tiny_pipelines.PIPELINES[name]
    pipeline = make()
    for parameter_name, parameter in pipeline.transformer.named_parameters():
        if "modulation" in parameter_name:
            # Else FLUX.2's blocks, which have no modulations of their own, do next to nothing.
            parameter.data.mul_(5)
    pipeline.save_pretrained(tmp_path / "teacher")
    teacher = Teacher(tmp_path / "teacher")
    model, intervals = teacher.transformer(), CASES[name]
    samples, block_ranges = Samples(model), teacher.adapter.block_ranges(model)
    folders = [tmp_path / folder for folder in ("probes", "students", "checkpoints")]
    for folder in folders:
        folder.mkdir()
    probes, students, checkpoints = folders
    run = RunContext(probes, probes, dims=ParallelDims.join(1, 1))
    fit_probes(teacher, samples, Probes(batch_size=8, tokens_per_sample=4), run, Detection().tokens)
    assert all(probe_file(probes, block).exists() for block in range(block_ranges[-1].stop))
    found = detect(probes, block_ranges, Detection(method="first_difference"), Width(), lambda *_, **__: None)
    streams = {"Flux2KleinPipeline": {"img", "txt"}, "Lumina2Pipeline": {"img"}}[name]
    assert set(found["tokens"]) == streams and set(found["cka"]) == {*streams, "mean"}
    # No block has parts that a width replacement could replace.
    assert all(":" not in replacement and "mod" not in replacement for replacement in found["plan"])

    settings = Distillation(steps=4, batch_size=8, warmup=1, learning_rate=1e-4)
    with torch.enable_grad():
        distil(teacher, samples, intervals, settings, RunContext(students, checkpoints), 1e-4)
    files = files_in(students)
    assert set(files) == set(intervals)
    switch, inputs = VariantSwitcher(teacher, files), samples.batch(samples.ids("validation"))
    errors = sensitivities(model, switch, inputs)
    with torch.no_grad():
        stock = model(**inputs, return_dict=False)[0]
        for interval, sums in errors.items():
            # Against the interval's first block alone.
            blocks = teacher.adapter.blocks(model)
            alone = StudentBlock(teacher.adapter, interval, interval.first, blocks[interval.first])
            with swapped(model, block_map(teacher.adapter, model, blocks, {interval: alone}, [interval])):
                removed = model(**inputs, return_dict=False)[0]
            assert 0 < sums.overall() < float((removed - stock).square().sum() / stock.square().sum())
        switch(model, [intervals[0]])
        made = model(**inputs, return_dict=False)[0]
        switch(model, ())
        assert torch.equal(model(**inputs, return_dict=False)[0], stock)
    one = float((made - stock).square().sum() / stock.square().sum())
    assert one == pytest.approx(errors[intervals[0]].overall(), rel=1e-3)
