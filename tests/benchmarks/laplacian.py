"""Laplacians of scalar networks and divergences of their gradients, against double backward and against a probe."""

import torch
from timing import medians
from torch import Tensor, nn

from divflow.divergence import Exact, Hutchinson
from divflow.networks import MLPPotential
from divflow.operators import laplacian

Row = tuple[str, str, str, str]


def four_hidden(batch: int) -> list[Row]:
    """A potential of four hidden layers of 128, D = 64: its Laplacian, and the gradient of that in the parameters."""
    field, x, t = MLPPotential(64, (128,) * 4, activation=nn.Tanh), torch.randn(batch, 64), torch.tensor(0.3)

    def potential(x: Tensor) -> Tensor:
        return field.potential(t, x)

    def step(values: Tensor) -> None:
        values.square().mean().backward()

    with torch.no_grad():
        ways = {"forward": lambda: laplacian(potential, x), "dense": lambda: laplacian(potential, x, Exact())}
        quiet = _faster(medians(ways, 10.0))
    ways = {
        "forward": lambda: step(laplacian(potential, x)),
        "dense": lambda: step(laplacian(potential, x, Exact())),
    }
    what = f"D = 64, four hidden layers of 128, batch {batch}"
    return [
        (f"Laplacian of a potential, {what}", "dense double backward", "2.5 times faster", quiet),
        (
            f"the same and its gradient in the parameters, {what}",
            "dense double backward",
            "",
            _faster(medians(ways, 10.0)),
        ),
    ]


@torch.no_grad()
def two_hidden() -> list[Row]:
    """The gradient of a potential of two hidden layers of 256, D = 64, batch 32, in probes."""
    field, x, t = MLPPotential(64, (256, 256)), torch.randn(32, 64), torch.tensor(0.3)
    rows, weight = torch.randn(32 * 64, 256), torch.randn(256, 256)
    time = medians(
        {
            "forward": lambda: field.value_and_divergence(t, x),
            "probe": lambda: Hutchinson()(field, t, x),
            "dense": lambda: Exact("reverse")(field, t, x),
            "product": lambda: rows @ weight,
        },
        10.0,
    )
    forward, dense, product = (time[name] / time["probe"] for name in ("forward", "dense", "product"))
    found = f"**{forward:.1f}** ({product:.1f} of it one product, 2,048 x 256 by 256 x 256; by products {dense:.1f})"
    return [("gradient of a potential, D = 64, two hidden layers of 256, batch 32", "value and one probe", "3", found)]


def _faster(time: dict[str, float]) -> str:
    ratio = time["dense"] / time["forward"]
    return f"**{ratio:.1f}** ({1e3 * time['forward']:.1f} against {1e3 * time['dense']:.1f} ms)"
