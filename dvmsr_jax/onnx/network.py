"""The network as an ONNX graph, layer by layer as in `dvmsr_jax.model` and `dvmsr_jax.vimm`.

There are two graphs for a network, both for pictures of any size:

* plain: picture in, picture out, both (1, 3, height, width), RGB in [0, 1].
* streaming: a band of the picture's rows in, as many rows of the result out, together with the
  arrays that the layers carry from band to band (see `dvmsr_jax.bands`).
"""

import dataclasses
import functools
import json
import operator

import numpy as np
import onnx

from dvmsr_jax.config import ModelConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.model import DVMSR, RGB_MEAN, named_parameters
from dvmsr_jax.onnx import protocol
from dvmsr_jax.onnx.bands import Band, Whole
from dvmsr_jax.onnx.graph import Graph, Value
from dvmsr_jax.vimm import LAYER_NORM_EPSILON


def plain_model(model: DVMSR) -> onnx.ModelProto:
    """A graph from a picture to the upscaled one."""
    graph = Graph()
    image = graph.input("image", np.float32, (1, 3, "height", "width"))
    network = _Network(model, graph, Whole(graph), image.op("Shape", start=2))
    _output(graph, network(image), model.config.scale, "height")
    return graph.model("DVMSR", protocol.WHOLE, _metadata(model.config, "plain"))


def streaming_model(model: DVMSR) -> onnx.ModelProto:
    """A graph from a band of rows, and what the band above has left, to the upscaled rows.

    Raises UserError if the model is bidirectional.
    """
    if model.config.bidirectional:
        raise UserError(
            "a bidirectional model reads a picture from both ends, so it cannot be exported for "
            "bands: add --plain"
        )
    graph = Graph()
    rows = graph.input("rows", np.float32, (1, 3, "rows", "width"))
    first = graph.input("first", np.int64, (1,))
    height = graph.input("height", np.int64, (1,))
    sizes = rows.op("Shape", start=2)
    band = Band(graph, first, height, sizes)
    _output(graph, _Network(model, graph, band, sizes)(rows), model.config.scale, "rows")
    for name, (value, shape) in band.left.items():
        graph.output(name + protocol.NEXT, value, np.float32, shape)
    metadata = _metadata(model.config, "streaming") | {"rows_late": str(band.late)}
    return graph.model("DVMSR", protocol.BANDS, metadata)


def _output(graph: Graph, upscaled: Value, scale: int, height: str) -> None:
    shape = (1, 3, f"{scale}*{height}", f"{scale}*width")
    graph.output("upscaled", upscaled, np.float32, shape)


def _metadata(config: ModelConfig, graph: str) -> dict[str, str]:
    return {
        "graph": graph,
        "scale": str(config.scale),
        "config": json.dumps(dataclasses.asdict(config)),
    }


