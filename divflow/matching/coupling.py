"""Which noise is joined to which datum."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from divflow.errors import check_count
from divflow.matching.times import MatchingError
from divflow.operators.context import Context, named_tensors
from divflow.operators.field import accumulation_dtype, flatten_event

__all__ = ["Coupling", "IndependentCoupling", "OptimalTransportCoupling"]


class Coupling(ABC):
    """A joint distribution of noise x_0 and data x_1, each distributed as it is by itself.

    Only the noise is moved to other rows: data stay with their context, labels and weights.
    """

    @abstractmethod
    def __call__(self, noise: Tensor, data: Tensor, context: Context | None = None) -> Tensor:
        """The rows of the noise in the order of their data, `(k, *event)`.

        Args:
            noise: independent draws, `(k, *event)`.
            data: `(k, *event)`.
            context: a tensor or a tree of tensors, one row a sample, `(k, ...)`, or None.
        """


@dataclass(frozen=True)
class IndependentCoupling(Coupling):
    """Noise as it was drawn, whatever the datum (Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023, arXiv:2209.03003)."""

    def __call__(self, noise: Tensor, data: Tensor, context: Context | None = None) -> Tensor:
        """The noise itself."""
        return noise


@dataclass(frozen=True)
class OptimalTransportCoupling(Coupling):
    """The pairs of a batch that are nearest by squared distance in all (Tong et al. 2024, arXiv:2302.00482, section 3.2.2).

        the permutation p that minimises sum over i of |x_0[p(i)] - x_1[i]|^2

    Paths of a batch cross less, so that the velocity that is their mean is straighter in time and takes fewer evaluations to
    solve, and its loss varies less. The coupling is that of k rows, not of the densities: for each k the flow has the right
    densities at t = 0 and t = 1, but its paths straighten slowly with k, the more slowly the higher the dimension; of images,
    hundreds gain little.

    Rows are paired only with noise of rows of the same context: without that the noise would depend on the
    context in training, and not when the flow is sampled (Cheng & Schwing 2025, arXiv:2503.10636). Contexts that are all
    different leave the noise as it was drawn.

    The exact assignment is found on the CPU, for which a GPU waits. It takes k^2 memory and up to k^3 time: on one core half a
    millisecond for k = 64 vectors, 1 ms for 128, 3 to 5 ms for 256, 15 to 35 ms for 512 and 0.1 to 0.3 s for 1,024. So larger batches are
    paired in parts of consecutive rows, and their time grows as their size.

    Args:
        max_rows: k, at most.

    Raises:
        ValueError: fewer than one row.
        MatchingError: when called, noise or data that are not finite.
    """

    max_rows: int = 64

    def __post_init__(self) -> None:
        check_count("max_rows", self.max_rows)

    def __call__(self, noise: Tensor, data: Tensor, context: Context | None = None) -> Tensor:
        """See `Coupling`."""
        paired, every = noise.clone(), torch.arange(len(data), device=data.device)
        leaves = [leaf for _, leaf in named_tensors(context) if leaf.numel()]
        for alike in _alike(leaves) if leaves else [every]:
            for rows in alike.split(self.max_rows):
                if len(rows) > 1:
                    paired[rows] = noise[rows[_nearest(noise[rows], data[rows])]]
        return paired


def _alike(leaves: Sequence[Tensor]) -> Iterator[Tensor]:
    """The numbers of the rows of each context that several have, the same in all of its tensors."""
    # By tensor, since an integer and a float have no dtype in common that holds both.
    numbers = [flatten_event(leaf).unique(dim=0, return_inverse=True)[1] for leaf in leaves]
    _, number, sizes = torch.stack(numbers, dim=1).unique(dim=0, return_inverse=True, return_counts=True)
    for several in (sizes > 1).nonzero():
        yield (number == several).nonzero().flatten()


def _nearest(noise: Tensor, data: Tensor) -> Tensor:
    """The number of the noise that belongs to each datum, `(k,)`.

    What is common to a row or a column of costs is the same in every permutation; scipy takes half the time without it.
    """
    with torch.no_grad():
        precise = accumulation_dtype(data)
        ends = flatten_event(data).to(precise), flatten_event(noise).to(precise)
        # By products of matrices torch would lose the digits of distances that are small beside the norms.
        cost = torch.cdist(*ends, compute_mode="donot_use_mm_for_euclid_dist").square()
        cost = cost - cost.amin(dim=1, keepdim=True)
        cost = cost - cost.amin(dim=0)
    if not torch.isfinite(cost).all():
        raise MatchingError(
            "noise or data have entries that are not finite, or too large to be squared, so that optimal transport can't pair "
            "them; drop those rows, or use IndependentCoupling()"
        )
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(columns, device=data.device)
