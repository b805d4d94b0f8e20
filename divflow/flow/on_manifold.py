"""Flows on manifolds: velocities made tangent, bases, and states brought back to the manifold after a solve."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from divflow.distributions import BaseError, standard_normal
from divflow.errors import listed_rows
from divflow.likelihood import Transport
from divflow.manifolds import Manifold, ManifoldError, TangentField
from divflow.operators.context import Context
from divflow.operators.field import flatten_event
from divflow.solver import SolverError

__all__ = ["arrived", "based_on", "check_period", "landed", "on_manifold"]

# How far from the manifold a solve may end, relative to the largest entry of the state.
_MOST = 0.05
# Samples by which a base is tested.
_SAMPLES = 16


def on_manifold(
    velocity: Callable[..., Tensor], manifold: Manifold | None, event_shape: Size
) -> tuple[Callable[..., Tensor], Manifold | None]:
    """Return a flow's velocity, made tangent to the manifold if there is one, and the manifold.

    Args:
        velocity: a module or function, or a `TangentField`, whose manifold is taken if none is given.
        manifold: of the flow's states, or None.
        event_shape: of the flow.

    Raises:
        ManifoldError: no manifold, one of another shape, or a velocity on another one.
    """
    if isinstance(velocity, TangentField):
        if manifold is not None and manifold != velocity.manifold:
            raise ManifoldError(
                f"the flow's manifold is {manifold}, but the velocity is a field on {velocity.manifold}"
            )
        manifold, velocity = velocity.manifold, velocity.divflow_nearby
    elif manifold is not None:
        velocity = TangentField(velocity, manifold, checked=False)
    if manifold is not None and manifold.event_shape != event_shape:
        raise ManifoldError(
            f"points of {manifold} have shape {tuple(manifold.event_shape)}, but the flow has event_shape={tuple(event_shape)}"
        )
    return velocity, manifold


def based_on(manifold: Manifold | None, base: Distribution | None, event_shape: Size, **settings: Any) -> Distribution:
    """Return a flow's base density: the one given, or the manifold's, or the standard normal.

    Args:
        manifold: of the flow's states, or None.
        base: given, or None.
        event_shape: of the flow.
        **settings: dtype and device of a base that is made.

    Raises:
        BaseError: a base whose samples are not on the manifold.
    """
    if manifold is None:
        return standard_normal(event_shape, **settings) if base is None else base
    if base is None:
        return manifold.base(settings.get("dtype"))
    if isinstance(base, Distribution):
        _check_base(base, manifold)
    return base


def _check_base(base: Distribution, manifold: Manifold) -> None:
    of = getattr(base, "manifold", manifold)
    try:
        if of != manifold:
            raise ManifoldError(f"it is a density on {of}")
        with torch.random.fork_rng(devices=[]):
            manifold.check(base.sample(Size([_SAMPLES])))
    except ManifoldError as error:
        raise BaseError(
            f"the base is no density on {manifold}, the flow's manifold: {error}. Take {manifold}.uniform() or .wrapped_normal(mean, std)."
        ) from error


def arrived(manifold: Manifold | None, carried: Transport) -> Transport:
    """Bring the states of a transport back to the manifold, if there is one.

    Args:
        manifold: of the flow.
        carried: the transport.
    """
    if manifold is None:
        return carried
    state, off = landed(manifold, carried.state)
    finer = carried.finer
    if finer is not None:
        finer = finer._replace(state=manifold.project(finer.state))
    return carried._replace(state=state, finer=finer, off_manifold=off)


def landed(manifold: Manifold, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the closest points of the manifold to states after a solve, and how far the states were, `(k,)`.

    Args:
        manifold: of the flow.
        states: `(k, *event)`.

    Raises:
        SolverError: they are far from it, so that the steps were too long.
    """
    if not states.numel():
        return states, states.new_zeros(len(states))
    off = manifold.off(states.detach())
    size = flatten_event(states.detach()).abs().amax(dim=1)
    far = off > _MOST * size
    if far.any():
        raise SolverError(
            f"the solve leaves {manifold} by up to {off[far].max():.3g} ({listed_rows(far)}); take smaller steps or tolerances, such as "
            "Solver(rtol=1e-6, atol=1e-6)"
        )
    return manifold.project(states), off


def check_period(velocity: Callable[..., Tensor], t: float, x: Tensor, context: Context | None) -> None:
    """Refuse a velocity on a torus without its period; `TangentField.check_period`.

    Args:
        velocity: of a flow.
        t: a time.
        x: states `(k, *event)`.
        context: one row per sample, or None.
    """
    if isinstance(velocity, TangentField):
        velocity.check_period(t, x.detach(), *(() if context is None else (context,)))
