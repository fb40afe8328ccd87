"""Folders of pipelines as people have them: each is the same teacher, or is refused in one sentence."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from ppcl.errors import UserError
from ppcl.models.teacher import Teacher
from ppcl.models.weight_checks import check_weights
from tests import tiny
from tests.teacher_folders import as_hub_cache, set_index, upload_all

MAKERS = {"Qwen-Image": tiny.qwen_pipeline, "FLUX.1": tiny.flux_pipeline, "SD3": tiny.sd3_pipeline}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return {family: make(folder / family) for family, make in MAKERS.items()}


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals["Qwen-Image"], tmp_path / "pipeline")


def weights_of(pipeline):
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def assert_same(pipeline, stock):
    ours, theirs = weights_of(pipeline), weights_of(stock)
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_same_teacher(teacher, stock):
    """What is loaded, whole and in parts, is the stock pipeline `stock`."""
    check_weights(teacher.files)
    assert_same(teacher.pipeline(), stock)
    transformer = teacher.transformer().state_dict()
    assert all(torch.equal(transformer[name], value) for name, value in stock.transformer.state_dict().items())
    parts = teacher.pipeline_without_transformer()
    assert parts.transformer is None
    stock.transformer = None
    assert_same(parts, stock)


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("shard_size", ["10GB", "20KB"])
def test_weights_with_a_variants_name_are_those_of_the_stock_pipeline(originals, tmp_path, family, shard_size):
    pipeline = DiffusionPipeline.from_pretrained(originals[family])
    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size=shard_size)
    assert not (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").exists()
    stock = DiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
    assert_same_teacher(Teacher(tmp_path), stock)


@pytest.mark.parametrize("family", MAKERS)
def test_sharded_weights_are_the_single_ones(originals, tmp_path, family):
    DiffusionPipeline.from_pretrained(originals[family]).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*/*.index.json"))) >= 1
    assert_same_teacher(Teacher(tmp_path), DiffusionPipeline.from_pretrained(originals[family]))


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_one_component_alone_may_have_a_variant(folder, originals, part):
    for path in (folder / part).glob("*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.bf16.safetensors"))
    assert_same_teacher(Teacher(folder), DiffusionPipeline.from_pretrained(originals["Qwen-Image"]))
    assert Teacher(folder).part_hashes() == Teacher(originals["Qwen-Image"]).part_hashes()


def test_plain_names_come_before_those_of_a_variant(folder, originals):
    for path in folder.glob("*/*.safetensors"):
        halved = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(halved, path.with_name(f"{path.stem}.fp16.safetensors"), {"format": "pt"})
    teacher = Teacher(folder)
    assert_same_teacher(teacher, DiffusionPipeline.from_pretrained(originals["Qwen-Image"]))
    assert not [name for name in teacher.part_hashes() if "fp16" in name]


def test_components_of_different_variants_are_refused(folder):
    for part, variant in (("transformer", "fp16"), ("text_encoder", "bf16")):
        for path in (folder / part).glob("*.safetensors"):
            path.rename(path.with_name(f"{path.stem}.{variant}.safetensors"))
    with pytest.raises(UserError, match="different variants .*transformer: fp16.*; save it in one"):
        Teacher(folder)


def test_files_that_are_links_are_the_teacher_and_are_hashed_by_what_they_lead_to(folder, tmp_path):
    snapshot = as_hub_cache(folder, tmp_path / "models--a--b")
    linked, plain = Teacher(snapshot), Teacher(folder)
    assert linked.sha256() == plain.sha256() and linked.part_hashes() == plain.part_hashes()
    assert_same_teacher(linked, DiffusionPipeline.from_pretrained(folder))
    versions, link = linked.versions(), snapshot / "text_encoder" / "model.safetensors"
    other = tmp_path / "other"
    shutil.copyfile(link, other)
    other.write_bytes(other.read_bytes()[:-1] + b"\1")
    link.unlink()
    link.symlink_to(other)
    assert linked.versions() != versions
    changed = Teacher(snapshot).part_hashes()
    assert {n for n, sha256 in changed.items() if plain.part_hashes()[n] != sha256} == {
        "text_encoder/model.safetensors"
    }


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae", ""])
def test_a_folder_that_is_a_link_is_followed(folder, tmp_path, part):
    plain = Teacher(folder)
    sha256, hashes = plain.sha256(), plain.part_hashes()
    moved = tmp_path / "elsewhere"
    shutil.move(folder / part, moved)
    (folder / part if part else tmp_path / "pipeline").symlink_to(moved, target_is_directory=True)
    linked = Teacher(tmp_path / "pipeline")
    assert linked.sha256() == sha256 and linked.part_hashes() == hashes and len(hashes) > 5
    check_weights(linked.files)
    before = linked.versions()
    target = (moved if part else moved / "vae") / "config.json"
    target.write_text(target.read_text() + "\n")
    assert linked.versions() != before


def test_a_folder_that_links_to_itself_is_read_once(folder):
    names = Teacher(folder).files.names()
    (folder / "vae" / "again").symlink_to(folder / "vae", target_is_directory=True)
    assert Teacher(folder).files.names() == names


def test_a_link_to_nothing_is_named(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    path.symlink_to("../../blobs/gone")
    with pytest.raises(UserError, match="vae/diffusion_pytorch_model.safetensors is a link to ../../blobs/gone, which"):
        Teacher(folder)


def test_the_hubs_folder_above_its_snapshots_is_told_where_they_are(folder, tmp_path):
    snapshot = as_hub_cache(folder, tmp_path / "models--a--b")
    with pytest.raises(UserError, match=f"is a folder of the hub's cache; point to {snapshot}"):
        Teacher(tmp_path / "models--a--b")


def test_what_lies_beside_the_components_is_no_part_of_the_teacher(folder):
    plain = Teacher(folder)
    versions = plain.versions()
    for name in ("flux1-dev.safetensors", "v1.ckpt", "onnx/model.onnx", ".git/lfs/objects/x.bin", "flux1-dev-Q4.gguf"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no weights")
    (folder / "text_encoder" / "flax_model.msgpack").write_bytes(b"none")
    again = Teacher(folder)
    assert again.sha256() == plain.sha256() and again.part_hashes() == plain.part_hashes()
    assert {n: v for n, v in again.versions().items() if "flax" not in n} == versions
    check_weights(again.files)


def test_of_a_bucket_only_what_is_loaded_is_read(folder, store, s3):
    for name in ("flux1-dev.safetensors", "v1.ckpt", "text_encoder/model.fp16.safetensors", "other/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no weights")
    upload_all(folder, store)
    s3.requests.clear()
    teacher = Teacher(store.url)
    check_weights(teacher.files)
    sent = sum(r.sent for r in s3.requests if r.method == "GET" and r.path.endswith(".safetensors"))
    size = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    headers = sum(int.from_bytes(p.read_bytes()[:8], "little") for p in folder.glob("*/*model.safetensors"))
    assert sent < 4 * headers < size
    teacher.with_weights()
    asked = {r.path.split("/", 3)[-1] for r in s3.requests if r.method == "GET"}
    assert not [name for name in asked if name.endswith((".ckpt", "flux1-dev.safetensors", "fp16.safetensors"))]
    assert not [name for name in asked if "other/" in name]
    assert_same(teacher.pipeline(), DiffusionPipeline.from_pretrained(folder))


def test_a_variant_in_a_bucket_is_that_of_the_folder(originals, tmp_path, store):
    DiffusionPipeline.from_pretrained(originals["SD3"]).save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    upload_all(tmp_path, store)
    remote, local = Teacher(store.url), Teacher(tmp_path)
    assert remote.sha256() == local.sha256() and remote.part_hashes() == local.part_hashes()
    assert_same_teacher(remote, DiffusionPipeline.from_pretrained(tmp_path, variant="fp16"))
    assert_same(remote.pipeline(transformer_only=True), local.pipeline(transformer_only=True))


def test_tokenizers_of_either_form_encode_alike(originals, tmp_path):
    """`save_pretrained` of this version writes tokenizer.json alone, older ones vocab.json and merges.txt."""
    folder = shutil.copytree(originals["SD3"], tmp_path / "pipeline")
    fast = Teacher(folder).pipeline_without_transformer()
    for part in ("tokenizer", "tokenizer_2"):
        content = json.loads((folder / part / "tokenizer.json").read_text())["model"]
        (folder / part / "vocab.json").write_text(json.dumps(content["vocab"]))
        (folder / part / "merges.txt").write_text("#version: 0.2\n")
        (folder / part / "tokenizer.json").unlink()
    check_weights(Teacher(folder).files)
    slow = Teacher(folder).pipeline_without_transformer()
    prompts = ["a red cat", "two dogs"]
    for one, two in zip(
        fast.encode_prompt(prompts, None, None, do_classifier_free_guidance=False),
        slow.encode_prompt(prompts, None, None, do_classifier_free_guidance=False),
        strict=True,
    ):
        assert (one is None and two is None) or torch.equal(one, two)
    assert "tokenizer/vocab.json" in Teacher(folder).part_hashes()


@pytest.mark.parametrize(
    "name", ["tokenizer/tokenizer.json", "scheduler/scheduler_config.json", "text_encoder/config.json"]
)
def test_git_lfs_pointers_in_place_of_other_files_are_refused_too(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer in place of the file; run git lfs pull"):
        Teacher(folder)


def test_a_git_lfs_pointer_in_a_bucket_is_refused(folder, store):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(pointer)
    upload_all(folder, store)
    with pytest.raises(UserError, match="vae/diffusion_pytorch_model.safetensors is a Git LFS pointer"):
        Teacher(store.url)


def test_gguf_files_are_refused_as_such(folder, tmp_path):
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").rename(folder / "transformer" / "q4.gguf")
    with pytest.raises(UserError, match=r"transformer/q4.gguf is quantised \(GGUF\); get the weights in bfloat16"):
        Teacher(folder)
    with pytest.raises(UserError, match="flux1-Q4.gguf is a file; point to the folder of a diffusers pipeline"):
        (tmp_path / "flux1-Q4.gguf").write_bytes(b"GGUF")
        Teacher(tmp_path / "flux1-Q4.gguf")


def test_a_pipeline_without_its_optional_components_is_whole(originals, tmp_path):
    folder = shutil.copytree(originals["SD3"], tmp_path / "pipeline")
    set_index(folder, text_encoder_3=[None, None], tokenizer_3=[None, None], image_encoder=[None, None])
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    teacher = Teacher(folder)
    check_weights(teacher.files)
    assert_same_teacher(teacher, DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None))
    assert "text_encoder_3" not in teacher.component_parameters()


@pytest.mark.parametrize("part", ["text_encoder", "vae", "tokenizer"])
def test_a_component_that_is_needed_and_null_is_refused(folder, part):
    set_index(folder, **{part: [None, None]})
    with pytest.raises(UserError, match=rf"model_index.json gives no {part} \(null\), which a QwenImagePipeline needs"):
        Teacher(folder)


def test_a_component_whose_folder_is_missing_is_refused(folder):
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match="tokenizer is missing, which model_index.json names; get a complete copy"):
        Teacher(folder)
