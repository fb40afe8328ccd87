"""Exported pipelines: loaded by stock diffusers, in a process without ppcl, on disk and in a bucket."""

import errno
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from ppcl.config.location import Location
from ppcl.errors import UserError
from ppcl.export import export_folder
from ppcl.export.destination import destination
from ppcl.export.tensor_writer import TensorFile
from ppcl.models.teacher import Teacher
from ppcl.models.weight_checks import check_weights
from ppcl.replacements import Plan
from ppcl.result import Result
from tests import tiny
from tests.ppcl.export.replacements import MAKERS, result

PLANS = {"stock": "2-3", "shaped": "0-1,ffn:2,modulations"}
PROMPT = "a red circle"
# Runs an exported folder where ppcl cannot be imported, and keeps the image as numbers.
_FOREIGN = """
import sys
sys.modules.update(ppcl=None, jobs=None, serve=None)
folder, to, shaped = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
import numpy, torch
from diffusers import DiffusionPipeline
if shaped:
    sys.path.insert(0, folder)
    import ppcl_transformer
pipeline = DiffusionPipeline.from_pretrained(folder)
for part in pipeline.components.values():
    for tensor in (*part.parameters(), *part.buffers()) if isinstance(part, torch.nn.Module) else ():
        tensor.data = tensor.data.clone()
image = pipeline(sys.argv[4], num_inference_steps=2, height=16, width=16, output_type="np",
                 generator=torch.Generator().manual_seed(1)).images[0]
numpy.save(to, image)
print(type(pipeline.transformer).__module__.split(".")[0], type(pipeline.transformer).__name__)
"""


@pytest.fixture(scope="module", params=MAKERS)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    teacher = MAKERS[request.param](folder / "teacher")
    (teacher / "README.md").write_text("---\nlicense: apache-2.0\nother: 1\n---\n# A teacher\n")
    (teacher / "LICENSE.md").write_text("Do as you like.\n")
    return Result(result(folder / "job", teacher, PLANS))


