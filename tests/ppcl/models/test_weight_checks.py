"""Weights that do not fit are refused from the headers, before anything runs: file, tensor, value seen, what to do."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppcl.errors import UserError
from ppcl.models.teacher import Teacher
from ppcl.models.weight_checks import check_weights
from tests import tiny
from tests.teacher_folders import upload_all

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny.qwen_pipeline(tmp_path_factory.mktemp("teacher") / "pipeline", blocks=4)


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "pipeline")


def change(path, action):
    tensors = load_file(path)
    action(tensors)
    save_file(tensors, path, {"format": "pt"})


def refusal(folder):
    with pytest.raises(UserError) as refused:
        check_weights(Teacher(folder).files)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("make", [tiny.qwen_pipeline, tiny.flux_pipeline, tiny.sd3_pipeline])
def test_a_stock_pipeline_is_not_refused(make, tmp_path):
    check_weights(Teacher(make(tmp_path)).files)


def test_tensors_of_a_longer_checkpoint_are_refused(folder, tmp_path):
    longer = tiny.qwen_pipeline(tmp_path / "longer", blocks=5)
    shutil.copyfile(longer / TRANSFORMER, folder / TRANSFORMER)
    told = refusal(folder)
    assert f"{TRANSFORMER} holds transformer_blocks.4.attn.add_k_proj.bias, one of" in told
    assert "QwenImageTransformer2DModel of transformer/config.json does not have; get the config.json" in told
    for load in (Teacher(folder).transformer, Teacher(folder).pipeline):
        with pytest.raises(UserError, match="holds transformer_blocks.4.attn.add_k_proj.bias"):
            load()


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (TRANSFORMER, "transformer_blocks.2.attn.to_q.weight"),
        (VAE, "decoder.conv_in.weight"),
        (ENCODER, "model.layers.0.mlp.down_proj.weight"),
    ],
)
def test_missing_tensors_are_refused_by_name(folder, file, name):
    """Transformers would draw them at random, with a warning alone."""
    change(folder / file, lambda tensors: tensors.pop(name))
    told = refusal(folder)
    assert f"{file.split('/')[0]} lacks 1 weights" in told and name.removeprefix("model.") in told


def test_a_transformer_that_lacks_tensors_is_refused_however_it_is_loaded(folder):
    change(folder / TRANSFORMER, lambda tensors: tensors.pop("proj_out.bias"))
    for load in (Teacher(folder).transformer, Teacher(folder).pipeline):
        with pytest.raises(UserError, match="transformer lacks 1 weights, the first being proj_out.bias"):
            load()


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (TRANSFORMER, "transformer_blocks.2.attn.to_q.bias"),
        (VAE, "decoder.conv_in.bias"),
        (ENCODER, "model.layers.0.input_layernorm.weight"),
    ],
)
def test_tensors_of_another_shape_are_refused(folder, file, name):
    def shorten(tensors):
        tensors[name] = tensors[name][:-1].clone()

    before = len(load_file(folder / file)[name])
    change(folder / file, shorten)
    told = refusal(folder)
    assert name.removeprefix("model.") in told
    assert f"has the shape {before - 1}, and the" in told and f"takes {before}; get the config.json" in told


@pytest.mark.parametrize("file", [TRANSFORMER, VAE, ENCODER])
@pytest.mark.parametrize(
    ("dtype", "said"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2"), (torch.int8, "I8")]
)
def test_weights_of_a_quantised_type_are_refused(folder, file, dtype, said):
    name = min(load_file(folder / file))

    def quantise(tensors):
        tensors[name] = tensors[name].to(dtype)

    change(folder / file, quantise)
    told = refusal(folder)
    assert f"{file}: the tensor {name} has the type {said}; give the weights in bfloat16, float16 or float32" in told


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "fp8"])
def test_a_quantised_component_is_refused_when_the_teacher_is_opened(folder, part, method):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(UserError, match=rf"{part}/config.json says .*\(quantization_config: {method}\); give the"):
        Teacher(folder)


@pytest.mark.parametrize("file", [TRANSFORMER, VAE, ENCODER])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_found_in_the_first_ones(folder, file, value):
    name = max(load_file(folder / file))

    def damage(tensors):
        tensors[name].view(-1)[0] = value

    change(folder / file, damage)
    assert f"the weight {name} in {folder}/{file} has NaN or infinite values" in refusal(folder)


def test_an_index_that_names_a_tensor_its_shard_does_not_hold_is_refused(folder):
    names = list(load_file(folder / TRANSFORMER))
    (folder / TRANSFORMER).rename(folder / "transformer/a-00001-of-00001.safetensors")
    weight_map = dict.fromkeys([*names, "transformer_blocks.9.x"], "a-00001-of-00001.safetensors")
    (folder / f"{TRANSFORMER}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "a-00001-of-00001.safetensors has no tensor transformer_blocks.9.x, which the index" in refusal(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', "no JSON"])
def test_an_index_that_is_none_is_refused(folder, content):
    (folder / f"{TRANSFORMER}.index.json").write_text(content)
    with pytest.raises(UserError, match="index.json (is not valid JSON|is no JSON object|names no weights)"):
        Teacher(folder)


def test_a_text_encoder_of_another_class_is_refused(folder):
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({"model_type": "t5", "d_model": 8}))
    told = refusal(folder)
    assert "text_encoder" in told and "Qwen2_5_VLForConditionalGeneration" in told


def test_a_configuration_that_describes_no_model_is_refused(folder):
    path = folder / "vae" / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"dim_mult": "124"}))
    assert "vae/config.json does not describe a AutoencoderKLQwenImage (" in refusal(folder)
    path.unlink()
    with pytest.raises(UserError, match="is not a diffusers pipeline folder: vae/config.json is missing"):
        Teacher(folder)


def test_a_class_that_this_diffusers_does_not_have_is_named(folder):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vae": ["diffusers", "AutoencoderOfTomorrow"]}))
    assert "names AutoencoderOfTomorrow for vae, which diffusers" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it has no header"),
        (b"\xff" * 64, "its header would be"),
        (b"\2\0\0\0\0\0\0\0[]", "its header is no JSON object"),
        (b'\x07\0\0\0\0\0\0\0{"a":1}', "its header does not describe tensors"),
        (b"\2\0\0\0\0\0\0\0{}more", "it has 14 bytes, and its header describes 10"),
    ],
)
def test_a_file_that_is_no_safetensors_is_told_by_its_header(folder, content, said):
    (folder / VAE).write_bytes(content)
    assert f"{VAE} cannot be read as safetensors ({said}" in refusal(folder)


@pytest.mark.parametrize("content", ["{}", "no JSON", '{"version": "1.0", "model": {"type": "none"}}'])
def test_a_damaged_tokenizer_is_refused(folder, content):
    (folder / "tokenizer" / "tokenizer.json").write_text(content)
    assert "tokenizer cannot be loaded as a Qwen2Tokenizer (" in refusal(folder)


def test_a_tokenizer_without_its_vocabulary_is_refused(folder):
    """Transformers would load one without words, to which all prompts are alike."""
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert "tokenizer holds neither tokenizer.json nor vocab.json and merges.txt; get a" in refusal(folder)
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    assert "tokenizer cannot be loaded as a Qwen2Tokenizer" in refusal(folder)


def test_a_pipeline_without_a_class_is_refused(folder):
    path = folder / "model_index.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "_class_name"}))
    with pytest.raises(UserError, match="is a None; supported for QwenImageTransformer2DModel: QwenImagePipeline"):
        Teacher(folder)


def test_a_file_at_which_diffusers_fails_beside_a_variant_is_refused(folder):
    (folder / "vae" / "LICENSE").write_text("Do as you like.")
    check_weights(Teacher(folder).files)
    (folder / TRANSFORMER).rename(folder / "transformer/diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(UserError, match=r"vae/LICENSE has no ending, at which diffusers fails .*\(fp16\); move it out"):
        Teacher(folder)


def test_weights_of_a_bucket_are_refused_from_their_headers_alone(folder, store, s3):
    change(folder / ENCODER, lambda tensors: tensors.pop("model.norm.weight"))
    upload_all(folder, store)
    s3.requests.clear()
    with pytest.raises(UserError, match="s3://.*text_encoder lacks 1 weights of a .*norm.weight; get a complete copy"):
        check_weights(Teacher(store.url).files)
    read = [r for r in s3.requests if r.method == "GET" and r.path.endswith("safetensors")]
    assert read and all(r.range for r in read)
    assert max(r.sent for r in read) < (folder / ENCODER).stat().st_size


def test_an_object_that_was_cut_off_is_refused(folder, store):
    upload_all(folder, store)
    store.write(VAE, (folder / VAE).read_bytes()[:-8])
    with pytest.raises(UserError, match=f"{VAE} cannot be read as safetensors .it has .* bytes, and its header"):
        check_weights(Teacher(store.url).files)
