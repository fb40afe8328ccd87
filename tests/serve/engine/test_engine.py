"""The engine as the API sees it: a real one, of a tiny result, on this test's own event loop."""

import asyncio
import time

import numpy as np
import pytest
import torch

from serve.config import load_settings
from serve.engine.engine import Engine
from serve.protocol import Accepted, FinalImage, GenerationRequest, Preview, Refused

PATIENCE = 60.0
ELASTIC = ("elastic.variants=[teacher,all]", "elastic.patience=1.5", "elastic.recover_seconds=0")


def request(**changes):
    usual = {
        "id": "1",
        "prompt": "a photo of a red circle",
        "model": "auto",
        "count": 1,
        "height": 32,
        "width": 32,
        "steps": 4,
        "seed": 5,
    }
    return GenerationRequest(**(usual | changes))


@pytest.fixture(scope="module")
def engine(result_folder):
    made = Engine(load_settings(result_folder, None, ["engine.queue=12", "engine.batch=4", *ELASTIC]))
    yield made
    made.close()


async def events(engine, **changes):
    return [event async for event in engine.generate(request(**changes))]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE))


async def idle(engine):
    """Until nothing is accepted: cancelled images notice at their next step."""
    while engine._backlog.images:
        await asyncio.sleep(0.01)


def test_a_request_is_accepted_then_drawn_as_the_stock_pipeline_would(engine, result_folder):
    accepted, picture = run(events(engine, model="ends"))
    assert accepted == Accepted("ends", False, accepted.expected_seconds) and accepted.expected_seconds > 0
    assert isinstance(picture, FinalImage) and (picture.index, picture.seed) == (0, 5) and picture.prompt_tokens > 0
    assert set(picture.seconds) == {"queued", "encoding", "denoising", "decoding"}
    from ppcl.result import Result

    stock = Result(result_folder).pipeline("ends")(
        "a photo of a red circle",
        height=32,
        width=32,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(5),
    )
    assert np.abs(picture.image.astype(int) - np.asarray(stock.images[0])).max() <= 1


def test_each_picture_has_its_own_seed_previews_and_number(engine):
    told = run(events(engine, model="teacher", count=3, previews=2, steps=6))
    images = sorted((e for e in told if isinstance(e, FinalImage)), key=lambda e: e.index)
    assert [(p.index, p.seed) for p in images] == [(0, 5), (1, 6), (2, 7)]
    assert not np.array_equal(images[0].image, images[1].image)
    for index in range(3):
        own = [e for e in told if isinstance(e, Preview | FinalImage) and e.index == index]
        assert [(e.number, e.step) for e in own[:-1]] == [(0, 2), (1, 4)] and isinstance(own[-1], FinalImage)
    alone = run(events(engine, model="teacher", seed=6, steps=6))[-1]
    assert np.abs(alone.image.astype(int) - images[1].image).max() <= 1


def test_models_are_the_variants_from_large_to_small(engine):
    infos = run(engine.models())
    assert [info.id for info in infos] == ["teacher", "p90", "ends", "p75", "all"]
    assert all(info.seconds_per_step > 0 for info in infos)
    info = run(engine.pipeline())
    assert (info.steps, info.height, info.width, info.multiple) == (2, 32, 32, 8)
    # The tiny Qwen-Image was not distilled for a guidance scale.
    assert info.arguments == ("negative_prompt", "true_cfg_scale")


def test_a_plan_as_text_is_a_model_too(engine):
    assert run(events(engine, model="0-1,2-3"))[0].variant == engine._names.get(
        engine.weights.variant("0-1,2-3").plan, "0-1,2-3"
    )


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"model": "no-such"}, 404, "model_not_found", "model"),
        ({"model": "0-3"}, 404, "model_not_found", "model"),
        ({"min_variant": "no-such"}, 404, "model_not_found", "min_variant"),
        ({"deadline": 1e-5}, 422, "deadline_too_short", "deadline_ms"),
        ({"deadline": 1e-5, "model": "all"}, 422, "deadline_too_short", "deadline_ms"),
        ({"prompt": "circle " * 600}, 422, "string_too_long", "prompt"),
        ({"arguments": {"negative_prompt": "circle " * 600}}, 422, "string_too_long", "negative_prompt"),
        ({"count": 13}, 429, "queue_full", None),
    ],
)
def test_what_cannot_be_served_is_refused_and_leaves_nothing_behind(engine, changes, status, code, param):
    with pytest.raises(Refused) as refused:
        run(events(engine, **changes))
    assert (refused.value.status, refused.value.code, refused.value.param) == (status, code, param)
    assert (refused.value.retry_after is not None) == (status == 429)
    assert not engine._backlog.images


