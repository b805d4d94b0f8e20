"""Networks of diffusers: log p of a mixture in closed form, for every prediction type and schedule; digits to bits/dim."""

import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from covering import alternated
from gaussian_mixtures import Mixture, over
from torch import Generator, nn

from divflow.adapters import AdapterError, from_diffusers
from divflow.data import Digits
from divflow.divergence import Hutchinson
from divflow.likelihood import Quadrature
from divflow.solver import Solver

EVENTS = [(2, 1, 1), (1, 4, 4)]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SCHEDULERS = {
    "DDPM": lambda kind: diffusers.DDPMScheduler(prediction_type=kind),
    "DDPM, zero terminal SNR": lambda kind: diffusers.DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=True),
    "Euler, zero terminal SNR": lambda kind: diffusers.EulerDiscreteScheduler(
        prediction_type=kind, rescale_betas_zero_snr=True
    ),
    "DPM-Solver, zero terminal SNR": lambda kind: diffusers.DPMSolverMultistepScheduler(
        prediction_type=kind, rescale_betas_zero_snr=True
    ),
    "UniPC, zero terminal SNR": lambda kind: diffusers.UniPCMultistepScheduler(
        prediction_type=kind, rescale_betas_zero_snr=True
    ),
    "DDIM, cosine": lambda kind: diffusers.DDIMScheduler(prediction_type=kind, **COSINE),
    "Euler": lambda kind: diffusers.EulerDiscreteScheduler(
        prediction_type=kind, beta_start=0.0001, beta_end=0.02, use_karras_sigmas=True
    ),
    "own betas": lambda kind: diffusers.DDPMScheduler(
        40, prediction_type=kind, trained_betas=np.linspace(0.001, 0.9, 40).tolist()
    ),
}


def log_sigmas(scheduler):
    signal = scheduler.alphas_cumprod.double().numpy()
    signal = signal[(signal > 0) & (np.diff(signal, prepend=1) < 0)]  # of which 2^-24, in place of zero, is the last
    return np.log((1 - signal) / signal) / 2


class Trained(nn.Module):
    """What a network trained to the optimum predicts for data shifted by a context, at any fraction of a step."""

    def __init__(self, data, scheduler):
        super().__init__()
        self.data, self.kind, self.levels = data, scheduler.config.prediction_type, log_sigmas(scheduler)
        self.seen = []

    def forward(self, sample, timestep, shift=None):
        self.seen.append(timestep)
        shift = torch.zeros((), dtype=sample.dtype) if shift is None else over(shift, sample)
        s = np.interp(timestep.detach().numpy(), np.arange(len(self.levels)), self.levels)
        sigma = torch.as_tensor(np.exp(s))
        alpha = 1 / (1 + sigma**2).sqrt()
        beta = sigma * alpha
        mean, noise = self.data.predictions(sample - over(alpha, sample) * shift, alpha, beta)
        mean = mean + shift
        velocity = over(alpha, sample) * noise - over(beta, sample) * mean
        return SimpleNamespace(sample={"epsilon": noise, "sample": mean, "v_prediction": velocity}[self.kind])


class Interpolating(nn.Module):
    """What a network trained to match flows predicts: noise - data, at (1 - sigma) data + sigma noise."""

    def __init__(self, data, inverted=False):
        super().__init__()
        self.data, self.inverted = data, inverted

    def forward(self, sample, timestep):
        sigma = timestep / 1000
        if self.inverted:
            mean, noise = self.data.predictions(sample, sigma, 1 - sigma)
            return mean - noise
        mean, noise = self.data.predictions(sample, 1 - sigma, sigma)
        return noise - mean


NOISES = {f"DDPM, {kind}": ("DDPM", kind) for kind in PREDICTIONS}
NOISES |= {name: (name, PREDICTIONS[i % 3]) for i, name in enumerate(SCHEDULERS) if name != "DDPM"}


@alternated(noise=NOISES, event=EVENTS)
def test_log_prob_of_a_mixture(noise, event):
    name, kind = NOISES[noise]
    data, scheduler = Mixture(event), SCHEDULERS[name](kind)
    x, blur = data.sample(3), math.exp(log_sigmas(scheduler)[0])
    result = from_diffusers(Trained(data, scheduler), scheduler, event).evaluate(x)
    torch.testing.assert_close(result.log_prob, data.log_prob(x, blur), rtol=0, atol=1e-3)
    assert result.quadrature_error.max() < 1e-3
    assert (result.standard_error == 0).all()


