"""Exports weights for other programs, as ONNX or StableHLO."""

import os
from pathlib import Path

import tyro

from dvmsr_jax import files, stablehlo
from dvmsr_jax.errors import UserError
from dvmsr_jax.onnx import protocol
from dvmsr_jax.pretrained import load_model


def export(
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    plain: bool = False,
    rows: int | None = None,
    columns: int | None = None,
) -> None:
    """Exports weights for other programs, as ONNX or StableHLO. No file is overwritten.

    Args:
        source: a name, a checkpoint directory, a .safetensors file or a published .pth file.
        target: the file to write. OUT.onnx takes pictures of any size. OUT.stablehlo is read by
            jax.export.deserialize.
        plain: for ONNX: a picture in, the enlarged picture out, for programs that expect that; its
            memory grows with the picture. Otherwise the picture is passed in bands of rows.
        rows: for StableHLO: rows of a band. None: 16.
        columns: for StableHLO: columns of a band, the largest width of a picture. None: 256.
    """
    if target.exists():
        raise UserError(f"{target}: already exists; remove it or choose another name")
    if target.suffix == protocol.SUFFIX:
        if rows is not None or columns is not None:
            raise UserError("--rows and --columns are for StableHLO: ONNX takes bands of any size")
        contents = to_onnx(source, plain=plain)
    elif target.suffix == ".stablehlo":
        if plain:
            raise UserError("--plain is for ONNX only")
        rows, columns = 16 if rows is None else rows, 256 if columns is None else columns
        contents = to_stablehlo(source, rows=rows, columns=columns)
    else:
        raise UserError(f"{target}: the output's name must end in .onnx or .stablehlo")
    with files.replacing(target) as temporary:
        temporary.write_bytes(contents)
    print(f"{source} -> {target}")


def to_onnx(source: str | os.PathLike[str], *, plain: bool = False) -> bytes:
    """The contents of an ONNX file with the weights of `load_model`; see `onnx.network`.

    Raises:
        UserError: the package onnx is not installed, the weights cannot be read, or they are of a
            bidirectional model and `plain` is not set.
    """
    try:
        from dvmsr_jax.onnx import network
    except ImportError as error:
        raise UserError(
            'the package onnx is not installed: pip install "dvmsr-jax[onnx]"'
        ) from error
    convert = network.plain_model if plain else network.streaming_model
    return convert(load_model(source)).SerializeToString()


def to_stablehlo(source: str | os.PathLike[str], *, rows: int, columns: int) -> bytes:
    """The contents of a file for `jax.export.deserialize`; see `stablehlo.export_band`.

    Raises:
        UserError: the weights cannot be read, or as `export_band`.
    """
    return bytes(stablehlo.export_band(source, rows=rows, columns=columns).serialize())
