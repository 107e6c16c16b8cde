"""Degraded LR pictures: random blur, resizing, noise and JPEG, as in real pictures.

A network trained only on bicubic LR sharpens the noise and JPEG blocks of other pictures. The
operations and ranges of "real" are those of Real-ESRGAN (arXiv 2107.10833) and DASR (arXiv
2203.14672), taken from the options published with their code. "mild" is for slight blur,
noise and JPEG, where the network should keep as much detail as possible.

LR stays aligned with HR: kernels are symmetric and of odd size, and each resizing maps the whole
picture onto the whole picture.
"""

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.fft
import scipy.ndimage
import scipy.special
from jaxtyping import Float, Float32, UInt8
from PIL import Image
from scipy.sparse import csr_array

from dvmsr_jax import bicubic
from dvmsr_jax.errors import UserError

Range = tuple[float, float]
Picture = Float32[np.ndarray, "h w 3"]
"""Values from 0 to 255, clipped only by noise, JPEG and the end of `degrade`."""

RESIZINGS = ("area", "bilinear", "bicubic")
SHAPES = ("gaussian", "generalised", "plateau")
# Side lengths of random kernels.
SIZES = (7, 9, 11, 13, 15, 17, 19, 21)


@dataclass(frozen=True)
class Round:
    """A round of blur, resizing, noise and JPEG. Random numbers are uniform within their ranges."""

    blur: float = 1.0
    """Probability of a blur."""
    shapes: tuple[float, ...] = (0.70, 0.15, 0.15)
    """Shares of SHAPES among the kernels."""
    anisotropic: tuple[float, ...] = (0.25 / 0.70, 0.2, 0.2)
    """For each shape, the share of anisotropic kernels."""
    sigma: Range = (0.2, 3.0)
    """Standard deviation of the kernels, in pixels of the picture to be blurred."""
    sinc: float = 0.1
    """Probability that a blur uses a sinc kernel instead, which causes ringing."""
    up_down_keep: tuple[float, ...] = (0.0, 0.0, 1.0)
    """Probabilities of enlarging, shrinking and neither."""
    factors: Range = (1.0, 1.0)
    """Size after resizing, relative to HR's size, or to LR's if `to_lr`."""
    to_lr: bool = False
    noise: float = 1.0
    """Probability of noise."""
    gaussian: float = 0.5
    """Share of Gaussian noise; the rest is Poisson noise."""
    gaussian_sigma: Range = (1.0, 30.0)
    """Standard deviation, in levels of 255."""
    poisson_scale: Range = (0.05, 3.0)
    """Factor for the noise of a picture with one photon per level."""
    grey: float = 0.4
    """Share of noise that is the same in all channels."""
    jpeg: float = 1.0
    """Probability of JPEG."""
    quality: Range = (30.0, 95.0)
    subsampling: float = 0.75
    """Share of JPEGs that store colours at half the resolution (4:2:0)."""


@dataclass(frozen=True)
class Level:
    """A sequence of rounds, which ends with the last JPEG and the resizing to LR's size."""

    share: float
    """Probability of this level in its preset."""
    rounds: tuple[Round, ...] = ()
    """Without rounds, LR is the bicubic reduction of HR."""
    final_sinc: float = 0.0
    """Probability of a sinc filter after the resizing to LR's size."""
    jpeg_last: float = 0.0
    """Probability that the last JPEG comes after this resizing rather than before."""


# DASR uses only Gaussian kernels.
_DASR = functools.partial(Round, shapes=(1.0, 0.0, 0.0), anisotropic=(0.35, 0.0, 0.0), sinc=0.0)
_MILD = functools.partial(
    _DASR, sigma=(0.2, 1.2), to_lr=True, gaussian_sigma=(0.0, 15.0), poisson_scale=(0.05, 1.0)
)

