"""Time and memory of one training step (forward, backward, SGD update) for several variants of SegNet.

    python scripts/bench_step.py time agc bn none            # ratios to the first, alternately in one process
    python scripts/bench_step.py kept agc bn none            # bytes kept for backward
    python scripts/bench_step.py peak agc --batch 4          # peak memory above the idle network; one variant a call

A variant is a norm, perhaps with "-literal", "-kept" (no recompute) or "-fastloss" behind it. "agc" alone has the fast
loss, all others the plain one.
"""

import argparse
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

from agcseg import build
from agcseg.fast_loss import segmentation_loss


def variant(name: str, batch: int, height: int, width: int):
    norm, *flags = name.split("-")
    torch.manual_seed(0)
    network = build(
        "segnet",
        norm=norm,
        implementation="literal" if "literal" in flags else "fast",
        recompute="kept" not in flags,
    )
    images, labels = torch.randn(batch, 3, height, width), torch.randint(19, (batch, height, width), dtype=torch.uint8)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    fast_loss = norm == "agc" and not flags or "fastloss" in flags

    def loss():
        logits = network(images)
        if fast_loss:
            return segmentation_loss(logits, labels).mean()
        return -F.log_softmax(logits, 1).gather(1, labels.long().unsqueeze(1)).mean()

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return network, loss, step


def bytes_kept(network: nn.Module, loss) -> int:
    """Bytes of the unique storages that autograd keeps, parameters excluded."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
    del result
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def memory(key: str) -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "kept", "peak"])
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 512))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="processor time: for one thread on a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "peak":
        torch.conv2d(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3))  # load the library first
        _, _, step = variant(args.variants[0], args.batch, *args.size)
        idle = memory("VmRSS")
        step()
        print(f"{args.variants[0]}: peak {memory('VmHWM') - idle:.0f} MiB above {idle:.0f}")
        return
    variants = {name: variant(name, args.batch, *args.size) for name in args.variants}
    if args.what == "kept":
        kept = {name: bytes_kept(network, loss) for name, (network, loss, _) in variants.items()}
        for name, size in kept.items():
            print(f"{name:16} {size / 2**20:7.1f} MiB   {' '.join(f'{size / other:.3f}' for other in kept.values())}")
        return
    clock = time.process_time if args.cpu_time else time.perf_counter
    times = {name: [] for name in variants}
    for i in range(args.repeats + 1):
        for name, (_, _, step) in variants.items():
            start = clock()
            step()
            if i:  # the first round warms up
                times[name].append(clock() - start)
    first = times[args.variants[0]]
    for name, values in times.items():
        ratios = [a / b for a, b in zip(first, values, strict=True)]
        print(
            f"{name:16} median {statistics.median(values):6.3f} s  min {min(values):6.3f} s  "
            f"{args.variants[0]}/{name}: median {statistics.median(ratios):.3f}, min/min {min(first) / min(values):.3f}"
        )


if __name__ == "__main__":
    main()