def test_a_full_queue_tells_when_to_come_back(engine):
    async def crowd():
        told = await asyncio.gather(
            *(events(engine, id=str(n), count=4, steps=20) for n in range(5)), return_exceptions=True
        )
        refused = [one for one in told if isinstance(one, Refused)]
        assert len(refused) == 2 and {one.code for one in refused} == {"queue_full"}
        assert all(one.status == 429 and one.retry_after >= 1 for one in refused)
        assert all(sum(isinstance(e, FinalImage) for e in one) == 4 for one in told if not isinstance(one, Refused))

    run(crowd())


def test_under_load_auto_degrades_and_a_model_that_was_named_never_does(engine):
    async def crowd():
        async def variant(model, **more):
            told = await events(engine, model=model, steps=20, **more)
            return told[0].variant, told[0].degraded

        named = [variant("teacher") for _ in range(4)]
        auto = [variant("auto", deadline=None) for _ in range(6)]
        floored = [variant("auto", min_variant="teacher") for _ in range(2)]
        return await asyncio.gather(*named, *auto, *floored)

    told = run(crowd())
    assert told[:4] == [("teacher", False)] * 4
    assert told[4] == ("teacher", False) or told[4][1]
    assert told[9][1] and told[9][0] in engine.quality.levels[1:]
    assert told[10:] == [("teacher", False)] * 2


def test_a_deadline_that_the_load_does_not_allow_is_refused_with_a_time_to_come_back(engine):
    async def crowd():
        slow = [asyncio.create_task(events(engine, model="teacher", steps=100)) for _ in range(8)]
        await asyncio.sleep(0.1)
        # Enough alone, and too little behind the others.
        alone = engine._backlog.idle_seconds(next(iter(engine._backlog.images)).workload, 4, 1, 1)
        with pytest.raises(Refused) as refused:
            await events(engine, model="teacher", deadline=3 * alone)
        assert (refused.value.status, refused.value.code) == (429, "deadline_unmet") and refused.value.retry_after >= 1
        assert engine.load()["backlog_seconds"] > engine._backlog.undegraded_seconds(), "what was refused is demand too"
        for one in slow:
            one.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        await idle(engine)

    run(crowd())


def test_closing_the_iterator_cancels_what_is_not_done(engine):
    async def leave():
        told = engine.generate(request(count=8, steps=1000, previews=3))
        assert isinstance(await anext(told), Accepted)
        assert len(engine._backlog.images) == 8 and engine._backlog.queued >= 4
        await told.aclose()
        began = time.monotonic()
        await idle(engine)
        return time.monotonic() - began

    assert run(leave()) < 20, "a thousand steps of eight images were generated"
    assert isinstance(run(events(engine))[-1], FinalImage)


def test_a_waiting_task_that_is_cancelled_cancels_its_pictures(engine):
    async def leave():
        task = asyncio.create_task(events(engine, steps=1000))
        while not engine._backlog.images:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(engine)

    run(leave())


