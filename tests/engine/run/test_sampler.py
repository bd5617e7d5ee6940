import copy
import json

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor

from penstock.engine.request.generation import SAMPLERS
from penstock.engine.request.levels import noise_levels, timesteps
from penstock.engine.run.sampler import (
    Sampler,
    SamplerState,
    guide,
    initial_noise,
    step_generator,
)
from penstock.engine.run.solvers import UniPC
from penstock.errors import CheckpointError, NonFinite, UsageError
from tests.makers import at_makers_levels
from tests.versions import DIFFUSERS_0_36

SHAPE = (1, 16, 2, 4, 6)
# As it stands in a model's folder
WAN_CONFIG = json.loads(
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ).to_json_string()
)


def make(sampler="unipc", steps=8, shift=5.0):
    return Sampler(WAN_CONFIG, sampler=sampler, steps=steps, shift=shift)


def prediction(i, latents):
    """A stand-in for the transformer: deterministic, and sensitive to its input."""
    return torch.sin(3 * latents + i) + 0.1 * latents


def run(sampler, latents, start=0, stop=None):
    for i in range(start, len(sampler.timesteps) if stop is None else stop):
        latents = sampler.step(prediction(i, latents), i, latents)
    return latents


def diffusers_scheduler(sampler, shift):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    if sampler == "unipc":
        return UniPCMultistepScheduler(**flow)
    if sampler == "dpm++":
        return DPMSolverMultistepScheduler(**flow)
    return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=sampler == "lcm")


def given_levels(theirs, sampler, steps, shift):
    """diffusers' solver at the makers' levels; where they have none, at its own (to rounding)."""
    theirs.set_timesteps(steps)
    if sampler in ("unipc", "dpm++"):
        return at_makers_levels(theirs, steps, shift)
    levels = torch.tensor([*noise_levels(sampler, steps, shift), 0.0])
    assert (levels - theirs.sigmas).abs().max() <= 1e-7
    theirs.sigmas = levels
    told = torch.tensor(timesteps(noise_levels(sampler, steps, shift), sampler))
    assert (told - theirs.timesteps).abs().max() <= 1e-4
    theirs.timesteps = told
    return theirs


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 3.0), (6, 5.0), (20, 3.0), (40, 5.0)])
def test_each_solver_equals_diffusers_bit_for_bit(sampler, steps, shift):
    if sampler == "lcm" and DIFFUSERS_0_36:
        pytest.skip("diffusers 0.36 draws noise from torch's own state, whatever it is given")
    theirs = given_levels(diffusers_scheduler(sampler, shift), sampler, steps, shift)
    ours = make(sampler, steps, shift)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    latents = expected = initial_noise(SHAPE, 1)
    for i, timestep in enumerate(theirs.timesteps):
        guess = prediction(i, expected)
        noise = {"generator": step_generator(0, i)} if sampler == "lcm" else {}
        expected = theirs.step(guess, timestep, expected, return_dict=False, **noise)[0]
        latents = ours.step(prediction(i, latents), i, latents)
        assert torch.equal(latents, expected)
    assert ours.next_step == steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_of_each_order_and_of_rounded_predictions_equals_diffusers(order, dtype):
    config = WAN_CONFIG | {"solver_order": order, "flow_shift": 5.0}
    theirs = given_levels(UniPCMultistepScheduler.from_config(config), "unipc", 9, 5.0)
    ours = Sampler(config, sampler="unipc", steps=9, shift=5.0)
    assert isinstance(ours._scheduler, UniPC)
    latents = expected = initial_noise(SHAPE, 1)
    for i, timestep in enumerate(theirs.timesteps):
        guess = prediction(i, expected).to(dtype)
        expected = theirs.step(guess, timestep, expected, return_dict=False)[0]
        latents = ours.step(prediction(i, latents).to(dtype), i, latents)
        assert torch.equal(latents, expected)


@pytest.mark.parametrize(
    "more",
    [
        {"thresholding": True}, {"predict_x0": False}, {"solver_type": "bh1"},
        {"lower_order_final": False}, {"disable_corrector": [0]}, {"use_karras_sigmas": True},
        {"beta_schedule": "scaled_linear"},
    ],
)  # fmt: skip
def test_what_else_a_config_asks_for_diffusers_does(more):
    made = Sampler(WAN_CONFIG | more, sampler="unipc", steps=4, shift=5.0)
    assert isinstance(made._scheduler, UniPCMultistepScheduler)


def test_the_requests_shift_replaces_the_folders():
    assert WAN_CONFIG["flow_shift"] == 3.0
    for sampler in SAMPLERS:
        middles = {shift: make(sampler, 9, shift).timesteps[4].item() for shift in (1.0, 3.0, 5.0)}
        assert middles[1.0] < middles[3.0] < middles[5.0]


def test_other_settings_of_the_folder_are_kept():
    config = WAN_CONFIG | {"solver_order": 3}
    latents = initial_noise(SHAPE, 1)
    third = Sampler(config, sampler="unipc", steps=8, shift=5.0)
    assert not torch.equal(run(third, latents), run(make(), latents))


