"""Single files in the layout of the original releases, read back by diffusers' own converters."""

import inspect

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file

from ppcl.errors import UserError
from ppcl.export import export_file, export_folder
from ppcl.export.original_keys import original_tensors
from ppcl.result import Result
from tests.ppcl.export.replacements import MAKERS, WIDTH, result

PLANS = {"shaped": "0-1", "stock": "2-3,4-5"}


@pytest.fixture(scope="module", params=MAKERS)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return Result(result(folder / "job", MAKERS[request.param](folder / "teacher"), PLANS))


def _flux_converter():
    """diffusers' own, which knows FLUX.1's width alone, for the tiny model's."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    space = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {WIDTH}"), space)
    return space["convert_flux_transformer_checkpoint_to_diffusers"]


CONVERTERS = {
    "QwenImageTransformer2DModel": lambda: dict,
    "FluxTransformer2DModel": _flux_converter,
    "SD3Transformer2DModel": lambda: single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
}


def test_diffusers_converters_give_the_folder_back(made, tmp_path):
    export_file(made, "stock", tmp_path / "m.safetensors", torch.float32)
    export_folder(made, "stock", tmp_path / "folder", torch.float32, transformer_only=True)
    expected = load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    original = load_file(tmp_path / "m.safetensors")
    name = made.teacher.adapter.transformer
    if name != "QwenImageTransformer2DModel":
        assert not original.keys() & {n for n in expected if n.startswith("transformer_blocks")}
    converted = CONVERTERS[name]()(dict(original))
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[n], tensor) for n, tensor in expected.items())


def test_from_single_file_reads_it(made, tmp_path, monkeypatch):
    if made.teacher.adapter.transformer == "FluxTransformer2DModel":
        entry = diffusers.loaders.single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
        monkeypatch.setitem(entry, "checkpoint_mapping_fn", _flux_converter())
    export_file(made, "stock", tmp_path / "m.safetensors", torch.float32)
    export_folder(made, "stock", tmp_path / "folder", torch.float32, transformer_only=True)
    model_class = getattr(diffusers, made.teacher.adapter.transformer)
    read = model_class.from_single_file(str(tmp_path / "m.safetensors"), config=str(tmp_path / "folder")).state_dict()
    expected = load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[n], tensor) for n, tensor in expected.items())


def test_a_plan_that_is_not_stock_names_what_stands_in_the_way_and_another_variant(made, tmp_path):
    with pytest.raises(UserError) as raised:
        export_file(made, "shaped", tmp_path / "m.safetensors")
    assert str(raised.value) == (
        "shaped holds students that end in an affine map, which the layout of the original release cannot hold; of "
        "this result stock would do, or use --format diffusers"
    )
    with pytest.raises(UserError, match="custom holds text runs and modulations in low rank"):
        export_file(made, "text:1-3,modulations", tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"a single file ends in \.safetensors; .*/m does not"):
        export_file(made, "stock", tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_one_new_file_beside_others_and_never_over_one(made, tmp_path):
    (tmp_path / "other.txt").write_text("")
    export_file(made, "stock", tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"m\.safetensors exists already"):
        export_file(made, "stock", tmp_path / "m.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"other.txt", "m.safetensors"}


def test_into_a_bucket_beside_other_files(made, s3, store, tmp_path):
    store.write("out/other", b"1")
    export_file(made, "stock", f"{store.url}/out/m.safetensors", torch.float32)
    export_file(made, "stock", tmp_path / "m.safetensors", torch.float32)
    assert store.read("out/m.safetensors") == (tmp_path / "m.safetensors").read_bytes()
    with pytest.raises(UserError, match=f"{store.url}/out exists already: it holds m.safetensors"):
        export_file(made, "stock", f"{store.url}/out/m.safetensors")
    assert set(store.objects("out/")) == {"out/other", "out/m.safetensors"}


def test_a_family_without_a_known_layout_is_told():
    with pytest.raises(UserError, match="the original layout of NewTransformer is not known; it is of Flux"):
        original_tensors("NewTransformer", None, 0, False, {})
