import math

import torch

from divflow.tasks.metrics import MeanWithStandardError


def test_over_batches_of_any_size():
    values, metric = torch.randn(100) * 3 + 1000, MeanWithStandardError()
    for batch in values.split([1, 50, 7, 42]):
        metric.update(batch)
    mean, error = metric.compute()
    torch.testing.assert_close(mean, values.mean())
    torch.testing.assert_close(error, values.std() / math.sqrt(100), rtol=1e-4, atol=0)
