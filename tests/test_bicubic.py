"""MATLAB's imresize: weights computed by hand, and the published low-resolution files."""

import numpy as np
import pytest

from dvmsr_jax import bicubic
from dvmsr_jax.bicubic import resize
from dvmsr_jax.evaluation import evaluate, find_benchmarks

# Keys' kernel with a = -0.5 at distances 1/4, 3/4, .. 7/4 in 128ths, and 1/8, 3/8, .. 15/8 in
# 1024ths.
QUARTERS = [111, 29, -9, -3]
EIGHTHS = [987, 745, 399, 93, -49, -75, -45, -7]


def column(values):
    return np.asarray(values, dtype=float).reshape(-1, 1, 1)


def impulse(size, at, height):
    return column(height * (np.arange(size) == at))


def random_image(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("scale", "weights"), [(2, QUARTERS), (4, EIGHTHS)])
def test_enlarging_an_impulse_shows_the_kernel(scale, weights):
    enlarged = resize(impulse(9, 4, sum(weights) * 2 / scale), 9 * scale, 1)
    expected = np.zeros(9 * scale)
    centre = 4 * scale + scale // 2
    expected[centre : centre + 2 * scale] = weights
    expected[centre - 2 * scale : centre] = weights[::-1]
    np.testing.assert_array_equal(enlarged, column(expected))


def test_shrinking_widens_the_kernel():
    # Row 20 lies 0.5 from output 10's centre, 1.5 from 9's, 2.5 from 11's and 3.5 from 8's.
    expected = np.zeros(20)
    expected[[10, 9, 11, 8]] = QUARTERS
    np.testing.assert_array_equal(resize(impulse(40, 20, 256), 20, 1), column(expected))
    # Row 41 lies 0.5 from output 10's centre, 3.5 from 9's, 4.5 from 11's and 7.5 from 8's.
    expected[[10, 9, 11, 8]] = EIGHTHS[0], EIGHTHS[3], EIGHTHS[4], EIGHTHS[7]
    np.testing.assert_array_equal(resize(impulse(80, 41, 4096), 20, 1), column(expected))


def test_border_pixel_repeats():
    # Output 0 lies 1/4 from pixel 0, and 3/4 and 7/4 from its first two copies outside; mirrored,
    # the second would be a copy of pixel 1.
    expected = [111 + 29 - 3, 111 - 9, 29 - 3, -9]
    for at, outputs in ((0, slice(4)), (5, slice(-1, -5, -1))):
        enlarged = resize(impulse(6, at, 128), 12, 1)[outputs]
        np.testing.assert_array_equal(enlarged, column(expected))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 9), (13, 30), (28, 36)])
def test_constant_stays_at_any_size(size):
    image = np.full((7, 9, 3), 201, np.uint8)
    np.testing.assert_array_equal(resize(image, *size), np.full((*size, 3), 201, np.uint8))


def test_same_size_is_the_identity():
    image = random_image(7, 9)
    np.testing.assert_array_equal(resize(image, 7, 9), image)


@pytest.mark.parametrize(("n_in", "n_out"), [(9, 23), (27, 9), (40, 10)])
def test_ramp_stays_straight_inside(n_in, n_out):
    centres = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
    margin = 2 * max(1, n_in / n_out)  # half the kernel
    inside = (centres >= margin) & (centres <= n_in - 1 - margin)
    assert inside.any()
    resized = resize(column(np.arange(n_in)), n_out, 1)[:, 0, 0]
    np.testing.assert_allclose(resized[inside], centres[inside], rtol=1e-13)


def test_uint8_is_rounded_after_each_pass():
    image = random_image(40, 24)
    rows = np.clip(np.floor(resize(image.astype(float), 10, 24) + 0.5), 0, 255)
    both = np.clip(np.floor(resize(rows, 10, 6) + 0.5), 0, 255)
    np.testing.assert_array_equal(resize(image, 10, 6), both.astype(np.uint8))


def test_axis_that_shrinks_most_goes_first():
    image = random_image(20, 24)
    transposed = resize(image.swapaxes(0, 1), 6, 10).swapaxes(0, 1)
    np.testing.assert_array_equal(resize(image, 10, 6), transposed)


def test_downscale_crops_to_a_multiple():
    image = random_image(14, 19)
    low = bicubic.downscale(image, 4)
    assert low.shape == (3, 4, 3)
    np.testing.assert_array_equal(low, bicubic.downscale(image[:12, :16], 4))
    assert bicubic.upscale(low, 4).shape == (12, 16, 3)
    with pytest.raises(ValueError, match="3x9 pixels are too few to shrink by 4"):
        bicubic.downscale(random_image(9, 3), 4)


@pytest.mark.parametrize(
    ("name", "psnr", "ssim"), [("Set5", 28.43, 0.811), ("Set14", 26.09, 0.705)]
)
def test_published_files_and_scores(shared, name, psnr, ssim):
    benchmark = find_benchmarks([shared / "data" / "benchmark" / name], scale=4)[name]
    for example in benchmark:
        np.testing.assert_array_equal(bicubic.downscale(example.hr, 4), example.lr, example.name)
    scores, _ = evaluate(lambda lr: bicubic.upscale(lr, 4), benchmark, 4, name=name)
    assert scores["psnr_y"] == pytest.approx(psnr, abs=0.005)
    assert scores["ssim_y"] == pytest.approx(ssim, abs=0.0005)
