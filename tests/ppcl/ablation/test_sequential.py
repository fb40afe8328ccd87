import torch
from safetensors.torch import load_file

from ppcl.ablation.sequential import SequentialRun
from ppcl.config.schema import Distillation
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval
from ppcl.training.distillation.trainer import distil
from ppcl.training.run_context import RunContext
from tests.samples import MemorySamples

INTERVALS = [Interval(0, 1), Interval(3, 5)]
SETTINGS = Distillation(steps=3, batch_size=8, learning_rate=1e-3, warmup=1)


@torch.enable_grad()
def test_only_what_stands_before_a_student_differs_in_sequence(teacher_folder, tmp_path):
    teacher, samples = Teacher(teacher_folder), MemorySamples()
    for name in ("apart", "sequence"):
        (tmp_path / name).mkdir()
    distil(teacher, samples, INTERVALS, SETTINGS, RunContext(tmp_path / "apart", tmp_path / "c"))
    SequentialRun(teacher, samples, SETTINGS, 0, "cpu").distil(INTERVALS, tmp_path / "sequence", lambda done: None)
    first, second = (
        [load_file(tmp_path / name / f"{i.name}.safetensors") for name in ("apart", "sequence")] for i in INTERVALS
    )
    assert all(torch.allclose(first[0][key], first[1][key], atol=1e-6) for key in first[0])
    assert not all(torch.allclose(second[0][key], second[1][key], atol=1e-5) for key in second[0])
