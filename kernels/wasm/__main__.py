"""python -m dvmsr_jax.kernels.wasm: writes web/dvmsr.wasm."""

import subprocess
import sys

from dvmsr_jax.kernels.wasm.build import PROGRAM, build

try:
    build()
except FileNotFoundError:
    sys.exit("clang is not installed; on Debian: apt install clang lld")
except subprocess.CalledProcessError:
    sys.exit("clang failed, see above; it needs wasm-ld (on Debian: apt install lld)")
print(f"{PROGRAM}: {PROGRAM.stat().st_size:,} bytes")
