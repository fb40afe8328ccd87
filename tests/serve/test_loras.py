"""LoRAs on a server: by the openai client, batched with their like, in the playground, and never by a client's path."""

import asyncio
import base64
import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from PIL import Image

from ppcl.errors import UserError
from ppcl.models.teacher import Teacher
from ppcl.result import Result
from serve.config import Served
from serve.engine.engine import Engine
from serve.protocol import Accepted, FinalImage, GenerationRequest, LoraOn
from tests.ppcl.lora.loras import written
from tests.serve.browser import CHROMIUM, Browser
from tests.serve.served import Server

SIZE = {"size": "32x32", "extra_body": {"seed": 3, "num_inference_steps": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teacher_folder):
    folder, teacher = tmp_path_factory.mktemp("loras"), Teacher(teacher_folder)
    written("qwen", teacher, folder / "a").rename(folder / "ink.safetensors")
    written("qwen", teacher, folder / "b", seed=1).rename(folder / "oil-2.safetensors")
    (folder / "README.md").write_text("Two LoRAs.")
    return folder


def settings(result_folder, folder, **engine):
    return Served(
        result=result_folder,
        engine={"device": "cpu", "loras": str(folder), "batch": 4} | engine,
        elastic={"patience": 10_000},
    )


@pytest.fixture(scope="module")
def engine(result_folder, folder):
    made = Engine(settings(result_folder, folder))
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(engine, no_keys_in_the_environment):
    made = Server(engine, engine.settings)
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


def pixels(answer):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))).astype(int)


def drawn(result_folder, variant, lora=None):
    """What the result itself makes of it."""
    pipeline = Result(result_folder).pipeline(variant, lora=lora)
    arguments = {"height": 32, "width": 32, "num_inference_steps": 2, **Result(result_folder).sampling.arguments}
    image = pipeline("a red circle", generator=torch.Generator().manual_seed(3), **arguments).images[0]
    return np.asarray(image).astype(int)


def test_a_lora_by_the_models_name_and_by_its_own_parameter(client, result_folder, folder):
    path = folder / "ink.safetensors"
    plain = pixels(client.images.generate(model="ends", prompt="a red circle", **SIZE))
    answer = client.images.generate(model="ends+ink", prompt="a red circle", **SIZE)
    assert answer.variant == "ends+ink"
    assert np.abs(pixels(answer) - drawn(result_folder, "ends", path)).max() <= 1
    assert np.abs(pixels(answer) - plain).max() > 2
    weak = SIZE | {"extra_body": SIZE["extra_body"] | {"lora": {"name": "ink", "scale": 0.4}}}
    answer = client.images.generate(model="ends", prompt="a red circle", **weak)
    assert np.abs(pixels(answer) - drawn(result_folder, "ends", (path, 0.4))).max() <= 1
    assert np.abs(pixels(client.images.generate(model="ends", prompt="a red circle", **SIZE)) - plain).max() <= 1
    answer = client.images.generate(model="auto+oil-2", prompt="a red circle", **SIZE)
    assert answer.variant == "teacher+oil-2"


def test_the_list_of_models_has_them_with_what_is_on(client, engine, result_folder, folder):
    models = {model.id: model for model in client.models.list().data}
    assert {"teacher+ink", "ends+oil-2", "all+ink"} <= set(models) and "auto+ink" not in models
    assert (models["all+ink"].variant, models["all+ink"].lora) == ("all", "ink")
    result = Result(result_folder)
    share = result.coverage(result.pipeline("ends"), "ends", folder / "ink.safetensors").share
    assert models["ends+ink"].lora_share == pytest.approx(share) and 0 < share < 1
    assert models["teacher+ink"].lora_share == 1
    assert models["ends"].loras == ["ink", "oil-2"]
    assert client.models.retrieve("ends+ink").lora == "ink"


@pytest.mark.parametrize(
    ("model", "lora", "code", "words"),
    [
        ("ends+no", None, "lora_not_found", "there is no LoRA 'no'; there are ink, oil-2"),
        ("ends", {"name": "/etc/passwd"}, "lora_not_found", "there is no LoRA '/etc/passwd'; there are"),
        ("ends", {"name": "../ink"}, "lora_not_found", "there is no LoRA"),
        ("ends+ink", {"name": "ink"}, "invalid_value", "names a LoRA already; leave lora out"),
        ("ends", {"name": "ink", "scale": 99}, None, "lora.scale"),
        ("ends", {"path": "ink"}, None, "lora"),
        ("no+ink", None, "model_not_found", "the model 'no' does not exist"),
    ],
)
def test_what_is_not_served_is_refused(client, model, lora, code, words):
    extra = SIZE["extra_body"] | ({"lora": lora} if lora else {})
    with pytest.raises(openai.APIStatusError) as raised:
        client.images.generate(model=model, prompt="a red circle", size="32x32", extra_body=extra)
    assert words in raised.value.body["message"]
    assert code is None or raised.value.code == code


