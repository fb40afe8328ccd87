import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppcl.errors import UserError
from ppcl.models import IdentityBlock, adapter_of
from ppcl.models.teacher import Teacher
from tests import tiny

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny.qwen_pipeline(tmp_path_factory.mktemp("teacher") / "pipeline")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "pipeline")


@torch.no_grad()
def test_the_transformer_read_by_tensors_is_the_stock_one_bitwise(folder):
    teacher = Teacher(folder)
    stock, own = teacher.pipeline().transformer, teacher.transformer()
    inputs = tiny.inputs(own)
    assert torch.equal(own(**inputs).sample, stock(**inputs).sample)


def test_no_parameter_of_a_loaded_transformer_requires_a_gradient(folder):
    """Else folded modulations would be taken for parts in training, and be no faster and no smaller."""
    teacher = Teacher(folder)
    for model in (teacher.transformer(), teacher.pipeline().transformer):
        assert not any(p.requires_grad for p in model.parameters())


def test_a_part_holds_its_own_blocks_only(folder):
    teacher = Teacher(folder)
    whole, part = teacher.transformer(), teacher.transformer(keep=[2, 3])
    blocks = adapter_of(part).blocks(part)
    assert [i for i, block in enumerate(blocks) if not isinstance(block, IdentityBlock)] == [2, 3]
    size = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    one = size(adapter_of(whole).blocks(whole)[0])
    assert size(part) == size(whole) - 4 * one
    assert not any(p.is_meta for p in part.parameters())


def test_nan_weights_are_refused_by_name(folder):
    weights = load_file(folder / WEIGHTS)
    weights["transformer_blocks.1.attn.to_q.weight"][0, 0] = float("nan")
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(UserError, match="transformer_blocks.1.attn.to_q.weight.*NaN"):
        Teacher(folder).transformer()


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a diffusers pipeline folder: model_index.json is missing"):
        Teacher(tmp_path)


def test_an_unsupported_transformer_is_named(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"][1] = "PixArtTransformer2DModel"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="PixArtTransformer2DModel is not supported; the nearest supported one is"):
        Teacher(folder)


def test_code_from_the_model_folder_is_refused(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["my_vae", "MyVae"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="takes vae from 'my_vae'"):
        Teacher(folder)


def test_pickles_are_refused(folder):
    torch.save({}, folder / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="is a pickle"):
        Teacher(folder)


def test_truncated_weights_are_refused(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        Teacher(folder).transformer()


def test_the_other_parts_are_hashed_file_by_file(folder):
    teacher = Teacher(folder)
    before, transformer = teacher.part_hashes(), teacher.sha256()
    assert {name.split("/")[0] for name in before} == {"scheduler", "text_encoder", "tokenizer", "vae"}
    path = folder / "text_encoder" / "config.json"
    path.write_text(path.read_text() + "\n")
    after = Teacher(folder).part_hashes()
    assert {name for name in before if before[name] != after[name]} == {"text_encoder/config.json"}
    assert Teacher(folder).sha256() == transformer


@pytest.mark.parametrize("name", [WEIGHTS, "vae/diffusion_pytorch_model.safetensors"])
def test_git_lfs_pointers_in_place_of_weights_are_refused(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer in place of the weights; run git lfs pull"):
        Teacher(folder)


@pytest.mark.parametrize(
    ("part", "stem"),
    [("transformer", "diffusion_pytorch_model"), ("text_encoder", "model"), ("vae", "diffusion_pytorch_model")],
)
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_shard_that_the_index_names_and_that_is_missing_is_refused(folder, part, stem, variant):
    (folder / part / f"{stem}.safetensors").unlink()
    index = folder / part / f"{stem}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(UserError, match=f"{part}/model-00001-of-00002.safetensors is missing, which {part}/{stem}"):
        Teacher(folder)


def test_a_component_without_weights_is_refused(folder):
    for path in (folder / "text_encoder").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="text_encoder holds no model.safetensors; get a complete copy"):
        Teacher(folder)
