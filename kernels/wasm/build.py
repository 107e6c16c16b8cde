"""Compiles dvmsr.cc with Clang and wasm-ld. The same compiler makes the same bytes."""

import subprocess
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
PAGE = ROOT / "web"
# The programs, and what they need of a browser. web/engine.js chooses one.
PROGRAMS = {"dvmsr.wasm": ("-msimd128",), "dvmsr-relaxed.wasm": ("-mrelaxed-simd",)}
# What made those that are in the repository: Debian's clang and lld.
TOOLS, VERSION = ("clang-19", "wasm-ld-19"), "19.1.7"
COMMAND = (
    TOOLS[0],
    "--target=wasm32",
    "-std=c++17",
    "-O3",
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


def build(folder: Path = PAGE) -> None:
    """Writes the programs.

    Raises:
        FileNotFoundError: there is no such clang.
        subprocess.CalledProcessError: it fails; its messages are printed.
    """
    for name, options in PROGRAMS.items():
        subprocess.run([*COMMAND, *options, "-o", str(folder / name)], check=True)
        (folder / name).chmod(0o644)
