"""The rows of results: their experiments compose, their peers and measures exist, and the table says what was found."""

import importlib
import json
import math
import re

import numpy as np
import pytest
import torch
from run import ROOT, config
from torch.distributions import Normal

BENCHMARKS = ROOT / "tests" / "benchmarks"


def load(monkeypatch, name):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(name)


def result(row, who, seed, nll, error, **more):
    metrics = {"nll": nll, "nll_standard_error": error, "nfe": 40.0, "nfe_divergence": 31.0, **more}
    return {
        "row": row,
        "who": who,
        "seed": seed,
        "metrics": metrics,
        "seconds": 60.0,
        "peak_memory_mib": 500.0,
        "parameters": 1234,
    }


def test_every_row_is_an_experiment_with_peers_and_measures(monkeypatch):
    pytest.importorskip("zuko")
    rows = load(monkeypatch, "results_rows").ROWS
    page = (ROOT / "docs" / "results.md").read_text()
    peers, measures = load(monkeypatch, "results_peers").PEERS, load(monkeypatch, "results_measures").MEASURES
    for name, row in rows.items():
        assert config(f"experiment={name}", "output_dir=x").trainer.max_steps > 0
        assert set(row.peers) <= set(peers)
        assert row.measure is None or row.measure in measures
        assert len(row.seeds) >= 3
        (command,) = re.findall(rf"^python train.py experiment={name}(?: .*)?$", page, re.MULTILINE)
        assert f"init_from=outputs/{row.start}/checkpoints/best.ckpt" in command or row.start is None


def test_a_row_is_run_after_the_one_that_it_starts_from(monkeypatch, tmp_path):
    results = load(monkeypatch, "results")
    assert results.with_starts(["lj13_flow_matching", "dw4_likelihood"])[:2] == ["dw4_flow_matching", "dw4_likelihood"]
    assert results.with_starts(["uci_casp"]) == ["uci_casp"]
    ran = []
    monkeypatch.setattr(results, "run", lambda command: ran.append(command) or 1.0)
    row = results.ROWS["dw4_likelihood"]
    with pytest.raises(FileNotFoundError):  # no run, no results
        results.run_row("dw4_likelihood", row, 2, ["trainer.max_steps=3"], tmp_path)
    (weights,) = [word.removeprefix("init_from=") for word in ran[0] if word.startswith("init_from=")]
    assert (ROOT / weights).resolve() == (tmp_path / "dw4_flow_matching/2/checkpoints/best.ckpt").resolve()
    assert {"experiment=dw4_likelihood", "seed=2", "trainer.max_steps=3"} < set(ran[0])


def test_errors_over_rows_and_seeds_are_told_apart(monkeypatch):
    table = load(monkeypatch, "results_table")
    found = [result("uci_casp", "divflow", seed, nll, 0.03) for seed, nll in enumerate((1.0, 1.2, 1.4))]
    found.append(result("uci_casp", "zuko_nsf", 0, 0.9, 0.02) | {"metrics": {"nll": 0.9, "nll_standard_error": 0.02}})
    unit, mean, over_rows, over_seeds = table.likelihood(found[:3])
    assert unit == "nats"
    assert mean == pytest.approx(1.2)
    assert over_rows == pytest.approx(0.03)
    assert over_seeds == pytest.approx(np.std([1.0, 1.2, 1.4], ddof=1) / math.sqrt(3))
    lines = [line.partition("rows |")[2] for line in table.markdown(found[::-1]).splitlines()]
    ours, theirs = (
        lines.index(" divflow | 1.200 nats | 0.030 | 0.115 (3) |"),
        lines.index(" zuko_nsf | 0.900 nats | 0.020 | (1) |"),
    )
    assert ours < theirs
    assert " divflow | 40 + 31 |  |  |" in lines  # and none of one pass
    assert {" divflow | 60 | 500 | 1,234 |", " zuko_nsf | 60 | 500 | 1,234 |"} < set(lines)


def test_measures_have_the_errors_of_one_seed_beside_their_mean(monkeypatch):
    table = load(monkeypatch, "results_table")
    more = [{"c2st": 0.6, "c2st_standard_error": 0.03}, {"c2st": 0.8, "c2st_standard_error": 0.04}]
    found = [result("uci_ccpp", "divflow", seed, 1.0, 0.1, **values) for seed, values in enumerate(more)]
    text = table.markdown(found)
    assert "| data | C2ST, ± over observations | log-probabilities per second |" in text
    assert f"| CCPP, D = 5, 9,568 rows | 0.7 ± {np.sqrt((0.03**2 + 0.04**2) / 2):.2g} |  |" in text
    assert "| CCPP, D = 5, 9,568 rows | zuko_nsf takes five times as many steps" in text
    assert "Particles" not in text
    found.append(result("uci_ccpp", "zuko_nsf", 0, 1.0, 0.1, c2st=0.5))
    assert "| CCPP, D = 5, 9,568 rows | zuko_nsf | 0.5 |  |" in table.markdown(found)


