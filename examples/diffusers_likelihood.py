"""The likelihood of a model of diffusers, in bits per dimension with its error.

    python examples/diffusers_likelihood.py --model FOLDER    # a UNet2DModel and a scheduler that diffusers saved
    python examples/diffusers_likelihood.py --steps 500       # a small one, trained here on scikit-learn's digits

The images must be those that the model is for; here they are the 8 x 8 digits, scaled to [-1, 1].
"""

import argparse
import math
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Generator

from divflow.adapters import from_diffusers
from divflow.data import Digits
from divflow.divergence import Hutchinson
from divflow.likelihood import Quadrature
from divflow.solver import Solver


def trained_here(steps: int, digits: Digits) -> tuple[UNet2DModel, DDPMScheduler]:
    """A small UNet that predicts the noise, as diffusers' own training script trains it (Ho et al. 2020)."""
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    scheduler, optimizer = DDPMScheduler(), torch.optim.Adam(unet.parameters(), 2e-3)
    for step in range(steps):
        digits.train.epoch = step  # new noise between the grey values
        x = 2 * digits.train.__getitems__(torch.randint(len(digits.train), (128,)).tolist()) - 1
        noise, t = torch.randn_like(x), torch.randint(len(scheduler.alphas_cumprod), (len(x),))
        loss = (unet(scheduler.add_noise(x, noise, t), t).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return unet, scheduler


def main(model: Path | None, steps: int, images: int) -> tuple[float, float]:
    """Bits per dimension of some test images, and its standard error over images and probes."""
    torch.manual_seed(0)
    digits = Digits((1, 8, 8), margin=None)
    if model is None:
        unet, scheduler = trained_here(steps, digits)
    else:
        unet = UNet2DModel.from_pretrained(model / "unet" if (model / "unet").is_dir() else model)
        scheduler = DDPMScheduler.from_pretrained(model / "scheduler" if (model / "scheduler").is_dir() else model)
    flow = from_diffusers(
        unet.eval(),
        scheduler,
        digits.event_shape,
        estimator=Hutchinson(2),  # exact takes as many products as pixels
        likelihood=Quadrature(15),
        solver=Solver(rtol=1e-4, atol=1e-4),
    )
    x = digits.test.rows[:images]
    with torch.no_grad():
        result = flow.evaluate(2 * x - 1, generator=Generator().manual_seed(0))
    log_prob = result.log_prob + x[0].numel() * math.log(2)  # of x in [0, 1]
    bits = digits.bits_per_dim(log_prob, x)
    error = bits.std().item() / math.sqrt(len(x))  # the probes' share of it, of one image, is result.standard_error
    print(f"{bits.mean():.3f} +- {error:.3f} bits/dim over {len(x)} images")
    print(
        f"of one image's log p the probes leave an error of {result.standard_error.mean():.2f} nats; {result.evaluations}"
    )
    return bits.mean().item(), error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder that diffusers saved")
    parser.add_argument("--steps", type=int, default=500, help="of training, without --model")
    parser.add_argument("--images", type=int, default=100, help="of the test split")
    arguments = parser.parse_args()
    main(arguments.model, arguments.steps, arguments.images)