def test_a_deadline_that_passes_while_pictures_wait_is_dropped_before_they_are_begun(engine, monkeypatch):
    async def crowd():
        monkeypatch.setattr(engine._backlog, "expected_seconds", lambda *of: 0.0)
        slow = [asyncio.create_task(events(engine, model="teacher", steps=40)) for _ in range(4)]
        await asyncio.sleep(0.05)
        alone = engine._backlog.idle_seconds(next(iter(engine._backlog.images)).workload, 4, 1, 1)
        with pytest.raises(Refused) as refused:
            await events(engine, model="teacher", deadline=2 * alone)
        assert (refused.value.status, refused.value.code) == (504, "deadline_exceeded")
        await asyncio.gather(*slow)

    run(crowd())


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(torch.OutOfMemoryError("CUDA"), 503, "out_of_memory"), (ValueError("secret prompt"), 500, "engine_error")],
)
def test_an_error_fails_its_request_alone(engine, monkeypatch, caplog, error, status, code):
    forward = engine.weights.pipeline.transformer.forward

    def failing(hidden_states, **arguments):
        if hidden_states.shape[1] != 16:
            raise error
        return forward(hidden_states, **arguments)

    monkeypatch.setattr(engine.weights.pipeline.transformer, "forward", failing)

    async def crowd():
        return await asyncio.gather(events(engine), events(engine, width=48), events(engine), return_exceptions=True)

    good, bad, other = run(crowd())
    assert isinstance(good[-1], FinalImage) and isinstance(other[-1], FinalImage)
    assert (
        isinstance(bad, Refused) and (bad.status, bad.code) == (status, code) and "secret" not in str(bad) + caplog.text
    )
    assert run(engine.healthy())


def test_metrics_count_requests_pictures_and_batches(engine):
    def value(name):
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in run(engine.metrics_text()).splitlines() if line.startswith(name)
        )

    before = {
        name: value(name)
        for name in (
            'ppcl_requests_total{outcome="done"}',
            "ppcl_images_total",
            "ppcl_batch_rows_sum",
            'ppcl_accepted_total{degraded="false",variant="all"}',
        )
    }
    run(events(engine, model="all", count=2))
    after = {name: value(name) for name in before}
    assert [after[name] - before[name] for name in before] == [1, 2, 8, 1]
    run(events(engine, model="0-1,4-5"))
    assert "0-1" not in run(engine.metrics_text()), "what clients write makes no series"
    assert value("ppcl_pictures_running") == value("ppcl_pictures_queued") == value("ppcl_backlog_seconds") == 0


def test_a_closed_engine_refuses_and_is_not_healthy(result_folder):
    engine = Engine(load_settings(result_folder, None, ["engine.variants=[all]"]))

    async def close():
        waiting = asyncio.create_task(events(engine, steps=1000))
        while not engine._backlog.images:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(engine.close)
        with pytest.raises(Refused) as refused:
            await waiting
        assert (refused.value.status, refused.value.code) == (503, "shutting_down")
        assert not await engine.healthy()
        with pytest.raises(Refused):
            await events(engine)

    run(close())


def with_arguments(engine, monkeypatch, **arguments):
    """The engine's result as if its job had had these arguments."""
    sampling = engine.weights.result.sampling
    changed = sampling.model_copy(update={"arguments": sampling.arguments | arguments})
    monkeypatch.setitem(engine.weights.result.__dict__, "sampling", changed)


def test_a_prompt_that_the_pipeline_would_cut_is_refused(engine, monkeypatch):
    with_arguments(engine, monkeypatch, max_sequence_length=4)
    with pytest.raises(Refused, match="the prompt has [0-9]+ tokens; at most 4 are taken") as refused:
        run(events(engine, model="teacher"))
    assert refused.value.status == 422
    assert isinstance(run(events(engine, model="teacher", prompt="red circle"))[-1], FinalImage)


def test_a_request_for_other_steps_than_the_results_sigmas_is_refused(engine, monkeypatch):
    with_arguments(engine, monkeypatch, sigmas=[1.0, 0.7, 0.4, 0.1])
    with pytest.raises(Refused, match="num_inference_steps is 5; this model is drawn in the 4 steps") as refused:
        run(events(engine, model="teacher", steps=5))
    assert (refused.value.status, refused.value.param) == (422, "num_inference_steps")
    own = run(events(engine, model="teacher", steps=4))[-1]
    monkeypatch.undo()
    assert not np.array_equal(own.image, run(events(engine, model="teacher", steps=4))[-1].image)


def test_a_second_order_scheduler_makes_two_calls_a_step(engine, monkeypatch):
    assert engine._calls_per_step({}) == 1 and engine._calls_per_step({"negative_prompt": " "}) == 2
    monkeypatch.setattr(engine.weights.pipeline.scheduler, "order", 2, raising=False)
    assert engine._calls_per_step({}) == 2 and engine._calls_per_step({"negative_prompt": " "}) == 4
