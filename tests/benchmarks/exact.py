"""Exact value and divergence: time against D, against other ways, and memory."""

import itertools
from collections.abc import Callable

import torch
from peak_memory import PeakMemory
from peers import batched_rows, loop, vmap_of_jacrev
from timing import medians
from torch import Tensor, nn

from divflow.divergence import Exact, Hutchinson
from divflow.networks import HollowEGNN, HollowMLP, PairField, TokenMixer

Row = tuple[str, str, str, str]


def two_hidden(size: int, hidden: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A network of two hidden layers."""
    widths = nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, size)
    net = nn.Sequential(*widths)
    return lambda t, x: net(x)


@torch.no_grad()
def wide() -> list[Row]:
    """D = 43, two hidden layers of 256, batch 256."""
    net, x, t = two_hidden(43, 256), torch.randn(256, 43), torch.tensor(0.3)
    exact = Exact()
    time = medians(
        {
            "forward": lambda: net(t, x),
            "divflow": lambda: exact(net, t, x),
            "probe": lambda: Hutchinson()(net, t, x),
            "jacrev": lambda: vmap_of_jacrev(net, t, x),
        }
    )
    what = "value and divergence, D = 43, H = 256, batch 256"
    return [
        (what, "`vmap(jacrev)`", "15 times faster", f"**{time['jacrev'] / time['divflow']:.1f}**{_ms(time)}"),
        (what, "forward pass", "at most 2.5 of them", f"**{time['divflow'] / time['forward']:.2f}**"),
        (what, "value and one probe", "", f"{time['divflow'] / time['probe']:.2f} of them"),
    ]


@torch.no_grad()
def large() -> list[Row]:
    """D = 784, two hidden layers of 512, batch 32, with the peak of memory."""
    net, x, t = two_hidden(784, 512), torch.randn(32, 784), torch.tensor(0.3)
    ways = {
        "divflow": lambda: Exact()(net, t, x),
        "dense reverse": lambda: Exact("reverse")(net, t, x),
        "dense forward": lambda: Exact("forward")(net, t, x),
        "dense forward, 64 at a time": lambda: Exact("forward", 64)(net, t, x),
        "loop": lambda: loop(net, t, x),
        "jacrev": lambda: vmap_of_jacrev(net, t, x),
        "batched rows": lambda: batched_rows(net, t, x),
    }
    time = medians(ways, 40.0)
    best = min((name for name in ways if name != "divflow"), key=time.get)
    peaks = {}
    for name in ("divflow", "batched rows"):
        with PeakMemory() as memory:
            ways[name]()
        peaks[name] = memory.peak
    what = "D = 784, H = 512, batch 32"
    return [
        (f"value and divergence, {what}", "`vmap(jacrev)`", "", f"**{time['jacrev'] / time['divflow']:.0f}**"),
        (
            f"value and divergence, {what}",
            f"the best dense way (divflow's {best})",
            "100 times faster",
            f"**{time[best] / time['divflow']:.0f}** ({1e3 * time['divflow']:.1f} against {1e3 * time[best]:.0f} ms)",
        ),
        (
            f"peak memory, {what}",
            "zuko's batched rows",
            "20 times less",
            f"**{peaks['batched rows'] / peaks['divflow']:.0f}** ({peaks['divflow'] / 2**20:.0f} against "
            f"{peaks['batched rows'] / 2**20:.0f} MiB)",
        ),
    ]


DIMENSIONS = (16, 64, 256, 1024)


@torch.no_grad()
def against_dimension(peers: bool = False) -> dict[str, list[float]]:
    """Seconds of forward pass and exact divergence at fixed H = 256, batch 256, for each of `DIMENSIONS`."""
    found: dict[str, list[float]] = {}
    t = torch.tensor(0.3)
    for size in DIMENSIONS:
        net, x = two_hidden(size, 256), torch.randn(256, size)
        ways = {
            "forward pass": lambda net=net, x=x: net(t, x),
            "divflow": lambda net=net, x=x: Exact()(net, t, x),
        }
        # After ways that take hundreds of MiB the allocator's pages are new, which others are then charged for.
        hungry: dict[str, Callable[[], object]] = {}
        if peers:
            ways["one probe"] = lambda net=net, x=x: Hutchinson()(net, t, x)
            ways["loop (FFJORD, torchcfm, flow_matching)"] = lambda net=net, x=x: loop(net, t, x)
            if size <= 256:  # at D = 1024 they take more than 10 GiB
                hungry["batched rows (zuko)"] = lambda net=net, x=x: batched_rows(net, t, x)
                hungry["vmap(jacrev)"] = lambda net=net, x=x: vmap_of_jacrev(net, t, x)
        for _ in range(
            8
        ):  # calls 1, 2, 4 and 8 are verified: beside slow peers, a median of few rounds would be theirs
            ways["divflow"]()
        for group in filter(None, (ways, hungry)):
            for name, seconds in medians(group, 5.0).items():
                found.setdefault(name, []).append(seconds)
    return found


def growth() -> list[Row]:
    """Cost in D at fixed H."""
    time = against_dimension()
    ratios = [a / b for a, b in zip(time["divflow"], time["forward pass"], strict=True)]
    listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return [
        (
            "cost at H = 256, D = 16, 64, 256, 1024",
            "the forward pass's growth",
            "within 1.5",
            f"**{max(ratios) / ratios[0]:.2f}** ({listed} forward passes)",
        )
    ]


@torch.no_grad()
def convolutions() -> list[Row]:
    """Four 3x3 convolutions of 32 channels, 28 x 28, batch 8; then three with GroupNorm between."""
    widths = [1, 32, 32, 32, 1]
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(widths):
        layers += [nn.Conv2d(n, m, 3, padding=1), nn.SiLU()]
    net, x = nn.Sequential(*layers[:-1]), torch.randn(8, 1, 28, 28)

    def field(t: Tensor, x: Tensor) -> Tensor:
        return net(x)

    plan = Exact().explain(field, 0.0, x)
    time = medians({"divflow": lambda: Exact()(field, 0.0, x), "loop": lambda: loop(field, 0.0, x)}, 40.0)
    return [
        (
            f"four 3x3 convolutions, 28 x 28, batch 8 ({plan.products} products)",
            "loop over dimensions",
            "35 times faster",
            f"**{time['loop'] / time['divflow']:.1f}** ({1e3 * time['divflow']:.0f} against {1e3 * time['loop']:.0f} ms)",
        ),
        *_convolutions_with_groups(28, 8),
        *_convolutions_with_groups(8, 32),
    ]


def _convolutions_with_groups(side: int, batch: int) -> list[Row]:
    def block(n: int) -> list[nn.Module]:
        return [nn.Conv2d(n, 32, 3, padding=1), nn.GroupNorm(2, 32), nn.SiLU()]

    net, x = nn.Sequential(*block(1), *block(32), nn.Conv2d(32, 1, 3, padding=1)), torch.randn(batch, 1, side, side)
    time = medians({"forward": lambda: net(x), **_ways(net, x)}, 40.0)
    what = f"three 3x3 convolutions with GroupNorm of two groups, {side} x {side}, batch {batch}"
    passes, faster = time["divflow"] / time["forward"], time["dense"] / time["divflow"]
    return [(what, "divflow's dense products", "", f"**{faster:.1f}** times faster ({passes:.0f} forward passes)")]


@torch.no_grad()
def known() -> list[Row]:
    """Networks that know their own divergence, batch 64: 22 particles in space, 16 tokens of 4 entries, vectors of 784."""
    cases = {
        "PairField, 22 particles in 3-D": (PairField((22, 3)), "at most 4 of them"),
        "HollowEGNN, 22 particles in 3-D": (HollowEGNN((22, 3)), "at most 4 of them"),
        "TokenMixer, 16 tokens of 4 entries": (TokenMixer((16, 4)), "at most 8 of them"),
        "HollowMLP, D = 784, two hidden layers of 784": (HollowMLP(784, hidden=(784, 784)), ""),
    }
    rows, t = [], torch.tensor(0.3)
    for what, (net, aim) in cases.items():
        x = torch.randn(64, *net.event_shape)
        time = medians(
            {
                "forward": lambda net=net, x=x: net(t, x),
                "divflow": lambda net=net, x=x: Exact("own")(net, t, x),
                "probe": lambda net=net, x=x: Hutchinson(1)(net, t, x),
            },
            30.0,  # so that most calls are none of those that are compared with autograd, 1, 2, 4, ...
        )
        probes, passes = time["divflow"] / time["probe"], time["divflow"] / time["forward"]
        rows.append(
            (
                f"value and divergence, {what}",
                "value and one probe",
                aim,
                f"**{probes:.2f}** ({passes:.1f} forward passes)",
            )
        )
    return rows


@torch.no_grad()
def normalized() -> list[Row]:
    """Layer normalization and softmax between linear layers, in forward passes."""
    first, second = nn.LayerNorm(256), nn.LayerNorm(256)
    inner = nn.Linear(43, 256), first, nn.Tanh(), nn.Linear(256, 256), second, nn.Tanh(), nn.Linear(256, 43)
    wide = nn.Linear(784, 512), nn.LayerNorm(512), nn.Tanh(), nn.Linear(512, 784)
    gated = nn.Linear(784, 512), nn.Softmax(dim=1), nn.Linear(512, 784)
    cases = {
        "two hidden layers with LayerNorm, D = 43, H = 256, batch 256": (inner, 256, 6),
        "one hidden layer with LayerNorm, D = 784, H = 512, batch 32": (wide, 32, 5),
        "one hidden layer of softmax, D = 784, H = 512, batch 32": (gated, 32, 5),
    }
    rows = []
    for what, (layers, batch, aim) in cases.items():
        net, x = nn.Sequential(*layers), torch.randn(batch, layers[0].in_features)
        time = medians({"forward": lambda net=net, x=x: net(x), **_ways(net, x)}, 10.0)
        passes = time["divflow"] / time["forward"]
        faster = time["dense"] / time["divflow"]
        rows.append((what, "forward pass", f"at most {aim} of them", f"**{passes:.2f}**"))
        rows.append((what, "divflow's dense products", "", f"{faster:.0f} times faster"))
    return rows


class _Residual(nn.Module):
    """Blocks of a hidden layer each, around which the state is carried."""

    def __init__(self, size: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(size, hidden), nn.Linear(hidden, size)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, hidden)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        return self.last(h)


def _plain(size: int, hidden: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(size, hidden), nn.Tanh()]
    for _ in range(depth - 1):
        layers += [nn.Linear(hidden, hidden), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(hidden, size))


@torch.no_grad()
def deep() -> list[Row]:
    """Four and six hidden layers, with and without residual connections, against dense products."""
    rows = []
    for size, batch, aim in ((64, 128, "at most 1.1"), (784, 16, "at most 0.67")):
        ratios = []
        for make in (_plain, _Residual):
            for depth in (4, 6):
                time = medians(_ways(make(size, 256, depth), torch.randn(batch, size)), 10.0)
                ratios.append(time["divflow"] / time["dense"])
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        what = f"4 and 6 hidden layers of 256, then as many residual blocks, D = {size}, batch {batch}"
        rows.append((what, "divflow's dense products", f"{aim} of their time", f"**{max(ratios):.2f}** ({listed})"))
    return rows


def _ways(net: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    def field(t: Tensor, x: Tensor) -> Tensor:
        return net(x)

    return {"divflow": lambda: Exact()(field, 0.3, x), "dense": lambda: Exact("reverse")(field, 0.3, x)}


def _ms(time: dict[str, float]) -> str:
    return f" ({1e3 * time['divflow']:.2f} against {1e3 * time['jacrev']:.1f} ms)"
