"""The device a run computes on, and how torch is set for it."""

import subprocess
import sys
import textwrap

import pytest
import torch

from agcseg.errors import UserError
from agcseg.nn import ConvUnit
from agcseg.training.machine import channels_last, compiled, find_device, keeping, out_of_memory, settings


def test_the_cpu_has_one_name():
    assert find_device("cpu") == find_device("cpu:0") == torch.empty(0).device


@pytest.mark.parametrize("name", ["meta", "mps", "cuda:99", "gpu"])
def test_other_devices_are_refused(name):
    with pytest.raises(UserError, match=rf"^device={name}: cannot be used here \(.+\); try device=auto or device=cpu$"):
        find_device(name)


@pytest.mark.parametrize(
    "message",
    [
        "GET was unable to find an engine to execute this computation",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    ],
)
def test_out_of_memory_in_other_words(message):
    assert out_of_memory(RuntimeError(message))
    assert not out_of_memory(UserError(message))


def test_out_of_memory():
    with pytest.raises(RuntimeError) as full:
        torch.empty(10**17)
    assert out_of_memory(full.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as other:
        torch.empty(2).view(3)
    assert not out_of_memory(other.value)


@pytest.mark.parametrize("precision, tf32", [("fp32", False), ("tf32", True), ("bf16", False)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_settings_are_stated_and_taken_back(precision, tf32, deterministic):
    def now():
        flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
        return *flags, torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory

    before = now()
    with pytest.raises(KeyboardInterrupt), settings(precision, deterministic):
        assert now() == (tf32, tf32, not deterministic, deterministic, not deterministic and before[-1])
        # In the words of the newer interface too: "none" asks the setting above it, which is "none", IEEE.
        assert torch.backends.cudnn.conv.fp32_precision == ("tf32" if tf32 else "none")
        assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if tf32 else "ieee")
        assert torch.backends.fp32_precision == "none"
        raise KeyboardInterrupt
    assert now() == before


def test_settings_after_the_newer_switch():
    """In a process of its own: it cannot be taken back."""
    program = """
        import torch
        from agcseg.training.machine import settings

        torch.backends.fp32_precision = "tf32"
        parts = torch.backends.cudnn.conv, torch.backends.cuda.matmul
        for precision, expected in (("fp32", "ieee"), ("tf32", "tf32")):
            with settings(precision):
                assert all(part.fp32_precision == expected for part in parts)
            assert all(part.fp32_precision == "tf32" for part in parts)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_settings_leave_a_warning_a_warning():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for deterministic in (True, False):
            with settings("fp32", deterministic):
                assert torch.are_deterministic_algorithms_enabled() == deterministic
            assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_channels_last(monkeypatch):
    cpu = torch.device("cpu")
    assert channels_last("auto", torch.device("cuda", 0)) and not channels_last(False, torch.device("cuda", 0))
    for capability, faster in (("AVX512", True), ("AVX2", False), ("DEFAULT", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert channels_last("auto", cpu) == faster and channels_last(True, cpu) and not channels_last(False, cpu)


def test_compiling_keeps_the_maps_and_no_copies_of_filters():
    network = torch.nn.Sequential(ConvUnit(3, 16), ConvUnit(16, 32), torch.nn.Conv2d(32, 2, 1))
    with keeping(network) as kept:
        maps = compiled(network)(torch.randn(1, 3, 16, 16))
    assert maps.requires_grad and 0 <= sum(kept.values()) - 4 * (3 + 16 + 32) * 16**2 < 1000  # of the means
