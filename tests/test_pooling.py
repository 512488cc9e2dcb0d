"""Unpooling against torch's own, values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from agcseg.nn import passes
from agcseg.nn.pooling import max_pool2d, max_unpool2d, window_offsets


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset", [0, 1])
def test_passes_equal_torch_bit_for_bit(dtype, layout, offset, monkeypatch):
    """Through integers that hold one number or two side by side, which at an odd offset lie across the memory's own."""
    monkeypatch.setattr(passes, "BLOCK", 64)
    numbers = torch.randn(2 * 3 * 8 * 12 + 1).mul(2).round().add(0.0).to(dtype)  # ties; -0 is less than 0 here
    maps = numbers[offset : len(numbers) - 1 + offset]
    maps[7], maps[30] = torch.inf, -torch.inf
    maps = maps.view(2, 3, 8, 12) if layout == torch.contiguous_format else maps.view(2, 8, 12, 3).permute(0, 3, 1, 2)
    maxima, winners = F.max_pool2d(maps, 2, return_indices=True)
    cells = window_offsets(winners, 12).contiguous(memory_format=layout)
    for found, expected in zip(passes.max_pool(maps), (maxima, cells), strict=True):
        assert torch.equal(found, expected) and found.is_contiguous(memory_format=layout)
    unpooled = passes.unpool(maxima, cells)
    assert torch.equal(unpooled, F.max_unpool2d(maxima, winners, 2)) and unpooled.is_contiguous(memory_format=layout)
    assert torch.equal(passes.gather(maps, cells), maxima)
