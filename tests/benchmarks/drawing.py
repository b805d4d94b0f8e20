"""How the guide's figures look: one width, and colours that the colour-blind tell apart (Okabe and Ito 2008)."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[2] / "docs"
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442"
OURS = "#D55E00"  # vermilion, of divflow alone
plt.rcParams.update(
    {
        "font.size": 9,
        "mathtext.fontset": "cm",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, PINK, SKY, "0.35"], marker=[*"osD^vP"]),
    }
)


def figure(height: float) -> Figure:
    """A figure of the width of a page."""
    return plt.figure(figsize=(8, height), layout="constrained")


def save(drawn: Figure, name: str) -> None:
    """Write it into the guide."""
    drawn.savefig(DOCS / name, dpi=120)
    plt.close(drawn)