def test_dynamic_shifting_in_a_foreign_config_is_switched_off():
    config = dict(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config)
    for sampler in SAMPLERS:
        made = Sampler(config, sampler=sampler, steps=4, shift=5.0)
        assert torch.equal(made.timesteps, make(sampler, 4).timesteps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_solver_stands_at_the_levels_of_the_rule(sampler):
    """Whatever the config of the folder says of spacing, and whatever diffusers is installed."""
    levels = noise_levels(sampler, 8, 5.0)
    odd = {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}
    for config in (WAN_CONFIG, {}, WAN_CONFIG | odd):
        made = Sampler(config, sampler=sampler, steps=8, shift=5.0)
        assert [made.sigma(i) for i in range(9)] == pytest.approx([*levels, 0.0], abs=1e-7)
        assert made.timesteps.tolist() == pytest.approx(timesteps(levels, sampler), rel=1e-7)


def test_a_config_of_other_timesteps_is_refused():
    with pytest.raises(CheckpointError, match="expected num_train_timesteps 1000, found 500"):
        Sampler(WAN_CONFIG | {"num_train_timesteps": 500}, sampler="unipc", steps=4, shift=5.0)


def test_repeated_timesteps_lose_no_step():
    sampler = make(steps=900)
    assert len(sampler.timesteps.unique()) < 900
    assert sampler.timesteps[0] == sampler.timesteps[1]
    run(sampler, initial_noise(SHAPE, 1), stop=2)
    assert sampler._scheduler.step_index == 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_state_after_any_step_continues_bit_identically(sampler):
    noise = initial_noise(SHAPE, 3)
    whole = run(make(sampler), noise)
    for k in range(9):
        first = make(sampler)
        latents = run(first, noise, stop=k)
        saved = copy.deepcopy(first.state())
        plain = json.loads(json.dumps(saved.values))
        second = make(sampler)
        second.load_state(SamplerState(plain, saved.tensors))
        assert second.next_step == k
        assert torch.equal(run(second, latents, start=k), whole)


@pytest.mark.parametrize(("sampler", "count"), [("unipc", 5), ("dpm++", 2), ("euler", 0)])
def test_the_state_is_the_solvers_complete_history(sampler, count):
    made = make(sampler)
    before = set(vars(made._scheduler))
    run(made, initial_noise(SHAPE, 3), stop=3)
    state = made.state()
    assert len(state.tensors) == count
    assert state.values["next_step"] == 3
    fresh = make(sampler)
    fresh.load_state(state)
    assert before <= set(vars(fresh._scheduler))
    for name, value in vars(made._scheduler).items():
        assert same(value, getattr(fresh._scheduler, name)), name


def same(left, right):
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.mark.parametrize("missing", ["model_outputs.0", "model_outputs.1", "last_sample.0"])
def test_each_tensor_of_the_state_matters(missing):
    noise = initial_noise(SHAPE, 3)
    first = make()
    latents = run(first, noise, stop=4)
    state = first.state()
    state.tensors[missing] = state.tensors[missing] + 1e-3
    second = make()
    second.load_state(state)
    assert not torch.equal(run(second, latents, start=4), run(first, latents, start=4))


def test_a_foreign_state_is_refused():
    state = make("unipc").state()
    for other in (make("dpm++"), make(steps=9), make(shift=3.0)):
        with pytest.raises(UsageError, match="other settings"):
            other.load_state(state)


def test_steps_are_taken_once_and_in_order():
    sampler = make(steps=2)
    latents = initial_noise(SHAPE, 0)
    with pytest.raises(UsageError, match="expected step 0 of 2, found step 1"):
        sampler.step(latents, 1, latents)
    latents = run(sampler, latents)
    with pytest.raises(UsageError, match="found step 2"):
        sampler.step(latents, 2, latents)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nan_and_inf_stop_at_that_step(sampler, value):
    made = make(sampler)
    latents = run(made, initial_noise(SHAPE, 0), stop=2)
    guess = prediction(2, latents)
    guess[0, 3, 1, 2, 2] = value
    with pytest.raises(NonFinite, match="after step 3 of 8.*1 of 768 bad"):
        made.step(guess, 2, latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.5, 5.0, 7.3])
def test_guidance_is_diffusers_expression_in_place(dtype, scale):
    noise_pred, noise_uncond = torch.randn(2, 4000).to(dtype)
    expected = noise_uncond + scale * (noise_pred - noise_uncond)
    guided = guide(noise_pred, noise_uncond, scale)
    assert guided.data_ptr() == noise_pred.data_ptr()
    assert torch.equal(guided, expected)


def test_noise_is_that_of_diffusers_with_a_cpu_generator():
    generator = torch.Generator("cpu").manual_seed(42)
    theirs = randn_tensor(SHAPE, generator=generator, device="cpu", dtype=torch.float32)
    ours = initial_noise(SHAPE, 42)
    assert torch.equal(ours, theirs)
    assert ours.dtype == torch.float32
    assert not torch.equal(ours, initial_noise(SHAPE, 43))


def test_drawing_noise_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    initial_noise(SHAPE, 1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_unknown_sampler_is_refused():
    with pytest.raises(UsageError, match=r"unipc or dpm\+\+ or euler"):
        make("ddim")


@pytest.mark.parametrize("sampler", ["unipc", "dpm++", "euler", "lcm"])
def test_what_a_solver_refuses_of_a_config_is_one_line(sampler):
    both = {"use_karras_sigmas": True, "use_exponential_sigmas": True}
    with pytest.raises(CheckpointError, match="scheduler config cannot be used") as caught:
        Sampler(both, sampler=sampler, steps=2, shift=5.0)
    assert "\n" not in str(caught.value)


def test_what_a_solver_cannot_follow_in_a_step_is_one_line():
    made = Sampler({"predict_x0": False}, sampler="unipc", steps=2, shift=5.0)
    noise = torch.randn(1, 4, 1, 2, 2)
    with pytest.raises(CheckpointError, match="flow_prediction"):
        made.step(noise, 0, noise)
