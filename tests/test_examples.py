"""Every script of examples/ in a small form, and the facts that it relies on."""

import csv
import importlib
import math
import subprocess
import sys

import pytest
import torch
from run import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch, request):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(request.param)


@pytest.mark.parametrize("example", ["lightning_module"], indirect=True)
def test_a_lightning_module_learns_the_score(example):
    assert example.main(60) < example.main(1)


@pytest.mark.parametrize("example", ["csv_to_samples"], indirect=True)
def test_from_csv_to_samples(example, tmp_path):
    nll = example.main(None, tmp_path / "samples.csv", 40, 50)
    assert math.isfinite(nll)
    rows = list(csv.reader((tmp_path / "samples.csv").read_text().splitlines()))
    assert rows[0] == ["sepal length", "sepal width", "petal length", "petal width"]
    assert len(rows) == 51
    means = torch.tensor([[float(value) for value in row] for row in rows[1:]]).mean(dim=0)
    assert 5 < means[0] < 7  # centimetres, as in the file


@pytest.mark.parametrize("example", ["places"], indirect=True)
def test_from_places_to_a_map(example, tmp_path):
    torch.manual_seed(0)
    example.write_places(tmp_path / "places.csv", 90)
    nll = example.main(tmp_path / "places.csv", tmp_path / "map.png", 20)
    assert nll < math.log(4 * math.pi) + 0.5  # that of the uniform density
    assert (tmp_path / "map.png").stat().st_size > 10_000


@pytest.mark.slow
def test_diffusers_likelihood(monkeypatch, tmp_path):
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("diffusers_likelihood")
    bits, error = example.main(None, 2, 3)
    assert 0 < error < bits
    torch.manual_seed(0)
    unet, scheduler = example.trained_here(2, example.Digits((1, 8, 8), margin=None))
    unet.save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "scheduler")
    again, _ = example.main(tmp_path, 0, 3)
    assert again == pytest.approx(bits, rel=0.05)  # of another 2 steps from the same seed, and the same probes


@pytest.mark.slow
def test_several_processes_test_every_row_once():
    done = subprocess.run(
        [sys.executable, "several_processes.py", "--processes", "2", "--steps", "3"],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes, 3 steps" in done.stdout
    assert done.stdout.count("nats over 1001 rows") == 1


@pytest.mark.parametrize("example", ["fokker_planck"], indirect=True)
def test_the_fokker_planck_residual(example):
    """The known solution leaves none, and torch.func finds the same of a network."""
    problem = example.Problem()
    problem.matrix, problem.means = problem.matrix.double(), problem.means.double()
    t = example.LAST * torch.rand(16, 1, dtype=torch.float64)
    x = problem.sample(t)
    for of in (example.residual, example.residual_by_torch_func):
        assert of(problem, problem.log_density, t, x).abs().max() < 1e-10
    network = example.Network(problem).double()
    ours, theirs = (of(problem, network, t, x) for of in (example.residual, example.residual_by_torch_func))
    torch.testing.assert_close(ours, theirs)
    assert ours.abs().min() > 1e-6


@pytest.mark.parametrize("example", ["fokker_planck"], indirect=True)
def test_the_fokker_planck_equation_is_learned(example):
    before, after = example.main(40, 64)
    assert after < before


@pytest.mark.parametrize("example", ["helium"], indirect=True)
def test_the_local_energy_of_helium(example):
    """Of two hydrogen-like orbitals it is -Z^2 and the repulsion, wherever they are; torch.func finds the same of a network."""
    x = torch.randn(16, 2, 3, dtype=torch.float64)
    apart = 1 / (x[:, 0] - x[:, 1]).norm(dim=1)
    of = example.local_energy(lambda x: -2 * x.square().sum(dim=2).sqrt().sum(dim=1), x)
    torch.testing.assert_close(of, -4 + apart)
    psi = example.WaveFunction(8).double()
    torch.nn.init.normal_(psi.layers[-1].weight)
    ours, theirs = example.local_energy(psi, x), example.local_energy_by_torch_func(psi, x)
    torch.testing.assert_close(ours, theirs)
    assert (ours - of).abs().min() > 1e-3
    torch.testing.assert_close(psi(x), psi(x.flip(1)))


@pytest.mark.parametrize("example", ["helium"], indirect=True)
def test_the_local_energy_is_finite_where_particles_meet(example):
    psi = example.WaveFunction(8).double()
    near = torch.tensor([1e-5, 0.0, 0.0], dtype=torch.float64)
    far = torch.tensor([0.3, 0.5, -0.4], dtype=torch.float64)
    at_nucleus, together = torch.stack([near, far])[None], torch.stack([far + near, far])[None]
    for x in (at_nucleus, together):
        assert example.potential(x).abs() > 9e4
        assert example.local_energy(psi, x).abs() < 10


@pytest.mark.parametrize("example", ["helium"], indirect=True)
def test_helium_is_bound_by_more_than_hartree_and_fock_know(example):
    energy, error = example.main(60, 400, 30)
    assert example.EXACT - 5 * error < energy < example.HARTREE_FOCK
    assert error < 0.005


@pytest.mark.slow
def test_a_boltzmann_generator(monkeypatch, capsys):
    """A flow that is hardly trained is right all the same, within the errors that it states."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("boltzmann_generator")
    found = example.main(steps=60, num_data=1_000, num_weighted=800, hidden=16)
    assert "by quadrature 29.6672" in capsys.readouterr().out
    assert 0.005 < found["effective_sample_fraction"] < 1
    assert abs(found["log_normalizer_deviation"]) < 5
    assert abs(found["outer_well_deviation"]) < 5


def test_every_example_is_tested():
    named = (ROOT / "tests" / "test_examples.py").read_text()
    assert all(path.stem in named for path in EXAMPLES.glob("*.py"))
