"""Networks of a user's own that differentiate themselves, are reparameterised, lazy, or of scalar times: by the command, and by hand."""

import re
import subprocess
import sys

import pytest
import torch
from run import FAST, SMALL_TOY, command, run_here
from torch import nn

from divflow.cli import main
from divflow.divergence import FieldError, Hutchinson, check_field
from divflow.flow import ContinuousFlow
from divflow.likelihood import Augmented
from divflow.matching import ConditionalFlowMatching
from divflow.score import VariancePreserving
from divflow.score.objectives import DenoisingScoreMatching, TimeConditionalScoreMatching
from divflow.solver import Solver
from divflow.tasks import ScoreTask

OWN = [*(it for it in FAST if not it.startswith("network")), *SMALL_TOY, "data=two_moons", "~network"]
# A file of a user's, in the folder where the command is typed.
NETWORKS = '''
import torch
from torch import nn
from torch.nn.utils import prune

class Potential(nn.Module):
    """The gradient of a potential: one layer old-style weight-normalized, one pruned, one lazy."""

    def __init__(self, event_shape):
        super().__init__()
        pruned = prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5)
        self.net = nn.Sequential(nn.LazyLinear(16), nn.Tanh(), pruned, nn.Tanh(), nn.utils.weight_norm(nn.Linear(16, 1)))

    def forward(self, t, x):
        inputs = torch.cat([x, t.expand(len(x))[:, None]], dim=1)
        return torch.autograd.grad(self.net(inputs).sum(), x, create_graph=True)[0]

class Unused(nn.Module):
    def __init__(self, event_shape):
        super().__init__()
        self.net, self.left_out = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, t, x):
        return self.net(x)
'''


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("own_networks", None)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize(
    "task",
    [
        "flow_matching",
        pytest.param("flow", marks=pytest.mark.slow),
        pytest.param("score", marks=pytest.mark.slow),
    ],
)
def test_a_potential_of_reparameterised_and_lazy_layers_is_trained_evaluated_and_sampled(own_folder, task, capsys):
    run_here(*OWN, f"task={task}", "+network._target_=own_networks.Potential", "output_dir=run")
    trained = ["ckpt_path=run/checkpoints/best.ckpt", "allow=[own_networks.Potential]"]
    with pytest.raises(
        SystemExit, match=r"own_networks.Potential' \(at divflow.network\).*allow=\[own_networks.Potential\]"
    ):
        main(["evaluate", trained[0]])
    main(["evaluate", *trained])
    main(["sample", *trained, "num_samples=3"])
    tested, evaluated = re.findall(r"log-likelihood\s*│\s*(\S+)", capsys.readouterr().out)
    assert tested == evaluated


def slope(t, x):
    return torch.autograd.grad(-x.cosh().log().sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "ways", [{}, {"likelihood": Augmented()}, {"solver": Solver("rk4")}, {"estimator": Hutchinson()}]
)
def test_a_field_that_differentiates_itself_has_the_density_of_its_derivative(mode, ways):
    x = torch.randn(4, 2, dtype=torch.float64)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    with mode():
        found = ContinuousFlow(slope, 2, **ways).log_prob(x, generator=generators[0])
        known = ContinuousFlow(lambda t, x: -x.tanh(), 2, **ways).log_prob(x, generator=generators[1])
        torch.testing.assert_close(found, known, rtol=1e-9, atol=1e-9)
        assert not found.requires_grad
        assert not ContinuousFlow(slope, 2, **ways).sample(3).requires_grad


class Gradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.potential = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, t, x):
        return torch.autograd.grad(self.potential(x).sum(), x, create_graph=True)[0]


def test_after_check_field_its_first_evaluation_draws_what_the_second_does():
    net, x = Gradient(), torch.randn(4, 2)
    objective = ConditionalFlowMatching()
    objective.check(net, x)

    def loss():
        torch.manual_seed(1)
        value = objective(net, x).mean()
        value.backward()
        return value.detach(), net.potential[0].weight.grad.clone()

    (first, gradient), (second, _) = loss(), loss()
    assert first == second
    assert gradient.any()


def test_a_derivative_without_its_graph_is_still_refused():
    def severed(t, x):
        return torch.autograd.grad(-x.cosh().log().sum(), x)[0]

    with pytest.raises(FieldError, match="create_graph=True"):
        check_field(severed, 0.5, torch.randn(4, 2))


def test_denoising_trains_a_score_that_is_a_gradient():
    net = Gradient()
    DenoisingScoreMatching(0.1)(net, torch.randn(4, 2)).mean().backward()
    assert net.potential[0].weight.grad.any()


def test_other_errors_of_torch_are_the_fields_own():
    def broken(t, x):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        ContinuousFlow(broken, 2).sample(2)

    frozen = torch.ones(2)
    with pytest.raises(RuntimeError, match="does not require grad"):
        ContinuousFlow(lambda t, x: torch.autograd.grad(frozen.sum(), x)[0], 2).sample(2)


class ScalarTime(nn.Module):
    def forward(self, t, x):
        assert t.ndim == 0, "one time for all"
        return -x * t


def test_a_score_of_scalar_times_is_refused_before_it_is_trained():
    sde = VariancePreserving(event_shape=(2,))
    task = ScoreTask(ScalarTime(), TimeConditionalScoreMatching(sde, DenoisingScoreMatching()))
    for rows in (1, 5):
        with pytest.raises(FieldError, match=r"scalar times only.*Bring t to the columns of x"):
            task.check(torch.randn(rows, 2))
    net = ContinuousFlow(ScalarTime(), 2)
    assert net.log_prob(torch.zeros(3, 2)).shape == (3,)


@pytest.mark.slow
def test_unused_parameters_in_several_processes_name_the_setting(own_folder):
    settings = [*OWN, "device=multi_process_cpu", "task=flow_matching", "+network._target_=own_networks.Unused"]
    run = subprocess.run(command(*settings), capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 1
    assert "left_out.weight" in run.stderr
    assert "device.strategy=ddp_find_unused_parameters_true" in run.stderr
    assert "Traceback" not in run.stderr
    setting = "device.strategy=ddp_find_unused_parameters_true"
    assert subprocess.run(command(*settings, setting), timeout=300, check=False).returncode == 0