PRESETS: dict[str, tuple[Level, ...]] = {
    "clean": (Level(1.0),),
    # Many photographs have only one of these flaws, most often JPEG.
    "mild": (
        Level(0.1),
        Level(0.1, (_MILD(blur=0.0, noise=0.0, jpeg=0.0), _MILD(noise=0.0, jpeg=0.0))),
        Level(0.15, (_MILD(blur=0.0, jpeg=0.0),)),
        Level(0.15, (_MILD(blur=0.0, noise=0.0),)),
        Level(
            0.5,
            (
                _MILD(blur=0.5, sigma=(0.2, 2.0), noise=0.0, jpeg=0.0),
                _MILD(
                    blur=0.35,
                    up_down_keep=(0.15, 0.15, 0.7),
                    factors=(0.85, 1.2),
                    noise=0.7,
                    jpeg=0.65,
                ),
            ),
            jpeg_last=0.75,
        ),
    ),
    # DASR's three levels, of which the most severe uses all of Real-ESRGAN's kernels.
    "real": (
        Level(
            0.3,
            (
                _DASR(
                    sigma=(0.2, 0.8),
                    up_down_keep=(0.1, 0.2, 0.7),
                    factors=(0.85, 1.2),
                    gaussian_sigma=(1.0, 10.0),
                    poisson_scale=(0.05, 0.5),
                    quality=(90.0, 95.0),
                ),
            ),
        ),
        Level(
            0.3,
            (
                _DASR(
                    sigma=(0.2, 1.5),
                    up_down_keep=(0.3, 0.4, 0.3),
                    factors=(0.5, 1.2),
                    gaussian_sigma=(1.0, 20.0),
                    poisson_scale=(0.05, 1.5),
                    quality=(50.0, 95.0),
                ),
            ),
        ),
        Level(
            0.4,
            (
                Round(up_down_keep=(0.2, 0.7, 0.1), factors=(0.15, 1.5)),
                Round(
                    blur=0.8,
                    sigma=(0.2, 1.5),
                    up_down_keep=(0.3, 0.4, 0.3),
                    factors=(0.3, 1.2),
                    to_lr=True,
                    gaussian_sigma=(1.0, 25.0),
                    poisson_scale=(0.05, 2.5),
                ),
            ),
            final_sinc=0.8,
            jpeg_last=0.5,
        ),
    ),
}

# A crop is degraded together with a margin of LR pixels around it, as far as the picture has them,
# so that its surroundings, not its reflection, are blurred into it. Up to _PHASES - 1 more pixels
# above and to the left let JPEG's blocks begin anywhere.
_MARGIN, _PHASES = 4, 16


