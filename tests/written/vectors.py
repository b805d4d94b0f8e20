"""Steps of vectors `(k, n)` that are functions."""

import torch
from torch.nn import functional as F

from written import written
from written.modules import groups

__all__ = ["FUNCTIONS", "Double", "along", "first", "running"]


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
    return float(t.detach().reshape(-1)[0])


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


def permuted(m, t, h):
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


class Twice(torch.autograd.Function):
    """x^2, with a backward pass of its own that is right, once and twice."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


def into_zeros(m, t, h):
    out = torch.zeros_like(h)
    out[:, 0] = h[:, -1].sin()
    return out.add_(h).mul_(2)


def neighbours(m, t, h):
    with torch.no_grad():
        nearest = torch.cdist(h[..., None], h[..., None]).topk(min(3, h.shape[1]), largest=False).indices
    return h.gather(1, nearest[..., -1]).sin()


def attention_of_entries(m, t, h):
    tokens = h[..., None] * torch.ones(4, dtype=h.dtype)
    return F.scaled_dot_product_attention(tokens, tokens, tokens)[..., 0]


def layer_norm_by_hand(m, t, h):
    h = h - h.mean(-1, keepdim=True)
    return torch.tanh(h / torch.sqrt((h**2).mean(-1, keepdim=True) + 1e-5))


def layer_norm_by_variance(m, t, h):
    return ((h - h.mean(1)[:, None]) / torch.sqrt(h.var(1, unbiased=False)[:, None] + 1e-5)).sin()


def standardized(m, t, h):
    std, mean = torch.std_mean(h, dim=1, correction=1, keepdim=True)
    return (h - mean) / (std + 0.1)


def softmax_by_hand(m, t, h):
    e = torch.exp(h - h.detach().amax(dim=1, keepdim=True))
    return e / e.sum(dim=1, keepdim=True)


FUNCTIONS = {
    "linear": written("layered jets small", lambda m, t, h: F.linear(h, m.weight, m.bias)),
    "wide": written("layered jets small", lambda m, t, h: torch.tanh(h @ m.wide.mT) @ m.wide),
    "tanh": written("layered jets", lambda m, t, h: torch.tanh(h)),
    "silu": written("layered jets", lambda m, t, h: F.silu(h)),
    "relu": written("layered jets branching", lambda m, t, h: F.relu(h + 0.01)),
    "square": written("layered jets", lambda m, t, h: 0.3 * h**2),
    "exp": written("layered jets", lambda m, t, h: (-h * h).exp()),
    "softmax": written("layered jets", lambda m, t, h: h.softmax(1)),
    "layer norm": written("layered jets", lambda m, t, h: F.layer_norm(h, h.shape[1:], m.bias, m.bias)),
    "group norm": written("layered jets several", lambda m, t, h: F.group_norm(h, groups(h.shape[1]), m.bias)),
    "bare group norm": written("layered jets several", lambda m, t, h: F.group_norm(h, groups(h.shape[1]))),
    "rms norm": written("layered jets", lambda m, t, h: F.rms_norm(h, h.shape[1:], m.bias, 1e-5)),
    "normalize gate": written("layered jets", lambda m, t, h: F.normalize(h, dim=1) * h),
    "attention": written("", attend),
    "time gate": written("layered jets", lambda m, t, h: h * torch.sigmoid(along(t, h) * m.bias)),
    "time matrix": written("layered jets timed small", lambda m, t, h: (h @ (m.weight * first(t))).sin()),
    "matrix of time": written("layered jets timed small full", lambda m, t, h: h @ torch.linalg.matrix_exp(m.weight * t.reshape(-1)[0].to(h))),
    "time branch": written("layered jets timed small", lambda m, t, h: h @ m.weight if first(t) < 0.5 else h.flip(1) * m.bias),
    "roll by time": written("layered jets timed", lambda m, t, h: torch.roll(h, int(first(t) * 4), 1).sin() * h),
    "power of time": written("layered jets timed", lambda m, t, h: (h * h + 1) ** first(t)),
    "clamp by time": written("layered jets branching timed", lambda m, t, h: h.clamp(-first(t), 1 + first(t))),
    "slice by time": written("layered jets timed", lambda m, t, h: torch.cat([h[:, int(2 * first(t)) :].sin(), h[:, : int(2 * first(t))]], 1)),
    "permute": written("layered jets", lambda m, t, h: h[:, m.order] * m.bias),
    "index select": written("layered jets", lambda m, t, h: h.index_select(1, m.order).tanh()),
    "gather": written("layered jets", lambda m, t, h: h.gather(1, m.order.expand(len(h), -1)) + h),
    "gather by argsort": written("jets branching small several", lambda m, t, h: torch.tanh(h @ m.weight).gather(1, h.argsort(1))),
    "take along argmax": written("jets branching", lambda m, t, h: h.take_along_dim(h.argmax(1, keepdim=True), 1) * h),
    "sort": written("branching several", lambda m, t, h: h.sort(1).values * m.bias),
    "topk": written("branching several", scattered),
    "cummax": written("branching several", lambda m, t, h: h.cummax(1).values + h),
    "median": written("branching several", lambda m, t, h: h - h.median(1, keepdim=True).values),
    "numpy order": written("layered jets branching joint", by_numpy),
    "index by value": written("layered jets branching", lambda m, t, h: h * m.bias[(h.detach() > 0).long().sum(1) % h.shape[1]][:, None]),
    "embedding by value": written("layered jets branching", lambda m, t, h: h + F.embedding((h.detach().abs() * 2).long() % len(m.bias), m.bias[:, None])[..., 0] * h),
    "where": written("layered jets branching", lambda m, t, h: torch.where(h > 0, h.sin(), h * m.bias)),
    "where mask": written("layered jets", lambda m, t, h: torch.where(m.mask, h, h.flip(1))),
    "masked fill": written("layered jets", lambda m, t, h: h.masked_fill(m.mask, 0.5) * h),
    "branch on values": written("layered jets branching joint small", lambda m, t, h: h.sin() if h.detach().sum() > 0.123 else h @ m.weight),
    "call count": written("layered jets stateful", on_count),
    "cat int": written("layered jets small", lambda m, t, h: labelled(m, t, h, torch.ones(len(h), 1, dtype=torch.long))),
    "cat bool": written("layered jets small", lambda m, t, h: labelled(m, t, h, torch.ones(len(h), 1, dtype=torch.bool))),
    "cat int in front": written("layered jets", lambda m, t, h: torch.cat([m.order[:1].expand(len(h), 1), h], 1)[:, : h.shape[1]] * m.bias + h),
    "stack int": written("layered jets", lambda m, t, h: torch.stack([h, m.order.expand(len(h), -1)], 2).prod(2)),
    "cat time": written("layered jets branching", lambda m, t, h: torch.cat([h, along(t, h).expand(len(h), 1)], 1)[:, 1:] * h),
    "interpolate": written("timed full", interpolated),
    "conv": written("layered jets", lambda m, t, h: F.conv1d(h[:, None], m.kernel[None, None], padding=1)[:, 0].tanh()),
    "circular conv": written("", lambda m, t, h: F.conv1d(F.pad(h[:, None], (1, 1), "circular"), m.kernel[None, None])[:, 0] * h),
    "cumsum": written("layered jets", lambda m, t, h: h.cumsum(1) * m.scale),
    "cumprod": written("", lambda m, t, h: (1 + 0.1 * h).cumprod(1)),
    "prod": written("layered jets", lambda m, t, h: h * (1 + 0.1 * h).prod(1, keepdim=True)),
    "mean": written("layered jets", lambda m, t, h: h - h.mean(1, keepdim=True)),
    "norm": written("layered jets", lambda m, t, h: h / (1 + h.norm(dim=1, keepdim=True))),
    "logsumexp": written("layered jets", lambda m, t, h: h - h.logsumexp(1, keepdim=True)),
    "outer": written("jets small", lambda m, t, h: torch.einsum("bi,bj,ij->bj", h, h, m.weight)),
    "bilinear": written("small", lambda m, t, h: F.bilinear(h, h, m.weight[None].expand(h.shape[1], -1, -1) * m.bias[:, None, None])),
    "bmm": written("jets small", lambda m, t, h: torch.bmm(h[:, None], h[:, :, None] * m.weight)[:, 0]),
    "hypernetwork": written("jets small", lambda m, t, h: torch.einsum("bij,bj->bi", h[:, :, None] * m.weight, h)),
    "triangular solve": written("full small", lambda m, t, h: torch.linalg.solve(m.weight @ m.weight.mT + torch.eye(len(m.bias)).to(h), h.mT).mT),
    "in place": written("", in_place),
    "written": written("", permuted),
    "masked write": written("", masked),
    "hook": written("severed small", hooked),
    "running": written("layered jets joint stateful severed", running),
    "running in place": written("layered jets joint stateful severed", running_in_place),
    "energy": written("small", energy),
    "dropout": written("layered jets random", dropped),
    "custom": written("", lambda m, t, h: Double.apply(h) * m.bias),
    "custom gate": written("small", lambda m, t, h: Double.apply(h @ m.weight).sigmoid() * h),
    "vmap": written("small", lambda m, t, h: torch.func.vmap(lambda z: m.weight @ z)(h).sin()),
    "zero times detached": written("layered jets", lambda m, t, h: h + 0 * h.detach() * m.scale),
    "detach": written("layered jets severed", lambda m, t, h: h.detach() * h),
    "no grad": written("layered jets severed small", lambda m, t, h: h * torch.no_grad()(lambda: (h @ m.weight).sin())()),
    "data": written("layered jets severed", lambda m, t, h: h.data.sin() * h + m.bias.data),
    "complex": written("full", lambda m, t, h: torch.fft.irfft(torch.fft.rfft(h, dim=1) * m.scale, n=h.shape[1], dim=1).sin()),
    "as complex": written("full", lambda m, t, h: (h * torch.exp(1j * along(t, h))).real + h.sin()),
    "strided": written("", lambda m, t, h: h.mT.contiguous().mT.as_strided(h.shape, h.mT.contiguous().mT.stride()) * 1.0 + h.sin()),
    "copied view": written("layered jets", lambda m, t, h: h.flip(1).unfold(1, 1, 1)[..., 0] * h),
    "constant": written("layered jets", lambda m, t, h: m.bias.expand_as(h) * along(t, h)),
    "zero times": written("layered jets", lambda m, t, h: h * 0 + m.bias),
    "round": written("layered jets branching", lambda m, t, h: h.round() * h + h.floor()),
    "expand one": written("layered jets", lambda m, t, h: h[:, :1].expand(-1, h.shape[1]) * m.bias),
    "chunks": written("layered jets", lambda m, t, h: torch.cat([part.sin() for part in h.split([1, h.shape[1] - 1], 1)][::-1], 1)),
    "glu": written("layered jets small", lambda m, t, h: F.glu(torch.cat([h, h @ m.weight], 1), dim=1)),
    "max of two": written("layered jets branching small", lambda m, t, h: torch.maximum(h, h @ m.weight)),
    "amax": written("layered jets branching", lambda m, t, h: h * h.amax(1, keepdim=True)),
    "lerp": written("layered jets small", lambda m, t, h: torch.lerp(h, h @ m.weight, m.scale.to(h))),
    "hermitian": written("layered jets", lambda m, t, h: torch.linalg.vector_norm(heads(h), dim=2, keepdim=True).expand_as(heads(h)).flatten(1) * h),
    "float roundtrip": written("layered jets full", lambda m, t, h: h.double().sin().to(h.dtype)),
    "reshape batch": written("jets", lambda m, t, h: h.reshape(-1, 1).sin().reshape(h.shape) * m.bias),
    "transposed": written("jets small", lambda m, t, h: (m.weight @ h.mT).mT.tanh()),
    "list index": written("layered jets", lambda m, t, h: h[:, m.order.tolist()] + h),
    "loop": written("layered jets small", lambda m, t, h: torch.stack([h[:, i] * m.bias[i] + h[:, i - 1].sin() for i in range(h.shape[1])], 1)),
    "unbind rows": written("jets", lambda m, t, h: torch.stack([row.sin() * m.bias for row in h]) if len(h) else h),
    "normalize": written("layered jets several", lambda m, t, h: F.normalize(h)),
    "normalize by the sum": written("layered jets several branching", lambda m, t, h: F.normalize(h, p=1.0, dim=-1)),
    "normalize and layer norm": written("layered jets several", lambda m, t, h: F.normalize(h + 0.1, dim=1) + F.layer_norm(h, h.shape[1:])),
    "logsumexp gate": written("layered jets", lambda m, t, h: h * torch.logsumexp(h, dim=1, keepdim=True)),
    "norms": written("layered jets several", lambda m, t, h: h.norm(dim=1, keepdim=True) * h + torch.linalg.norm(h, dim=1)[:, None] * h.sin()),
    "norm of order three": written("layered several", lambda m, t, h: h / torch.linalg.vector_norm(h, 3, dim=-1, keepdim=True)),
    "largest and least": written("layered jets branching", lambda m, t, h: (h - h.amin(1, keepdim=True)) / h.amax(dim=1, keepdim=True).exp()),
    "product of entries": written("layered jets", lambda m, t, h: h.sin() * h.prod(dim=1, keepdim=True)),
    "layer norm by hand": written("layered jets", layer_norm_by_hand),
    "layer norm by its variance": written("layered jets", layer_norm_by_variance),
    "standardized": written("layered jets several", standardized),
    "rms norm by hand": written("layered jets", lambda m, t, h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "softmax by hand": written("layered jets", softmax_by_hand),
    "softmax and layer norm": written("layered jets several", lambda m, t, h: F.layer_norm(h, h.shape[1:]) * (1 + h.std(1, keepdim=True)) + F.softmax(h, 1)),
    "steep": written("layered jets", lambda m, t, h: torch.tanh(10 * h)),
    "steeper": written("layered jets", lambda m, t, h: torch.tanh(1e3 * h)),
    "steepest": written("layered jets", lambda m, t, h: torch.tanh(1e5 * h)),
    "dropout by its function": written("layered jets random double", lambda m, t, h: F.dropout(h.sin().contiguous(), 0.3)),
    "neighbours": written("jets branching", neighbours),
    "one hot": written("layered jets branching", lambda m, t, h: F.one_hot(h.argmax(1), h.shape[1]).to(h) * h),
    "custom square": written("", lambda m, t, h: Twice.apply(h.tanh())),
    "vmap of a gradient": written("", lambda m, t, h: torch.func.vmap(torch.func.grad(lambda z: z.sin().sum()))(h)),
    "written into zeros": written("", into_zeros),
    "branch never taken": written("layered jets", lambda m, t, h: -h if bool((h > 1e6).any()) else h.sin()),
    "branch by a number": written("", lambda m, t, h: torch.stack([row.sin() if row.abs().max().item() > -1 else row for row in h]) if len(h) else h),
    "sort and sign": written("branching several", lambda m, t, h: h.sort(dim=1).values * h.sign()),
    "kinks": written("layered jets branching", lambda m, t, h: h.abs() + h.clamp(-0.5, 0.5) + h.round() + torch.where(h > 0, h, 0.1 * h)),
    "attention of entries": written("small", attention_of_entries),
    "ones": written("layered jets", lambda m, t, h: torch.ones_like(h)),
}  # fmt: skip
