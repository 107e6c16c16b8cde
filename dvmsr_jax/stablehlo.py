"""The network as a StableHLO program for CPUs, NVIDIA GPUs and TPUs, by `jax.export`.

The program takes one band of a picture's rows, of fixed size, and serves pictures of any height
that are no wider than the band. It contains the weights, no custom calls, and the scan in both
chunked forms: carried for CPUs, parallel for the others.
"""

import functools
import os

import jax
import jax.numpy as jnp

from dvmsr_jax.config import Compute
from dvmsr_jax.errors import UserError
from dvmsr_jax.inference import band_step
from dvmsr_jax.pretrained import load_model

PLATFORMS = ("cpu", "cuda", "tpu")


def export_band(source: str | os.PathLike[str], *, rows: int, columns: int) -> jax.export.Exported:
    """Exports the program for bands of this size, with the weights of `load_model`.

    Its arguments, in this order:

        carried  dictionary of arrays: zeros for the first band of a picture, and after that the
                 first result for the band above
        rows     the band's RGB pixels in [0, 1], (rows, columns, 3), float32; any values outside
                 the picture
        first    the index of the band's first row in the picture, int32
        height   the height of the picture, int32
        width    the width of the picture, int32

    Its results: what the next band's `carried` is; the upscaled rows, (rows s, columns s, 3); and
    the index in the picture of the row with which they begin, which lies some rows above the band.

    Raises UserError if the weights cannot be read, the model is bidirectional, or the size is not
    positive.
    """
    on_cpus = load_model(source, compute=Compute(scan="chunked-carried"))
    elsewhere = load_model(source, compute=Compute(scan="chunked-parallel"))
    if on_cpus.config.bidirectional:
        raise UserError(
            "a bidirectional model reads a picture from both ends, so it cannot be exported for "
            "bands"
        )
    if rows < 1 or columns < 1:
        raise UserError(f"a band has at least one row and one column, not {rows} and {columns}")
    cpu, default = functools.partial(band_step, on_cpus), functools.partial(band_step, elsewhere)

    def dvmsr(*arguments):
        return jax.lax.platform_dependent(*arguments, cpu=cpu, default=default)

    band = jax.ShapeDtypeStruct((rows, columns, 3), jnp.float32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    carried, _, _ = jax.eval_shape(cpu, None, band, number, number, number)
    program = jax.export.export(jax.jit(dvmsr), platforms=PLATFORMS)
    return program(carried, band, number, number, number)
