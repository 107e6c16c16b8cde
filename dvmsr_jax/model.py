"""DVMSR (arXiv 2405.03008, figure 2): shallow features, RSSBs of ViMMs, reconstruction.

Names of dimensions in the signatures of this package:

    b  batch       h w  low-resolution height and width     l = h w  tokens in raster order
    c  channels    d    inner channels of a ViMM            s        scale
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from dvmsr_jax.bands import WHOLE, Band, Whole
from dvmsr_jax.config import Compute, ModelConfig, NetworkConfig
from dvmsr_jax.convolution import Conv3x3
from dvmsr_jax.errors import UserError
from dvmsr_jax.vimm import LAYER_NORM_EPSILON, ViMM

# Mean colour of DIV2K, subtracted before the first convolution and added after the last.
RGB_MEAN = (0.4488, 0.4371, 0.4040)


class Features(NamedTuple):
    """Intermediate results, after each block's skip connection."""

    shallow: Array  # (b, h, w, c), the first convolution's output
    rssbs: tuple[Array, ...]  # (b, h, w, c) each; in other networks, the residual blocks
    body: Array  # (b, h, w, c), the last convolution's output before the long skip


class RSSB(nnx.Module):
    """Residual state-space block: a sequence of ViMMs and a 3x3 convolution, with a skip."""

    def __init__(self, config: ModelConfig, index: int, compute: Compute, *, rngs: nnx.Rngs):
        """`index` counts the network's RSSBs from 0."""
        vimms = range(index * config.vimms_per_rssb, (index + 1) * config.vimms_per_rssb)
        self.vimms = nnx.List([ViMM(config, i, compute, rngs=rngs) for i in vimms])
        self.conv = Conv3x3(config.channels, config.channels, compute, rngs=rngs)

    def __call__(
        self,
        features: Float[Array, "b h w c"],
        keys: Key[Array, " b"] | None = None,
        band: Whole | Band = WHOLE,
    ) -> Float[Array, "b h w c"]:
        """Refines the features. With `keys`, drop-path is active."""
        b, h, w, c = features.shape
        tokens = features.reshape(b, h * w, c)
        for i, vimm in enumerate(self.vimms):
            tokens = vimm(tokens, keys, band.at(f"vimms.{i}"))
        refined = self.conv(tokens.reshape(b, h, w, c), band.at("conv"))
        return refined + band.delayed(features, 1)


class Network(nnx.Module):
    """Any network, as training and scoring use it."""

    config: NetworkConfig

    def __call__(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b hs ws 3"]:
        """Upscales RGB images in [0, 1]; the result may leave that range slightly."""
        return self.with_features(image)[0]

    def with_features(
        self,
        image: Float[Array, "b h w 3"],
        *,
        keys: Key[Array, " b"] | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "b hs ws 3"], Features]:
        """The upscaled images and the intermediate features.

        With `keys`, one for each image, the network behaves as in training, where parts of it may
        be dropped at random. With `remat`, the backward pass recomputes activations inside blocks
        instead of storing them.
        """
        raise NotImplementedError


class DVMSR(Network):
    """The network of the paper."""

    config: ModelConfig

    def __init__(self, config: ModelConfig, *, compute: Compute = Compute(), rngs: nnx.Rngs):
        c, s = config.channels, config.scale
        self.config = config
        self.conv_first = Conv3x3(3, c, compute, rngs=rngs)
        self.norm_first = nnx.LayerNorm(c, epsilon=LAYER_NORM_EPSILON, rngs=rngs)
        self.rssbs = nnx.List([RSSB(config, i, compute, rngs=rngs) for i in range(config.rssbs)])
        self.norm_last = nnx.LayerNorm(c, epsilon=LAYER_NORM_EPSILON, rngs=rngs)
        self.conv_last = Conv3x3(c, c, compute, rngs=rngs)
        self.reconstruct = Conv3x3(c, 3 * s * s, compute, rngs=rngs)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, compute: Compute = Compute()
    ) -> "DVMSR":
        """Equivalent to `pretrained.load_model`."""
        from dvmsr_jax.pretrained import load_model  # which builds on this module

        return load_model(source, compute=compute)

    @property
    def streams(self) -> bool:
        """Whether pictures can pass through it in bands, from top to bottom."""
        return not self.config.bidirectional

    @property
    def rows_late(self) -> int:
        """Rows by which results for bands are delayed: one for each 3x3 convolution."""
        return len(self.rssbs) + 3

    def __call__(
        self, image: Float[Array, "b h w 3"], band: Whole | Band = WHOLE
    ) -> Float[Array, "b hs ws 3"]:
        """See Network. For a `Band`, the result begins `rows_late` rows above the band."""
        return self.with_features(image, band=band)[0]

    def with_features(
        self,
        image: Float[Array, "b h w 3"],
        *,
        keys: Key[Array, " b"] | None = None,
        remat: bool = False,
        band: Whole | Band = WHOLE,
    ) -> tuple[Float[Array, "b hs ws 3"], Features]:
        """See Network; with `keys`, drop-path is active."""
        mean = jnp.asarray(RGB_MEAN, image.dtype).reshape(1, 1, 1, 3)
        shallow = self.conv_first(image - mean, band.at("conv_first"))
        features = self.norm_first(shallow)
        outputs = []
        for i, rssb in enumerate(self.rssbs):
            refine = functools.partial(rssb, band=band.at(f"rssbs.{i}"))
            features = (jax.checkpoint(refine) if remat else refine)(features, keys)
            outputs.append(features)
        body = self.conv_last(self.norm_last(features), band.at("conv_last"))
        deep = body + band.delayed(shallow, len(self.rssbs) + 1)
        channels = self.reconstruct(deep, band.at("reconstruct"))
        upscaled = pixel_shuffle(channels, self.config.scale) + mean
        return upscaled, Features(shallow, tuple(outputs), body)