def test_measures_of_particles_are_lines_of_an_experiment_each(monkeypatch):
    table = load(monkeypatch, "results_table")
    more = {
        "dw4_flow_matching": {"log_normalizer": 29.6},
        "lj13_likelihood": {"log_normalizer": 59.8, "likelihoods_seconds": 9.0},
    }
    text = table.markdown([result(row, "divflow", 0, 1.0, 0.1, **values) for row, values in more.items()])
    assert "|  | `dw4_flow_matching` | `lj13_likelihood` |" in text
    assert "| log Z by exact weights, ± by their spread | 29.6 | 59.8 |" in text
    assert "| 10,000 exact likelihoods, s |  | 9 |" in text


def test_a_quadrature_error_is_in_the_units_of_the_result_and_noted_where_it_is_more_than_the_error_beside_it(
    monkeypatch,
):
    table = load(monkeypatch, "results_table")
    bits = {"bits_per_dim": 1.3, "bits_per_dim_standard_error": 0.02}
    found = [
        result("mnist_score", "divflow", 0, -3600.0, 10.0, **bits, quadrature_error=12.0),
        result(
            "mnist_score",
            "divflow",
            1,
            -3600.0,
            10.0,
            **bits,
            quadrature_error=9.0,
            bits_per_dim_quadrature_error=0.036,
        ),
        result("uci_casp", "divflow", 0, 1.0, 0.03, quadrature_error=0.001),
    ]
    text, line = table.markdown(found), "| MNIST, 28 x 28, score matching, UNet |"
    assert f"{line} divflow | 1.300 bits/dim | 0.020 | 0.000 (2) |" in text
    assert f"{line} divflow | 40 + 31 | 0.03 |  |" in text
    assert "| divflow | 40 + 31 | 0.001 |  |" in text
    assert f"{line} quadrature error 0.03 bits/dim: more than its ±" in text
    assert text.count("more than its ±") == 1
    assert f"{line} 1.30 ± 0.02 bits/dim, quadrature error 0.03 |" in table.short(found)
    assert "nats, quadrature" not in table.short(found)


def test_a_table_is_published_between_its_marks(monkeypatch, tmp_path):
    table = load(monkeypatch, "results_table")
    found = [result("uci_casp", "divflow", 0, 1.0, 0.03), result("dw4_flow_matching", "divflow", 1, 2.0, 0.03)]
    found.append(result("uci_casp", "zuko_nsf", 0, 0.9, 0.02))
    figures = tmp_path / "dw4_flow_matching" / "1" / "figures"
    figures.mkdir(parents=True)
    (figures / "final.png").write_bytes(b"image")
    docs = tmp_path / "docs"
    docs.mkdir()
    for page in (docs / "results.md", tmp_path / "README.md"):
        page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    for _ in range(2):
        table.draw(found, tmp_path / "results.png")
        table.publish(found, tmp_path, tmp_path)
    page, readme = (docs / "results.md").read_text(), (tmp_path / "README.md").read_text()
    for text in (page, readme):
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
    assert page.count("1.000 nats") == 1
    assert "| 1.00 ± 0.03 nats | zuko_nsf **0.90 ± 0.02** | `experiment=uci_casp` |" in readme
    assert (docs / "results.png").is_file()
    assert (docs / "dw4_flow_matching.png").read_bytes() == b"image"
    assert page.count("(dw4_flow_matching.png)") == 1
    assert json.loads((docs / "results.json").read_text()) == found


def test_c2st_is_a_half_of_equal_samples_and_near_one_of_others(monkeypatch):
    measures = load(monkeypatch, "results_measures")
    x, y = torch.randn(2, 200, 2)
    assert measures.c2st(x, y) == pytest.approx(0.5, abs=0.1)
    # A shift by d of one normal density: the best classifier's accuracy is Phi(d / 2).
    best = Normal(0.0, 1.0).cdf(torch.tensor(1.0)).item()
    assert measures.c2st(x, y + torch.tensor([2.0, 0.0])) == pytest.approx(best, abs=0.06)


