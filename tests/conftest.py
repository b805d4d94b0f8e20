import os

# The tests run in several processes; more threads each would get in each other's way, here and in the runs they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
