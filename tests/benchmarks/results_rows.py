"""The rows of the table of results: an experiment each, with what it is compared to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """An experiment, `configs/experiment/<its name>.yaml`, beside peers on the same split.

    Attributes:
        what: the data and their size, for the table.
        peers: names of `results_peers.PEERS`: trained for as many seconds as ours, with about as many parameters.
        measure: of `results_measures.MEASURES`, of ours and of each peer; None for the likelihood alone.
        seeds: of training; the split is the same for all.
        note: such as why it loses, for below the table.
        figure: of the first seed's run, for below the table; None for none.
        start: a row whose weights, of the same seed, ours start from, so that it is run before; None for fresh ones.
    """

    what: str
    peers: tuple[str, ...] = ()
    measure: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    note: str = ""
    figure: str | None = None
    start: str | None = None


BOTH = ("zuko_nsf", "zuko_cnf")
SLOWER = "level to the spread of seeds; zuko_nsf evaluates 50 to 100 times faster, in one pass"
ROWS = {
    "uci_casp": Row("CASP, D = 9, 45,730 rows", BOTH),
    "uci_ccpp": Row("CCPP, D = 5, 9,568 rows", BOTH, note="zuko_nsf takes five times as many steps in the same time"),
    "uci_grid": Row(
        "grid stability, D = 12, 10,000 rows",
        BOTH,
        note="NLL without the inputs' bounds, in 33 s: zuko_nsf 6.34, divflow 6.79, zuko_cnf 9.03 nats",
    ),
    "sbi_two_moons": Row("posterior of two moons, D = 2, 10,000 simulations", ("zuko_nsf",), "posterior", note=SLOWER),
    "sbi_slcp": Row("posterior of SLCP, D = 5, 10,000 simulations", ("zuko_nsf",), "posterior", note=SLOWER),
    "digits_flow_matching": Row("digits, 8 x 8, flow matching", ("flow_matching", "zuko_nsf"), "probes"),
    "digits_likelihood": Row(
        "digits, 8 x 8, maximum likelihood", ("zuko_nsf",), "probes", note="level to the spread of seeds"
    ),
    "digits_score": Row("digits, 8 x 8, score matching", ("zuko_nsf",), "probes"),
    "mnist_flow_matching": Row("MNIST, 28 x 28, flow matching, UNet", ("flow_matching",), "spread"),
    "mnist_likelihood": Row(
        "MNIST, 28 x 28, maximum likelihood, MLP",
        ("zuko_nsf",),
        "probes",
        note="250 steps are not enough for 784 dimensions",
    ),
    "mnist_unet_likelihood": Row(
        "MNIST, 28 x 28, flow matching then maximum likelihood, UNet",
        measure="spread",
        start="mnist_flow_matching",
        note="60 steps; by 63 nodes, 125 rows of seed 0 change by 0.8 nats, 0.0016 bits/dim",
    ),
    "mnist_score": Row("MNIST, 28 x 28, score matching, UNet", ("flow_matching",)),
    "dw4_flow_matching": Row("DW4, 4 particles in the plane, flow matching", (), "particles", figure="final.png"),
    "dw4_likelihood": Row("DW4, flow matching then maximum likelihood", (), "particles", start="dw4_flow_matching"),
    "lj13_flow_matching": Row(
        "LJ13, 13 particles in space, flow matching",
        (),
        "particles",
        note="so few samples count that log Z has a larger error than its ±",
        figure="final.png",
    ),
    "lj13_likelihood": Row(
        "LJ13, flow matching then maximum likelihood", (), start="lj13_flow_matching", figure="final.png"
    ),
}
