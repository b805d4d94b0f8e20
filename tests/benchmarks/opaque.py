"""One operation without a rule in a layered network: rows through it against dense products of the whole network."""

import torch
from timing import medians
from torch import Tensor, nn

from divflow.divergence import Exact

Row = tuple[str, str, str, str]


class Scanned(nn.Module):
    """Two layers, a scan of eight entries, two layers, and a gate beside them."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, 8))
        self.last = nn.Sequential(nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, size))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The field."""
        return self.last(self.first(x).sigmoid().cumprod(dim=1)) - x.tanh()


@torch.no_grad()
def one_operation() -> list[Row]:
    """D = 64 and 784, 512 hidden units, batch 64."""
    rows = []
    for size in (64, 784):
        net, x, t = Scanned(size, 512), torch.randn(64, size), torch.tensor(0.3)
        plan = Exact().explain(net, t, x)
        ways = {"divflow": Exact(), "dense products": Exact("reverse")}
        time = medians({name: lambda way=way, net=net, t=t, x=x: way(net, t, x) for name, way in ways.items()}, 10.0)
        what = f"exact through an operation without a rule (a scan of 8 entries), D = {size}, batch 64"
        share = time["divflow"] / time["dense products"]
        found = f"**{share:.2f}** of their time ({1e3 * time['divflow']:.1f} against {1e3 * time['dense products']:.1f} ms; {plan.why})"
        rows.append((what, "divflow's dense products", "", found))
    return rows


if __name__ == "__main__":
    for row in one_operation():
        print(*row, sep=" | ")
