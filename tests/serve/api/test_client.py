"""OpenAI's own client, unmodified, against a real engine: images, streams, models, and its typed exceptions."""

import asyncio
import base64
import io
import time
from types import SimpleNamespace

import numpy as np
import openai
import pytest
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image

from ppcl.result import Result
from tests.serve.served import until

ASKED = {"prompt": "a red circle", "model": "p75", "size": "32x32"}


def decoded(b64_json: str) -> Image.Image:
    picture = Image.open(io.BytesIO(base64.b64decode(b64_json)))
    picture.load()
    return picture


def test_a_picture_is_the_one_the_stock_pipeline_draws(server, engine):
    answer = server.client().images.generate(
        **ASKED, extra_body={"seed": 5, "num_inference_steps": 3, "true_cfg_scale": 1.0}
    )
    import torch

    pipeline = Result(engine.settings.result).pipeline("p75")
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a red circle",
        height=32,
        width=32,
        num_inference_steps=3,
        true_cfg_scale=1.0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert np.abs(np.asarray(decoded(answer.data[0].b64_json)).astype(int) - np.asarray(expected)).max() <= 1


def test_an_answer_tells_what_was_drawn_and_how(server):
    answer = server.client().images.generate(
        **ASKED, n=2, user="u", style="vivid", extra_body={"seed": 5, "num_inference_steps": 3}
    )
    assert (answer.size, answer.output_format, answer.background, len(answer.data)) == ("32x32", "png", "opaque", 2)
    # Images of 32 × 32 are 4 × 4 tokens of the tiny transformer, whose VAE has a factor of 4.
    assert answer.usage.output_tokens == 2 * (32 // 8) ** 2
    assert 0 < answer.usage.input_tokens == answer.usage.input_tokens_details.text_tokens
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    ours = answer.model_extra
    assert (ours["variant"], ours["degraded"], ours["seed"], ours["num_inference_steps"]) == ("p75", False, 5, 3)
    assert ours["timings"]["total"] > 0
    assert [picture.model_extra["seed"] for picture in answer.data] == [5, 6]
    assert all(picture.model_extra["timings"]["denoising"] > 0 for picture in answer.data)
    one, other = (np.asarray(decoded(picture.b64_json)) for picture in answer.data)
    assert one.shape == other.shape == (32, 32, 3) and (one != other).any()


def test_the_second_picture_of_two_is_the_first_of_the_next_seed(server):
    client = server.client()
    two = client.images.generate(**ASKED, n=2, extra_body={"seed": 8})
    one = client.images.generate(**ASKED, extra_body={"seed": 9})
    difference = np.asarray(decoded(two.data[1].b64_json)).astype(int) - np.asarray(decoded(one.data[0].b64_json))
    assert np.abs(difference).max() <= 1


def test_headers_disclose_the_variant_and_carry_the_request_id(server):
    raw = server.client().images.with_raw_response.generate(**ASKED | {"model": "auto"})
    answer = raw.parse()
    assert raw.headers["x-ppcl-variant"] == answer.model_extra["variant"]
    assert raw.headers["x-ppcl-degraded"] == str(answer.model_extra["degraded"]).lower()
    assert raw.headers["x-request-id"].startswith("req_")


def test_a_plan_as_text_is_a_model_too(server):
    answer = server.client().images.generate(**ASKED | {"model": "0-1,2-3"})
    assert answer.model_extra["variant"] == "0-1,2-3"


@pytest.mark.parametrize(
    ("size", "shape"), [("32x64", (32, 64)), ("64x32", (64, 32)), ("40x48", (40, 48)), ("auto", (32, 32))]
)
def test_pictures_have_the_size_that_was_asked_for(server, size, shape):
    answer = server.client().images.generate(**ASKED | {"size": size}, extra_body={"num_inference_steps": 1})
    assert decoded(answer.data[0].b64_json).size == shape
    assert answer.size == f"{shape[0]}x{shape[1]}"


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_pictures_come_in_the_format_that_was_asked_for(server, file_format):
    answer = server.client().images.generate(**ASKED, output_format=file_format)
    assert answer.output_format == file_format
    assert decoded(answer.data[0].b64_json).format == file_format.upper()


@pytest.mark.parametrize("file_format", ["jpeg", "webp"])
def test_less_quality_makes_smaller_files(server, file_format):
    def size(compression):
        answer = server.client().images.generate(
            **ASKED, output_format=file_format, output_compression=compression, extra_body={"seed": 1}
        )
        return len(answer.data[0].b64_json)

    assert size(0) < size(50) < size(100)


def test_a_stream_shows_each_picture_as_it_becomes(server):
    with server.client().images.generate(
        **ASKED | {"size": "32x48"},
        n=2,
        stream=True,
        partial_images=2,
        output_format="webp",
        quality="high",
        extra_body={"seed": 3, "num_inference_steps": 6},
    ) as stream:
        events = list(stream)
    for index in (0, 1):
        mine = [event for event in events if event.model_extra["index"] == index]
        assert [type(event) for event in mine] == [ImageGenPartialImageEvent] * 2 + [ImageGenCompletedEvent]
        assert [event.partial_image_index for event in mine[:2]] == [0, 1]
        assert [event.model_extra["step"] for event in mine[:2]] == [2, 4]
        for event in mine:
            picture = decoded(event.b64_json)
            assert (picture.format, picture.size) == ("WEBP", (32, 48))
            assert (event.size, event.output_format, event.quality, event.background) == (
                "32x48",
                "webp",
                "high",
                "opaque",
            )
            assert event.created_at > 1_700_000_000
        assert mine[-1].usage.output_tokens == 24 and mine[-1].usage.input_tokens_details.image_tokens == 0
        assert (mine[-1].model_extra["variant"], mine[-1].model_extra["seed"]) == ("p75", 3 + index)


def test_a_stream_ends_with_the_picture_that_is_drawn_without_one(server):
    asked = ASKED | {"extra_body": {"seed": 4}}
    whole = server.client().images.generate(**asked)
    with server.client().images.generate(**asked, stream=True) as stream:
        (completed,) = list(stream)
    difference = np.asarray(decoded(whole.data[0].b64_json)).astype(int) - np.asarray(decoded(completed.b64_json))
    assert np.abs(difference).max() <= 1


def test_many_pictures_at_once_through_the_asynchronous_client(server):
    async def all_of_them():
        async with server.async_client() as client:
            asked = [
                {**ASKED, "model": model, "extra_body": {"seed": seed}}
                for seed, model in enumerate(["p75", "all", "teacher", "auto"] * 2)
            ]
            return await asyncio.gather(*(client.images.generate(**one) for one in asked))

    answers = asyncio.run(all_of_them())
    assert [answer.model_extra["seed"] for answer in answers] == list(range(8))
    assert [answer.model_extra["variant"] for answer in answers][:3] == ["p75", "all", "teacher"]


def test_an_asynchronous_stream(server):
    async def events():
        async with server.async_client() as client:
            stream = await client.images.generate(
                **ASKED, stream=True, partial_images=1, extra_body={"num_inference_steps": 4}
            )
            return [event.type async for event in stream]

    assert asyncio.run(events()) == ["image_generation.partial_image", "image_generation.completed"]


def test_every_variant_is_a_model_with_its_figures_and_auto_is_one(server, engine):
    def figures(model):
        """But for the seconds, which follow what batches take."""
        return {key: value for key, value in model.to_dict().items() if key != "seconds_per_step"}

    listed = {model.id: model for model in server.client().models.list()}
    assert set(listed) == {"auto", *engine.weights.variants}
    for name, variant in engine.weights.variants.items():
        told = listed[name].model_extra
        assert (told["parameters"], told["share"], told["blocks"]) == (
            variant.parameters,
            variant.share,
            variant.blocks,
        )
        assert told["seconds_per_step"] > 0 and "quality" in told
        assert figures(server.client().models.retrieve(name)) == figures(listed[name])
    assert listed["auto"].model_extra["variants"][0] == "teacher"
    assert server.client().models.retrieve("auto") == listed["auto"]


def test_errors_are_openais_typed_exceptions(server, locked_server):
    client = server.client()

    def caught(kind, **changed) -> openai.APIStatusError:
        with pytest.raises(kind) as told:
            client.images.generate(**ASKED | changed)
        assert type(told.value) is kind
        assert told.value.request_id.startswith("req_") and told.value.type == "invalid_request_error"
        return told.value

    assert caught(openai.BadRequestError, n=11).param == "n"
    assert caught(openai.BadRequestError, extra_body={"stpes": 3}).code == "unknown_parameter"
    assert caught(openai.NotFoundError, model="p10").code == "model_not_found"
    assert caught(openai.UnprocessableEntityError, size="33x33").param == "size"
    assert caught(openai.UnprocessableEntityError, prompt="circle " * 600).code == "string_too_long"
    assert caught(openai.APIStatusError, prompt="a" * 70_000).status_code == 413
    with pytest.raises(openai.NotFoundError) as unknown:
        client.models.retrieve("qwen/none")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as refused:
        locked_server.client("wrong").images.generate(**ASKED)
    assert refused.value.code == "invalid_api_key"


@pytest.fixture
def full_queue(server):
    """Streams that fill the queue until they are closed."""
    client = server.client()
    streams = [
        client.images.generate(**ASKED, n=8, stream=True, extra_body={"num_inference_steps": 2000}) for _ in range(2)
    ]
    yield streams
    for stream in streams:
        stream.close()
    until(lambda: not waiting(server), "the queue did not empty")


def waiting(server) -> bool:
    """Whether an image is being generated or waits to be."""
    answer = server.ask("GET", "/metrics")
    assert answer.status == 200
    told = answer.body.decode()
    return any(f"\n{gauge} 0.0\n" not in told for gauge in ("ppcl_pictures_queued", "ppcl_pictures_running"))


def test_a_full_queue_is_a_rate_limit_with_the_time_to_wait(server, full_queue):
    with pytest.raises(openai.RateLimitError) as full:
        server.client().images.generate(**ASKED)
    assert (full.value.code, full.value.type) == ("queue_full", "rate_limit_error")
    assert int(full.value.response.headers["retry-after"]) >= 1
    assert full.value.response.headers["x-should-retry"] == "true"


def test_the_client_waits_as_long_as_it_is_told_and_then_has_its_picture(server, full_queue, monkeypatch):
    with pytest.raises(openai.RateLimitError) as full:
        server.client().images.generate(**ASKED)
    waits = []

    def instead_of_waiting(seconds):
        waits.append(seconds)
        for stream in full_queue:
            stream.close()
        until(lambda: not waiting(server), "the queue did not empty")

    monkeypatch.setattr("openai._base_client.time", SimpleNamespace(sleep=instead_of_waiting, time=time.time))
    answer = server.client(retries=1).images.generate(**ASKED)
    assert len(answer.data) == 1 and len(waits) == 1
    assert waits[0] == pytest.approx(int(full.value.response.headers["retry-after"]), rel=0.5)


def test_a_deadline_that_cannot_be_met_is_told_at_once(server):
    with pytest.raises(openai.UnprocessableEntityError) as late:
        server.client().images.generate(**ASKED, extra_body={"deadline_ms": 1, "num_inference_steps": 500})
    assert late.value.param == "deadline_ms"


def test_a_refusal_before_the_first_event_is_a_status_rather_than_a_stream(server):
    with pytest.raises(openai.NotFoundError):
        server.client().images.generate(**ASKED | {"model": "p10"}, stream=True)
