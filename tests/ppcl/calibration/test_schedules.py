"""States, rollouts, images and timings on the teacher's own schedule, held against the stock pipeline's run."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ppcl.calibration.encoding import EncodedPrompts, encode
from ppcl.calibration.noised_images import noise_images
from ppcl.calibration.sampling_checks import check_sampling
from ppcl.calibration.schedules import Schedule
from ppcl.calibration.seeding import chosen_steps
from ppcl.calibration.seeding import generator as seeded
from ppcl.calibration.trajectory_recorder import StateSettings, record
from ppcl.config.schema import Sampling
from ppcl.errors import UserError
from ppcl.evaluation.images import generate_images, step_times
from ppcl.models import adapter_of
from ppcl.models.teacher import Teacher
from ppcl.training.finetuning.rollouts import Rollouts
from ppcl.training.finetuning.solvers import rollout_solver
from tests.schedulers import CASES, WORKING
from tests.tiny import flux_pipeline, qwen_pipeline, sd3_pipeline

STEPS, SEED = 4, 3
SIZE = {"qwen": 32, "flux": 16, "sd3": 16}
ARGUMENTS = {"qwen": {}, "flux": {"guidance_scale": 2.5}, "sd3": {"guidance_scale": 1.0}}
MAKERS = {
    "qwen": lambda folder: qwen_pipeline(folder, blocks=2),
    "flux": lambda folder: flux_pipeline(folder, double=1, single=1),
    "sd3": lambda folder: sd3_pipeline(folder, blocks=2),
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {family: Teacher(make(folder / family)).pipeline() for family, make in MAKERS.items()}


@pytest.fixture
def with_scheduler(pipelines):
    def exchanged(family, name):
        pipelines[family].scheduler = CASES[name].scheduler()
        return pipelines[family]

    return exchanged


def sampling_of(family, steps=STEPS, **arguments):
    size = SIZE[family]
    return Sampling(steps=steps, height=size, width=size, arguments=ARGUMENTS[family] | arguments)


class Watched:
    """The stock pipeline's own run of one prompt: what its transformer was given and gave, and the final latents."""

    def __init__(self, pipeline, family, embedding, generator, steps=STEPS, **arguments):
        self.inputs, self.outputs = [], []
        hook = pipeline.transformer.register_forward_hook(self._look, with_kwargs=True)
        names = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
        try:
            self.latents = pipeline(
                **{names[name]: value[None] for name, value in embedding.items()},
                **ARGUMENTS[family],
                **arguments,
                height=SIZE[family],
                width=SIZE[family],
                num_inference_steps=steps,
                generator=generator,
                output_type="latent",
            ).images
        finally:
            hook.remove()

    def _look(self, module, args, arguments, output):
        kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items() if k != "return_dict"}
        self.inputs.append(kept)
        self.outputs.append(output[0].clone())


def encoded(pipeline, family, texts=("a photo of a red circle",)):
    adapter = adapter_of(pipeline.transformer)
    return adapter, encode(pipeline, adapter, list(texts), sampling_of(family))


@pytest.mark.parametrize(("name", "family"), WORKING)
@torch.no_grad()
def test_recorded_states_are_those_that_the_stock_pipeline_visits(with_scheduler, name, family):
    pipeline = with_scheduler(family, name)
    adapter, embeddings = encoded(pipeline, family)
    # Kept: more than there are evaluations, so all of them.
    settings = StateSettings(sampling_of(family), 16, SEED)
    states, call = record(pipeline, adapter, EncodedPrompts([5], embeddings), settings)
    stock = Watched(pipeline, family, embeddings[0], seeded("trajectory", SEED, 5))
    assert len(states) == len(stock.inputs) == (2 * STEPS - 1 if name == "heun" else STEPS)
    for state, given in zip(states, stock.inputs, strict=True):
        assert state.timestep == given[adapter.timestep].item()
        torch.testing.assert_close(state.latents, given[adapter.latents][0], rtol=1e-5, atol=1e-5)
    assert call.timesteps == [given[adapter.timestep].item() for given in stock.inputs]
    assert call.sigmas == pipeline.scheduler.sigmas.double().tolist()
    assert call.sigmas[0] == pytest.approx(1.0, abs=0.02) and call.sigmas[-1] == 0.0
    few = StateSettings(sampling_of(family), 2, SEED)
    kept, _ = record(pipeline, adapter, EncodedPrompts([5], embeddings), few)
    chosen = [states[step].timestep for step in chosen_steps(SEED, 5, 2, len(states))]
    assert [state.timestep for state in kept] == chosen