def test_each_step_is_at_its_noise_level():
    scheduler = diffusers.DDPMScheduler()
    model = Trained(Mixture((2, 1, 1)), scheduler)
    flow = from_diffusers(model, scheduler, (2, 1, 1))
    levels, steps = log_sigmas(scheduler), np.array([0, 1, 500, 998, 999])
    flow.velocity(torch.as_tensor(levels[steps]), torch.zeros(5, 2, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(model.seen[-1], torch.as_tensor(steps, dtype=torch.float64))
    between = torch.tensor((levels[7] + levels[8]) / 2)
    flow.velocity(between, torch.zeros(5, 2, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(model.seen[-1], torch.tensor(7.5, dtype=torch.float64))


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_context_shifts_the_data(kind):
    event, scheduler = (1, 2, 2), diffusers.DDPMScheduler(prediction_type=kind, **COSINE)
    data, shift = Mixture(event), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    x, blur = data.sample(3), math.exp(log_sigmas(scheduler)[0])
    for name in (None, "shift"):
        flow = from_diffusers(
            Trained(data, scheduler), scheduler, event, context_name=name, solver=Solver(rtol=1e-5, atol=1e-5)
        )
        torch.testing.assert_close(flow.log_prob(x + over(shift, x), shift), data.log_prob(x, blur), rtol=0, atol=1e-3)


INTERPOLATED = {
    "euler": (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), False),
    "dynamic": (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), False),
    "inverted": (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), True),
    "heun": (diffusers.FlowMatchHeunDiscreteScheduler(), False),
    "unipc": (diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), False),
}


@alternated(name=INTERPOLATED, event=EVENTS)
def test_flow_matching_schedulers(name, event):
    (scheduler, inverted), data = INTERPOLATED[name], Mixture(event)
    x = data.sample(3)
    flow = from_diffusers(Interpolating(data, inverted), scheduler, event)
    torch.testing.assert_close(flow.log_prob(x), data.log_prob(x), rtol=0, atol=1e-3)


class Points(nn.Module):
    """Data at one point, c for the condition c: the mean of the data is c itself."""

    def forward(self, sample, timestep, centre):
        return over(centre, sample).expand_as(sample)


def test_guidance_moves_the_density():
    """Guided by w from data at 1 away from data at -1, they are at -1 + 2 w, with noise of sigma_0."""
    scheduler, x = diffusers.DDPMScheduler(prediction_type="sample", **COSINE), torch.randn(3, 2, 1, 1).double()
    blur, centre = math.exp(log_sigmas(scheduler)[0]), torch.ones(3, dtype=torch.float64)
    settings = {"likelihood": Quadrature(tolerance=1e-4), "solver": Solver(rtol=1e-7, atol=1e-7)}
    plain = from_diffusers(Points(), scheduler, (2, 1, 1), **settings)
    for w in (1.0, 2.5):
        guided = from_diffusers(Points(), scheduler, (2, 1, 1), guidance_scale=w, unconditional=-centre[:1], **settings)
        z = 2 * w - 1 + blur * x
        expected = torch.distributions.Normal(2 * w - 1, blur).log_prob(z).flatten(1).sum(dim=1)
        torch.testing.assert_close(guided.log_prob(z, centre), expected, rtol=0, atol=1e-3)
        assert torch.equal(guided.log_prob(z, centre), plain.log_prob(z, centre)) == (w == 1)
    with pytest.raises(AdapterError, match="needs a condition"):
        guided.log_prob(x)


def test_learned_variances_are_left_out():
    class Both(Trained):
        def forward(self, sample, timestep):
            prediction = super().forward(sample, timestep).sample
            return torch.cat([prediction, torch.full_like(prediction, torch.nan)], dim=1)

    event, scheduler = (2, 1, 1), diffusers.DDPMScheduler(variance_type="learned_range")
    data = Mixture(event)
    x = data.sample(2)
    flow = from_diffusers(Both(data, scheduler), scheduler, event)
    torch.testing.assert_close(flow.log_prob(x), data.log_prob(x, 0.01), rtol=0, atol=1e-3)


def test_samples_are_near_the_data():
    scheduler = diffusers.DDPMScheduler()
    data = Mixture((2, 1, 1))
    flow = from_diffusers(Trained(data, scheduler), scheduler, (2, 1, 1)).double()
    samples = flow.sample(400, generator=Generator().manual_seed(0))
    entropy, error = -data.log_prob(data.sample(20_000)).mean(), data.log_prob(samples).std() / 20
    assert abs(-data.log_prob(samples).mean() - entropy) < 4 * error


