"""Exports weights for other programs, as ONNX.

python -m dvmsr_jax.export IN OUT.onnx
"""

import os
from pathlib import Path

import tyro

from dvmsr_jax import files
from dvmsr_jax.errors import UserError
from dvmsr_jax.onnx.protocol import SUFFIX
from dvmsr_jax.pretrained import load_weights
from dvmsr_jax.program import one_line_errors


def export(source: Path, target: Path, plain: bool = False) -> None:
    """Exports weights. An existing file is not overwritten.

    Args:
        source: a name, a checkpoint directory, a .safetensors file or a published .pth file.
        target: the .onnx file to write.
        plain: for programs that pass a whole picture and expect the result; its memory grows with
            the picture. Otherwise the file takes a picture in bands of rows.
    """
    if target.suffix != SUFFIX:
        raise UserError(f"{target}: the output's name must end in .onnx")
    if target.exists():
        raise UserError(f"{target}: already exists; remove it or choose another name")
    contents = to_onnx(source, plain=plain)
    with files.replacing(target) as temporary:
        temporary.write_bytes(contents)
    print(f"{source} -> {target}")


def to_onnx(source: str | os.PathLike[str], *, plain: bool = False) -> bytes:
    """The contents of an ONNX file with the weights of `load_weights`; see `onnx.network`.

    Raises:
        UserError: the package onnx is not installed, the weights cannot be read, or they are of a
            bidirectional model and `plain` is not set.
    """
    try:
        from dvmsr_jax.onnx import network
    except ImportError as error:
        raise UserError("the package onnx is not installed: pip install onnx") from error
    weights = load_weights(source)
    model = network.plain_model(weights) if plain else network.streaming_model(weights)
    return model.SerializeToString()


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(
            tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(export),
            prog="python -m dvmsr_jax.export",
            description=__doc__,
        )
