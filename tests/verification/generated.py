"""Fields by number: right ones, of what people put into networks, and ones that are cut off from autograd by some share."""

import contextlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Part = Callable[[Tensor], Tensor]
NORM = nn.utils.parametrizations

SIZES = (1, 2, 3, 6, 16, 64, 784)
SHARES = (1.0, 0.1, 0.01, 0.001)


class Twice(torch.autograd.Function):
    """x^2, with a backward pass of its own that is right, once and twice."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


class Field(nn.Module):
    """A part as a field of time and state."""

    def __init__(self, part: Part, modules: list[nn.Module]) -> None:
        super().__init__()
        self.part, self.held = part, nn.ModuleList(modules)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, t, x):
        return self.scale.to(x.dtype) * self.part(x)


class Draw:
    """What one number decides: sizes, parts, and how they are joined.

    Args:
        seed: the number.
        dtype: of the field.
    """

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.numbers, self.dtype, self.modules = np.random.default_rng(seed), dtype, []
        torch.manual_seed(seed)
        self.size = int(self.numbers.choice(SIZES))
        self.batch = int(self.numbers.integers(1, 9 if self.size < 100 else 3))

    def state(self) -> Tensor:
        scale = float(self.numbers.choice([0.0, 1e-3, 1.0, 1.0, 1.0, 30.0]))
        return scale * torch.randn(self.batch, self.size, dtype=self.dtype)

    def module(self, module: nn.Module) -> nn.Module:
        module = module.to(self.dtype)
        self.modules.append(module)
        return module

    def layers(self) -> Part:
        """A perceptron with one of many activations, and perhaps a normalization or dropout."""
        hidden = int(self.numbers.choice([8, 32]))
        activation = self.numbers.choice(
            ["ReLU", "Tanh", "SiLU", "GELU", "ELU", "Softplus", "LeakyReLU", "Hardtanh", "Softsign", "ReLU6", "Mish"]
        )
        middle = self.numbers.choice(["", "LayerNorm", "Dropout", "GroupNorm", "Alpha"])
        between = {
            "": nn.Identity,
            "LayerNorm": lambda: nn.LayerNorm(hidden),
            "Dropout": lambda: nn.Dropout(0.5),
            "GroupNorm": lambda: nn.GroupNorm(2, hidden),
            "Alpha": lambda: nn.AlphaDropout(0.2),
        }[middle]()
        wrap = self.numbers.choice([None, NORM.spectral_norm, NORM.weight_norm, None, None])
        linear = (lambda *sizes: wrap(nn.Linear(*sizes))) if wrap else nn.Linear
        first, last = linear(self.size, hidden), linear(hidden, self.size)
        if wrap is None and self.numbers.random() < 0.15:
            nn.init.zeros_(last.weight)
        return self.module(nn.Sequential(first, between, getattr(nn, activation)(), last))

    def part(self) -> Part:
        """One of the things that people do in a field, and do rightly."""
        kind = self.numbers.choice([name for name in dir(self) if name.startswith("do_")])
        return getattr(self, kind)()

    def do_network(self) -> Part:
        return self.layers()

    def do_steep(self) -> Part:
        steepness = float(self.numbers.choice([10.0, 1e3, 1e5]))
        return lambda x: torch.tanh(steepness * x)

    def do_dropout(self) -> Part:
        net = self.layers()
        return lambda x: F.dropout(net(x), 0.3)

    def do_recurrent(self) -> Part:
        gru = self.module(nn.GRU(1, 4, batch_first=True))
        last = self.module(nn.Linear(4, 1))
        return lambda x: last(gru(x[..., None])[0])[..., 0] if self.size < 100 else x

    def do_neighbours(self) -> Part:
        count = min(3, self.size)

        def part(x):
            with torch.no_grad():
                nearest = torch.cdist(x[..., None], x[..., None]).topk(count, largest=False).indices
            return x.gather(1, nearest[..., -1]).sin()

        return part

    def do_one_hot(self) -> Part:
        return lambda x: F.one_hot(x.argmax(1), self.size).to(x) * x

    def do_stable_softmax(self) -> Part:
        def part(x):
            e = (x - x.amax(1, keepdim=True).detach()).exp()
            return e / e.sum(1, keepdim=True)

        return part

    def do_own_backward(self) -> Part:
        return lambda x: Twice.apply(x.tanh())

    def do_gradient(self) -> Part:
        net = self.layers()

        def part(x):
            with torch.enable_grad():
                z = x if x.requires_grad else x.detach().requires_grad_()
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    energy = net(z).square().sum()
                return torch.autograd.grad(energy, z, create_graph=True)[0]

        return part

    def do_functorch(self) -> Part:
        return lambda x: torch.func.vmap(torch.func.grad(lambda z: z.sin().sum()))(x)

    def do_script(self) -> Part:
        script = torch.jit.script(nn.Sequential(nn.Linear(self.size, 8), nn.Tanh(), nn.Linear(8, self.size)))
        return self.module(script)

    def do_written(self) -> Part:
        def part(x):
            y = torch.zeros_like(x)
            y[:, 0] = x[:, -1].sin()
            return y.add_(x).mul_(2)

        return part

    def do_in_place(self) -> Part:
        elu = nn.ELU(inplace=True)
        return lambda x: elu(x)

    def do_branch(self) -> Part:
        return lambda x: -x if bool((x > 1e6).any()) else x.sin()

    def do_branch_by_a_number(self) -> Part:
        return lambda x: torch.stack([row.sin() if row.abs().max().item() > -1 else row for row in x])

    def do_sort(self) -> Part:
        return lambda x: x.sort(dim=1).values * x.sign()

    def do_kinks(self) -> Part:
        return lambda x: x.abs() + x.clamp(-0.5, 0.5) + x.round() + torch.where(x > 0, x, 0.1 * x)

    def do_checkpoint(self) -> Part:
        # Without a spectral norm, whose state is another when a checkpoint computes it again: its derivative is wrong.
        net = self.module(nn.Sequential(nn.Linear(self.size, 8), nn.Dropout(0.5), nn.SiLU(), nn.Linear(8, self.size)))
        return lambda x: checkpoint(net, x, use_reentrant=False)

    def do_attention(self) -> Part:
        def part(x):
            h = x[..., None] * torch.ones(4, dtype=x.dtype)
            return F.scaled_dot_product_attention(h, h, h)[..., 0] if self.size < 100 else x

        return part

    def do_autocast(self) -> Part:
        net = self.module(nn.Sequential(nn.Linear(self.size, 8), nn.Tanh(), nn.Linear(8, self.size)))

        def part(x):
            with torch.autocast("cpu", torch.bfloat16) if x.dtype == torch.float32 else contextlib.nullcontext():
                return net(x).to(x.dtype)

        return part

    def do_constant(self) -> Part:
        return lambda x: torch.ones_like(x)

    def do_normalized(self) -> Part:
        return lambda x: F.normalize(x + 0.1, dim=1) + F.layer_norm(x, (self.size,))

    def right(self) -> tuple[nn.Module, Tensor]:
        """A field that is right, and a state."""
        parts = [self.part() for _ in range(int(self.numbers.integers(1, 4)))]
        return Field(lambda x: sum(part(x.clone()) for part in parts), self.modules), self.state()

    def cut(self, share: float) -> tuple[nn.Module, Tensor]:
        """A field of which autograd misses a part of that share, and a state."""
        net, other = (
            self.layers(),
            self.module(nn.Sequential(nn.Linear(self.size, 8), nn.Tanh(), nn.Linear(8, self.size))),
        )
        kind = self.numbers.choice(["detach", "no_grad", "data", "numpy", "geometry", "force", "leaf", "list"])

        def severed(x):
            if kind == "detach":
                return other(x.detach())
            if kind == "no_grad":
                with torch.no_grad():
                    return other(x)
            if kind == "data":
                return other(x.data)
            if kind == "numpy":
                return torch.from_numpy(np.sin(other(x).detach().numpy()))
            if kind == "list":
                return torch.tensor(other(x).tolist(), dtype=x.dtype)
            if kind == "geometry":
                with torch.no_grad():
                    r = (1 + x.square().sum(1, keepdim=True)).sqrt()
                return other(x) * r
            with torch.enable_grad():
                z = x if kind == "force" and x.requires_grad else x.detach().requires_grad_()
                energy = other(z).square().sum()
                return torch.autograd.grad(energy, z, create_graph=kind == "leaf", retain_graph=True)[0]

        return Field(lambda x: net(x) + share * severed(x), self.modules), torch.randn(
            self.batch, self.size, dtype=self.dtype
        )
