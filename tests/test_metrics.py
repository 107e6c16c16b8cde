"""PSNR and SSIM against other implementations of the same formulas."""

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from dvmsr_jax.metrics import luma, psnr_rgb, psnr_y, ssim_y


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    hr = rng.integers(0, 256, (21, 19, 3), dtype=np.uint8)
    noise = rng.integers(-30, 31, hr.shape)
    return np.clip(hr + noise, 0, 255).astype(np.uint8), hr


def test_luma_of_the_primaries():
    colours = np.array([[[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]])
    np.testing.assert_allclose(
        luma(colours.astype(np.uint8)), [[16, 81.481, 144.553, 40.966, 235]], rtol=1e-14
    )


@pytest.mark.parametrize("border", [0, 4])
def test_psnr_equals_that_of_skimage(pictures, border):
    cropped = [luma(image[border : 21 - border, border : 19 - border]) for image in pictures]
    expected = peak_signal_noise_ratio(*cropped, data_range=255)
    assert psnr_y(*pictures, border) == pytest.approx(expected, rel=1e-12)


def test_ssim_equals_the_formula(pictures):
    border = 2
    x, y = (luma(image)[border:-border, border:-border] for image in pictures)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarities = []
    for row in range(x.shape[0] - 10):
        for col in range(x.shape[1] - 10):
            a, b = (z[row : row + 11, col : col + 11] for z in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a = (window * (a - mean_a) ** 2).sum()
            var_b = (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            similarities.append(
                (2 * mean_a * mean_b + c1)
                * (2 * covariance + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    assert ssim_y(*pictures, border) == pytest.approx(np.mean(similarities), rel=1e-10)


def test_border_does_not_count(pictures):
    sr, hr = pictures
    framed = 255 - sr
    framed[3:-3, 3:-3] = sr[3:-3, 3:-3]
    assert psnr_y(framed, hr, 3) == psnr_y(sr, hr, 3) != psnr_y(framed, hr, 2)
    assert ssim_y(framed, hr, 3) == ssim_y(sr, hr, 3) != ssim_y(framed, hr, 2)
    assert psnr_rgb(framed, hr, 3) == psnr_rgb(sr, hr, 3) != psnr_rgb(framed, hr, 2)


def test_psnr_rgb():
    """A difference of 2 in one of three channels: a mean square error of 4 / 3."""
    hr = np.full((6, 8, 3), 100, np.uint8)
    sr = hr.copy()
    sr[..., 2] += 2
    assert psnr_rgb(sr, hr, 1) == pytest.approx(10 * math.log10(255**2 * 3 / 4), rel=1e-12)


def test_equal_pictures(pictures):
    _, hr = pictures
    assert psnr_y(hr, hr, 4) == psnr_rgb(hr, hr, 4) == math.inf
    assert ssim_y(hr, hr, 4) == pytest.approx(1)


def test_pictures_that_cannot_be_scored(pictures):
    sr, hr = pictures
    for metric in (psnr_y, ssim_y, psnr_rgb):
        with pytest.raises(ValueError, match="cannot compare pictures of 19x20 and 19x21 pixels"):
            metric(sr[:-1], hr, 4)
    assert math.isfinite(ssim_y(sr, hr, 4))
    with pytest.raises(ValueError, match=r"19x21 pixels are too few .* below 21x21"):
        ssim_y(sr, hr, 5)
    with pytest.raises(ValueError, match=r"19x21 pixels are too few .* below 21x21"):
        psnr_y(sr, hr, 10)
