"""Networks trained with a noise schedule of Hugging Face's diffusers, called as unet(sample, timestep)."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from divflow.adapters.denoiser import PREDICTIONS, Scaling, denoising_flow
from divflow.adapters.foreign import AdapterError, Foreign, adapted_flow
from divflow.divergence import Estimator
from divflow.errors import checked_event_shape
from divflow.flow import ContinuousFlow
from divflow.likelihood import Likelihood
from divflow.operators.context import Context
from divflow.solver import Solver

__all__ = ["from_diffusers"]


def from_diffusers(
    unet: Callable[..., Any],
    scheduler: Any,
    event_shape: Sequence[int],
    *,
    guidance_scale: float = 1.0,
    unconditional: Tensor | None = None,
    context_name: str | None = None,
    estimator: Estimator | None = None,
    likelihood: Likelihood | None = None,
    solver: Solver | None = None,
    data_range: tuple[float, float] | None = None,
) -> ContinuousFlow:
    """Make a flow of a network trained with a scheduler of diffusers, called as `unet(sample, timestep, context)`.

    **Schedulers with `alphas_cumprod`** (DDPM, DDIM, DPM-Solver, Euler, ...; Ho et al. 2020, arXiv:2006.11239): step i has noise
    sigma_i = sqrt((1 - abar_i) / abar_i) in y = sample / sqrt(abar_i). The time of the flow is s = log sigma:

        dy/ds = y - D,   sample = y / sqrt(1 + sigma^2),   timestep = the fractional i at which log sigma_i is s

    log sigma is linear between steps, as in diffusers' `EulerDiscreteScheduler`; networks embed times as floats. D, the mean of
    the data given y, follows from the network's output f by the scheduler's `prediction_type` (Ho et al., equation
    15; Salimans & Ho 2022, arXiv:2202.00512, section 4):

        epsilon         D = y - sigma f                                        dy/ds = sigma f
        v_prediction    D = y / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) f    dy/ds = (sigma^2 y + sigma sqrt(1 + sigma^2) f) / (1 + sigma^2)
        sample          D = f                                                  dy/ds = y - f

    - The flow is solved for y scaled as in `from_denoiser`.
    - The density is that of the data with noise of sigma_0 (0.01 with DDPM's linear betas), in their own scale.
    - The base, at the last step, is where samplers start: a standard normal sample, y ~ N(0, (1 + sigma_T^2) I). A last step
      without any signal is left out.
    - Samplers that clip or threshold have another density, or none.

    **Schedulers of flow matching** (`FlowMatchEulerDiscreteScheduler`; Esser et al. 2024, arXiv:2403.03206): the sample is
    (1 - sigma) data + sigma noise. The time of the flow is sigma itself, from a standard normal at 1 to the data at 0:

        dx/dsigma = f,   timestep = num_train_timesteps * sigma

    whatever `shift` a sampler chooses its sigmas by. (With `invert_sigmas` noise is at 0 and data at 1.)

    **The context** is the network's third argument: class labels for `UNet2DModel`, the hidden states of an encoder for
    `UNet2DConditionModel`. The density of latents is not that of the images decoded from them.

    Args:
        unet: network of diffusers, or any `unet(sample, timestep)` that returns a tensor or an object with `.sample`.
        scheduler: scheduler of its training.
        event_shape: `(channels, height, width)`.
        guidance_scale: w of classifier-free guidance, f(no condition) + w (f(condition) - f(no condition)) (Ho & Salimans
            2022, arXiv:2207.12598). For w other than 1 the density is that of guided samples of this ODE. It is neither the
            model's conditional density nor a power of it, because no noisy data have the guided field.
        unconditional: context of one row, `(1, ...)`, for no condition.
        context_name: name of the network's argument for the context, if it is not the third.
        estimator: of the divergence; `Exact()` if None, which takes as many products as dimensions. Use `Hutchinson(1)` for images
            of more than a few hundred.
        likelihood: `Quadrature(tolerance=1e-3)` if None.
        solver: of the trajectory; `Solver(rtol=1e-6, atol=1e-6)` if None.
        data_range: least and largest values of the training data, (-1, 1) for most models of images.

            - It is kept as `flow.data_range`; data in other units raise a warning, and `divflow evaluate` converts images to it.
            - `FlowDensity(flow, Affine.between((0, 1), flow.data_range))` is the density of data in [0, 1].

    Returns:
        The flow, from noise at t_base to data at t_data.

    Raises:
        ValueError: data_range is not a range.
        AdapterError: the scheduler or its prediction type is not supported; the network has another number of channels, takes its
            arguments in the other order, returns another shape, or has dropout or batch normalization in training mode;
            or guidance is asked for without `unconditional`.
    """
    shape = checked_event_shape(event_shape)
    settings: dict[str, Any] = {
        "estimator": estimator,
        "likelihood": likelihood,
        "solver": solver,
        "data_range": data_range,
    }
    guidance = guidance_scale, unconditional, context_name
    prediction = _prediction_type(scheduler)
    if prediction == "flow_prediction":
        model = _UNet(unet, scheduler, _Interpolation(scheduler), shape, *guidance)
        inverted = bool(_setting(scheduler, "invert_sigmas"))
        t_base, t_data = (0.0, 1.0) if inverted else (1.0, 0.0)
        return adapted_flow(model, model, shape, base=None, t_base=t_base, t_data=t_data, **settings)
    model = _UNet(unet, scheduler, _NoiseLevels(scheduler.alphas_cumprod), shape, *guidance)
    # A sample of variance one is y / sqrt(1 + sigma^2), whatever sigma is.
    scaling, base_std = Scaling(1.0, model.times[0]), math.hypot(1, math.exp(model.times[1]))
    return denoising_flow(model, prediction, scaling, shape, base_std, **settings)


# Value that Euler's, DPM-Solver's and UniPC's schedulers use in place of zero, by which they would divide, at a last step without
# any signal (rescale_betas_zero_snr); it exceeds the signal of the step before.
_FOR_ZERO = 2**-24


class _NoiseLevels(nn.Module):
    """Noise levels of a schedule's steps, sigma_i = sqrt((1 - abar_i) / abar_i), and its steps as a function of them.

    Steps without any noise or any signal have no log sigma and are left out.

    Args:
        alphas_cumprod: abar_i, `(steps,)`, the share of the signal in the variance at step i, decreasing.
    """

    log_sigmas: Tensor

    def __init__(self, alphas_cumprod: Tensor) -> None:
        super().__init__()
        signal = torch.as_tensor(alphas_cumprod, device="cpu").detach().double()
        if signal.ndim == 1 and signal[-1:].tolist() == [_FOR_ZERO]:
            signal = torch.cat([signal[:-1], signal.new_zeros(1)])
        steps = ((signal > 0) & (signal < 1)).nonzero().flatten()
        if signal.ndim != 1 or len(steps) < 2 or not bool((signal.diff() < 0).all()):
            raise AdapterError(
                "the scheduler's alphas_cumprod must be a decreasing vector of numbers in [0, 1], the share of the signal at "
                f"each step, but is {alphas_cumprod!r}"
            )
        self.first_step = int(steps[0])
        self.register_buffer("log_sigmas", ((1 - signal[steps]) / signal[steps]).log() / 2, persistent=False)
        self.times = self.log_sigmas[0].item(), self.log_sigmas[-1].item()
        self.scale = math.hypot(1, math.exp(self.times[0]))  # of the flow's state z, a sample's at sigma = 0 being 1

    def arguments(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sample of a variance of one, and its step."""
        known = self.log_sigmas.to(t)
        above = torch.searchsorted(known, t.detach().contiguous()).clamp(1, len(known) - 1)
        low, high = known[above - 1], known[above]
        step = self.first_step + above - 1 + (t - low) / (high - low)
        return x / self.scale, step


class _Interpolation(nn.Module):
    """Noise levels of (1 - sigma) data + sigma noise, and its steps."""

    times = 0.0, 1.0

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.steps = _setting(scheduler, "num_train_timesteps")
        if not isinstance(self.steps, Real):
            raise AdapterError(f"the scheduler's config.num_train_timesteps must be a number, but is {self.steps!r}")

    def arguments(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sample, and its step."""
        return x, self.steps * t


class _UNet(Foreign):
    """A network of diffusers, guided or not, as a function of the flow's time and state."""

    signature = "unet(sample, timestep)"
    schedule: "_NoiseLevels | _Interpolation"
    guidance_scale: float
    unconditional: Tensor | None
    learns_variance: bool

    def __init__(
        self,
        model: Callable[..., Any],
        scheduler: Any,
        schedule: _NoiseLevels | _Interpolation,
        event_shape: tuple[int, ...],
        guidance_scale: float,
        unconditional: Tensor | None,
        context_name: str | None,
    ) -> None:
        super().__init__(model, schedule.times, context_name)
        channels = _setting(model, "in_channels")
        if channels is not None and event_shape[:1] != (channels,):
            raise AdapterError(
                f"the network takes {channels} channels, but the event shape is {event_shape}. Give the event shape ({channels}, height, width)"
            )
        if not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
            raise AdapterError(f"guidance_scale must be a number, 1 for no guidance, but is {guidance_scale!r}")
        given = isinstance(unconditional, Tensor) and unconditional.shape[:1] == (1,)
        if not given and (guidance_scale != 1 or unconditional is not None):
            raise AdapterError(
                f"guidance needs a context that stands for no condition, one row (1, ...), but unconditional is {unconditional!r}. Give the "
                "null class or the embedding of an empty prompt"
            )
        self.schedule, self.guidance_scale = schedule, guidance_scale
        self.register_buffer("unconditional", unconditional, persistent=False)
        # Networks that learn variances return them as further channels.
        self.learns_variance = str(_setting(scheduler, "variance_type")).startswith("learned")

    def arguments(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sample and timestep by the schedule."""
        return self.schedule.arguments(t, x)

    def known_context(self, count: int) -> Tensor | None:
        """The unconditional context, if it is given."""
        return None if self.unconditional is None else self.unconditional.expand(count, *self.unconditional.shape[1:])

    def call(self, state: Tensor, time: Tensor, context: Context | None) -> Tensor:
        """The prediction: with guidance, that of no condition and `guidance_scale` times what the condition adds."""
        if self.guidance_scale == 1:
            return self._prediction(state, time, context)
        if context is None:
            raise AdapterError(
                "guidance needs a condition, but no context was given. Give one, as log_prob(x, context)"
            )
        conditional = self._prediction(state, time, context)
        plain = self._prediction(state, time, self.known_context(len(state)))
        return plain + self.guidance_scale * (conditional - plain)

    def _prediction(self, state: Tensor, time: Tensor, context: Context | None) -> Tensor:
        output = super().call(state, time, context)
        prediction = output if isinstance(output, Tensor) else getattr(output, "sample", output)
        if self.learns_variance and isinstance(prediction, Tensor):
            prediction = prediction[:, : state.shape[1]]
        return prediction


def _prediction_type(scheduler: Any) -> str:
    """What networks of this scheduler predict: one of `PREDICTIONS`, or "flow_prediction"."""
    prediction = _setting(scheduler, "prediction_type")
    matches_flows = hasattr(scheduler, "sigmas") and not hasattr(scheduler, "alphas_cumprod")
    if prediction == "flow_prediction" or (matches_flows and _setting(scheduler, "shift") is not None):
        return "flow_prediction"
    if not hasattr(scheduler, "alphas_cumprod"):
        raise AdapterError(
            f"a {type(scheduler).__name__} has neither alphas_cumprod, as DDPMScheduler has, nor the sigmas of a "
            "FlowMatchEulerDiscreteScheduler. For EDM and other networks, give the function D(x, sigma) to from_denoiser"
        )
    if prediction not in PREDICTIONS:
        raise AdapterError(
            f"the scheduler's config.prediction_type must be one of {sorted(PREDICTIONS)} or 'flow_prediction', but is "
            f"{prediction!r}"
        )
    if _setting(scheduler, "timestep_type") == "continuous":
        raise AdapterError(
            "timestep_type='continuous' means EDM's preconditioning, whose timestep is log sigma / 4. Give the function "
            "D(x, sigma) of such a network to from_denoiser"
        )
    return str(prediction)


def _setting(owner: object, name: str) -> Any:
    return getattr(getattr(owner, "config", None), name, None)
