"""The pieces that generated fields are made of: what networks do, and what they had better not do."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BRANCHING", "IMAGE", "VECTOR", "Piece"]


class Piece(nn.Module):
    """One step of a field, of the same shape before and after: a function of (itself, t, h), and tensors for it."""

    def __init__(self, kind: str, shape: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.kind, self.shape, self.calls = kind, shape, 0
        size = shape[0]

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weight = nn.Parameter(draw(size, size) / size**0.5)
        self.wide = nn.Parameter(draw(size + 3, size) / size**0.5)
        self.bias, self.scale = nn.Parameter(0.3 * draw(size)), nn.Parameter(draw(()) * 0.3 + 1)
        self.kernel = nn.Parameter(draw(size, size, 3, 3) / (9 * size) ** 0.5)
        self.register_buffer("order", torch.randperm(size, generator=generator))
        self.register_buffer("mask", torch.rand(size, generator=generator) < 0.5)
        self.register_buffer("mean", torch.ones((), dtype=torch.float64))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        self.calls += 1
        return (VECTOR if len(self.shape) == 1 else IMAGE)[self.kind](self, t, h)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def along(t, h):
    """Time, ready to be broadcast with h."""
    return t.reshape(-1, *[1] * (h.ndim - 1)).to(h) if t.ndim else t.to(h)


def first(t):
    return float(t.reshape(-1)[0])


def groups(size):
    return 2 if size % 2 == 0 else 1


def heads(h):
    """Half of a vector as two tokens."""
    return h.unflatten(1, (-1, 1)) if h.shape[1] % 2 else h.unflatten(1, (2, -1))


def attend(m, t, h):
    q = heads(h)
    return F.scaled_dot_product_attention(q, q * m.scale, q + along(t, q)).flatten(1)


def in_place(m, t, h):
    h = h.clone()
    h.mul_(m.scale).add_(along(t, h))
    h[:, 0] = h[:, -1].clone() ** 2
    return h


def written(m, t, h):
    out = torch.zeros_like(h)
    out[:, m.order] = h * m.bias
    return out + h.sin()


def masked(m, t, h):
    h = h * 1.0
    h[:, m.mask] = h[:, m.mask].sin() * m.scale
    return h


def hooked(m, t, h):
    h = torch.tanh(h @ m.weight)
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * 1.5)
    return h


def running(m, t, h):
    m.mean = 0.9 * m.mean + 0.1 * h.detach().abs().mean().to(m.mean)
    return h / m.mean.clone()


def running_in_place(m, t, h):
    m.mean.mul_(0.9).add_(0.1 * h.detach().abs().mean().to(m.mean))
    return (h / m.mean.clone()).tanh()


def energy(m, t, h):
    with torch.enable_grad():
        z = h if h.requires_grad else h.detach().requires_grad_()
        potential = ((z @ m.weight).sin() * m.bias).sum()
        return torch.autograd.grad(potential, z, create_graph=True)[0]


def dropped(m, t, h):
    keep = torch.rand(h.shape, dtype=torch.float64) < 0.5
    return h * keep.to(h) * 2 if m.training else h


def labelled(m, t, h, labels):
    return torch.tanh(
        F.linear(
            torch.cat([h, labels], 1)[:, : m.wide.shape[0]],
            m.wide[:, : h.shape[1]].new_ones(1, 1).expand(h.shape[1], h.shape[1] + 1) * m.wide.mT[:, : h.shape[1] + 1],
        )
    )


def interpolated(m, t, h):
    size = h.shape[1]
    scale = 1 + 0.02 * first(t) + 0.51 / size
    wide = F.interpolate(h[:, None], scale_factor=scale, mode="linear", recompute_scale_factor=False)[:, 0]
    return wide[:, :size] * h


def by_numpy(m, t, h):
    order = h.detach().abs().cpu().double().numpy().sum(0).argsort().copy()
    return h[:, torch.from_numpy(order)] * m.bias


def on_count(m, t, h):
    return h.sin() if m.calls % 2 else h.flip(1) * m.bias


def scattered(m, t, h):
    values, places = h.topk(max(1, h.shape[1] // 2), dim=1)
    return torch.zeros_like(h).scatter(1, places, values) + h * 0.5


VECTOR = {
    "linear": lambda m, t, h: F.linear(h, m.weight, m.bias),
    "wide": lambda m, t, h: torch.tanh(h @ m.wide.mT) @ m.wide,
    "tanh": lambda m, t, h: torch.tanh(h),
    "silu": lambda m, t, h: F.silu(h),
    "relu": lambda m, t, h: F.relu(h + 0.01),
    "square": lambda m, t, h: 0.3 * h**2,
    "exp": lambda m, t, h: (-h * h).exp(),
    "softmax": lambda m, t, h: h.softmax(1),
    "layer norm": lambda m, t, h: F.layer_norm(h, h.shape[1:], m.bias, m.bias),
    "group norm": lambda m, t, h: F.group_norm(h, groups(h.shape[1]), m.bias),
    "bare group norm": lambda m, t, h: F.group_norm(h, groups(h.shape[1])),
    "rms norm": lambda m, t, h: F.rms_norm(h, h.shape[1:], m.bias, 1e-5),
    "normalize": lambda m, t, h: F.normalize(h, dim=1) * h,
    "attention": attend,
    "time gate": lambda m, t, h: h * torch.sigmoid(along(t, h) * m.bias),
    "time matrix": lambda m, t, h: (h @ (m.weight * first(t))).sin(),
    "matrix of time": lambda m, t, h: h @ torch.linalg.matrix_exp(m.weight * t.reshape(-1)[0].to(h)),
    "time branch": lambda m, t, h: h @ m.weight if first(t) < 0.5 else h.flip(1) * m.bias,
    "roll by time": lambda m, t, h: torch.roll(h, int(first(t) * 4), 1).sin() * h,
    "power of time": lambda m, t, h: (h * h + 1) ** first(t),
    "clamp by time": lambda m, t, h: h.clamp(-first(t), 1 + first(t)),
    "slice by time": lambda m, t, h: torch.cat([h[:, int(2 * first(t)) :].sin(), h[:, : int(2 * first(t))]], 1),
    "permute": lambda m, t, h: h[:, m.order] * m.bias,
    "index select": lambda m, t, h: h.index_select(1, m.order).tanh(),
    "gather": lambda m, t, h: h.gather(1, m.order.expand(len(h), -1)) + h,
    "gather by argsort": lambda m, t, h: torch.tanh(h @ m.weight).gather(1, h.argsort(1)),
    "take along argmax": lambda m, t, h: h.take_along_dim(h.argmax(1, keepdim=True), 1) * h,
    "sort": lambda m, t, h: h.sort(1).values * m.bias,
    "topk": scattered,
    "cummax": lambda m, t, h: h.cummax(1).values + h,
    "median": lambda m, t, h: h - h.median(1, keepdim=True).values,
    "numpy order": by_numpy,
    "index by value": lambda m, t, h: h * m.bias[(h.detach() > 0).long().sum(1) % h.shape[1]][:, None],
    "embedding by value": lambda m, t, h: h + F.embedding((h.detach().abs() * 2).long() % len(m.bias), m.bias[:, None])[..., 0] * h,
    "where": lambda m, t, h: torch.where(h > 0, h.sin(), h * m.bias),
    "where mask": lambda m, t, h: torch.where(m.mask, h, h.flip(1)),
    "masked fill": lambda m, t, h: h.masked_fill(m.mask, 0.5) * h,
    "branch on values": lambda m, t, h: h.sin() if h.detach().sum() > 0.123 else h @ m.weight,
    "call count": on_count,
    "cat int": lambda m, t, h: labelled(m, t, h, torch.ones(len(h), 1, dtype=torch.long)),
    "cat bool": lambda m, t, h: labelled(m, t, h, torch.ones(len(h), 1, dtype=torch.bool)),
    "cat int in front": lambda m, t, h: torch.cat([m.order[:1].expand(len(h), 1), h], 1)[:, : h.shape[1]] * m.bias + h,
    "stack int": lambda m, t, h: torch.stack([h, m.order.expand(len(h), -1)], 2).prod(2),
    "cat time": lambda m, t, h: torch.cat([h, along(t, h).expand(len(h), 1)], 1)[:, 1:] * h,
    "interpolate": interpolated,
    "conv": lambda m, t, h: F.conv1d(h[:, None], m.kernel[:1, :1, 0], padding=1)[:, 0].tanh(),
    "circular conv": lambda m, t, h: F.conv1d(F.pad(h[:, None], (1, 1), "circular"), m.kernel[:1, :1, 0])[:, 0] * h,
    "cumsum": lambda m, t, h: h.cumsum(1) * m.scale,
    "cumprod": lambda m, t, h: (1 + 0.1 * h).cumprod(1),
    "prod": lambda m, t, h: h * (1 + 0.1 * h).prod(1, keepdim=True),
    "mean": lambda m, t, h: h - h.mean(1, keepdim=True),
    "norm": lambda m, t, h: h / (1 + h.norm(dim=1, keepdim=True)),
    "logsumexp": lambda m, t, h: h - h.logsumexp(1, keepdim=True),
    "outer": lambda m, t, h: torch.einsum("bi,bj,ij->bj", h, h, m.weight),
    "bilinear": lambda m, t, h: F.bilinear(h, h, m.weight[None].expand(h.shape[1], -1, -1) * m.bias[:, None, None]),
    "bmm": lambda m, t, h: torch.bmm(h[:, None], h[:, :, None] * m.weight)[:, 0],
    "hypernetwork": lambda m, t, h: torch.einsum("bij,bj->bi", h[:, :, None] * m.weight, h),
    "triangular solve": lambda m, t, h: torch.linalg.solve(m.weight @ m.weight.mT + torch.eye(len(m.bias)).to(h), h.mT).mT,
    "in place": in_place,
    "written": written,
    "masked write": masked,
    "hook": hooked,
    "running": running,
    "running in place": running_in_place,
    "energy": energy,
    "dropout": dropped,
    "custom": lambda m, t, h: Double.apply(h) * m.bias,
    "custom gate": lambda m, t, h: Double.apply(h @ m.weight).sigmoid() * h,
    "vmap": lambda m, t, h: torch.func.vmap(lambda z: m.weight @ z)(h).sin(),
    "jvp": lambda m, t, h: h + 0 * h.detach() * m.scale,
    "detach": lambda m, t, h: h.detach() * h,
    "no grad": lambda m, t, h: h * torch.no_grad()(lambda: (h @ m.weight).sin())(),
    "data": lambda m, t, h: h.data.sin() * h + m.bias.data,
    "complex": lambda m, t, h: torch.fft.irfft(torch.fft.rfft(h, dim=1) * m.scale, n=h.shape[1], dim=1).sin(),
    "as complex": lambda m, t, h: (h * torch.exp(1j * along(t, h))).real + h.sin(),
    "strided": lambda m, t, h: h.mT.contiguous().mT.as_strided(h.shape, h.mT.contiguous().mT.stride()) * 1.0 + h.sin(),
    "copied view": lambda m, t, h: h.flip(1).unfold(1, 1, 1)[..., 0] * h,
    "constant": lambda m, t, h: m.bias.expand_as(h) * along(t, h),
    "zero times": lambda m, t, h: h * 0 + m.bias,
    "round": lambda m, t, h: h.round() * h + h.floor(),
    "expand one": lambda m, t, h: h[:, :1].expand(-1, h.shape[1]) * m.bias,
    "chunks": lambda m, t, h: torch.cat([part.sin() for part in h.split([1, h.shape[1] - 1], 1)][::-1], 1),
    "glu": lambda m, t, h: F.glu(torch.cat([h, h @ m.weight], 1), dim=1),
    "max of two": lambda m, t, h: torch.maximum(h, h @ m.weight),
    "amax": lambda m, t, h: h * h.amax(1, keepdim=True),
    "lerp": lambda m, t, h: torch.lerp(h, h @ m.weight, m.scale.to(h)),
    "hermitian": lambda m, t, h: torch.linalg.vector_norm(heads(h), dim=2, keepdim=True).expand_as(heads(h)).flatten(1) * h,
    "float roundtrip": lambda m, t, h: h.double().sin().to(h.dtype),
    "reshape batch": lambda m, t, h: h.reshape(-1, 1).sin().reshape(h.shape) * m.bias,
    "transposed": lambda m, t, h: (m.weight @ h.mT).mT.tanh(),
    "list index": lambda m, t, h: h[:, m.order.tolist()] + h,
    "loop": lambda m, t, h: torch.stack([h[:, i] * m.bias[i] + h[:, i - 1].sin() for i in range(h.shape[1])], 1),
    "unbind rows": lambda m, t, h: torch.stack([row.sin() * m.bias for row in h]) if len(h) else h,
}  # fmt: skip

IMAGE = {
    "conv": lambda m, t, h: F.conv2d(h, m.kernel, m.bias, padding=1).tanh(),
    "plain conv": lambda m, t, h: F.conv2d(h, m.kernel, padding=1),
    "dilated": lambda m, t, h: F.conv2d(h, m.kernel, padding=2, dilation=2),
    "circular": lambda m, t, h: F.conv2d(F.pad(h, (1, 1, 1, 1), "circular"), m.kernel).sin(),
    "transposed conv": lambda m, t, h: F.conv_transpose2d(h, m.kernel, padding=1),
    "depthwise": lambda m, t, h: F.conv2d(h, m.kernel[:, :1], padding=1, groups=h.shape[1]),
    "padding by time": lambda m, t, h: torch.roll(F.conv2d(h, m.kernel, padding=1), int(first(t) * 4), 3),
    "dilation by time": lambda m, t, h: F.conv2d(h, m.kernel, padding=1 + int(first(t) * 2), dilation=1 + int(first(t) * 2)),
    "group norm": lambda m, t, h: F.group_norm(h, groups(h.shape[1]), m.bias, m.bias),
    "bare group norm": lambda m, t, h: F.group_norm(h, 1) * h,
    "instance norm": lambda m, t, h: F.instance_norm(h) if h[0].numel() > h.shape[1] else h,
    "layer norm": lambda m, t, h: F.layer_norm(h, h.shape[1:]),
    "channel mix": lambda m, t, h: torch.einsum("bchw,cd->bdhw", h, m.weight),
    "silu": lambda m, t, h: F.silu(h),
    "square": lambda m, t, h: 0.3 * h * h,
    "time gate": lambda m, t, h: h * (1 + along(t, h) * m.bias[:, None, None]),
    "pool": lambda m, t, h: F.avg_pool2d(h, 3, 1, 1) * h,
    "max pool": lambda m, t, h: F.max_pool2d(h, 3, 1, 1) + h,
    "squeeze": lambda m, t, h: h * h.mean((2, 3), keepdim=True).sigmoid(),
    "attention": lambda m, t, h: F.scaled_dot_product_attention(h.flatten(2).mT, h.flatten(2).mT, h.flatten(2).mT).mT.reshape(h.shape),
    "interpolate": lambda m, t, h: F.interpolate(h, scale_factor=1 + 0.02 * first(t) + 0.51 / h.shape[3], mode="bilinear")[..., : h.shape[2], : h.shape[3]] * h,
    "nearest": lambda m, t, h: F.interpolate(h, scale_factor=1.4 + 0.3 * first(t))[..., : h.shape[2], : h.shape[3]].sin(),
    "warp": lambda m, t, h: F.grid_sample(h, F.affine_grid(torch.eye(2, 3)[None].to(h).repeat(len(h), 1, 1) + 0.3 * first(t), h.shape, align_corners=False), align_corners=False),
    "roll by value": lambda m, t, h: torch.roll(h, int(h.detach().sum() > 0.123), 3) * h,
    "where": lambda m, t, h: torch.where(h > 0, h, torch.roll(h, 1, 2)),
    "custom": lambda m, t, h: Double.apply(h).sin(),
    "hook": lambda m, t, h: _hook(h * m.scale),
    "in place": lambda m, t, h: h.clone().mul_(m.scale).add_(along(t, h)),
    "flip": lambda m, t, h: h.flip(3) * m.bias[:, None, None],
    "mean": lambda m, t, h: h - h.mean((1, 2, 3), keepdim=True),
    "shuffle": lambda m, t, h: F.channel_shuffle(h, groups(h.shape[1])) * h,
    "call count": lambda m, t, h: h.sin() if m.calls % 2 else torch.roll(h, 1, 2) * h,
    "constant": lambda m, t, h: torch.ones_like(h) * along(t, h) * m.bias[:, None, None],
    "running": lambda m, t, h: running(m, t, h),
    "checker": lambda m, t, h: h * m.mask[:, None, None] + h.flip(2) * ~m.mask[:, None, None],
    "argmax": lambda m, t, h: h.gather(3, h.argmax(3, keepdim=True)) * h,
}  # fmt: skip


def _hook(h):
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * 0.5)
    return h


BRANCHING = {
    "gather by argsort", "take along argmax", "sort", "topk", "cummax", "median", "numpy order", "index by value",
    "embedding by value", "branch on values", "round", "roll by value", "max pool", "argmax", "amax", "relu", "where",
    "max of two", "cat time", "clamp by time",
}  # fmt: skip
"""Those in which rounding may decide, which half precisions and float64 then do differently."""
