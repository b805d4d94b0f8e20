"""A divergence in a LightningModule of one's own: implicit score matching, whose loss is the divergence of the score.

    python examples/lightning_module.py --steps 1000

trains the score of two moons, and prints how far it is from the true one (the Fisher divergence, 1/2 E |s - grad log p|^2).
"""

import argparse

import lightning as L
import torch
from torch import Tensor, nn

from divflow.data import Toy
from divflow.data.toy import two_moons
from divflow.divergence import Exact, check_field, value_and_divergence
from divflow.networks import MLP


class ScoreModel(L.LightningModule):
    """Implicit score matching (Hyvarinen 2005): the mean of div s(x) + |s(x)|^2 / 2, exact at the price of a forward pass more."""

    def __init__(self, score: nn.Module) -> None:
        super().__init__()
        self.score, self.estimator = score, Exact()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The objective of a batch `(k, 2)`."""
        if self.global_step == 0:
            check_field(self.score, 0.0, batch)  # refuses a network that mixes the samples of the batch
        score, divergence = value_and_divergence(self.score, 0.0, batch, self.estimator)
        return (divergence + score.square().sum(dim=1) / 2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), 3e-3)


def main(steps: int) -> float:
    """Train for so many steps; returns the Fisher divergence."""
    L.seed_everything(0, verbose=False)
    data = Toy(two_moons(noise=0.2), num_train=20_000, num_test=2_000)
    model = ScoreModel(MLP(2, hidden=[64, 64]))
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, train_dataloaders=data.train_dataloader())
    x = data.test.rows
    with torch.no_grad():
        error = (model.score(torch.tensor(0.0), x) - data.score(x)).square().sum(dim=1) / 2
    print(f"Fisher divergence after {steps} steps: {error.mean():.3f} +- {error.std() / len(x) ** 0.5:.3f}")
    return error.mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of the optimizer")
    main(parser.parse_args().steps)
