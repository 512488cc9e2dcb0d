"""Unpooling against torch's own, values and gradients."""

import torch
from torch.nn import functional as F

from agcseg.nn.pooling import max_pool2d, max_unpool2d


def test_unpooling_without_scatter_equals_torch():
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64).relu()  # ties at 0
    pooled, indices = max_pool2d(x)
    back = torch.randn_like(x)
    results = []
    for deterministic in (False, True):
        leaf = pooled.clone().requires_grad_()
        torch.use_deterministic_algorithms(deterministic)
        try:
            output = max_unpool2d(leaf, indices)
            results.append((output, *torch.autograd.grad(output, leaf, back)))
        finally:
            torch.use_deterministic_algorithms(False)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(results[0][0], F.max_unpool2d(pooled, indices, 2))
    assert results[0][0].count_nonzero() == pooled.count_nonzero()
