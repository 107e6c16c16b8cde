"""What lies around the rows that a layer is given: nothing, or the rest of a streamed image.

No layer of a unidirectional network looks at a whole image. A 3x3 convolution looks one row up and
one down, a causal convolution at the tokens just before, and a scan at its last state. So an image
may pass through the network in bands of rows, one after the other, if every layer keeps what it
needs for the next band. The layers ask for it here, and are written once for both cases:

* WHOLE: the rows are all there are, and around them are zeros.
* Band: a convolution waits for the row below, so its answer is late by one row; what is to be added
  to the answer waits as well. Rows from outside the image come in too, before its first and after
  its last one, and are masked where they would count: so all bands are treated alike.
"""

from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Whole:
    """The rows of a whole image."""

    def with_neighbours(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h+2 w c"]:
        """The rows that a 3x3 convolution reads."""
        return jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))

    def delayed(self, x: Float[Array, "b h w c"], rows: int) -> Float[Array, "b h w c"]:
        """The rows that belong to an answer that so many convolutions have made late."""
        del rows
        return x

    def with_previous(self, u: Float[Array, "b l d"], count: int) -> Float[Array, "b l+{count} d"]:
        """The tokens, and before them the last `count` others."""
        return jnp.pad(u, ((0, 0), (count, 0), (0, 0)))

    def masked(self, u: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """The tokens, zero outside the image."""
        return u

    def scan_state(self, *shape: int) -> Array | None:
        """The state before the first token; None stands for zeros."""
        del shape
        return None

    def keep_scan_state(self, state: Array) -> None:
        """Takes note of the state after the last token."""
        del state


WHOLE = Whole()


class Band:
    """A band of an image's rows, for one pass through the network.

    The layers take from `carried`, in the order of their calls, what the band above has left for
    them, and leave as much in `left` for the one below.
    """

    def __init__(
        self,
        first: Int[Array, ""],
        height: Int[Array, ""],
        width: int,
        carried: Iterable[Array] | None,
    ):
        """`first` is the place of the band's first row in the image of this size.

        `carried` is the last band's `left`; None, for zeros, if there has been none.
        """
        self.first = first
        self.left: list[Array] = []
        self._height, self._width = height, width
        self._carried = None if carried is None else iter(carried)

    def with_neighbours(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h+2 w c"]:
        """See Whole. From here on, the rows are those one further up in the image."""
        b, h, w, c = x.shape
        x = self.masked(x.reshape(b, h * w, c)).reshape(x.shape)
        self.first = self.first - 1
        return self._with_last(x, 2)

    def delayed(self, x: Float[Array, "b h w c"], rows: int) -> Float[Array, "b h w c"]:
        """See Whole."""
        return self._with_last(x, rows)[:, : x.shape[1]]

    def with_previous(self, u: Float[Array, "b l d"], count: int) -> Float[Array, "b l+{count} d"]:
        """See Whole."""
        return self._with_last(u, count)

    def masked(self, u: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """See Whole."""
        rows = self.first + jnp.arange(u.shape[1]) // self._width
        inside = (rows >= 0) & (rows < self._height)
        return jnp.where(inside[None, :, None], u, jnp.zeros_like(u))

    def scan_state(self, *shape: int) -> Array | None:
        """See Whole."""
        return self._take(shape, jnp.float32)

    def keep_scan_state(self, state: Array) -> None:
        """See Whole."""
        self.left.append(state)

    def _with_last(self, x, count):
        """x, and before it the last `count` entries along axis 1 of the bands above."""
        b, _, *shape = x.shape
        x = jnp.concatenate([self._take((b, count, *shape), x.dtype), x], axis=1)
        self.left.append(x[:, x.shape[1] - count :])
        return x

    def _take(self, shape, dtype):
        return jnp.zeros(shape, dtype) if self._carried is None else next(self._carried)
