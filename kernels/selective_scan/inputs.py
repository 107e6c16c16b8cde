"""The record of arrays that every implementation takes, also used for their gradients."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Inputs(NamedTuple):
    """The arrays of a scan, in the shapes and dtypes of `op.selective_scan`.

    Inside an implementation, the arrays may be laid out differently, as documented there.
    """

    u: Float[Array, "b l d"]
    delta: Float[Array, "b l d"]
    A: Float[Array, "d n"]
    B: Float[Array, "b l n"]
    C: Float[Array, "b l n"]
    D: Float[Array, " d"]
    z: Float[Array, "b l d"] | None
    delta_bias: Float[Array, " d"] | None
    initial_state: Float[Array, "b d n"]