def test_diffusers_own_sampler_solves_the_same_ode():
    """DDIM without noise (Song et al. 2020), a thousand steps of first order, ends where the flow ends."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    model = Trained(Mixture((2, 1, 1)), scheduler)
    sample = start = torch.randn(5, 2, 1, 1, dtype=torch.float64)
    scheduler.set_timesteps(1000)
    for step in scheduler.timesteps[:-1]:
        sample = scheduler.step(model(sample, step).sample, step, sample).prev_sample
    flow = from_diffusers(model, scheduler, (2, 1, 1))
    sigma = math.exp(log_sigmas(scheduler)[0])
    torch.testing.assert_close(
        flow.decode(start * math.hypot(1, sigma)), sample * math.hypot(1, sigma), rtol=0, atol=5e-3
    )


def test_diffusers_own_flow_sampler_solves_the_same_ode():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    model = Interpolating(Mixture((2, 1, 1)))
    sample = start = torch.randn(5, 2, 1, 1, dtype=torch.float64)
    scheduler.set_timesteps(1000)
    for step in scheduler.timesteps:
        sample = scheduler.step(model(sample, step.double()), step, sample).prev_sample.double()
    torch.testing.assert_close(from_diffusers(model, scheduler, (2, 1, 1)).decode(start), sample, rtol=0, atol=1e-2)


def small_unet(**settings):
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False, **settings,
    )  # fmt: skip


QUICK = {"estimator": Hutchinson(1), "likelihood": Quadrature(15), "solver": Solver(rtol=1e-3, atol=1e-3)}


@pytest.mark.parametrize("network", ["class labels", "encoder hidden states"])
def test_conditions_of_real_networks(network):
    if network == "class labels":
        model, contexts = small_unet(num_class_embeds=3), torch.tensor([0, 1, 1])
    else:
        model = diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
            norm_num_groups=4, cross_attention_dim=4, attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        contexts = torch.tensor([0.0, 1.0, 1.0])[:, None, None].expand(3, 2, 4)
    flow = from_diffusers(model.eval(), diffusers.DDPMScheduler(), (1, 8, 8), **QUICK)
    latents = flow.encode(torch.ones(3, 1, 8, 8), contexts)
    torch.testing.assert_close(latents[1], latents[2])
    assert (latents[0] - latents[1]).abs().max() > 1e-3
    with pytest.raises(AdapterError, match=r"unet\(sample, timestep\).*no context"):
        flow.log_prob(torch.ones(3, 1, 8, 8))


@pytest.mark.slow  # `test_examples.py` trains one for two steps
def test_digits_to_bits_per_dimension():
    """A network is trained by diffusers' own scheduler; then its bits/dim of digits are below those of a uniform law."""
    digits, scheduler = Digits((1, 8, 8)), diffusers.DDPMScheduler()
    model = small_unet()
    x, log_det = digits.transform(digits.test.__getitems__(list(range(8))))
    bits = []
    for steps in (0, 60):
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(steps):
            images, _ = digits.transform(digits.train.__getitems__(torch.randint(1400, (64,)).tolist()))
            noise, times = torch.randn_like(images), torch.randint(1000, (len(images),))
            optimizer.zero_grad()
            prediction = model(scheduler.add_noise(images, noise, times), times).sample
            (prediction - noise).square().mean().backward()
            optimizer.step()
        flow = from_diffusers(model.eval(), scheduler, (1, 8, 8), **QUICK)
        nats = flow.log_prob(x, generator=Generator().manual_seed(0)) + log_det
        bits.append(-nats.mean().item() / 64 / math.log(2) + math.log2(digits.levels))
        model.train()
    assert all(math.isfinite(value) for value in bits)
    assert 2 < bits[1] < math.log2(digits.levels) < bits[0]


LINEAR = torch.linspace(0.99, 0.01, 10)
REFUSED = {
    "nothing": (SimpleNamespace(), "neither alphas_cumprod.*FlowMatchEuler"),
    "EDM": (diffusers.EDMEulerScheduler(), "EDMEulerScheduler.*from_denoiser"),
    "prediction": (
        SimpleNamespace(alphas_cumprod=LINEAR, config=SimpleNamespace(prediction_type="x0")),
        "prediction_type.*'x0'",
    ),
    "no config": (SimpleNamespace(alphas_cumprod=LINEAR), "prediction_type.*None"),
    "rising": (
        SimpleNamespace(alphas_cumprod=LINEAR.flip(0), config=SimpleNamespace(prediction_type="sample")),
        "decreasing",
    ),
    "one step": (
        SimpleNamespace(alphas_cumprod=LINEAR[:1], config=SimpleNamespace(prediction_type="sample")),
        "alphas_cumprod",
    ),
    "NaN": (
        SimpleNamespace(alphas_cumprod=LINEAR * torch.nan, config=SimpleNamespace(prediction_type="sample")),
        "alphas_cumprod",
    ),
    "no number of steps": (
        SimpleNamespace(sigmas=LINEAR, config=SimpleNamespace(shift=1.0)),
        "num_train_timesteps.*None",
    ),
    "continuous": (
        diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
        "timestep_type='continuous'.*from_denoiser",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_schedulers_are_checked(name):
    scheduler, message = REFUSED[name]
    with pytest.raises(AdapterError, match=message):
        from_diffusers(lambda sample, timestep: sample, scheduler, (1, 2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 2.0}, "unconditional is None"),
        ({"guidance_scale": "2"}, "guidance_scale.*'2'"),
        ({"unconditional": torch.zeros(2, 3)}, r"one row \(1, ...\)"),
    ],
)
def test_guidance_is_checked(arguments, message):
    with pytest.raises(AdapterError, match=message):
        from_diffusers(lambda sample, timestep: sample, diffusers.DDPMScheduler(), (1, 2, 2), **arguments)


def test_channels_are_checked():
    with pytest.raises(AdapterError, match=r"1 channels.*\(3, 8, 8\)"):
        from_diffusers(small_unet(), diffusers.DDPMScheduler(), (3, 8, 8))


def test_sizes_that_the_network_can_not_take():
    flow = from_diffusers(small_unet(), diffusers.DDPMScheduler(), (1, 7, 7), **QUICK)
    with pytest.raises(AdapterError, match="image size"):
        flow.log_prob(torch.zeros(1, 1, 7, 7))
