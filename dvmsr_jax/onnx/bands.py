"""`dvmsr_jax.bands` in ONNX: the context of a layer's rows, a whole picture or a band of rows.

A picture's arrays are (1, c, h, w), as ONNX's convolutions take them, and tokens (l, d). A band is
as wide as its picture, because a graph serves any width; its height may differ from band to band.
"""

import numpy as np

from dvmsr_jax.onnx.graph import Graph, Shape, Value, integers


class Whole:
    """The rows of a whole picture."""

    def __init__(self, graph: Graph):
        self._graph = graph

    def with_neighbours(self, x: Value, layer: str, channels: int) -> Value:
        """The rows that a 3x3 convolution reads: (1, c, h, w) -> (1, c, h + 2, w)."""
        del layer, channels
        return x.op("Pad", integers(0, 0, 1, 0, 0, 0, 1, 0))

    def delayed(self, x: Value, layer: str, channels: int, rows: int) -> Value:
        """The rows that match a result that this many convolutions have delayed."""
        del layer, channels, rows
        return x

    def with_previous(self, u: Value, layer: str, channels: int, count: int) -> Value:
        """The tokens with the `count` tokens before them: (l, d) -> (count + l, d)."""
        del layer, channels
        return u.op("Pad", integers(count, 0, 0, 0))

    def masked(self, x: Value) -> Value:
        """The tokens, with those outside the picture replaced by zeros."""
        return x

    def scan_state(self, layer: str, *shape: int) -> Value:
        """The state before the first token."""
        del layer
        return self._graph.constant(np.zeros(shape, np.float32))

    def keep_scan_state(self, state: Value, layer: str, *shape: int) -> None:
        """Stores the state after the last token."""
        del state, layer, shape


class Band(Whole):
    """A band of a picture's rows.

    Each layer takes the arrays under its name, which it left in the band above and which are inputs
    of the graph, and puts the same number in `left` for the band below.
    """

    def __init__(self, graph: Graph, first: Value, height: Value, sizes: Value):
        """`first` is the index of the band's first row in the picture of this height, both of
        shape (1,); `sizes` is the band's own (h, w)."""
        super().__init__(graph)
        self.left: dict[str, tuple[Value, Shape]] = {}
        self._first, self._height, self._sizes = first, height, sizes
        self.late = 0  # rows by which the current layer's input is delayed
        self._inside: dict[int, Value] = {}

    def with_neighbours(self, x: Value, layer: str, channels: int) -> Value:
        """See Whole. From here on, the rows are those that lie one higher in the picture."""
        inside = self._rows_inside().reshape(1, 1, -1, 1)
        x = inside.op("Where", x, np.float32(0))
        self.late += 1
        return self._carried(x, layer + ".rows", (1, channels, 2, "width"), axis=2)

    def delayed(self, x: Value, layer: str, channels: int, rows: int) -> Value:
        """See Whole."""
        name = f"{layer}.delayed" if layer else "delayed"
        return self._carried(x, name, (1, channels, rows, "width"), axis=2)[2, :-rows]

    def with_previous(self, u: Value, layer: str, channels: int, count: int) -> Value:
        """See Whole."""
        return self._carried(u, layer + ".tokens", (count, channels), axis=0) if count else u

    def masked(self, x: Value) -> Value:
        """See Whole."""
        inside = self._rows_inside().reshape(-1, 1)
        inside = inside.op("Expand", self._sizes).reshape(-1, 1)
        return inside.op("Where", x, np.float32(0))

    def scan_state(self, layer: str, *shape: int) -> Value:
        """See Whole."""
        return self._graph.input(layer + ".state", np.float32, shape)

    def keep_scan_state(self, state: Value, layer: str, *shape: int) -> None:
        """See Whole."""
        self.left[layer + ".state"] = state, shape

    def _rows_inside(self) -> Value:
        """(h,): whether the rows of the current layer's input lie in the picture."""
        if self.late not in self._inside:
            count = self._sizes[0, 0:1].reshape()
            (places,) = self._graph.op("Range", np.int64(0), count, np.int64(1))
            rows = places + (self._first - integers(self.late))
            inside = rows.op("GreaterOrEqual", integers(0)).op("And", rows.op("Less", self._height))
            self._inside[self.late] = inside
        return self._inside[self.late]

    def _carried(self, x: Value, name: str, shape: Shape, axis: int) -> Value:
        """The array with the carried one before it; its own end is carried to the next band."""
        carried = self._graph.input(name, np.float32, shape)
        (x,) = self._graph.op("Concat", carried, x, axis=axis)
        length = shape[axis]
        assert isinstance(length, int)
        self.left[name] = x[axis, -length:], shape
        return x
