"""What following a field costs in Python: the time of a call beside that of the plain forward pass, one thread, batch 32.

python tests/benchmarks/following.py
"""

import torch
from timing import medians
from torch import nn

from divflow.divergence import divergence

Row = tuple[str, str, str, str]


def network(size: int, hidden: int, layers: int, norm: bool = False) -> nn.Module:
    """Linear layers with tanh between, and maybe a layer normalization before it."""
    parts: list[nn.Module] = [nn.Linear(size, hidden)]
    for layer in range(layers):
        parts += [nn.LayerNorm(hidden)] * norm + [nn.Tanh()]
        parts += [nn.Linear(hidden, hidden)] * (layer < layers - 1)
    return nn.Sequential(*parts, nn.Linear(hidden, size))


CASES = {
    "2 hidden layers of 64, D = 2": lambda: (network(2, 64, 2), 2),
    "2 hidden layers of 128 with LayerNorm, D = 16": lambda: (network(16, 128, 2, norm=True), 16),
    "4 hidden layers of 128, D = 64": lambda: (network(64, 128, 4), 64),
}


def calls(seconds: float = 8.0) -> list[Row]:
    """Value and divergence with grad off and on, in forward passes."""
    torch.set_num_threads(1)
    rows = []
    for what, make in CASES.items():
        net, size = make()
        x = torch.randn(32, size)

        def value(grad: bool, net: nn.Module = net, x: torch.Tensor = x) -> None:
            with torch.set_grad_enabled(grad):
                net(x)

        def both(grad: bool, net: nn.Module = net, x: torch.Tensor = x) -> None:
            with torch.set_grad_enabled(grad):
                divergence(lambda t, z: net(z), 0.3, x)

        for _ in range(70):  # past the calls that are verified
            both(False)
            both(True)
        time = medians(
            {
                "value": lambda value=value: value(False),
                "off": lambda both=both: both(False),
                "on": lambda both=both: both(True),
            },
            seconds,
        )
        found = ", ".join(
            f"grad {mode} {time[mode] / time['value']:.1f} ({1e3 * time[mode]:.2f} ms)" for mode in ("off", "on")
        )
        rows.append((what, "forward pass", "", found))
    return rows


if __name__ == "__main__":
    for row in calls():
        print(*row, sep=" | ")
