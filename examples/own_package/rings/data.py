"""Points on two noisy circles, as a LightningDataModule."""

import math

import lightning as L
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader

__all__ = ["Rings"]


class Rings(L.LightningDataModule):
    """Two circles around the origin, with normal noise.

    Args:
        radii: of the circles.
        noise: its standard deviation.
        num_train: training points; a quarter of it for validation, as many for the test.
        batch_size: of all loaders.
        seed: of the points.
    """

    def __init__(
        self,
        radii: tuple[float, float] = (0.5, 1.5),
        noise: float = 0.1,
        num_train: int = 10_000,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.radii, self.noise, self.num_train, self.batch_size, self.seed = radii, noise, num_train, batch_size, seed

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Shuffled, without the last batch if that is a part of one."""
        return DataLoader(self._points(0, self.num_train), self.batch_size, shuffle=True, drop_last=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Tensor]:
        """In order."""
        return DataLoader(self._points(1, self.num_train // 4), self.batch_size)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Tensor]:
        """In order."""
        return DataLoader(self._points(2, self.num_train // 4), self.batch_size)  # type: ignore[arg-type]

    def _points(self, split: int, count: int) -> Tensor:
        generator = Generator().manual_seed(3 * self.seed + split)
        angles = 2 * math.pi * torch.rand(count, 1, generator=generator)
        radii = torch.tensor(self.radii)[torch.randint(2, (count, 1), generator=generator)]
        points = radii * torch.cat([angles.cos(), angles.sin()], dim=1)
        return points + self.noise * torch.randn(count, 2, generator=generator)
