"""PSNR and SSIM on luma, under super-resolution's usual protocol."""

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
    sr_y, hr_y = _cropped_lumas(sr, hr, border, least=1)
    error = np.mean((sr_y - hr_y) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim_y(sr: UInt8[np.ndarray, "h w 3"], hr: UInt8[np.ndarray, "_ _ 3"], border: int) -> float:
    """Structural similarity of the luma (Wang et al., IEEE Trans. Image Processing 13, 2004).

    Uses an 11x11 Gaussian window with sigma 1.5, and averages over all its positions inside the
    picture, after leaving out `border` pixels on each side. Raises ValueError if the pictures'
    sizes differ or the window does not fit.
    """
    sr_y, hr_y = _cropped_lumas(sr, hr, border, least=SSIM_WINDOW)
    similarity = structural_similarity(
        sr_y, hr_y, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return float(similarity)


def _cropped_lumas(
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
    return luma(sr[inside]), luma(hr[inside])
