"""Register usage of the Triton kernels, determined by compiling them. Needs no GPU."""

import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.table import Report
from dvmsr_jax.kernels.selective_scan import triton_kernels, triton_scan

KERNELS = ("chunk_ends", "chunk_start_gradients", "chunk_borders", "outputs", "gradients")
TARGETS = (80, 90, 100)  # compute capabilities times ten: A100, H100 and H200, B200
SIZES = ("l", "chunk", "chunks", "sharing")
TOKENS = ("u", "delta", "z", "dout", "y", "du", "ddelta", "dz")


def report_registers(report: Report) -> None:
    """Reports each kernel's registers per thread for each target, and the bytes spilt, if any."""
    text = ["kernel", "type"]
    report.table([*text, *(f"sm_{target}" for target in TARGETS)], text)
    for kernel in KERNELS:
        for dtype in ("fp32", "bf16"):
            cells = []
            for target in TARGETS:
                used, stack = registers_and_stack(kernel, target, dtype)
                cells.append(f"{used}" + (f" + {stack} B" if stack else ""))
            report.row([kernel, dtype, *cells])


def registers_and_stack(
    kernel: str, target: int, dtype: str, d: int = 120, n: int = 16
) -> tuple[int, int]:
    """Returns (registers, bytes of stack) per thread. Registers are spilt to the stack.

    Tokens are of Triton's type `dtype`, and every option is on.
    """
    function = getattr(triton_kernels, kernel)
    tile_d, tile_n = triton_scan.tile_sizes(d, n)
    constants = {"d": d, "n": n, "TILE_D": tile_d, "TILE_N": tile_n}
    constants |= {"SOFTPLUS": True, "GATE": True, "SAVE": True, "REVERSE": True}
    warps = 1
    if kernel == "chunk_borders":
        constants["TILE_C"], constants["TILE_D"] = triton_scan.BORDER_TILE
        warps = triton_scan.BORDER_WARPS
    constants = {name: x for name, x in constants.items() if name in function.arg_names}

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        return "i32" if name in SIZES else f"*{dtype if name in TOKENS else 'fp32'}"

    signature = {name: type_of(name) for name in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if signature[name].startswith("*")
    }
    cache = triton.knobs.cache
    with cache.scope():
        # Importing jax_triton empties the variable that names the folder.
        cache.dir = cache.dir or cache.get_triton_dir("cache")
        compiled = triton.compile(
            ASTSource(function, signature, constants, aligned),
            target=GPUTarget("cuda", target, 32),
            options={"num_warps": warps, "enable_fp_fusion": True},
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])
