"""Compiles dvmsr.cc with Clang and wasm-ld. The same compiler makes the same bytes."""

import subprocess
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
PROGRAM = ROOT / "web" / "dvmsr.wasm"
# What made the program that is in the repository: Debian's clang and lld.
COMPILER = "14.0.6"
COMMAND = (
    "clang",
    "--target=wasm32",
    "-std=c++17",
    "-O3",
    "-msimd128",
    "-mbulk-memory",  # memcpy and the like are instructions
    "-ffreestanding",
    "-fno-exceptions",
    "-fno-rtti",
    "-nostdlib",
    "-nostdinc++",
    f"-isystem{FOLDER / 'std'}",
    f"-I{ROOT}",
    "-Wall",
    "-Wextra",
    "-Wl,--no-entry",
    "-Wl,--strip-all",
    "-Wl,--stack-first",  # a stack that is too small traps
    "-Wl,-z,stack-size=262144",
    str(FOLDER / "dvmsr.cc"),
)


def build(program: Path = PROGRAM) -> None:
    """Writes the program.

    Raises:
        FileNotFoundError: there is no clang.
        subprocess.CalledProcessError: it fails; its messages are printed.
    """
    subprocess.run([*COMMAND, "-o", str(program)], check=True)
    program.chmod(0o644)
