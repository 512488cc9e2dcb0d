"""Predicted milliseconds of a training step on an H100, from the kernels that it launches on the fake GPU.

    python roofline.py VARIANT MINIBATCH [HEIGHTxWIDTH] [WIDTH]     in the environment of README.md

A prediction, no measurement: each launch takes the longest of its bytes at BANDWIDTH, its operations at PEAK, and
LAUNCH. Bytes: an operation of torch's reads its arguments and writes its results once, batch normalisation PASSES; a
Triton kernel, of agcseg or of Inductor, passes once over each tensor it has, twice where it works in place. No cache,
no workspaces, every convolution at the same share of the peak. The host is not in it.
"""

import inspect
import sys
from collections import Counter

import fakegpu
import torch
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton.runtime.jit import JITFunction

from agcseg.bench.step import Case, Step
from agcseg.nn import unit
from agcseg.training.machine import settings

BANDWIDTH = 3.0e12 * 0.85  # bytes/s
PEAK = 798e12 * 0.75  # bfloat16 operations/s
LAUNCH = 1.8e-6  # s, at least
BORDERS = {"tap_sums": ("x", "winners"), "borders": ("dx",)}  # of which maps they read no more
PASSES = {"native_batch_norm": 3, "native_batch_norm_backward": 5}  # over a map; statistics read it once more

launched: list[tuple[str, int, int, int]] = []  # name, bytes, operations, launches


class Launches(TorchDispatchMode):
    @classmethod
    def is_infra_mode(cls):  # else torch would run eagerly what is compiled
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name
        if name.startswith("agcseg::unit"):
            with self:  # look into it
                return (unit._backward if name.endswith("backward") else unit._forward)(*args, **kwargs)
        before = fakegpu.counts()["launches"]
        result = function(*args, **kwargs)
        if number := fakegpu.counts()["launches"] - before:
            if bias := _bias(name, args, result):  # a kernel of its own
                launched.append((f"{name} (bias)", bias, 0, 1))
            launched.append((name, _traffic(function, args, kwargs, result), _work(function, args, kwargs, result),
                             number - bool(bias)))  # fmt: skip
        return result


def _bytes(tensor):
    numbers = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= length if stride else 1  # what is expanded is read once
    return numbers * tensor.element_size()


def _bias(name, args, result):
    if name in ("aten::convolution", "aten::conv2d") and args[2] is not None:
        return 2 * _bytes(result)
    return _bytes(args[0]) if name == "aten::convolution_backward" and args[-1][2] else 0


def _work(function, args, kwargs, result):
    if function is torch.ops.aten.conv2d.default:  # within a unit torch does not take it apart
        return flop_registry[torch.ops.aten.convolution](*args[:2], None, *args[3:6], False, None, None, out_val=result)
    formula = flop_registry.get(function._overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0


def _traffic(function, args, kwargs, result):
    name = function._schema.name.removeprefix("aten::")
    if name in PASSES:
        return PASSES[name] * max(_bytes(t) for t in args if isinstance(t, torch.Tensor))
    if name == "convolution_backward":  # either gradient reads two of the three and writes the third's like
        return sum(map(_bytes, args[:3])) * sum(args[-1][:2])
    total, seen = 0, set()
    for i, argument in enumerate(function._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        only = argument.is_out or name in ("copy_", "fill_", "zero_")
        for tensor in tree_leaves(value):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                seen.add(tensor.untyped_storage().data_ptr())
                total += _bytes(tensor) * (2 if written and not only else 1)
    results = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_cuda]
    return total + sum(_bytes(t) for t in results if t.untyped_storage().data_ptr() not in seen)


def _own(self, *args, **options):
    result = _run_own(self, *args, **options)
    tensors = dict(zip(inspect.signature(self.fn).parameters, args, strict=False))
    if not options.get("POOL", options.get("UNPOOL", True)):
        tensors.pop("winners")  # there are none
    if not options.get("ADD", True):
        tensors.pop("sum_grad", None)
    moved = {name: _bytes(t) for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    for name in BORDERS.get(self.fn.__name__, ()):
        if name in moved:
            *_, h, w = tensors[name].shape
            moved[name] = moved[name] * 2 * (h + w) // (h * w)
    launched.append((self.fn.__name__, sum(moved.values()), 0, 1))
    return result


def _inductor(self, *args, **options):
    before = fakegpu.counts()["launches"]
    result = _run_inductor(self, *args, **options)
    tensors = [(k, t) for k, t in zip(self.triton_meta["signature"], args, strict=False) if isinstance(t, torch.Tensor)]
    total = sum(_bytes(t) * (2 if k.startswith("in_out_ptr") else 1) for k, t in tensors)
    if number := fakegpu.counts()["launches"] - before:
        launched.append(("Inductor's", total, 0, number))
    return result


_run_own, JITFunction.run = JITFunction.run, _own
_run_inductor, CachingAutotuner.run = CachingAutotuner.run, _inductor


def main(variant: str, minibatch: str, size: str = "256x512", width: str = "1") -> None:
    height_width = tuple(int(side) for side in size.split("x"))
    case = Case("segnet", variant, int(minibatch), "bf16", height_width, float(width), "cuda:0", channels_last=True)
    with settings("bf16"):
        step = Step(case)
        for _ in range(3):  # compiles
            step()
        before = fakegpu.counts()["launches"]
        step()
        number = fakegpu.counts()["launches"] - before
        launched.clear()
        with Launches():
            step()
    logged = sum(n for _, _, _, n in launched)
    if logged != number:
        raise SystemExit(f"{logged} launches were seen of {number} that a step makes: no prediction")
    milliseconds, launches, moved = Counter(), Counter(), Counter()
    for name, total, work, n in launched:
        milliseconds[name] += 1e3 * max(total / BANDWIDTH, work / PEAK, n * LAUNCH)
        launches[name] += n
        moved[name] += total
    for name, ms in milliseconds.most_common():
        print(f"{ms:8.3f} ms {launches[name]:5} launches {moved[name] / 2**20:9.1f} MiB  {name}")
    print(f"{milliseconds.total():8.3f} ms {number:5} launches {moved.total() / 2**20:9.1f} MiB  {variant}, predicted")


if __name__ == "__main__":
    main(*sys.argv[1:])