@pytest.mark.parametrize("name", ["zuko_nsf", "zuko_cnf", "flow_matching"])
def test_a_peer_has_the_size_of_ours_and_the_density_of_the_data(monkeypatch, name):
    """It integrates to one in the units of the data, whose columns differ in scale."""
    pytest.importorskip("zuko")
    pytest.importorskip("flow_matching")
    from divflow.data.columns import Columns

    peers = load(monkeypatch, "results_peers")
    torch.manual_seed(0)
    scales = torch.tensor([100.0, 0.01], dtype=torch.float64)
    data = Columns(torch.randn(400, 2, dtype=torch.float64) * scales, ["a", "b"], batch_size=50)
    settings = config("task=flow_matching", "network.hidden=[36,36]", "device=cpu", "output_dir=x")
    size = peers.parameters(peers.PEERS["flow_matching"](settings, data, 0).model)
    peer = peers.PEERS[name](settings, data, size)
    assert peers.parameters(peer.model) == pytest.approx(size, rel=0.35)
    assert peers.train(peer, peers.endless(data), 0.2, 0.9) > 0
    assert peer.evaluations == 0
    peer.evaluating()
    axis = torch.linspace(-8, 8, 121, dtype=torch.float64)
    cell = (axis[1] - axis[0]) ** 2 * scales.prod()
    with torch.no_grad():
        total = peer.log_prob(torch.cartesian_prod(axis, axis) * scales, None).exp().sum() * cell
    assert total.item() == pytest.approx(1, abs=0.02)
    assert (peer.evaluations > 0) == (name != "zuko_nsf")
    samples = peer.sample(500, None)
    assert ((samples.std(dim=0) / scales).log().abs() < 1).all()


def test_flow_matching_learns_the_velocity_of_its_paths(monkeypatch):
    """Of data at four points the velocity is known: the mean of (x_1 - x_t) / (1 - t) over them, given x_t."""
    pytest.importorskip("flow_matching")
    from divflow.data.columns import Columns

    peers = load(monkeypatch, "results_peers")
    torch.manual_seed(0)
    corners = torch.tensor([[1, -1], [-1, 1], [1, 1], [-1, -1]], dtype=torch.float64)
    rows = corners.repeat(100, 1)
    data = Columns(rows, ["a", "b"], batch_size=50)
    settings = config("task=flow_matching", "device=cpu", "output_dir=x")
    peer = peers.PEERS["flow_matching"](settings, data, 0)

    ends = data.transform(corners)[0].float()

    def known(t, x):
        t = t.view(-1, 1, 1).clamp(max=1 - 1e-6)
        weights = (-((x[:, None] - t * ends) / (1 - t)).square().sum(-1) / 2).softmax(dim=1)
        return ((ends - x[:, None]) / (1 - t) * weights[..., None]).sum(dim=1)

    peer.model = torch.nn.Module()
    peer.model.forward = known
    best = peer.loss(rows[:400], None)
    for other in (lambda t, x: known(t, x) + 0.5, lambda t, x: 0 * x, lambda t, x: known(1 - t, x)):
        peer.model.forward = other
        assert peer.loss(rows[:400], None) > best + 0.1


def test_particles_are_evaluated_as_a_trace_by_products_would(monkeypatch, tmp_path):
    from divflow.data import Particles
    from divflow.distributions import MeanFreeNormal
    from divflow.energies import DoubleWell, Tempering
    from divflow.flow import ContinuousFlow, FlowDensity
    from divflow.likelihood import Quadrature
    from divflow.networks import PairField

    module = load(monkeypatch, "results_particles")
    monkeypatch.setattr(module, "SAMPLES", 50)
    timed = module.medians
    monkeypatch.setattr(module, "medians", lambda functions, seconds: timed(functions, 0.0))
    torch.manual_seed(0)
    sampler = Tempering(rungs=2, std=2.0, chains=20, warm_up=5, thin=1)
    data = Particles(DoubleWell(), sampler, 40, 20, 20, 20, cache=tmp_path)
    flow = ContinuousFlow(PairField((4, 2)), (4, 2), base=MeanFreeNormal((4, 2)), likelihood=Quadrature(15))
    trained = object.__new__(module.Ours)
    trained.model, trained.data = FlowDensity(flow, data.transform), data
    found = module.particles(trained)
    assert found["likelihoods_difference"] < 1e-3
    assert found["brute_force_seconds"] > 0
    # Weights by exact densities are those that the flow's own report has, of other samples.
    own = trained.model.importance_weights(lambda x: -data.energy(x), 50, torch.Generator().manual_seed(1))
    error = own.standard_error + found["exact_log_normalizer_standard_error"]
    assert abs(found["exact_log_normalizer"] + data.log_normalizer - own.log_normalizer) < 5 * error
    x = data.transform(data.test.rows)[0].float()
    z, log_det = module.augmented(flow, x, 1.0, 0.0, None)
    torch.testing.assert_close(flow.base.log_prob(z) + log_det, flow.log_prob(x), rtol=1e-3, atol=1e-3)
    probes = torch.randint(0, 2, (5_000, 1, 4, 2)) * 2.0 - 1
    draws = module.augmented(flow, x[:1].expand(5_000, 4, 2), 1.0, 0.0, probes[:, 0])[1]
    assert (draws.mean() - log_det[0]).abs() < 5 * draws.std() / 5_000**0.5 + 1e-5
    assert draws.std() > 0
