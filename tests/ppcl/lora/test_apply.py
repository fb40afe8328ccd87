"""LoRAs on variants, against diffusers' own loading on the teacher and against weights that were merged before."""

import pytest
import torch

from ppcl.export import export_folder
from ppcl.lora import AppliedLora, read_lora
from ppcl.models.lora_linear import LoraLinear, update_norm
from ppcl.models.teacher import Teacher
from ppcl.replacements import Plan
from ppcl.replacements.pruned_heads import HeadPaths
from ppcl.replacements.switcher import VariantSwitcher
from ppcl.result import Result
from tests import tiny
from tests.ppcl.export.replacements import MAKERS, result
from tests.ppcl.lora.loras import written

PLANS = {
    "stock": "2-3",
    "all kinds": "text:1-3,ffn:2,4-5",
    "low": "0-1,ffn:2,modulations",
    "narrow": "ffn:2/50",
    "heads": "heads:2/50",
}


@pytest.fixture(scope="module", params=MAKERS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def made(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp(family)
    return Result(result(folder / "job", MAKERS[family](folder / "teacher"), PLANS))


@pytest.fixture(scope="module")
def path(family, made, tmp_path_factory):
    return written(family, made.teacher, tmp_path_factory.mktemp("lora"))


@torch.no_grad()
def velocity(transformer):
    return transformer(**tiny.inputs(transformer), return_dict=False)[0]


def fused(made, path, scale):
    """The teacher with the LoRA in its weights, by diffusers and PEFT."""
    pipeline = made.teacher.pipeline()
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="one")
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    return pipeline.transformer.requires_grad_(False)


def switcher(made):
    return VariantSwitcher(made.teacher, made.replacements)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_on_the_teacher_it_is_what_diffusers_makes_of_it(made, path, scale):
    stock = made.teacher.pipeline()
    plain = velocity(stock.transformer)
    stock.load_lora_weights(path.parent, weight_name=path.name, adapter_name="one")
    stock.set_adapters("one", scale)
    expected = velocity(stock.transformer)
    pipeline = made.pipeline("teacher", lora=(path, scale))
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(velocity(pipeline.transformer), expected, rtol=1e-5, atol=1e-6)
    assert str(made.coverage(pipeline, "teacher", path)) == "all of the LoRA is on"


@pytest.mark.parametrize("plan", PLANS.values())
def test_where_blocks_stay_it_is_the_lora_in_the_teachers_weights(made, path, plan):
    """Replacements hold none of the teacher's weights that a LoRA changes, but for the modulations in low rank."""
    transformer = fused(made, path, 0.7)
    switcher(made)(transformer, Plan.parse(plan))
    expected = velocity(transformer)
    pipeline = made.pipeline(plan, lora=(path, 0.7))
    applied = velocity(pipeline.transformer)
    if "/50" in plan:
        # Which takes its share of the update, as the fused teacher's does not.
        assert not torch.allclose(applied, expected, atol=1e-4)
        return
    torch.testing.assert_close(applied, expected, rtol=1e-4, atol=1e-5)


def test_the_update_of_a_narrow_ffn_is_that_of_the_units_that_stay(made, family, path):
    teacher, adapter = made.teacher.transformer(), made.teacher.adapter
    applied = AppliedLora(read_lora(path, made.teacher))
    switch = switcher(made)
    switch(teacher, Plan.parse("ffn:2/50"), applied)
    where = adapter.parts_of(teacher, 2, switch.blocks(teacher)[2])["img"]
    block = adapter.blocks(teacher)[2]
    up, down = (block.get_submodule(f"{where.ffn}.{name}") for name in (adapter.ffn_up, adapter.ffn_down))
    own = switch.blocks(teacher)[2].get_submodule(f"{where.ffn}.{adapter.ffn_up}").weight
    # By hand: the row of the teacher's map that each row of the narrow one is nearest to in direction.
    rows = [int(torch.cosine_similarity(own, row[None]).argmax()) for row in up.base.weight]
    assert isinstance(up, LoraLinear) and len(set(rows)) > len(rows) // 2
    layers = applied.lora.layers
    updates = {n: layer.scale * layer.up @ layer.down for n, layer in layers.items() if f".{2}." in n or n}
    name = next(n for n in updates if n.endswith(f"2.{where.ffn}.{adapter.ffn_up}"))
    torch.testing.assert_close(up.merged().weight - up.base.weight, updates[name][rows])
    name = name.replace(adapter.ffn_up, adapter.ffn_down)
    torch.testing.assert_close(down.merged().weight - down.base.weight, updates[name][:, rows])
    coverage = switch.coverage(teacher, Plan.parse("ffn:2/50"), applied)
    whole = sum(update.square().sum() for update in updates.values())
    cut = [n for n in updates if n in coverage.cut]
    assert len(cut) == 2 and not coverage.lost
    left = updates[cut[0]].square().sum() + updates[cut[1]].square().sum()
    kept = updates[name.replace(adapter.ffn_down, adapter.ffn_up)][rows].square().sum()
    kept = kept + updates[name][:, rows].square().sum()
    assert coverage.share == pytest.approx(float((whole - left + kept) / whole), rel=1e-5)


def test_the_update_of_fewer_heads_is_that_of_the_heads_that_stay(made, path):
    teacher, adapter = made.teacher.transformer(), made.teacher.adapter
    applied = AppliedLora(read_lora(path, made.teacher))
    switch = switcher(made)
    switch(teacher, Plan.parse("heads:2/50"), applied)
    block, paths = adapter.blocks(teacher)[2], HeadPaths.of(adapter, teacher, 2, switch.blocks(teacher)[2])
    layers = {n.partition(".2.")[2]: layer for n, layer in applied.lora.layers.items() if n.startswith("transformer_b")}
    # The second of two heads stays.
    seconds, width = slice(16, 32), 0
    for path_in_block in paths.all:
        if path_in_block not in layers:
            continue
        one, layer = block.get_submodule(path_in_block), layers[path_in_block]
        update = layer.scale * layer.up @ layer.down
        wanted = update[:, seconds] if path_in_block in paths.out.values() else update[seconds]
        torch.testing.assert_close(one.merged().weight - one.base.weight, wanted)
        width += 1
    coverage = switch.coverage(teacher, Plan.parse("heads:2/50"), applied)
    assert width and len(coverage.cut) == width and not coverage.lost


def test_what_is_left_out_is_told(made, path):
    pipeline = made.pipeline("stock", lora=path)
    coverage = made.coverage(pipeline, "stock", path)
    layers = made.applied_lora(path).lora.layers
    lost = [name for name in layers if ".2." in name[:22] or ".3." in name[:22]]
    lost = [name for name in lost if name.startswith("transformer_blocks.")]
    assert coverage.lost == lost and not coverage.cut
    squares = {name: float((layer.scale * layer.up @ layer.down).square().sum()) for name, layer in layers.items()}
    share = 1 - sum(squares[name] for name in lost) / sum(squares.values())
    assert coverage.share == pytest.approx(share, rel=1e-5)
    assert str(coverage).startswith(
        f"{100 * share:.1f} % of the LoRA is on, by the squared norm of its update; left out: "
    )


def test_switching_between_loras_and_none_gives_the_same_bits_again(made, family, path, tmp_path):
    other = written(family, made.teacher, tmp_path, seed=1)
    pipeline = made.pipeline("teacher")
    choices = [
        ("teacher", None),
        ("low", path),
        ("low", None),
        ("low", (path, 0.5)),
        ("teacher", other),
        ("low", other),
    ]
    seen = {}
    for variant, lora in [*choices, *reversed(choices), *choices]:
        made.switch(pipeline, variant, lora)
        key = variant, str(lora)
        now = velocity(pipeline.transformer)
        assert torch.equal(seen.setdefault(key, now), now), key
    assert len({v.numpy().tobytes() for v in seen.values()}) == len(choices)


@pytest.mark.parametrize("name", PLANS)
def test_an_export_has_it_in_its_weights(made, path, tmp_path, name):
    facts = export_folder(made, name, tmp_path / "out", torch.float32, transformer_only=True, lora=(path, 0.7))
    import diffusers

    from ppcl.models.pruned_transformer import pruned_class

    stock = made.teacher.adapter.transformer
    model_class = pruned_class(stock) if facts.obstacles else getattr(diffusers, stock)
    exported = velocity(model_class.from_pretrained(tmp_path / "out"))
    pipeline = made.pipeline(name, lora=(path, 0.7))
    torch.testing.assert_close(exported, velocity(pipeline.transformer), rtol=1e-4, atol=1e-5)
    assert (
        facts.lora == f"pytorch_lora_weights.safetensors, 0.7 times its strength: {made.coverage(pipeline, name, path)}"
    )
    assert facts.lora in (tmp_path / "out" / "README.md").read_text()


def test_the_norm_is_that_of_the_product():
    down, up = torch.randn(3, 20), torch.randn(7, 3)
    assert update_norm(down, up) == pytest.approx(float((up @ down).norm()), rel=1e-6)


def test_an_update_does_not_go_unseen_where_only_the_weight_is_read():
    with pytest.raises(AttributeError):
        _ = LoraLinear(torch.nn.Linear(2, 2), torch.ones(1, 2), torch.ones(2, 1), 1.0, "x").weight


def test_with_weights_that_come_and_go(teacher_folder, tmp_path):
    teacher = Teacher(teacher_folder)
    path = written("qwen", teacher, tmp_path / "lora")
    root = result(tmp_path / "job", teacher_folder, PLANS)
    expected = velocity(Result(root).pipeline("low", lora=path).transformer)
    pipeline = Result(root, memory={"offload": "group"}).pipeline("low", lora=path)
    torch.testing.assert_close(velocity(pipeline.transformer), expected, rtol=1e-5, atol=1e-6)
