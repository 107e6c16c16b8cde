"""python -m kernels.wasm: writes web/dvmsr.wasm."""

from kernels.wasm.build import PROGRAM, build

build()
print(f"{PROGRAM}: {PROGRAM.stat().st_size:,} bytes")
