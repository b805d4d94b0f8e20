"""Particles of a known energy as data: their splits, their density, and samples that are kept."""

import copy
import inspect
import math
import re
import shutil
from dataclasses import dataclass

import pytest
import torch

from divflow.data import DataError, MeanFreeScale, Particles
from divflow.data import particles as module
from divflow.distributions import BaseError, MeanFreeNormal
from divflow.energies import DoubleWell, EnergyError, LennardJones, PairEnergy, Tempering
from divflow.flow import ContinuousFlow, FlowDensity

SAMPLER = Tempering(rungs=8, power=2.0, std=2.0, chains=40, warm_up=40, thin=2)
COUNTS = {"num_train": 300, "num_val": 60, "num_test": 80, "num_weighted": 20}


@pytest.fixture
def made(monkeypatch):
    """How often the sampler was called."""
    calls = []

    def counted(self, *arguments):
        calls.append(self)
        return original(self, *arguments)

    original = Tempering.__call__
    monkeypatch.setattr(Tempering, "__call__", counted)
    return calls


def particles(folder, energy=None, **settings):
    return Particles(energy or DoubleWell(), SAMPLER, **COUNTS | settings, cache=folder)


def test_splits_and_scale(tmp_path):
    data = particles(tmp_path)
    assert [len(rows) for rows in (data.train, data.val, data.test)] == [300, 60, 80]
    assert data.event_shape == (4, 2)
    everything = torch.cat([data.train.rows, data.val.rows, data.test.rows])
    assert len(everything.unique(dim=0)) > 400  # a state that was refused stays
    assert everything.mean(dim=1).abs().max() < 1e-5
    y, _ = data.transform(data.train.rows)
    torch.testing.assert_close(y.std(), torch.tensor(1.0))
    assert y.mean(dim=1).abs().max() < 1e-5


def test_the_density_is_the_boltzmann_density(tmp_path):
    """log Z of DW4 by quadrature, 29.6672; of others by the sampler, with an error."""
    data = particles(tmp_path)
    assert abs(data.log_normalizer - 29.66723) < 1e-4
    assert data.log_normalizer_error == 0
    assert abs(data.free_energy_difference + 0.02134) < 1e-4
    x = data.test.rows
    torch.testing.assert_close(data.log_prob(x), -DoubleWell()(x) - data.log_normalizer)
    other = particles(tmp_path, LennardJones(3, 2))
    assert other.free_energy_difference is None
    assert other.log_normalizer_error > 0


def test_a_flow_that_is_the_density_of_the_data_has_no_gap():
    """A normal density on the subspace, scaled: what the scale's log-determinant must be there."""
    transform = MeanFreeScale(0.5)
    density = FlowDensity(ContinuousFlow(lambda t, x: 0 * x, (4, 2), base=MeanFreeNormal((4, 2))), transform)
    x = density.sample(20).float()
    expected = -x.square().sum(dim=(1, 2)) / (2 * 0.25) - 6 / 2 * math.log(2 * math.pi * 0.25)
    torch.testing.assert_close(density.log_prob(x), expected)
    torch.testing.assert_close(transform.inverse(transform(x)[0]), x.double(), rtol=1e-6, atol=1e-6)
    with pytest.raises(BaseError, match="off"):
        density.log_prob(x + 1)


def test_samples_are_made_once(tmp_path, made, capsys):
    first = particles(tmp_path)
    assert "once, to be kept in" in capsys.readouterr().out
    again = particles(tmp_path)
    assert len(made) == 1
    assert capsys.readouterr().out == ""
    for name in ("train", "val", "test"):
        assert torch.equal(getattr(first, name).rows, getattr(again, name).rows)
    others = [particles(tmp_path, seed=1), particles(tmp_path, DoubleWell(c=0.8)), particles(tmp_path, num_train=340)]
    assert len(made) == 4
    for other in others:
        assert not torch.equal(other.train.rows[:300], first.train.rows)


def save(path, **changes):
    """The file with other values under some names, or without those that are None."""
    kept = torch.load(path) | changes
    torch.save({name: value for name, value in kept.items() if value is not None}, path)


def flip(path):
    """One bit of the first sample's exponent, as a bad disk would."""
    content = bytearray(path.read_bytes())
    content[content.find(torch.load(path)["samples"][0].numpy().tobytes()) + 3] ^= 1
    path.write_bytes(content)


