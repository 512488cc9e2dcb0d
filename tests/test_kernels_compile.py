"""The Triton kernels compile for GPUs that are not here, without spilling registers."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from agcseg.nn import kernels, triton_kernels  # noqa: E402

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INTEGERS = ("P", "w", "h", "K", "sp", "sk", "zsp", "zsk", "tt", "tk", "share", "shares", "N", "L", "M")
FLOATS = ("partial", "mean", "bias", "scale", "d_bias", "d_scale", "filters", "gain", "d_filters", "d_gain")
FLOATS += ("sum_grad", "taps", "level", "weights", "factor")
POOLS = [{"POOL": pool, "SHARES": kernels.SHARES} for pool in (False, True)]
CASES = {
    "sums": [{}],
    "activate": [{"KNOWN": known, "SUM": known, **pool} for known in (False, True) for pool in POOLS],
    "gate": [{"ADD": new, "POOL": pool} for new in (False, True) for pool in (False, True)],
    "spread": POOLS,
    "window": [{"GATHER": gather} for gather in (False, True)],
    "levels": [{"SHARES": kernels.SHARES, "BK": 16}],
    "tap_sums": [{"UNPOOL": unpool, "SHARES": kernels.SHARES, "BP": 256, "BK": 16} for unpool in (False, True)],
    "fold": [{"BN": 8, "BK": 2, "BL": 256}],
    "fold_back": [{"BN": 8, "BK": 32, "BL": 32}],
    "borders": [{}],
    "filters": [{"ADD": new, "BK": 2, "BL": 1024} for new in (False, True)],
}
CASES |= {name: [{"WEIGHTED": True, "IGNORE": 255, "BK": 32, "BP": 128}] for name in ("class_loss", "class_loss_back")}
WARPS = {"levels": 4, "fold": 4, "borders": 4, "filters": 4}  # the others have 8


@pytest.mark.slow
@pytest.mark.skipif(not TOOL.exists(), reason="this Triton comes without cuobjdump")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_registers_suffice(name, channels_last, architecture, tmp_path):
    kernel, bk = getattr(triton_kernels, name), 64 if channels_last else 4
    unknown = {"shares", *(kernel.do_not_specialize or ())}
    for case in CASES[name]:
        tile = {"BP": kernels.TILE // bk, "BK": bk}
        constants = {**tile, **({"BP": 1024 // bk} if name == "borders" else {}), **case}
        constants |= {unit: 1 for unit in (("sk", "zsk", "tk") if channels_last else ("sp", "zsp", "tt"))}
        places = {argument: (i,) for i, argument in enumerate(kernel.arg_names)}
        constants = {argument: value for argument, value in constants.items() if argument in places}
        types = {argument: _type(argument, constants) for argument in places}
        source = ASTSource(
            fn=kernel,
            signature=types,
            constexprs={places[argument]: value for argument, value in constants.items()},
            attrs={
                places[a]: [["tt.divisibility", 16]] for a in places if types[a] != "constexpr" and a not in unknown
            },
        )
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": WARPS.get(name, 8)})
        (tmp_path / "kernel").write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([TOOL, "-res-usage", tmp_path / "kernel"], capture_output=True, text=True).stdout
        assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"], (case, usage)


def _type(argument, constants):
    if argument in constants:
        return "constexpr"
    if argument in INTEGERS:
        return "i32"
    return "*u8" if argument in ("winners", "labels") else "*fp32" if argument in FLOATS else "*bf16"
