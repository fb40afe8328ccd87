"""The demo teacher's weights in half of the bytes."""

import shutil

import torch
from safetensors.torch import load_file

from ppcl.demo.store_bfloat16 import store_bfloat16
from ppcl.models.teacher import Teacher


def test_the_file_is_rounded_and_the_teacher_still_computes_in_float32(teacher_folder, tmp_path):
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    before, size = load_file(path), path.stat().st_size
    store_bfloat16(folder)
    after = load_file(path)
    assert {x.dtype for x in after.values()} == {torch.bfloat16} and path.stat().st_size < 0.6 * size
    assert all(torch.equal(after[name], x.bfloat16()) for name, x in before.items())
    for transformer in (Teacher(folder).transformer(), Teacher(folder).pipeline().transformer):
        assert {p.dtype for p in transformer.parameters()} == {torch.float32}
        for name, parameter in transformer.named_parameters():
            assert torch.equal(parameter, after[name].float())