def test_batches_hold_images_of_one_lora(engine):
    """Three kinds of images at once, each as if it were alone."""

    def request(number, lora):
        return GenerationRequest(str(number), "a red circle", "ends", 2, 32, 32, 4, 7, lora=lora)

    async def events(number, lora):
        return [event async for event in engine.generate(request(number, lora))]

    loras = [None, LoraOn("ink"), LoraOn("oil-2"), LoraOn("ink", 0.5)]
    alone = [asyncio.run(events(0, lora)) for lora in loras]

    async def together():
        return await asyncio.gather(*(events(i, loras[i % len(loras)]) for i in range(8)))

    for number, told in enumerate(asyncio.run(together())):
        expected = sorted((e for e in alone[number % 4] if isinstance(e, FinalImage)), key=lambda e: e.index)
        images = sorted((e for e in told if isinstance(e, FinalImage)), key=lambda e: e.index)
        assert isinstance(told[0], Accepted) and len(images) == 2
        for image, one in zip(images, expected, strict=True):
            assert np.abs(image.image.astype(int) - one.image).max() <= 1
    assert len({told[-1].image.tobytes() for told in alone}) == 4


def test_a_server_that_loads_a_part_of_the_blocks(result_folder, folder):
    made = Engine(settings(result_folder, folder, variants=["all"]))
    try:
        assert made.weights.lora_shares["all"]["ink"] < 1
    finally:
        made.close()


def test_a_folder_of_loras_is_checked_at_the_start(result_folder, tmp_path, s3, store, folder):
    with pytest.raises(UserError, match=f"engine.loras: {tmp_path}/no is no folder"):
        Engine(settings(result_folder, tmp_path / "no"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.safetensors file"):
        Engine(settings(result_folder, tmp_path / "empty"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "ink.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"ink\.safetensors cannot be read as safetensors"):
        Engine(settings(result_folder, tmp_path / "bad"))
    (tmp_path / "bad" / "ink.safetensors").rename(tmp_path / "bad" / "a b.safetensors")
    with pytest.raises(UserError, match="has a name that no request can give"):
        Engine(settings(result_folder, tmp_path / "bad"))
    store.upload(folder / "ink.safetensors", "loras/ink.safetensors")
    made = Engine(settings(result_folder, f"{store.url}/loras", variants=["ends"]))
    try:
        assert list(made.weights.loras) == ["ink"]
    finally:
        made.close()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the playground was not tried in a browser")
def test_the_playground_offers_them(server, tmp_path):
    browser = Browser(tmp_path / "profile")
    try:
        browser.resize(1280, 1200)
        browser.open(server.address)
        browser.until("!document.querySelector('#generate').disabled")
        options = browser.run("[...document.querySelector('#lora').options].map((o) => o.value)")
        assert options == ["", "ink", "oil-2"] and browser.run("document.querySelector('#lora_scale').disabled")
        assert browser.run("[...document.querySelectorAll('input[name=variant]')].every((b) => !b.value.includes('+'))")
        browser.run(
            "(() => {const s = document.querySelector('#lora'); s.value = 'ink';"
            " s.dispatchEvent(new Event('change', {bubbles: true}))})()"
        )
        note = browser.text("#lora-note")
        assert note.startswith("All takes ") and note.endswith(" % of it.") and "teacher" not in note
        browser.run("document.querySelector('#prompt').value = 'a red circle'")
        browser.click("#generate")
        browser.until("document.querySelector('#stop').hidden && document.querySelectorAll('.card').length > 0")
        names = browser.run("[...document.querySelectorAll('.card .name')].map((n) => n.textContent)")
        assert names == ["teacher", "all"] and not browser.problems
        page = browser.text("#results")
        assert "NaN" not in page and "undefined" not in page and "LoRA ink × 1" in page and "6 blocks" in page
        if keep := os.environ.get("PPCL_TEST_SCREENSHOT"):
            browser.screenshot(Path(keep))
    finally:
        browser.close()


def test_a_server_transfers_its_loras_to_students(result_folder, folder):
    from serve.engine.loading import load

    name = "p90"
    chosen = settings(result_folder, folder, variants=[name], lora_transfer=True).engine
    weights = load(result_folder, None, chosen, "cpu", torch.float32)
    plan = weights.variants[name].plan
    for lora in weights.loras.values():
        weights.switch(weights.pipeline.transformer, plan, replace(lora, scale=0.5))
        coverage = weights.switch.coverage(weights.pipeline.transformer, plan, lora)
        assert coverage.transferred and all(one.startswith("transformer_blocks.2.") for one in coverage.transferred)


def test_a_transfer_without_loras_is_refused(result_folder):
    made = Served(result=result_folder, engine={"device": "cpu", "lora_transfer": True})
    with pytest.raises(UserError, match="engine.lora_transfer has no LoRA to transfer; name their folder"):
        Engine(made)
