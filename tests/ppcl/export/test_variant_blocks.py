"""Every plan of every family, exported and loaded by its own class, against the variant inside of the teacher."""

import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from ppcl.config.location import Location
from ppcl.export import variant_blocks
from ppcl.export.destination import destination
from ppcl.export.transformer_files import WeightPlan, write_weights
from ppcl.export.variant_blocks import VariantBlocks
from ppcl.models import pruned_transformer
from ppcl.models.teacher import Teacher
from ppcl.replacements import Plan
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.sizing.peak_memory import PeakMemory
from tests import tiny

# What each plan is made of, and what stands in the way of stock classes.
STOCK = {"": [], "2-3": [], "2-3,4-5": []}
SHAPED = {
    "0-1": ["students that end in an affine map"],
    "ffn:0,ffn:2/50": ["linear FFNs", "FFNs with fewer hidden units"],
    "text:1-3": ["text runs"],
    "text:1-3,ffn:2,ffn:0/50,4-5": ["FFNs with fewer hidden units", "linear FFNs", "text runs"],
    "heads:0/50,heads:2/50,ffn:2/50,heads:{last}/50": [
        "attention with fewer heads",
        "FFNs with fewer hidden units",
    ],
    "heads:2/50,modulations": ["attention with fewer heads", "modulations in low rank"],
    "modulations": ["modulations in low rank"],
    "0-1,ffn:2,modulations": ["students that end in an affine map", "linear FFNs", "modulations in low rank"],
    "text:1-3,ffn:2/50,4-5,modulations": [
        "text runs",
        "FFNs with fewer hidden units",
        "modulations in low rank",
    ],
}


def exported(teacher, files, plan, folder, most=1 << 40):
    """The transformer's folder, written as exports are."""
    blocks = VariantBlocks(teacher, VariantSwitcher(teacher, files).plan_files(Plan.parse(plan)))
    weights = WeightPlan.of(blocks, torch.float32, "diffusion_pytorch_model.safetensors", most=most)
    weights.check(blocks.empty_model().state_dict())
    with destination(Location.of(folder), last="config.json") as to:
        write_weights(blocks, weights, torch.float32, to, lambda done, total: None)
    return blocks, weights


@torch.no_grad()
def velocity(model):
    model = tiny.aligned(model.eval())
    return model(**tiny.inputs(model), return_dict=False)[0]


@pytest.mark.parametrize("plan", [*STOCK, *SHAPED])
def test_an_exported_variant_gives_the_same_bits(every_kind, plan, tmp_path):
    teacher, files = every_kind
    obstacles = (STOCK | SHAPED)[plan]
    # SD3's last block drops the text.
    last = teacher.adapter.block_ranges(teacher.empty_transformer())[0][-1]
    stock, plan = plan in STOCK, plan.format(last=last)
    blocks, _ = exported(teacher, files, plan, tmp_path / "out")
    assert sorted(blocks.obstacles()) == sorted(obstacles)
    model = blocks.empty_model()
    assert type(model).__name__ == blocks.class_name
    assert (type(model) is getattr(diffusers, teacher.adapter.transformer)) == stock
    state = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    model.load_state_dict(state, strict=True, assign=True)

    inside = teacher.transformer()
    switch = VariantSwitcher(teacher, files)
    tiny.aligned(inside)
    with torch.no_grad():
        switch(inside, Plan.parse(plan))
        for block in teacher.adapter.blocks(inside):
            tiny.aligned(block)
        expected = inside(**tiny.inputs(inside), return_dict=False)[0]
    made = velocity(model)
    if "modulations" in plan or ("4-5" in plan and teacher.adapter.transformer.startswith("SD3")):
        # Products are computed of weights that lie elsewhere in memory; and the student's text output, which nothing
        # reads, is not computed: both round otherwise.
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(made, expected)


def test_gradient_checkpointing_gives_the_arguments_by_position(every_kind, tmp_path):
    teacher, files = every_kind
    blocks, _ = exported(teacher, files, "0-1,ffn:2", tmp_path / "out")
    model = blocks.empty_model()
    model.load_state_dict(load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"), assign=True)
    expected = velocity(model)
    model.requires_grad_(True).train().enable_gradient_checkpointing()
    made = model(**tiny.inputs(model), return_dict=False)[0]
    torch.testing.assert_close(made, expected)
    made.square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".affine." in name)


def test_shards_hold_every_tensor_once_and_none_is_too_large(every_kind, tmp_path):
    teacher, files = every_kind
    _, whole = exported(teacher, files, "0-1", tmp_path / "one")
    _, weights = exported(teacher, files, "0-1", tmp_path / "many", most=100_000)
    assert len(weights.files) > 2
    count = len(weights.files)
    assert list(weights.files)[0] == f"diffusion_pytorch_model-00001-of-{count:05d}.safetensors"
    joined = {}
    for name in weights.files:
        assert (tmp_path / "many" / name).stat().st_size < 120_000
        state = load_file(tmp_path / "many" / name)
        assert not joined.keys() & state.keys()
        joined |= state
    expected = load_file(tmp_path / "one" / "diffusion_pytorch_model.safetensors")
    assert joined.keys() == expected.keys()
    assert all(torch.equal(joined[name], tensor) for name, tensor in expected.items())
    assert weights.bytes == whole.bytes == sum(t.numel() * 4 for t in expected.values())


def test_more_blocks_need_no_more_memory(tmp_path):
    """The most bytes of tensors alive while weights are written; tables of positions are a part of them."""
    peaks, sizes = [], []
    for blocks in (6, 24):
        teacher = Teacher(tiny.qwen_pipeline(tmp_path / str(blocks), blocks=blocks))
        with PeakMemory() as memory:
            _, weights = exported(teacher, {}, "", tmp_path / f"out-{blocks}")
        peaks.append(memory.peak)
        sizes.append(weights.bytes)
    block = (sizes[1] - sizes[0]) / 18
    assert peaks[1] - peaks[0] < block, (peaks, block)


def test_every_weight_and_every_replacement_is_read_once(every_kind, tmp_path, monkeypatch):
    teacher, files = every_kind
    read, tensors = [], Teacher._tensors
    monkeypatch.setattr(
        Teacher,
        "_tensors",
        lambda self, wanted: ((read.append(name), (name, t))[1] for name, t in tensors(self, wanted)),
    )
    loaded, load = [], variant_blocks.load_replacement
    monkeypatch.setattr(
        variant_blocks, "load_replacement", lambda path, *more: loaded.append(path) or load(path, *more)
    )
    exported(teacher, files, "text:1-3,ffn:2/50,4-5,modulations", tmp_path / "out")
    assert read and len(set(read)) == len(read)
    assert len(set(loaded)) == len(loaded) == 4


def test_the_module_needs_torch_and_diffusers_alone(tmp_path):
    """In a process that cannot import ppcl, from a copy under its exported name."""
    copy = tmp_path / "ppcl_transformer.py"
    copy.write_text(Path(pruned_transformer.__file__).read_text())
    code = """
import sys
sys.path[:] = [p for p in sys.path if p]
sys.modules.update(ppcl=None, jobs=None, serve=None)
sys.path.insert(0, sys.argv[1])
import ppcl_transformer
print(ppcl_transformer.PrunedQwenImageTransformer2DModel.__mro__[1].__name__)
try:
    ppcl_transformer.PrunedNothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "QwenImageTransformer2DModel",
        "module 'ppcl_transformer' has no attribute 'PrunedNothing'",
    ], done.stderr
