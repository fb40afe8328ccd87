"""The application on Ray Serve, over HTTP, with OpenAI's client: one Serve instance, redeployed as the tests go on.

Replicas take seconds to start, so the tests share them: their order is that of this file.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import socket
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from PIL import Image

from serve.config import load_settings
from serve.protocol import FinalImage, GenerationRequest
from tests.serve.waiting import PATIENCE, until

APP = "ppcl"
DASHBOARD = Path(__file__).resolve().parents[2] / "cluster" / "grafana.json"
# So many that an image is still under way when a test does something to its replica.
LONG, SHORT = 400, 4


class Site:
    def __init__(self, result, port):
        self.result, self.port, self.address = result, port, f"http://127.0.0.1:{port}"

    def deploy(self, *changes):
        from ray import serve

        from serve.ray_app import application

        usual = [
            "engine.cpus=1",
            "engine.variants=[teacher,all]",
            "limits.steps=1000",
            "autoscaling.look_back_seconds=1",
        ]
        settings = load_settings(self.result, None, [*usual, *changes], {"port": self.port})
        serve.run(application(settings), name=APP, route_prefix="/")

    def client(self, **more):
        return openai.OpenAI(
            base_url=f"{self.address}/v1", api_key="none", timeout=PATIENCE, **({"max_retries": 0} | more)
        )

    def draw(self, steps=SHORT, model="teacher", seed=0, **more):
        return self.client().images.generate(
            prompt="a photo of a red circle",
            model=model,
            extra_body={"num_inference_steps": steps, "seed": seed, **more},
        )

    def engine(self):
        from ray import serve

        return serve.get_deployment_handle("engine", APP)

    def replicas(self):
        """How many replicas of the engine run."""
        from ray import serve

        status = serve.status().applications[APP].deployments["engine"]
        assert status.status != "DEPLOY_FAILED"
        return status.replica_states.get("RUNNING", 0)

    def actors(self):
        """The names of the engine's replicas, those that start or end included."""
        import ray

        names = [
            actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == "serve"
        ]
        return [name for name in names if f"{APP}#engine#" in name]

    def load(self):
        return self.engine().load.remote().result(timeout_s=PATIENCE)


@pytest.fixture(scope="module")
def site(ray_cluster, result_folder):
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = Site(result_folder, port)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    try:
        made.deploy("engine.queue=8")
        yield made
    finally:
        serve.shutdown()


def under_load(site, clients, act, steps=SHORT):
    """`act()` while so many clients ask for one image after the other; what each of them was answered."""
    stop, answers = [], []

    def ask(seed):
        while not stop:
            try:
                answer = site.draw(steps=steps, seed=seed)
                answers.append(len(answer.data[0].b64_json) > 0)
            except openai.OpenAIError as error:
                answers.append(error)

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask, seed) for seed in range(clients)]
        try:
            act()
        finally:
            stop.append(True)
        for one in asking:
            one.result(timeout=PATIENCE)
    return answers


def test_the_official_client_draws_streams_and_lists(site):
    generated = site.draw(seed=7)
    image = Image.open(io.BytesIO(base64.b64decode(generated.data[0].b64_json)))
    assert image.size == (32, 32) and generated.variant == "teacher"
    events = list(
        site.client().images.generate(
            prompt="a photo of a red circle",
            model="auto",
            stream=True,
            partial_images=2,
            extra_body={"num_inference_steps": 6},
        )
    )
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [model.id for model in site.client().models.list()] == ["auto", "teacher", "all"]
    with pytest.raises(openai.NotFoundError):
        site.draw(model="no-such")


def test_health_and_metrics_answer(site):
    with urllib.request.urlopen(f"{site.address}/health", timeout=PATIENCE) as answer:
        assert json.load(answer) == {"status": "ready"}
    with urllib.request.urlopen(f"{site.address}/metrics", timeout=PATIENCE) as answer:
        text = answer.read().decode()
    assert "ppcl_http_requests_total" in text and 'ppcl_images_total{variant="teacher"}' in text


def test_rays_own_metrics_have_the_names_of_the_dashboard(site):
    import ray

    asked = set(re.findall(r"ray_ppcl_\w+", DASHBOARD.read_text()))
    port = ray.nodes()[0]["MetricsExportPort"]

    def exported():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
            return asked <= set(re.findall(r"^ray_ppcl_\w+", answer.read().decode(), re.MULTILINE))

    until(exported, "Ray exports them")


