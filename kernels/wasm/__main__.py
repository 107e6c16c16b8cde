"""python -m dvmsr_jax.kernels.wasm: writes the WebAssembly programs of web/."""

import subprocess
import sys

from dvmsr_jax.kernels.wasm.build import PAGE, PROGRAMS, build

INSTALL = "on Debian: apt install clang-19 lld-19"

try:
    build()
except FileNotFoundError:
    sys.exit(f"clang 19 is not installed; {INSTALL}")
except subprocess.CalledProcessError:
    sys.exit(f"clang failed, see above; it needs wasm-ld ({INSTALL})")
for name in PROGRAMS:
    print(f"{PAGE / name}: {(PAGE / name).stat().st_size:,} bytes")
