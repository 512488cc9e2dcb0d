"""The device a run computes on, and how torch is set for it."""

import pytest
import torch

from agcseg.errors import UserError
from agcseg.training.machine import find_device, out_of_memory


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