def test_a_client_that_goes_away_frees_the_engine(site):
    """Both kinds: one that waits for its answer, and one in the middle of a stream."""
    body = {"prompt": "x", "model": "teacher", "num_inference_steps": 1000}
    waiting = socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE)
    content = json.dumps(body).encode()
    waiting.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
    waiting.sendall(f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    stream = site.client().images.generate(
        prompt="x", model="teacher", stream=True, partial_images=3, extra_body={"num_inference_steps": 1000}
    )
    until(lambda: site.load()["images"] == 2, "both are under way")
    next(iter(stream))
    stream.close()
    until(lambda: site.load()["images"] == 1, "the stream's image ends")
    waiting.close()
    until(lambda: site.load()["images"] == 0, "the other image ends")


def test_a_full_engine_says_so_and_when_to_come_back(site):
    def ask(seed):
        try:
            return site.draw(steps=LONG, seed=seed, model="all").variant
        except openai.RateLimitError as error:
            assert int(error.response.headers["retry-after"]) >= 1 and error.code == "queue_full"
            return "refused"

    with ThreadPoolExecutor(12) as pool:
        told = Counter(pool.map(ask, range(12)))
    assert told == {"all": 8, "refused": 4}


def test_a_rolling_update_under_load_fails_no_request(site):
    before = site.actors()
    answers = under_load(
        site, 3, lambda: site.deploy("autoscaling.min_replicas=2", "autoscaling.max_replicas=2"), steps=20
    )
    assert len(answers) >= 8 and all(answer is True for answer in answers), Counter(map(str, answers))
    until(lambda: site.replicas() == 2, "two replicas run")
    until(lambda: not set(before) & set(site.actors()), "the replicas of before are gone")


def test_a_replica_that_is_killed_under_load_loses_no_request(site):
    import ray

    def kill():
        name = site.actors()[0]
        actor = ray.get_actor(name, namespace="serve")
        time.sleep(1)
        # The busiest moment there is: both replicas draw.
        until(lambda: all(site.load()["images"] > 0 for _ in range(6)), "the replicas draw")
        ray.kill(actor, no_restart=True)
        until(
            lambda: len(set(site.actors()) - {name}) == 2 and site.replicas() == 2,
            "another replica has taken its place",
        )

    answers = under_load(site, 6, kill, steps=100)
    failed = [answer for answer in answers if answer is not True]
    assert len(answers) >= 12 and not failed, Counter(map(str, failed))


def test_what_was_told_of_a_lost_replicas_request_is_not_told_again(site):
    import ray

    async def watch():
        from serve.config import Http
        from serve.ray_backend import RayBackend

        backend = RayBackend(site.engine(), Http())
        events, killed = [], False
        async for event in backend.generate(GenerationRequest("1", "x", "auto", 1, 32, 32, LONG, 3, previews=8)):
            events.append(event)
            if len(events) == 3 and not killed:
                killed = True
                for name in site.actors():
                    if await busy(name):
                        ray.kill(ray.get_actor(name, namespace="serve"), no_restart=True)
        assert killed
        return events

    async def busy(name):
        # The replica's own method, not through a handle, which would choose among them.
        return await ray.get_actor(name, namespace="serve").get_num_ongoing_requests.remote() > 0

    events = asyncio.run(watch())
    assert [getattr(event, "number", None) for event in events] == [None, *range(8), None]
    assert isinstance(events[-1], FinalImage)


def test_replicas_follow_the_work_up_and_down_and_no_request_fails(site):
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_backlog_seconds": 0.5,
        "upscale_delay_seconds": 0.5,
        "downscale_delay_seconds": 1,
    }
    site.deploy(*(f"autoscaling.{key}={value}" for key, value in scaling.items()))
    until(lambda: site.replicas() == 1, "the floor is reached")
    answers = under_load(site, 8, lambda: until(lambda: site.replicas() == 2, "a second replica"), steps=100)
    answers += under_load(site, 1, lambda: until(lambda: site.replicas() == 1, "back to one"), steps=SHORT)
    assert all(answer is True for answer in answers), Counter(map(str, answers))