@pytest.mark.parametrize(("name", "family"), WORKING)
@torch.no_grad()
def test_a_rollout_of_the_teacher_is_the_stock_pipelines_run(with_scheduler, name, family):
    """Seven steps: enough for every order of solver to have a full history. A checkpoint on the way changes nothing."""
    pipeline = with_scheduler(family, name)
    adapter, embeddings = encoded(pipeline, family)
    stock = Watched(pipeline, family, embeddings[0], torch.Generator().manual_seed(0), steps=7)
    _, call = record(
        pipeline, adapter, EncodedPrompts([5], embeddings), StateSettings(sampling_of(family, steps=7), 1, SEED)
    )
    schedule = Schedule.of_call(call, adapter)
    # As a worker reads it from the folder: it has never been called.
    scheduler, first = CASES[name].scheduler(), stock.inputs[0]
    start = first[adapter.latents]

    def pool():
        latents = torch.cat([start, torch.zeros_like(start)])
        solver = rollout_solver(scheduler, schedule, 2, start.shape[1:])
        return Rollouts([7, 8], [1.0, 1.0], latents, schedule, np.array([3]), solver)

    rollouts, rng = pool(), np.random.default_rng(0)
    rollouts.steps[:] = 0  # some timesteps of the first evaluation are below 1
    rollouts.timesteps[:] = schedule.timesteps[0]
    for number, given in enumerate(stock.inputs):
        torch.testing.assert_close(rollouts.latents[:1], given[adapter.latents], rtol=1e-5, atol=1e-5)
        timestep = torch.tensor([rollouts.timesteps[0] * adapter.timestep_scale]).to(given[adapter.timestep])
        assert torch.equal(timestep, given[adapter.timestep])
        own = first | {adapter.latents: rollouts.latents[:1], adapter.timestep: timestep}
        velocity = pipeline.transformer(**own)[0]
        if number == 4:
            restored = pool()
            restored.restore({key: tensor.clone() for key, tensor in rollouts.tensors().items()})
            rollouts = restored
        rollouts.advance(np.array([0]), velocity, rng)
    assert rollouts.ids.tolist() == [3, 8] and rollouts.steps.tolist() == [0, 0], "it has not started again at the end"


@pytest.mark.parametrize("name", ["heun", "unipc", "dpm"])
@torch.no_grad()
def test_a_rollout_that_starts_over_or_in_the_middle_has_no_history(with_scheduler, name):
    pipeline = with_scheduler("sd3", name)
    adapter, embeddings = encoded(pipeline, "sd3")
    _, call = record(pipeline, adapter, EncodedPrompts([5], embeddings), StateSettings(sampling_of("sd3"), 1, SEED))
    schedule, scheduler = Schedule.of_call(call, adapter), CASES[name].scheduler()
    shape = torch.Size([4, 8, 8])
    middle = schedule.timesteps[len(schedule) // 2]
    rollouts = Rollouts(
        [0], [middle], torch.ones(1, *shape), schedule, np.array([3]), rollout_solver(scheduler, schedule, 1, shape)
    )
    first = int(rollouts.steps[0])
    assert schedule.timesteps[first] == middle and (name != "heun" or first % 2 == 0)
    v = torch.randn(1, *shape)
    rollouts.advance(np.array([0]), v, np.random.default_rng(0))
    # Without a history every solver's first step is of first order.
    dt = schedule.sigmas[first + 1] - schedule.sigmas[first]
    torch.testing.assert_close(rollouts.latents, 1 + float(dt) * v, rtol=1e-4, atol=1e-4)
    for _ in range(len(schedule) - first - 1):
        rollouts.advance(np.array([0]), v, np.random.default_rng(0))
    assert rollouts.steps.tolist() == [0]
    noise = rollouts.latents.clone()
    rollouts.advance(np.array([0]), v, np.random.default_rng(0))
    dt = schedule.sigmas[1] - schedule.sigmas[0]
    torch.testing.assert_close(rollouts.latents, noise + float(dt) * v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "family"), WORKING)
@torch.no_grad()
def test_noised_images_lie_on_the_levels_that_sampling_visits(tmp_path, with_scheduler, name, family):
    size = SIZE[family]
    Image.new("RGB", (size, size), (200, 30, 90)).save(tmp_path / "a.png")
    pipeline = with_scheduler(family, name)
    adapter, embeddings = encoded(pipeline, family)
    _, visited = record(pipeline, adapter, EncodedPrompts([0], embeddings), StateSettings(sampling_of(family), 1, SEED))
    kept = 9
    states, call = noise_images(
        pipeline,
        adapter,
        EncodedPrompts([0], embeddings),
        [str(tmp_path / "a.png")],
        dict(pipeline.transformer.config),
        StateSettings(sampling_of(family), kept, SEED),
    )
    assert call.timesteps == pytest.approx(visited.timesteps, rel=1e-6) and call.sigmas == visited.sigmas
    assert len(states) == kept and {state.timestep for state in states} == set(call.timesteps)
    # Each state is the image and noise in the shares of its level: the image is the same in all of them.
    clean = []
    for slot, state in enumerate(states):
        noise = torch.randn(state.latents.shape, generator=seeded("noise", SEED, 0, slot))
        sigma = call.sigmas[call.timesteps.index(state.timestep)]
        if sigma < 0.95:
            clean.append((state.latents - sigma * noise) / (1 - sigma))
        elif sigma == 1:
            assert torch.equal(state.latents, noise)
    for other in clean[1:]:
        torch.testing.assert_close(other, clean[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "family"), WORKING)