HARMS = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:200]), "can't be read"),
    "text": (lambda path: path.write_text("hello, world"), "can't be read"),
    "garbage": (lambda path: path.write_bytes(b"h\x0a."), "can't be read"),
    "empty": (lambda path: path.write_bytes(b""), "can't be read"),
    "list": (lambda path: torch.save([1, 2], path), "another version"),
    "tensor": (lambda path: torch.save(torch.ones(3), path), "another version"),
    "foreign": (lambda path: torch.save({"samples": torch.zeros(3)}, path), "another version"),
    "no samples": (lambda path: save(path, samples=None), "no samples"),
    "no tensor": (lambda path: save(path, samples=3), "no samples"),
    "fewer": (lambda path: save(path, samples=torch.load(path)["samples"][:-1]), r"no samples of shape \(440, 3, 2\)"),
    "no energies": (lambda path: save(path, energies=None), "no energies"),
    "no log Z": (lambda path: save(path, log_normalizer=None), "no number log_normalizer"),
    "NaN": (lambda path: save(path, samples=torch.full((440, 3, 2), math.nan)), "whose energies differ"),
    "bit": (flip, "whose energies differ"),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Data, and the file that their samples are kept in."""
    folder = tmp_path_factory.mktemp("kept")
    data = particles(folder, LennardJones(3, 2))
    (path,) = folder.glob("*.pt")
    return data, path


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_damaged_is_made_anew(tmp_path, kept, made, capsys, harm):
    first, whole = kept
    path = tmp_path / whole.name
    shutil.copy(whole, path)
    damage, why = HARMS[harm]
    damage(path)
    again = particles(tmp_path, LennardJones(3, 2))
    assert len(made) == 1
    assert re.search(f"{why}.*Making it again", capsys.readouterr().out)
    assert torch.equal(first.train.rows, again.train.rows)
    particles(tmp_path, LennardJones(3, 2))
    assert len(made) == 1
    assert [it.name for it in tmp_path.iterdir()] == [path.name]


def test_what_is_of_another_version_is_made_anew(tmp_path, made, capsys, monkeypatch):
    particles(tmp_path)
    monkeypatch.setattr(module, "_VERSION", 2)
    particles(tmp_path)
    assert len(made) == 2
    assert "another version" in capsys.readouterr().out


def springs(formula):
    """A class of one name, whose formula a user edits."""

    @dataclass(frozen=True)
    class Springs(PairEnergy):
        particles: int = 4
        dimensions: int = 2

        def pair(self, squared):
            return formula(squared)

    Springs.__qualname__ = "Springs"
    return Springs()


def test_an_energy_of_another_formula_is_sampled_anew(tmp_path, made, capsys):
    """Its parameters, and so the key, are the same."""
    first, kept = particles(tmp_path, springs(lambda squared: squared / 2)), list(tmp_path.iterdir())
    edited = particles(tmp_path, springs(lambda squared: squared))
    assert list(tmp_path.iterdir()) == kept
    assert len(made) == 2
    assert "formula of the energy has changed" in capsys.readouterr().out
    assert edited.train.rows.std() < 0.9 * first.train.rows.std()
    again = particles(tmp_path, springs(lambda squared: 1 * squared))
    assert len(made) == 2
    assert again.log_normalizer == edited.log_normalizer != first.log_normalizer


@pytest.mark.parametrize("place", ["file", "below", "folder"])
def test_a_cache_that_cant_be_written_to_is_refused_before_sampling(tmp_path, made, place):
    cache = tmp_path / "file"
    if place == "folder":
        particles(cache)
        made.clear()
        (path,) = cache.iterdir()
        path.unlink()
        path.mkdir()
    else:
        cache.write_text("")
    with pytest.raises(DataError, match=r"file.*cache="):
        particles(cache / "more" if place == "below" else cache)
    assert not made


def test_an_energy_that_is_none(made):
    unchecked = inspect.unwrap(Particles.__init__)  # while tests run, annotations are checked, too
    with pytest.raises(EnergyError, match="must be a PairEnergy.*function"):
        unchecked(Particles.__new__(Particles), lambda x: x, SAMPLER)
    assert not made


def test_where_quadrature_fails_log_z_is_the_samplers(tmp_path, monkeypatch, capsys):
    def fails(energy, split):
        raise EnergyError("quadrature does not resolve it")

    monkeypatch.setattr(module, "quartet", fails)
    data = particles(tmp_path)
    assert abs(data.log_normalizer - 29.66723) < 5 * data.log_normalizer_error
    assert data.free_energy_difference is None
    assert "sampler's: quadrature does not resolve it" in capsys.readouterr().out


def test_the_default_folder_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    particles(None)
    assert len(list((tmp_path / "divflow").glob("DoubleWell-4-2-*.pt"))) == 1


@pytest.mark.parametrize("name", COUNTS)
def test_splits_that_are_too_small(tmp_path, made, name):
    with pytest.raises(DataError, match=f"{name} must be at least 2.*1"):
        particles(tmp_path, **{name: 1})
    assert not made


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, torch.ones(4, 2)])
def test_a_scale_is_one_positive_number(scale):
    with pytest.raises(ValueError, match="one positive number"):
        MeanFreeScale(scale)


def test_a_velocity_must_leave_the_centre():
    base, x = MeanFreeNormal((4, 2)), MeanFreeNormal((4, 2)).sample((3,))
    base.check_velocity(lambda t, x: x * t, 0.5, x)
    with pytest.raises(BaseError, match=r"moves it by 1.*mean_free=True"):
        base.check_velocity(lambda t, x: x + 1, 0.5, x)
    drift = torch.nn.Linear(2, 2)
    torch.nn.init.zeros_(drift.weight)
    torch.nn.init.zeros_(drift.bias)
    field = _Field(drift)
    before = copy.deepcopy(field.state_dict())
    with pytest.raises(BaseError, match="moves it"):
        base.check_velocity(field, 0.5, x)  # which is zero as yet
    assert all(torch.equal(before[name], value) for name, value in field.state_dict().items())


class _Field(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, t, x):
        return self.net(x)