def pixel_shuffle(x: Float[Array, "b h w c"], scale: int) -> Float[Array, "b hs ws rgb"]:
    """Moves channels into space, in PyTorch's channel order: colour, then row, then column."""
    b, h, w, _ = x.shape
    x = x.reshape(b, h, w, -1, scale, scale)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, h * scale, w * scale, -1)


NETWORKS: dict[type[NetworkConfig], Callable[..., Network]] = {ModelConfig: DVMSR}
"""What builds the network of each kind of configuration, as `build` calls it."""


def build(config: NetworkConfig, *, compute: Compute = Compute(), rngs: nnx.Rngs) -> Network:
    """A network with random weights."""
    return NETWORKS[type(config)](config, compute=compute, rngs=rngs)


def read_config(fields: Mapping[str, Any]) -> NetworkConfig:
    """The configuration that a file describes by its fields.

    Raises:
        UserError: there is no such network here.
        TypeError: it does not have these fields, or they are not a mapping.
    """
    if not isinstance(fields, Mapping):
        raise TypeError("a configuration must be a mapping")
    name = fields.get("network")
    for kind in NETWORKS:
        if getattr(kind, "network", None) == name:
            return kind(**fields)
    raise UserError(f"there is no network {name!r} here")


def parameter_count(model: nnx.Module) -> int:
    """Number of trainable scalars."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """A network's configuration and its parameters, checked to match.

    The parameters are arrays, keyed as by `named_parameters`. Weights are a JAX pytree: they can be
    passed to compiled functions and moved to devices.
    """

    config: NetworkConfig
    parameters: Mapping[str, Array | np.ndarray]

    def __post_init__(self) -> None:
        """Raises ValueError if parameters are missing, left over or of other shapes."""
        config, parameters = self.config, self.parameters
        # Building an absurdly deep network would take ages.
        if isinstance(config, ModelConfig) and config.vimms > len(parameters):
            raise ValueError(
                f"the weights do not fit the model: {len(parameters)} of them for {config.rssbs} "
                f"RSSBs of {config.vimms_per_rssb} ViMMs"
            )
        expected = parameter_shapes(config)
        problems = [f"{name} is missing" for name in expected if name not in parameters]
        problems += [
            f"{name} is not part of the model" for name in parameters if name not in expected
        ]
        problems += [
            f"{name} has shape {parameters[name].shape}, expected {shape}"
            for name, shape in expected.items()
            if name in parameters and parameters[name].shape != shape
        ]
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise ValueError("the weights do not fit the model: " + "; ".join(problems[:3]) + more)

    @classmethod
    def of(cls, model: Network) -> "Weights":
        """The weights of a model."""
        return cls(model.config, named_parameters(model))

    @classmethod
    def from_file(cls, config: NetworkConfig, parameters: Mapping[str, np.ndarray]) -> "Weights":
        """Weights with parameters of any floating-point type, converted to float32.

        Raises:
            ValueError: they do not match the configuration, or are not finite.
        """
        with np.errstate(over="ignore"):  # to infinity
            as_float32 = {name: np.asarray(x, np.float32) for name, x in parameters.items()}
        weights = cls(config, as_float32)
        check_finite(weights.parameters)
        return weights

    def identity(self) -> str:
        """A short identifier derived from the configuration and the parameters."""
        config = json.dumps(dataclasses.asdict(self.config), sort_keys=True)
        digest = hashlib.sha256(config.encode())
        for name, x in sorted(self.parameters.items()):
            digest.update(name.encode())
            digest.update(np.asarray(x, np.float32).tobytes())
        return digest.hexdigest()[:12]

    def model(self, compute: Compute = Compute()) -> Network:
        """The network with these weights."""
        # eval_shape builds the structure without initialising weights that would be discarded.
        model = nnx.eval_shape(lambda: build(self.config, compute=compute, rngs=nnx.Rngs(0)))
        leaves = [
            (path, variable.replace(jnp.asarray(self.parameters[_name(path)], jnp.float32)))
            for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
        ]
        nnx.update(model, nnx.from_flat_state(leaves))
        return model


def _unflatten_weights(config: NetworkConfig, children: tuple[Any]) -> Weights:
    weights = object.__new__(Weights)  # unchecked: JAX also builds trees of other objects
    object.__setattr__(weights, "config", config)
    object.__setattr__(weights, "parameters", children[0])
    return weights


jax.tree_util.register_pytree_node(
    Weights, lambda weights: ((weights.parameters,), weights.config), _unflatten_weights
)


@functools.lru_cache
def parameter_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's parameters, by name."""
    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {_name(path): variable.shape for path, variable in state}


def check_finite(parameters: Any) -> None:
    """Raises ValueError, naming the first array of a tree, if one holds NaN or infinity."""
    for path, x in jax.tree_util.tree_leaves_with_path(parameters):
        if not np.isfinite(np.asarray(x)).all():
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"{name} holds numbers that are not finite")


def named_parameters(model: nnx.Module) -> dict[str, Array]:
    """The parameters by their path, such as "rssbs.0.vimms.1.in_proj.kernel"."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {_name(path): variable[...] for path, variable in state}


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