def degrade_crop(
    hr: UInt8[np.ndarray, "H W 3"],
    top: int,
    left: int,
    side: int,
    key: int,
    preset: Literal["clean", "mild", "real"],
    scale: int,
) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """The LR crop of `side` pixels at (top, left), in LR pixels, of an HR picture.

    It depends only on the key and the HR pixels around it.
    """
    rng = np.random.default_rng(key)
    before = _MARGIN + rng.integers(_PHASES, size=2)
    starts = np.maximum((top, left) - before, 0)
    stops = np.minimum(np.array([top, left]) + side + _MARGIN, np.array(hr.shape[:2]) // scale)
    rows, columns = map(slice, starts * scale, stops * scale)
    lr = degrade(hr[rows, columns], int(rng.integers(2**63)), preset, scale)
    y, x = (top, left) - starts
    return lr[y : y + side, x : x + side]


def degrade(
    hr: UInt8[np.ndarray, "H W 3"],
    key: int,
    preset: Literal["clean", "mild", "real"],
    scale: int,
) -> UInt8[np.ndarray, "h w 3"]:
    """LR of an HR picture whose sides are multiples of the scale. Equal keys give equal results."""
    rng = np.random.default_rng(key)
    levels = PRESETS[preset]
    level = levels[rng.choice(len(levels), p=[level.share for level in levels])]
    if not level.rounds:
        return bicubic.downscale(hr, scale)
    height, width = (size // scale for size in hr.shape[:2])

    picture = hr.astype(np.float32)
    for number, step in enumerate(level.rounds, 1):
        if rng.random() < step.blur:
            picture = blur(picture, _random_kernel(rng, step))
        base = 1 if step.to_lr else scale
        factor = base * _random_factor(rng, step)
        picture = _resize_randomly(rng, picture, round(height * factor), round(width * factor))
        if rng.random() < step.noise:
            picture = _add_random_noise(rng, picture, step)
        if number < len(level.rounds):
            picture = _compress_randomly(rng, picture, step)

    def resize_to_lr(picture):
        picture = _resize_randomly(rng, picture, height, width)
        if rng.random() < level.final_sinc:
            cutoff = rng.uniform(np.pi / 3, np.pi)
            picture = blur(picture, sinc_kernel(int(rng.choice(SIZES)), cutoff))
        return picture

    def encode(picture):
        return _compress_randomly(rng, picture, step)

    end: list[Callable[[Any], Any]] = [encode, resize_to_lr]
    for operation in end if rng.random() >= level.jpeg_last else end[::-1]:
        picture = operation(picture)
    return _to_bytes(picture)


def apply(
    lr: UInt8[np.ndarray, "h w 3"],
    *,
    blur: float = 0.0,
    noise: float = 0.0,
    jpeg: int | None = None,
    seed: int = 0,
) -> UInt8[np.ndarray, "h w 3"]:
    """Degrades an LR picture by given amounts, for evaluation.

    Args:
        lr: the picture.
        blur: standard deviation of a Gaussian blur, in LR pixels. 0: none.
        noise: standard deviation of Gaussian noise, in levels of 255. 0: none.
        jpeg: quality of JPEG (4:2:0), which comes last, from 1 to 100. None: no JPEG.
        seed: seed of the noise.

    Raises:
        UserError: as `check`.
    """
    check(blur=blur, noise=noise, jpeg=jpeg)
    picture = lr.astype(np.float32)
    if blur:
        picture = scipy.ndimage.gaussian_filter(picture, blur, axes=(0, 1))
    if noise:
        picture = add_gaussian_noise(np.random.default_rng(seed), picture, noise, grey=False)
    if jpeg is not None:
        picture = compress(picture, jpeg, subsampled=True)
    return _to_bytes(picture)


def check(*, blur: float = 0.0, noise: float = 0.0, jpeg: int | None = None) -> None:
    """Raises UserError if a strength of `apply` is out of its range."""
    for name, value in (("blur", blur), ("noise", noise)):
        if not 0 <= value < np.inf:
            raise UserError(f"{name} is {value}, expected a number from 0 up")
    if jpeg is not None and not 1 <= jpeg <= 100:
        raise UserError(f"jpeg is {jpeg}, expected a quality from 1 to 100")


def blur_kernel(
    shape: Literal["gaussian", "generalised", "plateau"],
    size: int,
    sigmas: Range,
    angle: float = 0.0,
    beta: float = 1.0,
) -> Float[np.ndarray, "{size} {size}"]:
    """A normalised kernel, with standard deviations `sigmas` along axes rotated by `angle`.

    With d the distance in standard deviations, "gaussian" is exp(-d^2 / 2), "generalised" is
    exp(-d^(2 beta) / 2), and "plateau" is 1 / (1 + d^(2 beta)), which has a flat top.
    """
    y, x = np.mgrid[:size, :size] - size // 2
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    squared = (u / sigmas[0]) ** 2 + (v / sigmas[1]) ** 2
    match shape:
        case "gaussian":
            kernel = np.exp(-squared / 2)
        case "generalised":
            kernel = np.exp(-(squared**beta) / 2)
        case "plateau":
            kernel = 1 / (1 + squared**beta)
    return kernel / kernel.sum()


def sinc_kernel(size: int, cutoff: float) -> Float[np.ndarray, "{size} {size}"]:
    """A normalised low-pass kernel that cuts off at `cutoff` radians per pixel, with ringing."""
    y, x = np.mgrid[:size, :size] - size // 2
    radius = np.hypot(x, y)
    radius[size // 2, size // 2] = 1  # anything but 0; the next line but one sets the limit
    kernel = cutoff * scipy.special.j1(cutoff * radius) / (2 * np.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * np.pi)
    return kernel / kernel.sum()


def blur(picture: Picture, kernel: Float[np.ndarray, "n n"]) -> Picture:
    """The picture, reflected at its borders, filtered by a symmetric kernel of odd size."""
    height, width = picture.shape[:2]
    margin = len(kernel) // 2
    padding = ((0, 0), (margin, margin), (margin, margin))
    padded = np.pad(picture.transpose(2, 0, 1), padding, "symmetric")
    # The convolution wraps around only into the margins.
    shape = [scipy.fft.next_fast_len(size, real=True) for size in padded.shape[1:]]
    spectrum = scipy.fft.rfft2(padded, shape)
    spectrum *= scipy.fft.rfft2(kernel.astype(np.float32), shape)
    filtered = scipy.fft.irfft2(spectrum, shape)[:, 2 * margin :, 2 * margin :]
    return filtered[:, :height, :width].transpose(1, 2, 0)


def resize(
    picture: Picture, height: int, width: int, kind: Literal["area", "bilinear", "bicubic"]
) -> Float32[np.ndarray, "{height} {width} 3"]:
    """Resizes a picture; kernels are widened if it shrinks."""
    for axis, size in enumerate((height, width)):
        if size != picture.shape[axis]:
            lines = picture.swapaxes(0, axis)
            weights = _resampling(len(lines), size, kind)
            resized = weights @ lines.reshape(len(lines), -1)
            picture = resized.reshape(size, *lines.shape[1:]).swapaxes(0, axis)
    return picture


def add_gaussian_noise(
    rng: np.random.Generator, picture: Picture, sigma: float, *, grey: bool
) -> Picture:
    """Adds noise with a standard deviation of `sigma` levels, and clips."""
    shape = (*picture.shape[:2], 1 if grey else 3)
    noise = rng.standard_normal(shape, np.float32)
    return np.clip(picture + np.float32(sigma) * noise, 0, 255)


def add_poisson_noise(
    rng: np.random.Generator, picture: Picture, scale: float, *, grey: bool
) -> Picture:
    """Adds `scale` times the noise of counting one photon per level, and clips.

    The standard deviation is scale * sqrt(level), where grey noise uses the luma's level. Samples
    are drawn from a normal distribution and corrected for Poisson's skewness (Cornish and Fisher),
    which is three times faster than NumPy's `poisson`.
    """
    luma = np.array([[0.299], [0.587], [0.114]], np.float32)
    light = np.clip(picture @ luma if grey else picture, 0, 255)
    normal = rng.standard_normal(light.shape, np.float32)
    noise = np.sqrt(light) * normal + (normal * normal - 1) / 6
    return np.clip(picture + np.float32(scale) * noise, 0, 255)


def compress(picture: Picture, quality: int, *, subsampled: bool) -> Picture:
    """The picture after JPEG compression, with colours at half the resolution if `subsampled`."""
    file = io.BytesIO()
    Image.fromarray(_to_bytes(picture)).save(
        file, "JPEG", quality=quality, subsampling=2 if subsampled else 0
    )
    return np.asarray(Image.open(file), np.float32)


def _random_kernel(rng: np.random.Generator, step: Round) -> Float[np.ndarray, "n n"]:
    size = int(rng.choice(SIZES))
    if rng.random() < step.sinc:
        return sinc_kernel(size, rng.uniform(np.pi / (3 if size < 13 else 5), np.pi))
    index = rng.choice(len(SHAPES), p=step.shapes)
    first = rng.uniform(*step.sigma)
    sigmas, angle = (first, first), 0.0
    if rng.random() < step.anisotropic[index]:
        sigmas, angle = (first, rng.uniform(*step.sigma)), rng.uniform(0, np.pi)
    shape: Any = SHAPES[index]
    # Half of them have heavier tails than the Gaussian, and half are flatter.
    below, above = {"gaussian": (1, 1), "generalised": (0.5, 4), "plateau": (1, 2)}[shape]
    beta = rng.uniform(below, 1) if rng.random() < 0.5 else rng.uniform(1, above)
    return blur_kernel(shape, size, sigmas, angle, beta)


def _random_factor(rng: np.random.Generator, step: Round) -> float:
    low, high = step.factors
    ranges = ((1.0, high), (low, 1.0), (1.0, 1.0))
    return rng.uniform(*ranges[rng.choice(3, p=step.up_down_keep)])


def _resize_randomly(
    rng: np.random.Generator, picture: Picture, height: int, width: int
) -> Float32[np.ndarray, "_ _ 3"]:
    kind: Any = RESIZINGS[rng.choice(len(RESIZINGS))]
    return resize(picture, max(height, 1), max(width, 1), kind)


def _add_random_noise(rng: np.random.Generator, picture: Picture, step: Round) -> Picture:
    grey = rng.random() < step.grey
    if rng.random() < step.gaussian:
        return add_gaussian_noise(rng, picture, rng.uniform(*step.gaussian_sigma), grey=grey)
    return add_poisson_noise(rng, picture, rng.uniform(*step.poisson_scale), grey=grey)


def _compress_randomly(rng: np.random.Generator, picture: Picture, step: Round) -> Picture:
    if rng.random() >= step.jpeg:
        return picture
    quality = round(rng.uniform(*step.quality))
    return compress(picture, quality, subsampled=bool(rng.random() < step.subsampling))


def _resampling(n_in: int, n_out: int, kind: str) -> csr_array:
    if kind == "bicubic":
        matrix = bicubic.resampling(n_in, n_out)
    else:
        # Area: the overlap of a pixel of the result with those of the picture. Enlarging by area is
        # bilinear, because merely repeating pixels would move edges.
        pixel = 1.0 if kind == "bilinear" else min(n_out / n_in, 1.0)
        kernel = functools.partial(_overlap, pixel)
        matrix = bicubic.resampling(n_in, n_out, kernel, radius=(1 + pixel) / 2)
    return matrix.astype(np.float32)


def _overlap(pixel: float, x: np.ndarray) -> np.ndarray:
    """The share of an interval of length `pixel` at x that lies within 1/2 of 0.

    For a length of 1, this is the triangle of bilinear interpolation.
    """
    return np.clip((1 + pixel) / 2 - np.abs(x), 0, pixel) / pixel


def _to_bytes(picture: Picture) -> UInt8[np.ndarray, "h w 3"]:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
