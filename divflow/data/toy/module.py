"""Samples of a toy density as a Lightning data module."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Generator, Tensor

from divflow.data.module import DataError, Rows, TensorDataModule
from divflow.data.toy.curves import circles, swiss_roll, two_moons, two_spirals
from divflow.data.toy.mixtures import rotations_mixture, sphere_mixture, torus_mixture
from divflow.data.toy.patches import checkerboard, eight_gaussians, pinwheel

__all__ = ["Density", "HasScore", "Toy"]


_NAMED = {
    make.__name__: make
    for make in (
        two_moons,
        circles,
        two_spirals,
        swiss_roll,
        eight_gaussians,
        checkerboard,
        pinwheel,
        sphere_mixture,
        torus_mixture,
        rotations_mixture,
    )
}


@runtime_checkable
class Density(Protocol):
    """Protocol of densities in the plane, or of the manifold that they have as `manifold`, that can be sampled and evaluated."""

    def sample(self, count: int, generator: Generator | None = None) -> Tensor:
        """Points `(count, *event)`."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density of x `(k, *event)` in nats, `(k,)`."""
        ...


@runtime_checkable
class HasScore(Protocol):
    """Protocol of densities with a score; `ToyDensity` takes it from the log-density."""

    def score(self, x: Tensor) -> Tensor:
        """The score of x, grad log p(x), of x's shape."""
        ...


class Toy(TensorDataModule):
    """Points drawn from a known density in the plane or on a manifold, so that a run reports its gap to the truth.

    The gap is the mean of log p(x) - log q(x) over the test points. It estimates the Kullback-Leibler divergence from the
    model q to the truth p, in nats. For scores the truth is known, too.

    Args:
        density: a `Density`, such as `two_moons()`, a function that makes one, or the name of such a function.
        num_train: number of training points, drawn once.
        num_val: number of validation points.
        num_test: number of test points.
        batch_size: points a training step, in each process.
        eval_batch_size: points a validation or test step; `batch_size` if None.
        seed: of all points.

    Raises:
        DataError: a split has fewer than two points, or there is no density of that name.

    Example:
        >>> data = Toy("two_moons", num_train=100)
        >>> data.event_shape
        (2,)
    """

    event_shape: tuple[int, ...] = (2,)

    def __init__(
        self,
        density: Density | Callable[[], Density] | str,
        num_train: int = 100_000,
        num_val: int = 2_000,
        num_test: int = 10_000,
        batch_size: int = 512,
        eval_batch_size: int | None = 2_000,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        for name, count in {"num_train": num_train, "num_val": num_val, "num_test": num_test}.items():
            if count < 2:
                raise DataError(f"{name} must be at least 2, but is {count}")
        self.density = _made(density)
        self.manifold = getattr(self.density, "manifold", None)
        if self.manifold is not None:
            self.event_shape = tuple(self.manifold.event_shape)
        generator = Generator().manual_seed(seed)
        self.train, self.val, self.test = (
            Rows(self.density.sample(count, generator)) for count in (num_train, num_val, num_test)
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """True log-density of x `(k, *event)` in nats, `(k,)`."""
        return self.density.log_prob(x)

    def score(self, x: Tensor) -> Tensor | None:
        """True score of x, of its shape; None for a density without score, such as one with edges or on a manifold."""
        return self.density.score(x) if isinstance(self.density, HasScore) else None


def _made(density: Density | Callable[[], Density] | str) -> Density:
    if isinstance(density, str):
        if density not in _NAMED:
            raise DataError(f"density must be one of {', '.join(_NAMED)}, but there is no density {density!r}")
        density = _NAMED[density]
    return density if isinstance(density, Density) else density()
