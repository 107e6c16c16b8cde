"""Networks to compare DVMSR with: CNNs, windowed attention, and a DVMSR that also reads columns.

They have DVMSR's head and tail: a first convolution, one after the residual blocks with a long
skip, and one before the pixel shuffle. Importing this module lets training, checkpoints and scoring
use them.
"""

import functools
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from dvmsr_jax.bands import WHOLE, Band, Whole
from dvmsr_jax.config import Compute, ModelConfig, NetworkConfig, Within
from dvmsr_jax.cost import Cost, cost
from dvmsr_jax.errors import UserError
from dvmsr_jax.model import (
    DVMSR,
    NETWORKS,
    RGB_MEAN,
    RSSB,
    Conv3x3,
    Features,
    Network,
    build,
    pixel_shuffle,
)
from dvmsr_jax.vimm import LAYER_NORM_EPSILON, dense_init, torch_uniform
from experiments.counting import count_macs


@dataclass(frozen=True)
class BlocksConfig(NetworkConfig):
    """A network of equal residual blocks."""

    depth: Annotated[int, Within(1)] = 1
    """Number of residual blocks."""

    @property
    def blocks(self) -> int:
        """See NetworkConfig."""
        return self.depth


@dataclass(frozen=True)
class CnnConfig(BlocksConfig):
    """A plain residual CNN, like EDSR's baseline (arXiv 1707.02921)."""

    channels: Annotated[int, Within(1)] = 48
    depth: Annotated[int, Within(1)] = 9
    network: Literal["cnn"] = "cnn"


@dataclass(frozen=True)
class RlfnConfig(BlocksConfig):
    """RLFN (arXiv 2205.07514): three convolutions a block and spatial attention at its end."""

    channels: Annotated[int, Within(1)] = 45
    depth: Annotated[int, Within(1)] = 6
    attention_channels: Annotated[int, Within(1)] = 16
    """Width of the spatial attention."""
    network: Literal["rlfn"] = "rlfn"


@dataclass(frozen=True)
class WindowsConfig(BlocksConfig):
    """Self-attention in shifted windows, like SwinIR (arXiv 2108.10257), but smaller.

    Its shape is that of the paper's student: two token mixers and a convolution per block.
    """

    depth: Annotated[int, Within(1)] = 4
    layers: Annotated[int, Within(1)] = 2
    """Transformer layers in each block; every other one shifts its windows."""
    heads: Annotated[int, Within(1)] = 6
    """Attention heads, which share the channels evenly."""
    window: Annotated[int, Within(2)] = 8
    """Side of the square windows, in pixels."""
    hidden: Annotated[int, Within(1)] = 112
    """Width of the layers' multilayer perceptron."""
    network: Literal["windows"] = "windows"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels % self.heads:
            raise UserError(f"{self.heads} heads cannot share {self.channels} channels")


@dataclass(frozen=True)
class AlternatingConfig(ModelConfig):
    """A DVMSR in which every other RSSB reads the picture column by column."""

    network: Literal["alternating"] = "alternating"


