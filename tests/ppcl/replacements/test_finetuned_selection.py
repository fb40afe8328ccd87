"""Which plans take the fine-tuned replacements: what was measured decides, for the measured and for those like them."""

import json

import pytest
import torch

from ppcl.errors import UserError
from ppcl.models.teacher import Teacher
from ppcl.replacements import Interval, LinearFfn, LowRankModulation, TunedBlock
from ppcl.replacements.finetuned_selection import FinetunedSelection, ratios_of
from ppcl.replacements.io import load_replacement, save_replacement
from ppcl.result import Result
from ppcl.storage.manifest import Artifacts
from tests import made_result, tiny

A, B, C, D = Interval(0, 1), Interval(2, 3), Interval(4, 5), LinearFfn(6)
SENSITIVITY = {A: 0.5, B: 0.3, C: 0.1, D: 0.05, LowRankModulation(): 1e-6}
RATIOS = {
    frozenset({A, B, C}): 0.5,
    frozenset({A, B}): 0.8,
    frozenset({C}): 2.0,
    frozenset({B, C}): 1.2,
    frozenset({A, D}): 0.9,
}


def tuned(ratios=RATIOS, files=(A, B, C)):
    return FinetunedSelection(dict.fromkeys(files), SENSITIVITY, ratios)


@pytest.mark.parametrize(
    ("plan", "taken"),
    [
        ({A, B, C}, True),
        ({A, B}, True),
        ({C}, False),
        ({B, C}, False),
        # Nearest are [A B C] and [A B], both better; for [C D] they are [C] and [B C], both worse.
        ({A, B, C, D}, True),
        ({A, B, LowRankModulation()}, True),
        ({C, D}, False),
        # [B C], worse, and [A B C], better: all must be.
        ({B}, False),
        # Nothing of it was trained, or no measured plan has anything of it.
        ({D}, False),
        (set(), False),
    ],
)
def test_a_plan_takes_them_where_it_or_those_like_it_were_better(plan, taken):
    assert tuned().uses_finetuned(plan) is taken


def test_what_nothing_measured_is_like_stays_as_it_was():
    assert not tuned({frozenset({A}): 0.5, frozenset({A, LowRankModulation()}): 0.5}).uses_finetuned({B})
    assert not tuned({frozenset({A, B}): 0.5}).uses_finetuned({A}), "one measured plan tells too little"
    assert not tuned({}).uses_finetuned({A})


def test_what_was_trained_with_one_plan_in_full_is_for_that_plan_alone():
    files = (A, B, TunedBlock(6), TunedBlock(7))
    trained = tuned({frozenset({A, B}): 0.5}, files)
    assert trained.taken([A, B]) == set(files) and not trained.taken([A]) and not trained.taken([A, B, C])
    assert not tuned({frozenset({A, B}): 1.5}, files).taken([A, B])
    # Where no replacement of the plan is trained, its blocks are all the same.
    folded = frozenset({LowRankModulation()})
    assert tuned({folded: 0.5}, files[2:]).taken(folded) == set(files[2:])
    assert tuned().taken([A, B, D]) == {A, B}


def test_a_plan_without_an_error_has_none_to_lose():
    rows = [{"plan": ["0-1"], "before": 0.0, "after": 0.0}, {"plan": ["2-3"], "before": 0.2, "after": 0.1}]
    assert ratios_of(rows) == {frozenset({A}): float("inf"), frozenset({B}): 0.5}


@pytest.fixture
def root(tmp_path, teacher_folder):
    """A result in which the fine-tuned replacements of two intervals are the distilled ones, doubled."""
    root = made_result.result(tmp_path / "job", teacher_folder)
    artifacts, teacher = Artifacts(root), Teacher(teacher_folder)
    for interval in (A, B):
        module = load_replacement(artifacts.path("students", f"{interval.name}.safetensors"), teacher)
        for p in module.parameters():
            p.data.mul_(2)
        save_replacement(
            module, interval, teacher.adapter, artifacts.path("finetuning", f"{interval.name}.safetensors")
        )
    rows = [{"plan": [str(e) for e in plan], "before": 1.0, "after": ratio} for plan, ratio in RATIOS.items()]
    artifacts.path("finetuning", "finetuning.json").write_text(json.dumps({"plans": rows}))
    artifacts.commit("finetuning", "2", info={"variants": "1"})
    return root


@torch.no_grad()
def test_a_result_holds_both_and_switches_between_them_by_plan(root):
    result = Result(root)
    pipeline = result.pipeline([A, B])
    weight = "transformer_blocks.{}.block.attn.to_q.weight"

    def at(block):
        return dict(pipeline.transformer.named_parameters())[weight.format(block)].clone()

    both = {block: at(block) for block in (0, 2)}
    assert result.finetuned([A, B]) and not result.finetuned([B, C]) and not result.finetuned([C])
    result.switch(pipeline, [B, C])
    alone = at(2)
    assert torch.allclose(both[2], 2 * alone)
    untouched = at(4)
    result.switch(pipeline, [A, B, C])
    assert torch.equal(at(0), both[0]) and torch.equal(at(2), both[2]) and torch.equal(at(4), untouched)
    assert result.variant([A, B]).parameters == sum(p.numel() for p in result.pipeline([A, B]).transformer.parameters())


def test_fine_tuning_for_other_variants_is_not_taken(root):
    artifacts = Artifacts(root)
    artifacts.commit("finetuning", "2", info={"variants": "another"})
    assert Result(root).tuned is None


def test_a_damaged_fine_tuned_file_is_told(root):
    path = root / "finetuning" / f"{A.name}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="finetuning/00-01.safetensors is damaged or missing"):
        Result(root)


def test_a_file_that_the_manifest_does_not_name_is_not_taken(root, teacher_folder):
    teacher = Teacher(teacher_folder)
    save_replacement(
        load_replacement(root / "students" / f"{C.name}.safetensors", teacher),
        C,
        teacher.adapter,
        root / "finetuning" / f"{C.name}.safetensors",
    )
    assert C not in Result(root).tuned.files


def test_the_engine_loads_the_set_each_served_variant_takes(root):
    from serve.config import EngineSettings
    from serve.engine.loading import load as load_weights

    weights = load_weights(root, None, EngineSettings(variants=["teacher", "all"]), "cpu", torch.float32)
    assert weights.result.finetuned("all") and weights.variant("0-1,2-3") is not None
    # What takes the distilled ones would wait for a file.
    assert weights.variant("2-3,4-5") is None
    assert tiny.inputs(weights.pipeline.transformer)
