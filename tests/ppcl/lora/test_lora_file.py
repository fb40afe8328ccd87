"""What is no LoRA of this teacher is refused in one sentence."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppcl.errors import UserError
from ppcl.lora import read_lora
from ppcl.models.teacher import Teacher
from tests import tiny
from tests.ppcl.export.replacements import MAKERS
from tests.ppcl.lora.loras import changed, written


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return Teacher(teacher_folder)


@pytest.fixture(scope="module")
def good(teacher, tmp_path_factory):
    return written("qwen", teacher, tmp_path_factory.mktemp("lora"))


def test_alpha_is_part_of_the_strength(teacher, good):
    layers = read_lora(good, teacher).layers
    assert {layer.scale for layer in layers.values()} == {2.0}
    assert all(layer.down.shape[0] == layer.up.shape[1] == 4 for layer in layers.values())


def test_kohyas_layout_is_converted(tmp_path):
    """As kohya's scripts write it for FLUX.1: other names, the alpha as a tensor, and one matrix for q, k and v."""
    teacher = Teacher(MAKERS["flux"](tmp_path / "teacher"))
    width, generator = 32, torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    name = "lora_unet_double_blocks_1_img_attn_qkv"
    down, up = random(4, width), random(3 * width, 4)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "kohya.safetensors")
    layers = read_lora(tmp_path / "kohya.safetensors", teacher).layers
    assert set(layers) == {f"transformer_blocks.1.attn.to_{x}" for x in "qkv"}
    for part, x in zip((0.5 * up @ down).chunk(3), "qkv", strict=True):
        layer = layers[f"transformer_blocks.1.attn.to_{x}"]
        torch.testing.assert_close(layer.scale * layer.up @ layer.down, part)


def test_kohyas_layout_is_converted_for_qwen_image(teacher, tmp_path):
    """All dots of a layer's name are underscores there."""
    generator = torch.Generator().manual_seed(0)
    names = {"attn_to_q": "attn.to_q", "attn_to_add_out": "attn.to_add_out", "img_mlp_net_2": "img_mlp.net.2"}
    transformer, tensors, expected = teacher.empty_transformer(), {}, {}
    for number, (flat, name) in enumerate(names.items()):
        place = f"transformer_blocks.{number}.{name}"
        linear = transformer.get_submodule(place)
        down = torch.randn(4, linear.in_features, generator=generator)
        up = torch.randn(linear.out_features, 4, generator=generator)
        key = f"lora_unet_transformer_blocks_{number}_{flat}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
        expected[place] = 0.5 * up @ down
    save_file(tensors, tmp_path / "kohya.safetensors")
    layers = read_lora(tmp_path / "kohya.safetensors", teacher).layers
    assert set(layers) == set(expected)
    for place, update in expected.items():
        torch.testing.assert_close(layers[place].scale * layers[place].up @ layers[place].down, update)


def nan(state):
    return {name: torch.full_like(t, torch.nan) if i == 0 else t for i, (name, t) in enumerate(state.items())}


def wider(state):
    return {name: torch.cat([t, t], 1) if "lora_A" in name else t for name, t in state.items()}


def half_missing(state):
    return {name: t for i, (name, t) in enumerate(state.items()) if i}


def of_text(state):
    return state | {"text_encoder.layers.0.q_proj.lora_A.weight": torch.ones(4, 8)}


def dora(state):
    return state | {"transformer.transformer_blocks.0.attn.to_q.dora_scale": torch.ones(4)}


def foreign(state):
    return {name.replace("transformer_blocks", "layers"): t for name, t in state.items() if "proj_out" not in name}


def nothing(state):
    return {"weight": torch.ones(2)}


MISTAKES = {
    nan: "has NaN or infinite values in",
    wider: "is not one of a Qwen-Image of this size .*size mismatch",
    half_missing: "lacks the tensor",
    of_text: "changes the text encoder too, with text_encoder.layers.0.q_proj.lora_A.weight; only LoRAs of the",
    dora: "only plain LoRAs are supported, no DoRA, LoKr or LoHa",
    foreign: "changes what a Qwen-Image of this size does not have, such as layers.0.",
    nothing: "changes what a Qwen-Image of this size does not have, such as weight;",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_a_mistake_is_one_sentence(teacher, good, tmp_path, change, capsys):
    path = changed(good, tmp_path / "bad.safetensors", change)
    with pytest.raises(UserError, match=MISTAKES[change]) as raised:
        read_lora(path, teacher)
    assert str(raised.value).startswith(f"the LoRA {path} ") and "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_one_of_another_family_or_another_width(teacher, tmp_path):
    flux = Teacher(MAKERS["flux"](tmp_path / "flux"))
    with pytest.raises(
        UserError, match=r"changes what a Qwen-Image of this size does not have, such as (single_)?transformer_blocks.0"
    ):
        read_lora(written("flux", flux, tmp_path / "lora"), teacher)
    shallow = Teacher(tiny.qwen_pipeline(tmp_path / "shallow", blocks=2))
    longer = written("qwen", teacher, tmp_path / "long")
    assert any("transformer_blocks.5." in name for name in load_file(longer))
    with pytest.raises(UserError, match=r"transformer_blocks\.2"):
        read_lora(longer, shallow)


def test_files_that_are_none(teacher, tmp_path):
    with pytest.raises(UserError, match=r"is no \.safetensors file; other formats can run code"):
        read_lora(tmp_path / "lora.pt", teacher)
    with pytest.raises(UserError, match=r"missing\.safetensors"):
        read_lora(tmp_path / "missing.safetensors", teacher)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_lora(tmp_path / "cut.safetensors", teacher)
