"""Does a field treat the samples of a batch independently? Every batched trace supposes it."""

import copy

import torch
from torch import Tensor, nn

from divflow.divergence.field import Field, FieldError, as_time, checked_state, checked_value
from divflow.divergence.seeded import seeded

__all__ = ["accepts_sample_times", "check_field", "perturbed_copy"]


@torch.no_grad()
def check_field(g: Field, t: Tensor | float, x: Tensor) -> None:
    """Refuse a field that mixes the samples of a batch, or is no field at all.

    Every second sample is changed; the values at the others must stay as they were. A module is
    examined on a copy whose all-zero parameters are perturbed, since a last layer that starts at zero
    would hide what comes before it. Costs two evaluations; call it once before training.

    Args:
        g: the field.
        t: time, a scalar or `(k,)`.
        x: states `(k, *event)` such as the field will see.

    Raises:
        FieldError: samples are mixed (the message names the module where it can be known), or shape,
            dtype or device are wrong.
    """
    x = checked_state(x)
    t = as_time(t, x)
    if x.numel() == 0:
        checked_value(g(t, x.clone()), x)
        return
    if len(x) == 1:
        x = x.expand(2, *x.shape[1:])
        t = t if t.ndim == 0 else t.expand(2)
    field = perturbed_copy(g) if isinstance(g, nn.Module) else g
    noise = torch.Generator().manual_seed(0)
    changed = x.clone()
    changed[1::2] += torch.randn(changed[1::2].shape, generator=noise).to(x) * (1 + x.abs().max())
    before = _same_randomness(field, t, x)[0::2]
    after = _same_randomness(field, t, changed)[0::2]
    scale = before.abs().amax() + after.abs().amax()
    difference = (before - after).abs().amax()
    if difference > scale * torch.finfo(x.dtype).eps ** 0.5:
        raise FieldError(
            f"the field mixes the samples of a batch: changing some samples moved the values at others by up to "
            f"{difference.item():.3g}, so a trace over the batch would be wrong. {_remedy(g)}"
        )


@torch.no_grad()
def accepts_sample_times(g: Field, start: float, stop: float, x: Tensor) -> bool:
    """Whether `g(t, x)` with one time a sample, t `(k,)`, equals g at each of these times as a scalar.

    Many a network is written for a scalar t only; given `(k,)` it raises, or broadcasts t against the
    wrong dimension where k happens to fit. Costs three evaluations, on a copy of a module.
    """
    field = perturbed_copy(g) if isinstance(g, nn.Module) else g
    # States that are zero, or equal, would hide what t is broadcast against.
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    x = x + 0.01 * (1 + x.abs().max()) * noise
    times = torch.linspace(start, stop, len(x), dtype=x.dtype, device=x.device)
    try:
        together = _same_randomness(field, times, x)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:  # whatever it asserts of its times, by any type
        return False
    for row in (0, -1):
        alone = _same_randomness(field, times[row], x)[row]
        # False where a value is NaN, from which nothing can be told.
        if not (together[row] - alone).abs().max() <= together.abs().max() * torch.finfo(x.dtype).eps ** 0.5:
            return False
    return True


def _same_randomness(field: Field, t: Tensor, x: Tensor) -> Tensor:
    devices = [x.device] if x.is_cuda else []
    # Without autocast, whose rounding would hide small differences, or look like some.
    with seeded(0, devices), torch.autocast(x.device.type, enabled=False):
        return checked_value(field(t, x.clone()), x)


@torch.no_grad()
def perturbed_copy(module: nn.Module) -> nn.Module:
    """A copy whose all-zero parameters are not zero, so that a last layer that starts there hides nothing."""
    try:
        module = copy.deepcopy(module)
    except RuntimeError:  # it holds tensors with a history, as weight normalization does, which can't be copied
        return module
    noise = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.numel() and not parameter.any():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise).to(parameter))
    return module


def _remedy(g: Field) -> str:
    if isinstance(g, nn.Module):
        for name, module in g.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
                module.training or not module.track_running_stats
            ):
                return (
                    f"{name or 'The field'} is a {type(module).__name__} that normalizes over the batch: "
                    "use GroupNorm or LayerNorm, or put it in eval mode."
                )
    return "Look for normalization, attention or statistics taken over dimension 0."
