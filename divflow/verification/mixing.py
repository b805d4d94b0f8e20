"""Mixed samples: gradients where there should be none."""

import torch
from torch import Tensor

__all__ = ["mixed_by"]


def mixed_by(output: Tensor, point: Tensor, calls: int) -> Tensor | None:
    """Return the largest gradient at samples whose values have no cotangent, relative to that at the others; None if none.

    The cotangent lives on one half of the samples, then on the other. The halves change at each verified call: at every
    second call one of both products shows a dependence between two given samples.

    Args:
        output: of the field, `(k, ...)`.
        point: the state `(k, *event)`.
        calls: of the field, from which the halves are drawn.
    """
    if not output.requires_grad or len(output) < 2 or output.numel() == 0 or point.shape[:1] != output.shape[:1]:
        return None
    noise = torch.Generator("cpu").manual_seed(calls)
    half = torch.randperm(len(output), generator=noise, device="cpu").to(point.device) < len(output) // 2
    vectors = torch.randn(output.shape, generator=noise, dtype=torch.float64, device="cpu").to(output)
    worst = None
    for chosen in (half, ~half):
        with torch.inference_mode(False), torch.no_grad():
            cotangent = vectors * chosen.view(-1, *[1] * (output.ndim - 1))
            (gradient,) = torch.autograd.grad(output, point, cotangent, retain_graph=True, allow_unused=True)
        if gradient is None:
            return None
        size = gradient.detach().abs().reshape(len(point), -1).amax(dim=1)
        own, others = size[chosen].amax(), size[~chosen].amax()
        share = others / own
        if others > 16 * torch.finfo(gradient.dtype).eps * own and (worst is None or share > worst):
            worst = share
    return worst
