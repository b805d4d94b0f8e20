import gc
import os

# The tests run in several processes; more threads each would get in each other's way, here and in the runs they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_collection_finish():
    """What was imported to collect tests stays, and is not looked through for garbage at each of them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(autouse=True)
def _seeded():
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # the same, without a trace of the stack for each kind of device that is not there
        torch.default_generator.manual_seed(0)


@pytest.fixture
def without_validation():
    """As importing zuko leaves torch's distributions, for everyone; here for a test. Importing Pyro changes them, too."""
    from torch.distributions import Distribution

    before = Distribution._validate_args, Distribution.__dict__.get("arg_constraints")
    Distribution._validate_args, Distribution.arg_constraints = False, {}
    yield
    Distribution._validate_args, Distribution.arg_constraints = before