class Blocks(Network):
    """DVMSR's head and tail around residual blocks."""

    config: BlocksConfig

    def __init__(self, config: BlocksConfig, block: Any, compute: Compute, rngs: nnx.Rngs):
        """`block` makes a residual block, which is called with its input."""
        c, s = config.channels, config.scale
        self.config = config
        self.conv_first = Conv3x3(3, c, compute, rngs=rngs)
        self.blocks = nnx.List([block(config, compute, rngs) for _ in range(config.depth)])
        self.conv_last = Conv3x3(c, c, compute, rngs=rngs)
        self.reconstruct = Conv3x3(c, 3 * s * s, compute, rngs=rngs)

    def with_features(
        self,
        image: Float[Array, "b h w 3"],
        *,
        keys: Key[Array, " b"] | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "b hs ws 3"], Features]:
        """See Network. No part is ever dropped."""
        del keys
        mean = jnp.asarray(RGB_MEAN, image.dtype).reshape(1, 1, 1, 3)
        shallow = self.conv_first(image - mean, WHOLE)
        features, outputs = shallow, []
        for block in self.blocks:
            features = (jax.checkpoint(block) if remat else block)(features)
            outputs.append(features)
        body = self.conv_last(self.finish(features), WHOLE)
        upscaled = pixel_shuffle(self.reconstruct(body + shallow, WHOLE), self.config.scale) + mean
        return upscaled, Features(shallow, tuple(outputs), body)

    def finish(self, features: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The last convolution's input."""
        return features


class ResidualBlock(nnx.Module):
    """EDSR's: convolution, ReLU, convolution, and a skip."""

    def __init__(self, config: CnnConfig, compute: Compute, rngs: nnx.Rngs):
        c = config.channels
        self.first = Conv3x3(c, c, compute, rngs=rngs)
        self.second = Conv3x3(c, c, compute, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Refines the features."""
        return x + self.second(jax.nn.relu(self.first(x, WHOLE)), WHOLE)


class Cnn(Blocks):
    """The plain residual CNN."""

    def __init__(self, config: CnnConfig, *, compute: Compute, rngs: nnx.Rngs):
        super().__init__(config, ResidualBlock, compute, rngs)


class LocalFeatureBlock(nnx.Module):
    """RLFN's: three convolutions with a skip, a 1x1 convolution, and spatial attention."""

    def __init__(self, config: RlfnConfig, compute: Compute, rngs: nnx.Rngs):
        c, f = config.channels, config.attention_channels
        self.convs = nnx.List([Conv3x3(c, c, compute, rngs=rngs) for _ in range(3)])
        self.mix = pointwise(c, c, compute, rngs)
        self.reduce = pointwise(c, f, compute, rngs)
        self.keep = pointwise(f, f, compute, rngs)
        init = torch_uniform(fan_in=9 * f)
        self.shrink = nnx.Conv(
            f,
            f,
            (3, 3),
            strides=2,
            padding="VALID",
            kernel_init=init,
            bias_init=init,
            dtype=compute.precision,
            precision=compute.products,
            rngs=rngs,
        )
        self.coarse = Conv3x3(f, f, compute, rngs=rngs)
        self.expand = pointwise(f, c, compute, rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Refines the features."""
        refined = x
        for conv in self.convs:
            refined = jax.nn.leaky_relu(conv(refined, WHOLE), 0.05)
        refined = self.mix(refined + x).astype(jnp.float32)
        narrow = self.reduce(refined)
        # Seven positions every three, or as many as there are in small pictures.
        small = self.shrink(narrow)
        side = tuple(min(7, size) for size in small.shape[1:3])
        small = self.coarse(nnx.max_pool(small, side, strides=(3, 3)), WHOLE)
        large = jax.image.resize(small, narrow.shape, "bilinear")
        gate = jax.nn.sigmoid(self.expand(large + self.keep(narrow)))
        return refined * gate.astype(jnp.float32)


class Rlfn(Blocks):
    """RLFN's blocks between DVMSR's head and tail, which are also RLFN's."""

    def __init__(self, config: RlfnConfig, *, compute: Compute, rngs: nnx.Rngs):
        super().__init__(config, LocalFeatureBlock, compute, rngs)


class WindowLayer(nnx.Module):
    """A Swin Transformer layer: attention within windows, and a perceptron, each with a skip."""

    def __init__(self, config: WindowsConfig, shifted: bool, compute: Compute, rngs: nnx.Rngs):
        c, m = config.channels, config.window
        dense = functools.partial(
            nnx.Linear,
            kernel_init=dense_init,
            dtype=compute.precision,
            precision=compute.products,
            rngs=rngs,
        )
        self.heads, self.window, self.shift = config.heads, m, m // 2 if shifted else 0
        self.norm_attention = nnx.LayerNorm(c, epsilon=LAYER_NORM_EPSILON, rngs=rngs)
        self.qkv = dense(c, 3 * c)
        self.out = dense(c, c)
        # A bias for each head and each difference between two positions in a window.
        self.position = nnx.Param(dense_init(rngs.params(), ((2 * m - 1) ** 2, config.heads)))
        self.norm_mlp = nnx.LayerNorm(c, epsilon=LAYER_NORM_EPSILON, rngs=rngs)
        self.up, self.down = dense(c, config.hidden), dense(config.hidden, c)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Refines the features, whose sides are multiples of the window's."""
        x = x + self._attend(self.norm_attention(x)).astype(jnp.float32)
        hidden = jax.nn.gelu(self.up(self.norm_mlp(x)))
        return x + self.down(hidden).astype(jnp.float32)

    def _attend(self, x):
        (b, h, w, c), m, s = x.shape, self.window, self.shift
        x = jnp.roll(x, (-s, -s), axis=(1, 2))
        windows = x.reshape(b, h // m, m, w // m, m, c).transpose(0, 1, 3, 2, 4, 5)
        windows = windows.reshape(b, -1, m * m, c)
        qkv = self.qkv(windows).reshape(*windows.shape[:3], 3, self.heads, -1)
        q, k, v = jnp.moveaxis(qkv, 3, 0)
        precision = self.qkv.precision
        scores = jnp.einsum("bnqhd,bnkhd->bnhqk", q, k, precision=precision)
        bias = self.position[...][_differences(m)].transpose(2, 0, 1)
        scores = scores.astype(jnp.float32) / math.sqrt(q.shape[-1]) + bias[None, None]
        if s:
            scores = jnp.where(_neighbours(h, w, m, s)[None, :, None], scores, -1e9)
        attention = jax.nn.softmax(scores).astype(v.dtype)
        mixed = jnp.einsum("bnhqk,bnkhd->bnqhd", attention, v, precision=precision)
        mixed = self.out(mixed.reshape(windows.shape))
        mixed = mixed.reshape(b, h // m, w // m, m, m, c).transpose(0, 1, 3, 2, 4, 5)
        return jnp.roll(mixed.reshape(b, h, w, c), (s, s), axis=(1, 2))


def _differences(window: int) -> np.ndarray:
    """For each pair of positions in a window, the number of their difference."""
    y, x = np.divmod(np.arange(window**2), window)
    down, right = (p[:, None] - p[None] + window - 1 for p in (y, x))
    return down * (2 * window - 1) + right


def _neighbours(height: int, width: int, window: int, shift: int) -> Bool[Array, "n mm mm"]:
    """For each shifted window, which pairs of its pixels are neighbours in the picture.

    Windows at the lower and right border also contain pixels from the opposite border.
    """

    def part(size: int) -> Array:
        return (jnp.arange(size) >= size - shift).astype(jnp.int32)

    parts = 2 * part(height)[:, None] + part(width)[None]
    parts = parts.reshape(height // window, window, width // window, window)
    parts = parts.transpose(0, 2, 1, 3).reshape(-1, window**2)
    return parts[:, :, None] == parts[:, None]


class WindowBlock(nnx.Module):
    """SwinIR's residual block: layers of attention, a convolution, and a skip."""

    def __init__(self, config: WindowsConfig, compute: Compute, rngs: nnx.Rngs):
        self.layers = nnx.List(
            [WindowLayer(config, i % 2 == 1, compute, rngs) for i in range(config.layers)]
        )
        self.conv = Conv3x3(config.channels, config.channels, compute, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Refines the features."""
        refined = x
        for layer in self.layers:
            refined = layer(refined)
        return x + self.conv(refined, WHOLE)


class Windows(Blocks):
    """The network of windowed attention. Pictures are reflected to whole windows."""

    config: WindowsConfig

    def __init__(self, config: WindowsConfig, *, compute: Compute, rngs: nnx.Rngs):
        super().__init__(config, WindowBlock, compute, rngs)
        self.norm_last = nnx.LayerNorm(config.channels, epsilon=LAYER_NORM_EPSILON, rngs=rngs)

    def with_features(
        self,
        image: Float[Array, "b h w 3"],
        *,
        keys: Key[Array, " b"] | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "b hs ws 3"], Features]:
        """See Network. No part is ever dropped."""
        _, h, w, _ = image.shape
        s, m = self.config.scale, self.config.window
        image = jnp.pad(image, ((0, 0), (0, -h % m), (0, -w % m), (0, 0)), "reflect")
        upscaled, features = super().with_features(image, keys=keys, remat=remat)
        cropped = jax.tree.map(lambda x: x[:, :h, :w], features)
        return upscaled[:, : h * s, : w * s], cropped

    def finish(self, features: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """See Blocks."""
        return self.norm_last(features)


class ColumnRSSB(RSSB):
    """An RSSB that reads the picture column by column."""

    def __call__(
        self,
        features: Float[Array, "b h w c"],
        keys: Key[Array, " b"] | None = None,
        band: Whole | Band = WHOLE,
    ) -> Float[Array, "b h w c"]:
        """See RSSB."""
        return super().__call__(features.swapaxes(1, 2), keys, band).swapaxes(1, 2)


class Alternating(DVMSR):
    """A DVMSR whose second, fourth, ... RSSB reads columns."""

    config: AlternatingConfig

    def __init__(self, config: AlternatingConfig, *, compute: Compute, rngs: nnx.Rngs):
        super().__init__(config, compute=compute, rngs=rngs)
        for i in range(1, config.rssbs, 2):
            self.rssbs[i] = ColumnRSSB(config, i, compute, rngs=rngs)

    @property
    def streams(self) -> bool:
        """See DVMSR. Columns lead from band to band."""
        return False


def pointwise(c_in: int, c_out: int, compute: Compute, rngs: nnx.Rngs) -> nnx.Linear:
    """A 1x1 convolution."""
    init = torch_uniform(fan_in=c_in)
    return nnx.Linear(
        c_in,
        c_out,
        kernel_init=init,
        bias_init=init,
        dtype=compute.precision,
        precision=compute.products,
        rngs=rngs,
    )


@cost.register
def _(config: BlocksConfig, height: int, width: int) -> Cost:
    in_jax = Compute(scan="chunked")  # without C++ code, which has no countable operations
    model = nnx.eval_shape(lambda: build(config, compute=in_jax, rngs=nnx.Rngs(0)))
    graph, parameters = nnx.split(model)
    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    macs = count_macs(lambda p, x: nnx.merge(graph, p)(x), parameters, image)
    return Cost(macs=macs, scan_flops=0, usual_macs=macs)


NETWORKS |= {
    CnnConfig: Cnn,
    RlfnConfig: Rlfn,
    WindowsConfig: Windows,
    AlternatingConfig: Alternating,
}
