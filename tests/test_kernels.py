"""The Triton kernels against torch's operations: on a GPU, or on CPU tensors, in Triton's interpreter, in a process of
its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent / "fakegpu"))
import fakegpu  # noqa: E402

from agcseg import losses  # noqa: E402
from agcseg.nn import agc, agc_unit, inference, max_pool2d, max_unpool2d, passes  # noqa: E402
from agcseg.nn.pooling import window_offsets  # noqa: E402
from agcseg.training.machine import settings  # noqa: E402

ON_GPU = torch.cuda.is_available() and not fakegpu.here()
pytestmark = [pytest.mark.gpu] if ON_GPU else []

if not (ON_GPU or os.environ.get("TRITON_INTERPRET")):

    def test_in_the_interpreter():
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n0", __file__]
        done = subprocess.run(
            command, env={**environment, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 and "100%" in done.stdout, done.stdout + done.stderr

else:
    from agcseg.nn import kernels

    both_layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    # one tile and part of one; several shares of several tiles; more maps than a tile has
    sizes = pytest.mark.parametrize("shape", [(2, 5, 6, 8), (1, 3, 64, 96), (2, 66, 2, 4)])

    def seeded(number):
        return torch.Generator("cuda" if ON_GPU else "cpu").manual_seed(number)

    def maps(shape, layout, dtype=torch.float32):
        return torch.randn(shape, generator=seeded(0)).to(dtype).contiguous(memory_format=layout)

    def vectors(n):
        return torch.linspace(-1, 1, n).sin(), torch.linspace(2, -0.5, n)

    @pytest.fixture(autouse=True)
    def small_tiles(monkeypatch):
        monkeypatch.setattr(kernels, "TILE", 1024)
        monkeypatch.setattr(kernels, "SHARES", 3)
        kernels._planned.cache_clear()
        with torch.device("cuda" if ON_GPU else "cpu"), settings("fp32"):
            yield
        kernels._planned.cache_clear()

    def check(found, expected, layout):
        for a, b in zip(found, expected, strict=True):
            if a is None or b is None:
                assert a is b
                continue
            assert a.dtype == b.dtype and a.shape == b.shape
            assert a.dim() < 4 or a.is_contiguous(memory_format=layout)
            digit = {torch.bfloat16: 2**-7, torch.float32: 1e-5, torch.uint8: 0}[a.dtype]
            torch.testing.assert_close(a, b, rtol=digit, atol=digit)

    @both_layouts
    @sizes
    @pytest.mark.parametrize("pool", [False, True])
    @pytest.mark.parametrize("known", [False, True])
    def test_activate(shape, layout, pool, known):
        z, (bias, mean_scale) = maps(shape, layout), vectors(shape[1])
        mean = z.mean((2, 3)) if known else None
        found = kernels.activate(z.clone(), bias, mean_scale, pool, mean)
        check(found, passes.activate(z.clone(), bias, mean_scale, pool, mean), layout)

    @both_layouts
    @sizes
    @pytest.mark.parametrize("pool", [False, True])
    def test_backward(shape, layout, pool):
        z, (bias, mean_scale) = maps(shape, layout), vectors(shape[1])
        output, winners, mean = passes.activate(z, bias, mean_scale, pool)
        grad = torch.randn(output.shape, generator=seeded(1))  # contiguous, whatever the layout
        found = kernels.backward(grad, output, winners, mean, mean_scale)
        check(found, passes.backward(grad, output, winners, mean, mean_scale, True), layout)

    @pytest.mark.parametrize("pool", [False, True])
    def test_bfloat16_to_one_digit(pool):
        layout = torch.channels_last
        z, (bias, mean_scale) = maps((2, 5, 16, 24), layout, torch.bfloat16), vectors(5)
        output, winners, mean = kernels.activate(z.clone(), bias, mean_scale, pool)
        expected = agc(z.float(), torch.ones(5), bias, mean_scale).relu()
        check([output], [(F.max_pool2d(expected, 2) if pool else expected).bfloat16()], layout)
        torch.testing.assert_close(mean, z.double().mean((2, 3)).float())
        grad = maps(output.shape, layout, torch.bfloat16)
        found = kernels.backward(grad, output, winners, mean, mean_scale)
        wide = [grad.float(), output.float(), winners, mean, mean_scale]
        dz, d_bias, d_mean_scale = passes.backward(*wide, True)
        check(found, [dz.bfloat16(), d_bias, d_mean_scale], layout)

    @both_layouts
    @sizes
    def test_windows(shape, layout):
        z = maps(shape, layout)
        values, winners = max_pool2d(z)
        for notation in (winners, window_offsets(winners, shape[3])):
            assert torch.equal(kernels.unpool(values, notation), F.max_unpool2d(values, winners, 2))
            assert torch.equal(kernels.gather(z, notation), values)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            room = torch.empty(2 * len(values), *values.shape[1:]).contiguous(memory_format=memory_format)
            passes.gather(z, window_offsets(winners, shape[3]), room[-len(z) :])
            assert torch.equal(room[-len(z) :], values)
            if memory_format == layout:
                kernels.gather(z, winners, room[: len(z)])
                assert torch.equal(room[: len(z)], values)

    def test_maps_and_vectors_that_lie_in_others():
        """What a caller hands over need not be dense: a slice, a gradient that is one number, a column of a table."""
        z = maps((2, 12, 6, 16), torch.channels_last)[:, ::2, :, 4:12]
        dense, (bias, mean_scale) = z.contiguous(), torch.stack(vectors(6), 1).unbind(1)
        values, winners = max_pool2d(dense)
        one = torch.ones(()).expand(dense.shape)
        for given in (z, one):
            assert torch.equal(kernels.gather(given, winners), passes.gather(given, window_offsets(winners, 8)))
        for given in (z[:, :, ::2, ::2], one[:, :, ::2, ::2]):
            assert torch.equal(kernels.unpool(given, winners), F.max_unpool2d(given.contiguous(), winners, 2))
        found = kernels.activate(dense.clone(), bias, mean_scale, True)
        check(found, passes.activate(dense.clone(), bias, mean_scale, True), torch.contiguous_format)
        found = kernels.backward(one[:, :, ::2, ::2], *found, mean_scale)
        expected = passes.activate(dense.clone(), bias, mean_scale, True)
        expected = passes.backward(one[:, :, ::2, ::2], *expected, mean_scale, True)
        check(found, expected, torch.contiguous_format)

    def test_the_first_of_equal_cells_wins():
        z = maps((2, 5, 8, 8), torch.channels_last).round()
        zero = torch.zeros(5)
        _, winners, _ = kernels.activate(z.clone(), zero, zero, True)
        assert torch.equal(winners, window_offsets(max_pool2d(z.relu())[1], 8))

    def test_nan_stays():
        z = maps((1, 2, 4, 4), torch.contiguous_format)
        z[0, 1, 2, 3] = torch.nan
        for pool in (False, True):
            output, winners, mean = kernels.activate(z.clone(), torch.zeros(2), torch.ones(2), pool)
            assert output[0, 1].isnan().all() and not output[0, 0].isnan().any()
            dz, *_ = kernels.backward(torch.ones_like(output), output, winners, mean, torch.ones(2))
            assert not dz[0, 0].isnan().any()

    @both_layouts
    def test_filter_gradients(layout):
        filters, d = maps((6, 5, 3, 3), layout), maps((6, 5, 3, 3), torch.contiguous_format)
        gain = torch.linspace(-1, 2, 6)
        found = kernels.filter_gradients(d.clone(), filters, gain)
        assert found[0].stride() == filters.stride()
        torch.testing.assert_close(found, passes.filter_gradients(d.clone(), filters, gain))

    @pytest.mark.parametrize("of", [lambda w: w[:, ::2], lambda w: w.transpose(0, 1), lambda w: w[:, :, 1:]])
    def test_filter_gradients_of_a_view(of):
        filters = of(maps((6, 6, 3, 3), torch.contiguous_format))
        d, gain = torch.randn(filters.shape), torch.stack(vectors(6), 1)[:, 0]
        found = kernels.filter_gradients(d.clone(), filters, gain)
        torch.testing.assert_close(found, passes.filter_gradients(d.clone(), filters, gain))

    @both_layouts
    @pytest.mark.parametrize("options", [{}, {"pool": True}, {"unpool": True, "pool": True}, {"stem": True}])
    def test_the_unit(options, layout, monkeypatch):
        """All kernels together equal the formula, values and gradients."""
        monkeypatch.setattr(passes, "kernels", lambda maps: kernels)
        monkeypatch.setattr("agcseg.nn.fast.SMALL", 0)
        shape = (2, 3, 4, 6) if "unpool" in options else (2, 3, 8, 12)
        x = maps(shape, layout).requires_grad_()
        units = [[torch.randn(k, c, 3, 3), *torch.randn(3, k)] for k, c in ((5, 4 if "stem" in options else 3), (4, 3))]
        units = [[p.requires_grad_() for p in unit] for unit in units][: 1 + ("stem" in options)]
        winners = torch.randint(4, shape, dtype=torch.uint8)
        output = agc_unit(
            x,
            *units[0],
            pool="pool" in options,
            unpool=winners if "unpool" in options else None,
            stem=units[1] if "stem" in options else None,
        )
        y = F.max_unpool2d(x, _flat(winners), 2) if "unpool" in options else x
        for filters, *parameters in reversed(units):
            y = F.relu(agc(F.conv2d(y, filters, padding=1), *parameters))
        if "pool" in options:
            output, y = output[0], F.max_pool2d(y, 2)
        leaves = [x, *(p for unit in units for p in unit)]
        grad = torch.randn(y.shape)
        found, expected = ([maps, *torch.autograd.grad(maps, leaves, grad)] for maps in (output, y))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    def _tap_sums(x):
        """In torch's own operations, (N, C, 3, 3)."""
        columns = inference._tap_sums(x, x.dtype).transpose(2, 3)
        return inference._tap_sums(columns, x.dtype).transpose(2, 3)

    @both_layouts
    @sizes
    @pytest.mark.parametrize("unpool", [False, True])
    def test_tap_sums(shape, layout, unpool):
        x, filters = maps(shape, layout), maps((4, shape[1], 3, 3), layout)
        winners = torch.randint(4, shape, dtype=torch.uint8) if unpool else None
        found = kernels.tap_sums(x, kernels.sums(x), filters, winners)
        x = F.max_unpool2d(x, _flat(winners), 2) if unpool else x
        assert found.is_contiguous(memory_format=layout)
        torch.testing.assert_close(found, _tap_sums(x), rtol=1e-5, atol=1e-4)

    @both_layouts
    @sizes
    def test_fold(shape, layout):
        x, filters, gain = maps(shape, layout), maps((5, shape[1], 3, 3), layout), torch.linspace(-1, 2, 5)
        taps = kernels.tap_sums(x, kernels.sums(x), filters)
        folded, mean = kernels.fold(filters, gain, x.dtype, taps, shape[2] * shape[3])
        assert folded.stride() == filters.stride()
        torch.testing.assert_close(folded, filters * gain.view(-1, 1, 1, 1))
        torch.testing.assert_close(mean, F.conv2d(x, folded, padding=1).mean((2, 3)), rtol=1e-4, atol=1e-5)

    @both_layouts
    @sizes
    def test_what_a_level_gives(shape, layout):
        """A number for each of a convolution's maps, as gradient of all their positions: never added to them."""
        x, filters, gain = maps(shape, layout), maps((5, shape[1], 3, 3), layout), torch.linspace(-1, 2, 5)
        level = torch.linspace(-1, 1, shape[0] * 5).cos().view(-1, 5)
        wide = [t.double().requires_grad_() for t in (x, filters)]
        z = F.conv2d(wide[0], wide[1] * gain.view(-1, 1, 1, 1), padding=1)
        z.backward(level.double()[:, :, None, None].expand_as(z))
        folded, back = kernels.fold_back(filters, gain, x.dtype, level)
        torch.testing.assert_close(folded, filters * gain.view(-1, 1, 1, 1))
        dx = torch.zeros_like(x)
        inside = kernels.borders(dx, back)
        torch.testing.assert_close(dx + inside[:, :, None, None], wide[0].grad.float(), rtol=1e-5, atol=1e-4)
        taps = kernels.tap_sums(x, kernels.sums(x), filters)
        found = kernels.filter_gradients(torch.zeros_like(filters), filters, gain, taps, level)
        torch.testing.assert_close(found[0], wide[1].grad.float(), rtol=1e-4, atol=1e-3)
        d_gain = (filters * torch.einsum("nk,ncij->kcij", level, taps)).sum((1, 2, 3))
        torch.testing.assert_close(found[1], d_gain, rtol=1e-4, atol=1e-3)

    @both_layouts
    @sizes
    @pytest.mark.parametrize("pool", [False, True])
    def test_gate(shape, layout, pool):
        z, (bias, mean_scale) = maps(shape, layout), vectors(shape[1])
        mean = z.mean((2, 3))
        output, winners, _, partial = kernels.activate(z, bias, mean_scale, pool, mean, True)
        torch.testing.assert_close(partial.sum(1), output.sum((2, 3)), rtol=1e-5, atol=1e-4)
        grad, sum_grad = maps(output.shape, layout).flip(0), mean.flip(0).contiguous()
        expected = torch.where(output > 0, grad + sum_grad[:, :, None, None], 0)
        found, partial = kernels.gate(grad, output, winners, sum_grad)
        assert torch.equal(found, expected if winners is None else kernels.unpool(expected, winners))
        torch.testing.assert_close(partial.sum(1), expected.sum((2, 3)), rtol=1e-5, atol=1e-4)
        level, d_bias, d_mean_scale = kernels.levels(partial, mean, mean_scale, 7)
        s = expected.sum((2, 3))
        for a, b in ((level, -mean_scale * s / 7), (d_bias, s.sum(0)), (d_mean_scale, -(mean * s).sum(0))):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize(
        "many, outer, stem, layout",  # many: all, all but one in the middle
        [
            (0, False, True, torch.contiguous_format),
            (0, True, False, torch.channels_last),
            (5 * 4 * 32, False, True, torch.channels_last),
            (5 * 4 * 32, True, False, torch.contiguous_format),
        ],
    )
    def test_units_that_know_their_mean(many, outer, stem, layout, monkeypatch):
        """Units that hand on the sums of their maps equal the formula, with an unpooling and a pooling among them."""
        monkeypatch.setattr(passes, "kernels", lambda maps: kernels)
        monkeypatch.setattr("agcseg.nn.fast.SMALL", 0)
        monkeypatch.setattr("agcseg.nn.unit.MANY", many)
        x = maps((5, 3, 8, 4), layout).requires_grad_(outer)  # the convolution's input's gradient, or none
        widths = [3, 6, 3, 5, 4, 6]
        units = [[torch.randn(k, c, 3, 3), *torch.randn(3, k)] for c, k in zip(widths, widths[1:], strict=False)]
        units = [[p.contiguous(memory_format=layout) if p.dim() == 4 else p for p in unit] for unit in units]
        units = [[p.requires_grad_() for p in unit] for unit in units]
        first = {"stem": units[0]} if stem else {}
        y, sums = agc_unit(x, *units[stem], sum_up=True, **first)
        if not stem:
            y, sums = agc_unit(y, *units[1], sum_up=True, sums=sums)
        y, winners, sums = agc_unit(y, *units[2], pool=True, sum_up=True, sums=sums)
        y, sums = agc_unit(y, *units[3], unpool=winners.flip(1)[:, :1].expand_as(y), sum_up=True, sums=sums)
        found, sums = agc_unit(y, *units[4], sum_up=True, sums=sums)
        assert sums is not None
        y = x
        for i, (filters, *parameters) in enumerate(units):
            if i == 3:
                y, indices = F.max_pool2d(y, 2, return_indices=True)
                cells = window_offsets(indices, 4).flip(1)[:, :1].expand_as(y)
                y = F.max_unpool2d(y, _flat(cells), 2)
            y = F.relu(agc(F.conv2d(y, filters, padding=1), *parameters))
        leaves = [*([x] if outer else []), *(p for unit in units for p in unit)]
        grad = torch.randn(y.shape)
        found, expected = ([maps, *torch.autograd.grad(maps, leaves, grad)] for maps in (found, y))
        for a, b in zip(found, expected, strict=True):
            size = b.abs().max()
            torch.testing.assert_close(a / size, b / size, rtol=0, atol=1e-4)

    @both_layouts
    @pytest.mark.parametrize("dtype, weighted", [(torch.float32, True), (torch.bfloat16, False)])
    @pytest.mark.parametrize("shape", [(3, 19, 6, 8), (2, 2, 40, 64), (1, 70, 2, 5)])
    def test_class_loss(shape, layout, dtype, weighted, monkeypatch):
        n, k, *size = shape
        logits = (8 * maps(shape, layout)).to(dtype)
        logits[0, 1, 0, 0] = 90  # as exp would overflow
        labels = torch.randint(0, k, (n, *size), generator=seeded(2), dtype=torch.uint8)
        labels[:, 1] = 255
        labels[-1, 1:] = 255 if n > 2 else 0
        weights = torch.linspace(0, 2, k) if weighted else None
        results = []
        for on_a_gpu in (False, True):
            monkeypatch.setattr(losses, "kernels", lambda maps, here=on_a_gpu: kernels if here else None)
            x = logits.clone().requires_grad_() if on_a_gpu else logits.float().requires_grad_()
            loss = losses.segmentation_loss(x, labels, weights)
            (d,) = torch.autograd.grad(loss, x, torch.linspace(1, 2, n))
            assert d.dtype == x.dtype and (d.is_contiguous(memory_format=layout) or not on_a_gpu)
            results += [[loss, d.float()]]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)

    def test_a_label_that_is_no_class_is_told(monkeypatch):
        monkeypatch.setattr(losses, "kernels", lambda maps: kernels)
        labels = torch.tensor([[[0, 1, 255, 0]], [[0, 3, 255, 0]], [[0, -1, 255, 0]]])
        for weights in (torch.ones(3), None):
            loss = losses.segmentation_loss(torch.zeros(3, 3, 1, 4), labels, weights)
            torch.testing.assert_close(loss[0], torch.tensor(3.0).log())
            assert loss[1:].isnan().all()

    def _flat(cells):
        h, w = cells.shape[2:]
        corner = torch.arange(0, 4 * h * w, 4 * w).view(h, 1) + torch.arange(0, 2 * w, 2)
        return corner + cells % 2 + cells // 2 * 2 * w

    def test_unpooling_between_other_units(monkeypatch):
        monkeypatch.setattr(passes, "kernels", lambda maps: kernels)
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        values, winners = max_pool2d(maps((2, 3, 4, 6), torch.channels_last))
        values.requires_grad_()
        expected = F.max_unpool2d(values, winners, 2)
        found = max_unpool2d(values, winners)
        grad = torch.randn(found.shape)
        assert torch.equal(found, expected) and found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(*(torch.autograd.grad(maps, values, grad)[0] for maps in (found, expected)))
