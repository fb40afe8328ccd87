"""Which schedulers are refused, with which sentence, before anything runs; and which teachers look distilled."""

import json

import pytest

from ppcl.errors import UserError
from ppcl.models.schedulers import SOLVERS, check_scheduler, few_step_note
from ppcl.models.teacher import Teacher
from tests.schedulers import CASES, PIPELINES, REFUSED, WORKING, with_scheduler
from tests.tiny import flux_pipeline, qwen_pipeline, sd3_pipeline


def stored(case):
    """The configuration as `save_pretrained` writes it."""
    return json.loads(case.scheduler().to_json_string())


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_what_ppcl_cannot_sample_with_is_refused_in_a_sentence_that_says_what_to_set(name, family):
    case = CASES[name]
    with pytest.raises(UserError) as refused:
        check_scheduler("models/teacher", case.name, stored(case), PIPELINES[family])
    message = str(refused.value)
    assert message.startswith(f"models/teacher/scheduler is a {case.name}, which ") and case.says in message
    assert "\n" not in message and ("set " in message or "save " in message)


@pytest.mark.parametrize(("name", "family"), WORKING)
def test_what_works_is_accepted(name, family):
    case = CASES[name]
    check_scheduler("models/teacher", case.name, stored(case), PIPELINES[family])


def test_sigmas_of_the_configuration_are_refused_where_the_scheduler_takes_none():
    for name in ("heun", "dpm"):
        case = CASES[name]
        with pytest.raises(UserError, match="takes no sigmas; leave sigmas out of sampling.arguments"):
            check_scheduler("t", case.name, stored(case), PIPELINES["sd3"], sigmas=True)
    case = CASES["unipc"]
    check_scheduler("t", case.name, stored(case), PIPELINES["sd3"], sigmas=True)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_that_is_taken_is_among_the_cases(solver):
    assert any(CASES[name].name == solver for name, _ in WORKING)


def test_a_teacher_with_such_a_scheduler_is_not_opened(tmp_path):
    """So no command begins with it: all of them open the teacher first."""
    folder = qwen_pipeline(tmp_path / "qwen", blocks=1)
    with pytest.raises(UserError, match="qwen/scheduler is a FlowMatchHeunDiscreteScheduler, which does not take"):
        Teacher(with_scheduler(folder, "heun"))
    folder = sd3_pipeline(tmp_path / "sd3", blocks=2)
    scheduler = Teacher(with_scheduler(folder, "heun")).scheduler()
    assert type(scheduler).__name__ == "FlowMatchHeunDiscreteScheduler" and scheduler.config.shift == 3.0


EULER_CONFIG = {"shift": 3.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15}
FIXED_MU = EULER_CONFIG | {"use_dynamic_shifting": True, "base_shift": 1.0986, "max_shift": 1.0986}
DYNAMIC = EULER_CONFIG | {"use_dynamic_shifting": True}


@pytest.mark.parametrize(
    ("place", "index", "transformer", "scheduler", "reason"),
    [
        ("m/a", {"_class_name": "FluxPipeline"}, {"guidance_embeds": False}, EULER_CONFIG, "guidance_embeds: false"),
        ("m/a", {"_class_name": "FluxPipeline"}, {"guidance_embeds": True}, DYNAMIC, None),
        ("m/a", {"_class_name": "QwenImagePipeline"}, {"guidance_embeds": False}, DYNAMIC, None),
        ("m/a", {"_class_name": "QwenImagePipeline"}, {"guidance_embeds": False}, FIXED_MU, "same base_shift"),
        ("m/a", {"is_distilled": True}, {}, DYNAMIC, "is_distilled"),
        ("m/a", {"is_distilled": False}, {}, DYNAMIC, None),
        ("s3://b/SD3.5-Turbo/", {}, {}, EULER_CONFIG, "'turbo'"),
        ("m/a", {}, {"_name_or_path": "Tongyi-MAI/Z-Image-Turbo"}, EULER_CONFIG, "'turbo'"),
        ("m/large", {}, {}, EULER_CONFIG, None),
    ],
)
def test_a_teacher_that_looks_distilled_for_few_steps_is_told_of_where_many_are_asked_for(
    place, index, transformer, scheduler, reason
):
    note = few_step_note(place, index, transformer, scheduler, steps=20)
    if reason is None:
        assert note is None
    else:
        assert note is not None and reason in note and "sampling.steps is 20" in note
    assert few_step_note(place, index, transformer, scheduler, steps=4) is None


def test_the_note_is_read_off_the_folder(tmp_path):
    folder = flux_pipeline(tmp_path / "flux", double=1, single=1)
    assert Teacher(folder).few_step_note(20) is None
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"guidance_embeds": False}))
    note = Teacher(folder).few_step_note(20)
    assert note is not None and "FLUX.1-schnell" in note
