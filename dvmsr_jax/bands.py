"""The context of a layer's rows: a whole image, or a band of an image that is streamed.

No layer of a unidirectional network reads a whole image. A 3x3 convolution reads one row above and
one below, a causal convolution the tokens just before, and a scan its last state. An image can
therefore pass through the network in bands of rows, one after the other, if every layer keeps the
rows or the state that the next band needs, under its own name. Layers call the methods below in
both cases:

* WHOLE: the rows are the whole image, surrounded by zeros.
* Band: a convolution waits for the row below, so its result is one row late, and whatever is added
  to the result is delayed as well. A band may be wider than its image and may contain rows before
  the first or after the last one. Values outside the image are masked where they would matter, so
  one compiled program serves all bands, and images of many sizes.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike as DType
from jaxtyping import Array, Float, Int


class Place(NamedTuple):
    """The place of a band of rows in an image of this height and width."""

    first: Int[Array, ""]
    """Index of the first row, at the current layer."""
    height: Int[Array, ""]
    width: Int[Array, ""]
    columns: int
    """Length of the rows, at least the image's width."""


class Whole:
    """The rows of a whole image."""

    def at(self, layer: str) -> "Whole":
        """The context for a layer of this name within the current one."""
        del layer
        return self

    def with_neighbours(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h+2 w c"]:
        """The rows that a 3x3 convolution reads."""
        return jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))

    def delayed(self, x: Float[Array, "b h w c"], rows: int) -> Float[Array, "b h w c"]:
        """The rows that match a result that this many convolutions have delayed."""
        del rows
        return x

    def with_previous(self, u: Float[Array, "b l d"], count: int) -> Float[Array, "_ _ d"]:
        """The tokens in runs of equal length, each with the `count` tokens before it prepended."""
        return jnp.pad(u, ((0, 0), (count, 0), (0, 0)))

    def previous(self, b: int, count: int, d: int, dtype: DType) -> Float[Array, "b count d"]:
        """The `count` tokens before the first."""
        return jnp.zeros((b, count, d), dtype)

    def keep_previous(self, tokens: Float[Array, "b _ d"]) -> None:
        """Stores the last tokens of the image so far."""
        del tokens

    def masked(self, x: Float[Array, "b l d"], outside: float = 0.0) -> Float[Array, "b l d"]:
        """The tokens, with those outside the image replaced by this value."""
        del outside
        return x

    def place(self, l: int) -> Place:
        """The place of the rows, which have l tokens."""
        return Place(jnp.int32(0), jnp.int32(1), jnp.int32(l), l)

    def scan_state(self, b: int, d: int, n: int) -> Float[Array, "b d n"]:
        """The state before the first token."""
        return jnp.zeros((b, d, n), jnp.float32)

    def keep_scan_state(self, state: Array) -> None:
        """Stores the state after the last token."""
        del state


WHOLE = Whole()


class Band:
    """A band of one image's rows, for one pass through the network.

    Each layer takes the arrays under its name from `carried`, which it left there in the band
    above, and puts the same number in `left` for the band below.
    """

    def __init__(
        self,
        first: Int[Array, ""],
        height: Int[Array, ""],
        width: Int[Array, ""],
        columns: int,
        carried: Mapping[str, Array] | None,
    ):
        """`first` is the index of the band's first row in the image of this height and width.

        `columns` is the band's own width. `carried` is `left` of the band above; None stands for
        zeros, above the first band.
        """
        self.left: dict[str, Array] = {}
        self._row = _FirstRow(first)
        self._height, self._width, self._columns = height, width, columns
        self._carried = carried
        self._layer = ""

    def at(self, layer: str) -> "Band":
        """See Whole."""
        band = copy.copy(self)
        band._layer = f"{self._layer}{layer}."
        return band

    def with_neighbours(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h+2 w c"]:
        """See Whole. From here on, the rows are those that lie one higher in the image."""
        b, h, w, c = x.shape
        x = self.masked(x.reshape(b, h * w, c)).reshape(x.shape)
        self._row.first = self._row.first - 1
        x = jnp.concatenate([self._take("rows", (b, 2, w, c), x.dtype), x], axis=1)
        self._leave("rows", x[:, -2:])
        return x

    def delayed(self, x: Float[Array, "b h w c"], rows: int) -> Float[Array, "b h w c"]:
        """See Whole."""
        b, h, w, c = x.shape
        x = jnp.concatenate([self._take("delayed", (b, rows, w, c), x.dtype), x], axis=1)
        self._leave("delayed", x[:, -rows:])
        return x[:, :h]

    def with_previous(self, u: Float[Array, "b l d"], count: int) -> Float[Array, "_ _ d"]:
        """See Whole. Each row is a run."""
        b, l, d = u.shape
        rows = l // self._columns
        known = jnp.concatenate([self.previous(b, count, d, u.dtype), u], axis=1)
        # Positions in the image, counted from the band's first token, of the tokens just before
        # each row and of the band's last ones; then their indices in `known`, after the `count`
        # carried.
        places = jnp.arange(rows + 1)[:, None] * self._width + jnp.arange(-count, 0)[None]
        row, column = jnp.divmod(places, self._width)
        known_at = count + jnp.where(places < 0, places, row * self._columns + column)
        previous = known[:, known_at]  # (b, rows + 1, count, d)
        self.keep_previous(previous[:, rows])
        runs = jnp.concatenate([previous[:, :rows], u.reshape(b, rows, -1, d)], axis=2)
        return runs.reshape(b * rows, -1, d)

    def previous(self, b: int, count: int, d: int, dtype: DType) -> Float[Array, "b count d"]:
        """See Whole."""
        return self._take("tokens", (b, count, d), dtype)

    def keep_previous(self, tokens: Float[Array, "b _ d"]) -> None:
        """See Whole."""
        self._leave("tokens", tokens)

    def masked(self, x: Float[Array, "b l d"], outside: float = 0.0) -> Float[Array, "b l d"]:
        """See Whole."""
        row, column = jnp.divmod(jnp.arange(x.shape[1]), self._columns)
        row += self._row.first
        inside = (row >= 0) & (row < self._height) & (column < self._width)
        return jnp.where(inside[None, :, None], x, jnp.asarray(outside, x.dtype))

    def place(self, l: int) -> Place:
        """See Whole."""
        del l
        first, height, width = (
            jnp.asarray(x, jnp.int32) for x in (self._row.first, self._height, self._width)
        )
        return Place(first, height, width, self._columns)

    def scan_state(self, b: int, d: int, n: int) -> Float[Array, "b d n"]:
        """See Whole."""
        return self._take("state", (b, d, n), jnp.float32)

    def keep_scan_state(self, state: Array) -> None:
        """See Whole."""
        self._leave("state", state)

    def _take(self, kind, shape, dtype):
        name = self._layer + kind
        return jnp.zeros(shape, dtype) if self._carried is None else self._carried[name]

    def _leave(self, kind, x):
        name = self._layer + kind
        if name in self.left:
            raise ValueError(f"two layers of a band are called {name!r}")
        self.left[name] = x


@dataclasses.dataclass
class _FirstRow:
    """The index in the image of a band's first row, at the current layer of the pass."""

    first: Int[Array, ""]
