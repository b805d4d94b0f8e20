"""Exact divergences on manifolds: time against forward passes, probes and `vmap(jacrev)` in a frame of the tangent space."""

import torch
from timing import medians
from torch import Tensor

from divflow.divergence import Exact, Hutchinson
from divflow.manifolds import Manifold, SpecialOrthogonal, Sphere, TangentField, Torus
from divflow.networks import MLP

Row = tuple[str, str, str, str]

SPACES: dict[str, Manifold] = {"S^2": Sphere(2), "S^15": Sphere(15), "T^7": Torus(7), "SO(3)": SpecialOrthogonal()}
BATCH = 512


def in_a_frame(field: TangentField, t: Tensor, x: Tensor) -> Tensor:
    """The way of a textbook: the Jacobian of v(t, pi(x)), whose trace is that over a frame."""

    def one(y: Tensor) -> Tensor:
        return field(t, y[None])[0].flatten()

    jacobian = torch.func.vmap(torch.func.jacrev(one))(x).flatten(2)
    return jacobian.diagonal(dim1=1, dim2=2).sum(dim=1)


@torch.no_grad()
def exact() -> list[Row]:
    """Two and three hidden layers of 256, batch 512."""
    rows, t = [], torch.tensor(0.3)
    for name, manifold in SPACES.items():
        for layers in (2, 3):
            torch.manual_seed(0)
            field = TangentField(MLP(tuple(manifold.event_shape), (256,) * layers), manifold)
            x = manifold.uniform().sample((BATCH,))
            time = medians(
                {
                    "forward": lambda field=field, x=x: field(t, x),
                    "divflow": lambda field=field, x=x: Exact()(field, t, x),
                    "probe": lambda field=field, x=x: Hutchinson()(field, t, x),
                    "jacrev": lambda field=field, x=x: in_a_frame(field, t, x),
                },
                8.0,
            )
            what = f"divergence on {name}, {layers} hidden layers of 256, batch {BATCH}, {Exact().explain(field, t, x).method}"
            for unit in ("forward pass", "value and one probe"):
                ratio = time["divflow"] / time[unit.split()[-1].replace("pass", "forward")]
                rows.append((what, unit, "", f"{ratio:.2f} of them"))
            rows.append((what, "`vmap(jacrev)`", "", f"**{time['jacrev'] / time['divflow']:.1f}** times faster"))
    return rows


@torch.no_grad()
def probes() -> list[Row]:
    """The variance of probes of the ambient space over that of tangent ones, the mean of five networks at four points each."""
    rows, draws = [], 4_000
    for name, manifold in SPACES.items():
        if manifold.flat:
            continue
        ratios = []
        for seed in range(5):
            torch.manual_seed(seed)
            field = TangentField(MLP(tuple(manifold.event_shape), (256, 256)), manifold)
            x = manifold.uniform().sample((4,)).repeat_interleave(draws, 0)
            ambient = Hutchinson()(lambda t, y, field=field: field(t, y), 0.3, x).divergence
            tangent = Hutchinson()(field, 0.3, x).divergence
            ratios.append((ambient.view(4, -1).var(1) / tangent.view(4, -1).var(1)).mean())
        what = f"variance on {name}, tangent probes"
        rows.append((what, "ambient probes", "", f"**{torch.stack(ratios).mean():.1f}** times lower"))
    return rows
