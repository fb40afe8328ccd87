"""One image by a stock pipeline: its pixels, its cancellation, its previews."""

import threading

import numpy as np
import pytest
import torch

from serve.engine.batcher import Cancelled, Ticket
from serve.engine.generation import (
    GenerationTask,
    ImageGenerator,
    _CleanLatentsRecorder,
    _PreviewRequest,
    calls_per_step,
)
from serve.engine.shared_pipeline import WorkloadKey
from tests.ppcl.calibration.test_families import flux_pipeline, sd3_pipeline
from tests.schedulers import CASES
from tests.serve.engine.families import embedded, latents, share


@pytest.fixture
def generator(qwen):
    made = ImageGenerator(share(qwen)[0])
    yield made
    made.close()


TASK = GenerationTask((), "a photo of a red circle", 32, 32, 6, seed=3)


def with_changes(**changes):
    return GenerationTask(**(vars(TASK) | changes))


def test_a_picture_is_that_of_the_stock_pipeline(generator, qwen):
    generated = generator.generate(TASK, Ticket())
    stock = qwen(
        "a photo of a red circle",
        height=32,
        width=32,
        num_inference_steps=6,
        generator=torch.Generator().manual_seed(3),
    )
    assert np.array_equal(generated.image, np.asarray(stock.images[0]))
    assert set(generated.seconds) == {"encoding", "denoising", "decoding"} and min(generated.seconds.values()) > 0


def test_a_picture_that_is_cancelled_ends_at_its_next_step(generator):
    ticket, steps = Ticket(), []

    def stepped(step):
        steps.append(step)
        if step == 2:
            ticket.cancelled.set()

    with pytest.raises(Cancelled):
        generator.generate(TASK, ticket, stepped)
    assert steps == [1, 2]
    assert generator.generate(TASK, Ticket()).image.shape == (32, 32, 3)


def test_the_clean_latents_of_the_last_step_are_the_result(qwen):
    """`x_t - σ_t v` is exact where the next σ is zero; guidance included."""
    scheduler = qwen.scheduler
    for guidance in ({}, {"negative_prompt": " ", "true_cfg_scale": 3.0}):
        shared, _ = share(qwen)
        pipeline = shared.copy(WorkloadKey((), 1024), Ticket())
        recorder = _CleanLatentsRecorder(pipeline.scheduler)
        result = latents(pipeline, {"prompt": "red", "height": 32, "width": 32, "num_inference_steps": 4, **guidance})
        shared.close()
        torch.testing.assert_close(recorder.latents, result, rtol=1e-5, atol=1e-5)
    assert qwen.scheduler is scheduler


@pytest.mark.parametrize(
    ("steps", "previews", "after"), [(6, 2, [2, 4]), (6, 1, [3]), (2, 3, [1]), (1, 3, []), (6, 0, [])]
)
def test_previews_come_from_another_thread_in_order_and_before_the_end(generator, steps, previews, after):
    seen = []

    def previewed(number, step, image):
        assert image.shape == (32, 32, 3) and threading.current_thread().name.startswith("previews")
        seen.append((number, step))

    generator.generate(with_changes(steps=steps, previews=previews), Ticket(), on_preview=previewed)
    assert seen == list(enumerate(after))


def test_a_preview_shows_what_the_latents_decode_to(generator, qwen):
    """The final latents, previewed, are the final image."""
    call = {"prompt": TASK.prompt, "height": 32, "width": 32, "num_inference_steps": 6, "generator": 3}
    seen = []
    preview = _PreviewRequest(latents(qwen, call), 0, 6, lambda *arguments: seen.append(arguments))
    generator._preview(TASK, Ticket(), preview)
    assert np.array_equal(seen[0][2], generator.generate(TASK, Ticket()).image)


@pytest.mark.parametrize("name", ["heun", "unipc", "dpm"])
def test_steps_and_previews_are_counted_alike_with_every_scheduler(name):
    """A step of Heun's method is two calls of the transformer; previews are `x_t - σ_t v` there too."""
    pipeline = sd3_pipeline()
    pipeline.scheduler = CASES[name].scheduler()
    pipeline.set_progress_bar_config(disable=True)
    call = embedded(3) | {"guidance_scale": 1.0}
    task = GenerationTask((), None, 16, 16, 4, 7, arguments=call, previews=1)
    stock = pipeline(
        **call, height=16, width=16, num_inference_steps=4, generator=torch.Generator().manual_seed(7), output_type="np"
    ).images[0]
    generator, steps, seen = ImageGenerator(share(pipeline)[0]), [], []
    try:
        made = generator.generate(task, Ticket(), steps.append, lambda number, step, image: seen.append((number, step)))
        shared = generator.shared
        recorded = shared.copy(WorkloadKey((), 256), Ticket())
        recorder = _CleanLatentsRecorder(recorded.scheduler)
        result = latents(recorded, call | {"height": 16, "width": 16, "num_inference_steps": 4})
    finally:
        generator.close()
    assert steps == [1, 2, 3, 4] and seen == [(0, 2)]
    assert np.abs(made.image / 255 - stock).max() < 0.51 / 255 + 1e-4
    # The last step of all these solvers is of first order, to no noise.
    torch.testing.assert_close(recorder.latents, result, rtol=1e-4, atol=1e-4)


def test_rows_a_step_takes_are_told_by_how_the_pipeline_guides(qwen):
    flux, sd3 = flux_pipeline().__call__, sd3_pipeline().__call__
    asked = [
        (qwen.__call__, {}, 1),
        (qwen.__call__, {"negative_prompt": " "}, 2),
        (qwen.__call__, {"negative_prompt": " ", "true_cfg_scale": 1}, 1),
        (flux, {}, 1),
        (flux, {"true_cfg_scale": 2.0, "negative_prompt": ""}, 2),
        (flux, {"guidance_scale": 9.0}, 1),
        (sd3, {}, 2),
        (sd3, {"guidance_scale": 1.0}, 1),
    ]
    assert [calls_per_step(call, arguments) for call, arguments, _ in asked] == [rows for _, _, rows in asked]