@pytest.mark.parametrize("name", PLANS)
def test_the_same_image_where_ppcl_is_not_installed(made, name, tmp_path):
    facts = export_folder(made, name, tmp_path / "out", torch.float32)
    shaped = name == "shaped"
    command = [sys.executable, "-c", _FOREIGN, str(tmp_path / "out"), str(tmp_path / "i.npy"), str(shaped), PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stock = made.teacher.adapter.transformer
    assert done.stdout.split() == (["ppcl_transformer", f"Pruned{stock}"] if shaped else ["diffusers", stock])
    assert bool(facts.obstacles) == shaped == (tmp_path / "out" / "ppcl_transformer.py").exists()

    pipeline = tiny.aligned(made.pipeline(name))
    for block in made.teacher.adapter.blocks(pipeline.transformer):
        tiny.aligned(block)
    expected = pipeline(
        PROMPT, num_inference_steps=2, height=16, width=16, output_type="np", generator=torch.Generator().manual_seed(1)
    ).images[0]
    image = np.load(tmp_path / "i.npy")
    assert np.ptp(expected) > 0.01
    if shaped:
        np.testing.assert_allclose(image, expected, atol=1e-5)
    else:
        assert (image == expected).all()


@torch.no_grad()
def test_an_export_of_stock_blocks_is_a_teacher_and_any_other_is_refused_as_one(made, tmp_path):
    export_folder(made, "stock", tmp_path / "stock", torch.float32)
    teacher = Teacher(tmp_path / "stock")
    check_weights(teacher.files)
    smaller, stock = teacher.transformer(), made.pipeline("stock").transformer
    assert len(teacher.adapter.blocks(smaller)) < len(made.teacher.adapter.blocks(stock))
    inputs = tiny.inputs(stock)
    torch.testing.assert_close(smaller(**inputs).sample, stock(**inputs).sample)
    assert teacher.part_hashes() == made.teacher.part_hashes()
    export_folder(made, "shaped", tmp_path / "shaped", torch.float32)
    with pytest.raises(UserError, match="is an export whose blocks are not all stock blocks, .*; export a plan of"):
        Teacher(tmp_path / "shaped")
    export_folder(made, "stock", tmp_path / "alone", torch.float32, transformer_only=True)
    with pytest.raises(UserError, match="is not a diffusers pipeline folder: model_index.json is missing; point to a"):
        Teacher(tmp_path / "alone")


def test_an_export_of_a_teacher_with_a_variants_names_has_plain_ones(made, tmp_path):
    DiffusionPipeline.from_pretrained(made.teacher.folder).save_pretrained(tmp_path / "fp16", variant="fp16")
    for name in ("README.md", "transformer/config.json"):
        shutil.copyfile(made.teacher.folder / name, tmp_path / "fp16" / name)
    renamed = Result(made.artifacts.root, teacher=tmp_path / "fp16")
    export_folder(renamed, "stock", tmp_path / "out", torch.float32)
    assert not list((tmp_path / "out").rglob("*fp16*"))
    check_weights(Teacher(tmp_path / "out").files)


def test_the_card_and_the_record_say_what_the_model_is(made, tmp_path):
    export_folder(made, "shaped", tmp_path / "out")
    card, record = (
        (tmp_path / "out" / "README.md").read_text(),
        json.loads((tmp_path / "out" / "ppcl.json").read_text()),
    )
    assert card.startswith("---\nlibrary_name: diffusers\n") and "license: apache-2.0\n---" in card
    assert str(made.teacher.folder.parent) not in card and made.teacher.sha256() in card
    assert "import ppcl_transformer" in card and "torch.bfloat16" in card
    assert "| 0 | 0-1 | an affine map behind it |" in card
    assert record["plan"] == str(Plan.parse(PLANS["shaped"])) and record["blocks"][0]["teacher"] == "0-1"
    assert record["parameters"] == made.variants["shaped"].parameters
    assert (tmp_path / "out" / "LICENSE.md").read_text() == "Do as you like.\n"
    state = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert state["_class_name"].startswith("Pruned") and state["pruned"]["lists"]


def test_the_number_of_parameters_is_that_of_the_file(made, tmp_path):
    for name in [*PLANS, "4-5"]:
        to = tmp_path / name
        facts = export_folder(made, name, to, torch.float32, transformer_only=True)
        state = load_file(to / "diffusion_pytorch_model.safetensors")
        # A table of positions is no parameter.
        assert facts.parameters == sum(t.numel() for n, t in state.items() if n != "pos_embed.pos_embed")
        expected = made.variant(name).parameters
        # Where SD3's last block makes no text, a student there has no use for the half that would.
        ends = name == "4-5" and made.teacher.adapter.transformer.startswith("SD3")
        assert facts.parameters < expected if ends else facts.parameters == expected


def test_the_transformer_alone(made, tmp_path):
    export_folder(made, "stock", tmp_path / "out", torch.float32, transformer_only=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "LICENSE.md", "config.json", "diffusion_pytorch_model.safetensors", "ppcl.json"}
    import diffusers

    model = getattr(diffusers, made.teacher.adapter.transformer).from_pretrained(tmp_path / "out")
    assert len(made.teacher.adapter.blocks(model)) == made.variants["stock"].blocks


def test_an_export_of_stock_blocks_is_a_teacher(made, tmp_path):
    export_folder(made, "stock", tmp_path / "out")
    teacher = Teacher(tmp_path / "out")
    assert teacher.adapter == made.teacher.adapter
    model = teacher.transformer(dtype=torch.bfloat16)
    assert len(teacher.adapter.blocks(model)) == made.variants["stock"].blocks


def test_an_export_of_other_blocks_says_that_it_is_no_teacher(made, tmp_path):
    export_folder(made, "shaped", tmp_path / "out")
    with pytest.raises(
        UserError, match="is an export whose blocks are not all stock blocks, which cannot be compressed"
    ):
        Teacher(tmp_path / "out")


def test_what_is_there_already_stays(made, tmp_path):
    (tmp_path / "out").mkdir()
    export_folder(made, "stock", tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    with pytest.raises(UserError, match=f"{tmp_path}/out exists already; give --to another place, or remove it"):
        export_folder(made, "stock", tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


def test_a_disk_that_fills_up_leaves_nothing(made, tmp_path, monkeypatch):
    def full(self, name, tensor):
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

    monkeypatch.setattr(TensorFile, "write", full)
    with pytest.raises(OSError, match="No space left"):
        export_folder(made, "stock", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(OSError, match="No space left"):
        export_folder(made, "stock", tmp_path / "mine" / "new" / "deeper" / "out")
    # The folders above it that were made for it go, too, and those that were there stay.
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_a_folder_that_somebody_else_put_something_in_stays(tmp_path):
    to = Location.of(tmp_path / "new" / "out")
    with pytest.raises(RuntimeError, match="failed"), destination(to, "model.safetensors"):
        (tmp_path / "new" / "other").write_text("content")
        raise RuntimeError("failed")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["other"]


def test_a_single_file_that_fails_leaves_no_folder(tmp_path):
    to = Location.of(tmp_path / "new" / "out")
    with pytest.raises(FileNotFoundError), destination(to, "model.safetensors", single=True):
        pass  # the file is never made, so it cannot be put in its place
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_told_before_anything_is_written(made, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 5))
    with pytest.raises(UserError, match=r"the export needs \S+ GB and .* has 5e-09 GB free; free space or choose"):
        export_folder(made, "stock", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_damaged_replacement_is_told_and_leaves_nothing(made, tmp_path):
    copied = tmp_path / "job"
    shutil.copytree(made.artifacts.root, copied)
    opened = Result(copied)
    path = copied / "students" / "02-03.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        export_folder(opened, "stock", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"job"}


def test_from_and_to_a_bucket(made, s3, store, tmp_path):
    teacher = Teacher(made.teacher.folder)
    for path in sorted(teacher.folder.rglob("*")):
        if path.is_file():
            store.upload(path, f"teacher/{path.relative_to(teacher.folder)}")
    opened = Result(made.artifacts.root, teacher=f"{store.url}/teacher")
    export_folder(opened, "stock", f"{store.url}/out", torch.float32)
    export_folder(made, "stock", tmp_path / "out", torch.float32)
    names = {name.removeprefix("out/") for name in store.objects("out/")}
    here = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert names == here
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert store.read(f"out/{weights}") == (tmp_path / "out" / weights).read_bytes()
    with pytest.raises(UserError, match=f"{store.url}/out exists already: it holds"):
        export_folder(opened, "stock", f"{store.url}/out")
    assert {name.removeprefix("out/") for name in store.objects("out/")} == here


def test_an_upload_that_fails_leaves_nothing_in_the_bucket(made, s3, store):
    from tests.bucket import error

    with (
        s3.failing(error(403, "AccessDenied"), lambda r: r.method == "PUT" and "model_index" in r.path),
        pytest.raises(UserError),
    ):
        export_folder(made, "stock", f"{store.url}/out")
    assert not store.objects("out/")
