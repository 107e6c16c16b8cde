"""PSNR and SSIM, following the usual protocol of super-resolution."""

import math

import numpy as np
from jaxtyping import Float64, UInt8
from skimage.metrics import structural_similarity

SSIM_WINDOW = 11


def luma(rgb: UInt8[np.ndarray, "h w 3"]) -> Float64[np.ndarray, "h w"]:
    """Y of YCbCr (ITU-R BT.601) like MATLAB's rgb2ycbcr, in [16, 235], but not rounded."""
    return rgb / 255 @ np.array([65.481, 128.553, 24.966]) + 16


def psnr_y(sr: UInt8[np.ndarray, "h w 3"], hr: UInt8[np.ndarray, "_ _ 3"], border: int) -> float:
    """Peak signal-to-noise ratio in dB of the luma, peak 255; inf for equal pictures.

    `border` pixels are left out on each side. Raises ValueError if the pictures' sizes differ or
    nothing is left.
    """
    sr, hr = _cropped(sr, hr, border, least=1)
    return _psnr(luma(sr), luma(hr))


def psnr_rgb(sr: UInt8[np.ndarray, "h w 3"], hr: UInt8[np.ndarray, "_ _ 3"], border: int) -> float:
    """`psnr_y` over the three RGB channels, as papers on degraded pictures report it."""
    sr, hr = _cropped(sr, hr, border, least=1)
    return _psnr(sr.astype(np.float64), hr.astype(np.float64))


def ssim_y(sr: UInt8[np.ndarray, "h w 3"], hr: UInt8[np.ndarray, "_ _ 3"], border: int) -> float:
    """Structural similarity of the luma (Wang et al., IEEE Trans. Image Processing 13, 2004).

    Uses an 11x11 Gaussian window with sigma 1.5, and averages over all its positions inside the
    picture, after leaving out `border` pixels on each side. Raises ValueError if the pictures'
    sizes differ or the window does not fit.
    """
    sr, hr = _cropped(sr, hr, border, least=SSIM_WINDOW)
    similarity = structural_similarity(
        luma(sr),
        luma(hr),
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(similarity)


def _psnr(sr: np.ndarray, hr: np.ndarray) -> float:
    error = np.mean((sr - hr) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def _cropped(
    sr: np.ndarray, hr: np.ndarray, border: int, least: int
) -> tuple[np.ndarray, np.ndarray]:
    height, width = sr.shape[:2]
    if sr.shape != hr.shape:
        raise ValueError(
            f"cannot compare pictures of {width}x{height} and {hr.shape[1]}x{hr.shape[0]} pixels"
        )
    if min(height, width) - 2 * border < least:
        side = least + 2 * border
        raise ValueError(
            f"{width}x{height} pixels are too few to score; leave out pictures below {side}x{side}"
        )
    inside = np.s_[border : height - border, border : width - border]
    return sr[inside], hr[inside]