class _Network:
    """Adds the network's layers to a graph. Layers are named by their parameters."""

    def __init__(self, model: DVMSR, graph: Graph, band: Whole, sizes: Value):
        """`sizes` is the (h, w) of the image."""
        self._config, self._graph, self._band, self._sizes = model.config, graph, band, sizes
        self._parameters = {
            name: np.asarray(x, np.float32) for name, x in named_parameters(model).items()
        }

    def __call__(self, image: Value) -> Value:
        """(1, 3, h, w) -> (1, 3, hs, ws)."""
        config, band = self._config, self._band
        mean = np.array(RGB_MEAN, np.float32).reshape(1, 3, 1, 1)
        shallow = self._conv3x3(image - mean, "conv_first")
        features = self._image(self._layer_norm(self._tokens(shallow), "norm_first"))
        for i in range(config.rssbs):
            features = self._rssb(features, f"rssbs.{i}")
        normed = self._image(self._layer_norm(self._tokens(features), "norm_last"))
        body = self._conv3x3(normed, "conv_last")
        deep = body + band.delayed(shallow, "", config.channels, config.rssbs + 1)
        channels = self._conv3x3(deep, "reconstruct")
        return channels.op("DepthToSpace", blocksize=config.scale, mode="CRD") + mean

    def _rssb(self, features: Value, name: str) -> Value:
        config = self._config
        tokens = self._tokens(features)
        for i in range(config.vimms_per_rssb):
            tokens = self._vimm(tokens, f"{name}.vimms.{i}")
        refined = self._conv3x3(self._image(tokens), f"{name}.conv")
        return refined + self._band.delayed(features, name, config.channels, 1)

    def _vimm(self, tokens: Value, name: str) -> Value:
        tokens = self._band.masked(self._layer_norm(tokens, f"{name}.norm"))
        d = self._config.inner_channels
        u, z = (tokens @ self._parameter(f"{name}.in_proj.kernel")).split(d, d, axis=1)
        y = self._direction(u, z, f"{name}.forward", self._band)
        if self._config.bidirectional:
            u, z, whole = _reversed(u), _reversed(z), Whole(self._graph)
            y = y + _reversed(self._direction(u, z, f"{name}.backward", whole))
        return y @ self._parameter(f"{name}.out_proj.kernel")

    def _direction(self, u: Value, z: Value, name: str, band: Whole) -> Value:
        rank, n = self._config.delta_rank, self._config.states
        u = _silu(self._causal_conv(u, f"{name}.conv", band))
        projected = u @ self._parameter(f"{name}.x_proj.kernel")
        low_rank, B, C = projected.split(rank, n, n, axis=1)
        delta = low_rank @ self._parameter(f"{name}.dt_proj.kernel")
        # A step of size 0 leaves the scan's state unchanged.
        delta = band.masked((delta + self._parameter(f"{name}.dt_bias")).op("Softplus"))
        y = self._scan(u, delta, B, C, name, band)
        return (y + u * self._parameter(f"{name}.D")) * _silu(z)

    def _scan(self, u: Value, delta: Value, B: Value, C: Value, name: str, band: Whole) -> Value:
        """(l, d): one step of ONNX's Scan per token; its state is (n, d)."""
        n, d = self._config.states, self._config.inner_channels
        A = -np.exp(self._parameters[f"{name}.A_log"].T)
        decay_rates = self._graph.constant(A, f"{name}.A")
        step = self._graph.inner()
        h = step.input("h", np.float32, (n, d))
        delta_t = step.input("delta_t", np.float32, (d,))
        x_t = step.input("x_t", np.float32, (d,))
        B_t = step.input("B_t", np.float32, (n, 1))
        C_t = step.input("C_t", np.float32, (1, n))
        h = (delta_t * decay_rates).op("Exp") * h + B_t * x_t
        step.output("h_next", h, np.float32, (n, d))
        step.output("y_t", C_t @ h, np.float32, (1, d))
        state, y = self._graph.op(
            "Scan",
            band.scan_state(name, n, d),
            delta,
            delta * u,
            B.reshape(-1, n, 1),
            C.reshape(-1, 1, n),
            outputs=2,
            body=step.proto("step"),
            num_scan_inputs=4,
        )
        band.keep_scan_state(state, name, n, d)
        return y.reshape(-1, d)

    def _causal_conv(self, u: Value, name: str, band: Whole) -> Value:
        kernel = self._parameters[f"{name}.kernel"]
        previous = len(kernel) - 1
        runs = band.with_previous(u, name, self._config.inner_channels, previous)
        taps = [
            runs[0, i : i - previous or None] * self._graph.constant(tap)
            for i, tap in enumerate(kernel)
        ]
        return functools.reduce(operator.add, taps) + self._parameter(f"{name}.bias")

    def _conv3x3(self, x: Value, name: str) -> Value:
        kernel = self._parameters[f"{name}.kernel"].transpose(3, 2, 0, 1)
        return self._band.with_neighbours(x, name, kernel.shape[1]).op(
            "Conv",
            self._graph.constant(np.ascontiguousarray(kernel), f"{name}.kernel"),
            self._parameter(f"{name}.bias"),
            pads=(0, 1, 0, 1),
        )

    def _layer_norm(self, x: Value, name: str) -> Value:
        scale, bias = self._parameter(f"{name}.scale"), self._parameter(f"{name}.bias")
        return x.op("LayerNormalization", scale, bias, axis=-1, epsilon=LAYER_NORM_EPSILON)

    def _parameter(self, name: str) -> Value:
        return self._graph.constant(self._parameters[name], name)

    def _tokens(self, image: Value) -> Value:
        """(1, c, h, w) -> (l, c)."""
        return image.reshape(self._config.channels, -1).transpose(1, 0)

    def _image(self, tokens: Value) -> Value:
        """(l, c) -> (1, c, h, w)."""
        return tokens.transpose(1, 0).reshape(1, self._config.channels, self._sizes)


def _reversed(tokens: Value) -> Value:
    return tokens[0, ::-1]


def _silu(x: Value) -> Value:
    return x * x.op("Sigmoid")
