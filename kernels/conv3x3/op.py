"""The public function; conv3x3.h computes it."""

from pathlib import Path

from jaxtyping import Array, Float

from dvmsr_jax.kernels.native_library import SUFFIXES, Factors, NativeLibrary

LIBRARY = NativeLibrary(
    Path(__file__).with_name("conv3x3.cc"), ("Conv3x3Float32", "Conv3x3BFloat16")
)

missing = LIBRARY.missing


def conv3x3(
    x: Float[Array, "b rows w c"],
    kernel: Float[Array, "3 3 c c_out"],
    bias: Float[Array, " c_out"],
    *,
    factors: Factors = "float32",
) -> Float[Array, "b h w c_out"]:
    """The 3x3 convolution of rows that include those above and below; not differentiable.

    There are h = rows - 2 rows in the result. Beyond the first and last columns, x is zero. All
    arrays are float32; `factors` is the type to which the factors of products are rounded.

    Raises:
        NativeUnavailableError: it cannot run here; `missing()` gives the reason.
    """
    b, rows, w, _ = x.shape
    function = LIBRARY.function(f"Conv3x3{SUFFIXES[factors]}", (b, rows - 2, w, kernel.shape[-1]))
    (y,) = function(x, kernel, bias)
    return y