@torch.no_grad()
def test_evaluations_images_and_times_are_those_of_the_pipelines_own_steps(with_scheduler, name, family):
    pipeline, sampling = with_scheduler(family, name), sampling_of(family)
    texts = ["a photo of a red circle", "a photo of a blue square"]
    images = generate_images(pipeline, texts, [1, 2], sampling)
    for text, seed, image in zip(texts, (1, 2), images, strict=True):
        alone = pipeline(
            text,
            height=sampling.height,
            width=sampling.width,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            **sampling.arguments,
        ).images[0]
        assert np.abs(image / 255 - alone).max() < 0.51 / 255 + 1e-4
    one = sampling.model_copy(update={"steps": 1})
    for settings, steps in ((sampling, STEPS), (one, 2)):
        times = step_times(pipeline, lambda transformer, plan: None, {"teacher": ()}, texts, settings)
        # A step of second order is two evaluations, and counts as one.
        assert len(times["teacher"]) == steps - 1


@torch.no_grad()
def test_sigmas_of_the_configuration_are_the_schedule(with_scheduler):
    pipeline = with_scheduler("flux", "euler")
    adapter, embeddings = encoded(pipeline, "flux")
    sampling = sampling_of("flux", steps=3, sigmas=[1.0, 0.6, 0.3])
    states, call = record(pipeline, adapter, EncodedPrompts([5], embeddings), StateSettings(sampling, 8, SEED))
    assert call.sigmas == pytest.approx([1.0, 0.6, 0.3, 0.0]) == [*call.timesteps, 0.0] and len(states) == 3
    for settings in (sampling, sampling_of("flux", steps=1, sigmas=[1.0])):
        times = step_times(pipeline, lambda transformer, plan: None, {"teacher": ()}, ["a"], settings)
        assert len(times["teacher"]) == max(2, settings.steps) - 1


@torch.no_grad()
def test_a_teacher_without_an_embedded_guidance_scale_records_none(with_scheduler):
    """As FLUX.1-schnell: `guidance_embeds: false`."""
    pipeline = copy.copy(with_scheduler("flux", "euler"))
    adapter, embeddings = encoded(pipeline, "flux")
    settings = StateSettings(sampling_of("flux", guidance_scale=0.0), 8, SEED)
    _, with_scale = record(pipeline, adapter, EncodedPrompts([5], embeddings), settings)
    assert with_scale.each == {"guidance": 0.0}
    transformer = type(pipeline.transformer).from_config(dict(pipeline.transformer.config) | {"guidance_embeds": False})
    pipeline.__dict__["transformer"] = transformer.eval()
    states, without = record(pipeline, adapter, EncodedPrompts([5], embeddings), settings)
    assert without.each == {} and [state.timestep for state in states] == [1.0, 0.75, 0.5, 0.25]


def test_an_argument_or_a_guidance_scale_that_is_wrong_is_refused_without_a_weight(tmp_path):
    teacher = Teacher(MAKERS["sd3"](tmp_path))
    check_sampling(teacher, Sampling(height=32, width=32, arguments={"sigmas": [1.0, 0.5], "guidance_scale": 0}))
    with pytest.raises(UserError, match="'true_cfg_scale', which cannot be set for StableDiffusion3Pipeline"):
        check_sampling(teacher, Sampling(height=32, width=32, arguments={"true_cfg_scale": 2}))
    # 8 positions, patches of 2 latents, latents of 2 pixels.
    with pytest.raises(
        UserError, match="sampling.width is 48, .* reach to 32 pixels \\(pos_embed_max_size\\); give at most 32"
    ):
        check_sampling(teacher, Sampling(height=32, width=48))
    distilled = SimpleNamespace(
        pipeline_class="QwenImagePipeline",
        config=lambda: {"guidance_embeds": True},
        pixels_a_token=lambda: 16,
        largest_side=lambda: None,
    )
    with pytest.raises(UserError, match="set sampling.arguments.guidance_scale"):
        check_sampling(distilled, Sampling())
    check_sampling(distilled, Sampling(arguments={"guidance_scale": 1.0}))


def test_a_timesteps_position_begins_a_step_and_is_the_one_before_it_where_it_lies_between_two():
    heun = Schedule(np.array([1.0, 0.6, 0.6, 0.2, 0.2]), np.array([1.0, 0.6, 0.6, 0.2, 0.2, 0.0]))
    assert heun.position(np.array([1.1, 1.0, 0.61, 0.6, 0.1])).tolist() == [-1, 0, 0, 2, 4]
    assert [heun.level(2, 0.6), heun.level(2, 0.4), heun.level(-1, 1.1)] == [0.6, 0.4, 1.1]
