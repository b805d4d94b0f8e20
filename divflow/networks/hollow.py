"""Hollow networks: each part of the output sees its own part of the input at the very end only."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divflow.networks.conditioning import NetworkError
from divflow.verification.seeded import seeded

__all__ = ["Hollow"]

# Parts whose hollowness is tried, spread over all.
_MOST_TRIED = 256


class Hollow(nn.Module):
    """A network f_i = tau(x_i, h_i) with h_i a function of all parts of x but x_i (Chen & Duvenaud 2019, arXiv:1912.03579).

    The diagonal of its Jacobian is that of tau at fixed h, whatever the depth of h and the number of parts. That h is
    hollow is tried when the divergence is first asked for: a part that is changed must leave its own h as it was.
    """

    _tried = False

    @abstractmethod
    def conditioner(self, t: Tensor, x: Tensor) -> Float[Tensor, "batch parts *features"]:
        """h: what each part is told of the others."""

    @abstractmethod
    def parts(self, x: Tensor) -> Float[Tensor, "batch parts dimensions"]:
        """X as the parts of which each is hidden from its own h: a view of x."""

    def require_hollow(self, t: Tensor, x: Tensor) -> None:
        """Try, once for a network, whether the conditioner is hollow, at one sample.

        Raises:
            NetworkError: changing a part changes what that part is told.
        """
        if self._tried or len(x) == 0:
            return
        t, x = t.detach().reshape(-1)[0], x.detach()[:1]
        count = self.parts(x).shape[1]
        tried = torch.linspace(0, count - 1, min(count, _MOST_TRIED), device=x.device).round().long()
        rows = torch.arange(len(tried), device=x.device)
        before = x.repeat(len(tried), *[1] * (x.ndim - 1))
        after = before.clone()
        noise = torch.randn(1, generator=torch.Generator().manual_seed(0), device="cpu").to(x)
        self.parts(after)[rows, tried] += noise * (1 + x.abs().max())
        features = []
        for states in (before, after):
            with torch.no_grad(), seeded(0, [x.device] if x.is_cuda else []):
                features.append(self.conditioner(t, states)[rows, tried].flatten(1))
        moved = (features[1] - features[0]).abs().amax(dim=1)
        # Not <=, so that NaN is refused.
        if not (moved <= torch.finfo(x.dtype).eps ** 0.5 * (1 + features[0].abs().amax())).all():
            worst = moved.nan_to_num(torch.inf).argmax()
            raise NetworkError(
                f"{type(self).__name__} is not hollow: changing part {tried[worst].item()} of x changed the conditioner's features for that "
                f"part by {moved[worst].item():.3g}. Hide each part from its own features, or set value_and_divergence = None"
            )
        self._tried = True
