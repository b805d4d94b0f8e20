"""Hollow networks: each part of the output depends on its own part of the input only through the last step."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divflow.networks.conditioning import NetworkError
from divflow.verification.seeded import seeded

__all__ = ["Hollow"]

# Largest number of parts to test, spread over all.
_MOST_TRIED = 256


class Hollow(nn.Module):
    """Base of hollow networks f_i = tau(x_i, h_i), h_i of all parts but x_i (Chen & Duvenaud 2019, arXiv:1912.03579).

    The diagonal of the Jacobian is that of tau at fixed h, whatever the depth of h and the number of parts. The first divergence
    tests that h is hollow: changing a part must leave its own h unchanged.
    """

    _tried = False

    @abstractmethod
    def conditioner(self, t: Tensor, x: Tensor) -> Float[Tensor, "batch parts *features"]:
        """Features h of each part, functions of the other parts."""

    @abstractmethod
    def parts(self, x: Tensor) -> Float[Tensor, "batch parts dimensions"]:
        """View of x as the parts, each of which its own h must not see."""

    def require_hollow(self, t: Tensor, x: Tensor) -> None:
        """Test, once for a network and at one sample, that the conditioner is hollow.

        Raises:
            NetworkError: changing a part changes its own features.
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
