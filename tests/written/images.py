"""Steps of images `(k, c, h, w)`."""

import torch
from torch.nn import functional as F

from written import written
from written.modules import groups
from written.vectors import Double, along, first, running

__all__ = ["IMAGES"]


def hooked(h):
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * 0.5)
    return h


IMAGES = {
    "image conv": written("layered jets", lambda m, t, h: F.conv2d(h, m.kernel, m.bias, padding=1).tanh()),
    "image plain conv": written("layered jets", lambda m, t, h: F.conv2d(h, m.kernel, padding=1)),
    "image dilated": written("layered jets", lambda m, t, h: F.conv2d(h, m.kernel, padding=2, dilation=2)),
    "image circular": written("", lambda m, t, h: F.conv2d(F.pad(h, (1, 1, 1, 1), "circular"), m.kernel).sin()),
    "image transposed conv": written("", lambda m, t, h: F.conv_transpose2d(h, m.kernel, padding=1)),
    "image depthwise": written("layered jets", lambda m, t, h: F.conv2d(h, m.kernel[:, :1], padding=1, groups=h.shape[1])),
    "image padding by time": written("layered jets timed", lambda m, t, h: torch.roll(F.conv2d(h, m.kernel, padding=1), int(first(t) * 4), 3)),
    "image dilation by time": written("layered jets timed", lambda m, t, h: F.conv2d(h, m.kernel, padding=1 + int(first(t) * 2), dilation=1 + int(first(t) * 2))),
    "image group norm": written("layered jets", lambda m, t, h: F.group_norm(h, groups(h.shape[1]), m.bias, m.bias)),
    "image bare group norm": written("layered jets", lambda m, t, h: F.group_norm(h, 1) * h),
    "image instance norm": written("layered jets", lambda m, t, h: F.instance_norm(h) if h[0].numel() > h.shape[1] else h),
    "image layer norm": written("layered jets", lambda m, t, h: F.layer_norm(h, h.shape[1:])),
    "image channel mix": written("layered jets", lambda m, t, h: torch.einsum("bchw,cd->bdhw", h, m.weight)),
    "image silu": written("layered jets", lambda m, t, h: F.silu(h)),
    "image square": written("layered jets", lambda m, t, h: 0.3 * h * h),
    "image time gate": written("layered jets", lambda m, t, h: h * (1 + along(t, h) * m.bias[:, None, None])),
    "image pool": written("", lambda m, t, h: F.avg_pool2d(h, 3, 1, 1) * h),
    "image max pool": written("branching", lambda m, t, h: F.max_pool2d(h, 3, 1, 1) + h),
    "image squeeze": written("layered jets", lambda m, t, h: h * h.mean((2, 3), keepdim=True).sigmoid()),
    "image attention": written("", lambda m, t, h: F.scaled_dot_product_attention(h.flatten(2).mT, h.flatten(2).mT, h.flatten(2).mT).mT.reshape(h.shape)),
    "image interpolate": written("timed full", lambda m, t, h: F.interpolate(h, scale_factor=1 + 0.02 * first(t) + 0.51 / h.shape[3], mode="bilinear")[..., : h.shape[2], : h.shape[3]] * h),
    "image nearest": written("timed", lambda m, t, h: F.interpolate(h, scale_factor=1.4 + 0.3 * first(t))[..., : h.shape[2], : h.shape[3]].sin()),
    "image warp": written("timed full", lambda m, t, h: F.grid_sample(h, F.affine_grid(torch.eye(2, 3)[None].to(h).repeat(len(h), 1, 1) + 0.3 * first(t), h.shape, align_corners=False), align_corners=False)),
    "image roll by value": written("layered jets branching joint", lambda m, t, h: torch.roll(h, int(h.detach().sum() > 0.123), 3) * h),
    "image where": written("layered jets branching", lambda m, t, h: torch.where(h > 0, h, torch.roll(h, 1, 2))),
    "image custom": written("", lambda m, t, h: Double.apply(h).sin()),
    "image hook": written("severed", lambda m, t, h: hooked(h * m.scale)),
    "image in place": written("layered jets", lambda m, t, h: h.clone().mul_(m.scale).add_(along(t, h))),
    "image flip": written("layered jets", lambda m, t, h: h.flip(3) * m.bias[:, None, None]),
    "image mean": written("layered jets", lambda m, t, h: h - h.mean((1, 2, 3), keepdim=True)),
    "image shuffle": written("", lambda m, t, h: F.channel_shuffle(h, groups(h.shape[1])) * h),
    "image call count": written("layered jets stateful", lambda m, t, h: h.sin() if m.calls % 2 else torch.roll(h, 1, 2) * h),
    "image constant": written("layered jets", lambda m, t, h: torch.ones_like(h) * along(t, h) * m.bias[:, None, None]),
    "image running": written("layered jets joint stateful severed", running),
    "image checker": written("layered jets", lambda m, t, h: h * m.mask[:, None, None] + h.flip(2) * ~m.mask[:, None, None]),
    "image argmax": written("jets branching", lambda m, t, h: h.gather(3, h.argmax(3, keepdim=True)) * h),
}  # fmt: skip
