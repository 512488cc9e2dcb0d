"""Build the fake GPU, give a process one, and read what it counts. See README.md."""

import ctypes
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

COUNTED = ("launches", "waits", "uploads", "downloads", "mallocs", "graphs")  # the enum of fakegpu.c


def build(folder: Path) -> str:
    """Compile the library into a folder, for `environment`.

    Returns:
        why that cannot be done here, or "".
    """
    triton = find_spec("triton")
    if sys.platform != "linux" or not shutil.which("gcc") or not triton:
        return "the fake GPU needs Linux, gcc and Triton, which brings CUDA's headers"
    headers, library = Path(triton.origin).parent / "backends/nvidia/include", folder / "libfakegpu.so"
    source = Path(__file__).with_name("fakegpu.c")
    command = ["gcc", "-O1", "-shared", "-fPIC", "-w", f"-I{headers}", "-o", library, source, "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"gcc: {done.stderr.strip()[-500:]}"
    for name in ("libcuda.so.1", "libcuda.so"):
        (folder / name).symlink_to(library.name)
    # Python imports it when it starts, so that a program's children have the same GPUs without another word.
    (folder / "sitecustomize.py").write_text("import fakegpu\n\nfakegpu.install()\n")
    return ""


def environment(folder: Path, gpus: int = 1, memory: int | None = None) -> dict[str, str]:
    """Environment variables of a process that has fake GPUs, each with `memory` bytes (85e9)."""
    paths = [str(folder), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **{key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"},
        "LD_PRELOAD": str(folder / "libfakegpu.so"),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "FAKE_GPU_COUNT": str(gpus),
        **({"FAKE_GPU_MEMORY": str(memory)} if memory else {}),
    }


def here() -> bool:
    """Whether this process has fake GPUs."""
    return "FAKE_GPU_COUNT" in os.environ


def counts() -> dict[str, int]:
    """How often each of `COUNTED` happened so far in this process."""
    numbers = (ctypes.c_long * len(COUNTED))()
    ctypes.CDLL(None).fake_gpu_counts(numbers)
    return dict(zip(COUNTED, numbers, strict=True))


def diary(path: Path | None) -> None:
    """Write every kernel, copy and wait to a file, in order, until it is called with None."""
    ctypes.CDLL(None).fake_gpu_diary(str(path).encode() if path else None)


def install() -> None:
    """Replace cuDNN, which asks the hardware, and the count of values, whose result has the size that a kernel says.

    A convolution gives an empty output of the right layout, after the copies that torch makes to have its inputs in
    that layout. Batch normalisation, in float32 cuDNN's too, is a kernel either way.
    """
    import torch
    from torch._prims_common import suggest_memory_format

    library = ctypes.CDLL(None)

    def layout(*tensors):
        formats = [suggest_memory_format(tensor) for tensor in tensors]
        return torch.channels_last if torch.channels_last in formats else torch.contiguous_format

    def laid_out(memory_format, *tensors):
        return [tensor.contiguous(memory_format=memory_format) for tensor in tensors]

    def empty(shape, like, memory_format):
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)

    def convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups):
        assert not transposed, "not in the fake GPU"
        memory_format = layout(x, w)
        laid_out(memory_format, x, w)
        sizes = [
            (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (w.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
        ]
        out = empty((len(x), len(w), *sizes), x, memory_format)
        library.fake_gpu_kernel(b"convolution")
        return out if bias is None else out.add_(bias.view(1, -1, 1, 1))

    def convolution_backward(grad, x, w, *arguments):
        memory_format, wanted = layout(x, w), arguments[-1]
        laid_out(memory_format, grad)
        d_x = d_w = None
        if wanted[0]:
            laid_out(memory_format, w)
            d_x = empty(x.shape, grad, memory_format)
            library.fake_gpu_kernel(b"convolution_backward_of_input")
        if wanted[1]:
            laid_out(memory_format, x)
            d_w = empty(w.shape, grad, memory_format)
            library.fake_gpu_kernel(b"convolution_backward_of_filters")
        return d_x, d_w, grad.sum((0, 2, 3)) if wanted[2] else None

    def cudnn_batch_norm(x, weight, *arguments):
        library.fake_gpu_kernel(b"batch_norm")
        reserve = torch.empty(0, dtype=torch.uint8, device=x.device)
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight), reserve

    def cudnn_batch_norm_backward(x, grad, weight, *arguments):
        library.fake_gpu_kernel(b"batch_norm_backward")
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)

    def bincount(values, weights=None, minlength=0):
        values.cpu()  # it waits
        return torch.ones(max(minlength, 1), dtype=torch.int64).to(values.device)

    install.library = torch.library.Library("aten", "IMPL")  # as long as it lives
    for replaced in (convolution, convolution_backward, cudnn_batch_norm, cudnn_batch_norm_backward, bincount):
        install.library.impl(replaced.__name__, replaced, "CUDA")
