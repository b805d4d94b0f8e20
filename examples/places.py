"""Places on the earth: from a CSV of latitudes and longitudes to a density, and to a map.

    python examples/places.py places.csv map.png

Without a file it makes one, of places around three cities. The density is with respect to the area of the unit sphere. A minute on one core.
"""

import sys

import lightning as L
import torch
from matplotlib.figure import Figure

from divflow.data import Places
from divflow.flow import ContinuousFlow
from divflow.manifolds import LatitudeLongitude, Sphere
from divflow.matching import ConditionalFlowMatching, GeodesicPath
from divflow.networks import MLP, FourierFeatures
from divflow.tasks import FlowMatchingTask


def write_places(path: str, number: int = 900) -> None:
    """Write places around Lima, Nairobi and Tokyo."""
    cities = LatitudeLongitude().points(torch.tensor([[-12.0, -77.0], [-1.3, 36.8], [35.7, 139.7]]))
    places = Sphere(2).wrapped_normal(cities, 0.15).sample((number // 3,)).flatten(0, 1)
    lines = [f"{latitude:.4f},{longitude:.4f}" for latitude, longitude in LatitudeLongitude().rows(places).tolist()]
    with open(path, "w") as file:
        file.write("\n".join(["latitude,longitude", *lines]) + "\n")


def main(path: str = "places.csv", picture: str = "map.png", steps: int = 3_000) -> float:
    """Train on a file and draw the log-density; returns the test's negative log-likelihood in nats."""
    L.seed_everything(0, verbose=False)
    data, sphere = Places(path, batch_size=256), Sphere(2)
    network = MLP(3, hidden=(128, 128, 128), activation=torch.nn.SiLU, features=FourierFeatures(3, 32, 15.0))
    flow = ContinuousFlow(network, 3, manifold=sphere)
    task = FlowMatchingTask(
        flow, ConditionalFlowMatching(GeodesicPath(sphere)), optimizer=lambda p: torch.optim.Adam(p, 1e-3)
    )
    trainer = L.Trainer(
        max_steps=steps, limit_val_batches=0, logger=False, enable_checkpointing=False, accelerator="cpu"
    )
    trainer.fit(task, datamodule=data)
    nll = trainer.test(task, datamodule=data)[0]["test/nll"]

    latitude, longitude = torch.linspace(-89, 89, 90), torch.linspace(-179, 179, 180)
    grid = LatitudeLongitude().points(torch.cartesian_prod(latitude, longitude))
    with torch.no_grad():
        log_prob = flow.log_prob(grid).view(90, 180)
    axes = (figure := Figure(figsize=(8, 4))).add_subplot(projection="mollweide")
    corners = (torch.deg2rad(angles).numpy() for angles in (longitude, latitude))
    image = axes.pcolormesh(*corners, log_prob.numpy(), vmin=-8, rasterized=True)
    figure.colorbar(image, label="log p (nats)", extend="min")
    figure.savefig(picture, dpi=150)
    return nll


if __name__ == "__main__":
    if len(sys.argv) == 1:
        write_places("places.csv")
    print(f"test: {main(*sys.argv[1:]):.3f} nats")
