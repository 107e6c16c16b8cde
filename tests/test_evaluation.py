"""Benchmarks are found and paired, or errors name them; scores are means over their pictures."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvmsr_jax import bicubic
from dvmsr_jax.data import degradations
from dvmsr_jax.errors import UserError
from dvmsr_jax.evaluation import (
    Degraded,
    Example,
    Pair,
    evaluate,
    find_benchmarks,
    load_pair,
    parse_degradations,
    sample_benchmark,
)
from dvmsr_jax.images import ImageError, read_rgb, write_png
from dvmsr_jax.samples import SAMPLES

METRICS = ("psnr_y", "ssim_y", "psnr_rgb")


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_all(folder, **sizes):
    """Files of these names and (height, width)."""
    for name, size in sizes.items():
        write_png(folder / f"{name}.png", picture(*size))


def bicubic_x2(lr):
    return bicubic.upscale(lr, 2)


def test_folders_and_folders_of_folders(tmp_path):
    write_all(tmp_path / "A" / "HR", one=(8, 8), two=(8, 8))
    write_all(tmp_path / "A" / "LR", one=(4, 4), twox2=(4, 4))
    write_all(tmp_path / "many" / "C" / "HR", three=(8, 8))
    write_all(tmp_path / "many" / "B" / "HR", one=(8, 8))
    benchmarks = find_benchmarks([tmp_path / "A", tmp_path / "many"], scale=2)
    assert list(benchmarks) == ["A", "B", "C"]
    a = tmp_path / "A"
    assert benchmarks["A"].pairs == (
        Pair("one", a / "HR" / "one.png", a / "LR" / "one.png"),
        Pair("two", a / "HR" / "two.png", a / "LR" / "twox2.png"),
    )
    assert [pair.lr for pair in benchmarks["B"].pairs] == [None]
    assert [example.name for example in benchmarks["A"]] == ["one", "two"]
    assert len(benchmarks["A"]) == 2


def test_lr_is_read_or_made(tmp_path):
    write_all(tmp_path, hr=(9, 14), lr=(4, 7))
    hr = read_rgb(tmp_path / "hr.png")[:8]
    example = load_pair(Pair("x", tmp_path / "hr.png", tmp_path / "lr.png"), scale=2)
    np.testing.assert_array_equal(example.hr, hr)
    np.testing.assert_array_equal(example.lr, read_rgb(tmp_path / "lr.png"))
    example = load_pair(Pair("x", tmp_path / "hr.png", None), scale=2)
    np.testing.assert_array_equal(example.hr, hr)
    np.testing.assert_array_equal(example.lr, bicubic.downscale(hr, 2))


@pytest.mark.parametrize("lr_size", [(5, 7), (4, 6), (3, 7)])
def test_sizes_that_do_not_fit(tmp_path, lr_size):
    write_all(tmp_path, hr=(9, 14), lr=lr_size, tiny=(1, 9))
    message = f"lr.png: has {lr_size[1]}x{lr_size[0]} pixels, but 1/2 of {tmp_path}/hr.png is 7x4"
    with pytest.raises(ImageError, match=re.escape(message)):
        load_pair(Pair("x", tmp_path / "hr.png", tmp_path / "lr.png"), scale=2)
    with pytest.raises(ImageError, match=r"tiny\.png: 9x1 pixels are too few"):
        load_pair(Pair("x", tmp_path / "tiny.png", None), scale=2)


def test_files_that_do_not_pair_up_are_named(tmp_path):
    def refused(*dirs, naming):
        with pytest.raises(ImageError, match=f"^{re.escape(str(naming))}: "):
            find_benchmarks(dirs, scale=2)

    refused(tmp_path / "missing", naming=tmp_path / "missing")
    refused(tmp_path, naming=tmp_path)

    lonely_hr = tmp_path / "lonely_hr"
    write_all(lonely_hr / "HR", a=(8, 8), b=(8, 8))
    write_all(lonely_hr / "LR", a=(4, 4), bx4=(4, 4))
    refused(lonely_hr, naming=lonely_hr / "HR" / "b.png")

    lonely_lr = tmp_path / "lonely_lr"
    write_all(lonely_lr / "HR", a=(8, 8))
    write_all(lonely_lr / "LR", a=(4, 4), b=(4, 4))
    refused(lonely_lr, naming=lonely_lr / "LR" / "b.png")

    same_stem = tmp_path / "same_stem"
    write_all(same_stem / "HR", a=(8, 8))
    write_all(same_stem / "HR" / "more", a=(8, 8))
    refused(same_stem, naming=same_stem / "HR" / "more" / "a.png")

    for parent in ("x", "y"):
        write_all(tmp_path / parent / "Same" / "HR", a=(8, 8))
    refused(tmp_path / "x", tmp_path / "y", naming=tmp_path / "y" / "Same")


def test_scores_are_means_and_pictures_are_saved(tmp_path):
    examples = [
        Example(name, bicubic.downscale(hr, 2), hr)
        for name, hr in (("a", picture(30, 32)), ("b", picture(24, 20, seed=1)))
    ]

    def darker(lr):
        return bicubic_x2(lr) // 2

    scores, seconds = evaluate(darker, examples, 2, name="Pair", save_dir=tmp_path)
    assert list(scores) == ["psnr_y", "ssim_y", "psnr_rgb", "bicubic", "images"]
    assert list(scores["images"]) == list(seconds) == ["a", "b"]
    assert all(second > 0 for second in seconds.values())
    for metric in METRICS:
        each = [scores["images"][name][metric] for name in "ab"]
        assert each[0] != each[1]
        assert scores[metric] == pytest.approx(sum(each) / 2, rel=1e-14)
        assert scores[metric] < scores["bicubic"][metric]
    for example in examples:
        saved = read_rgb(tmp_path / "Pair" / f"{example.name}.png")
        np.testing.assert_array_equal(saved, darker(example.lr))

    baseline, _ = evaluate(bicubic_x2, examples, 2, name="Pair")
    assert {key: baseline[key] for key in METRICS} == scores["bicubic"]


def test_pictures_that_cannot_be_scored_are_named():
    small = picture(14, 30)
    example = Example("small", bicubic.downscale(small, 2), small)
    with pytest.raises(UserError, match="Mine/small: 30x14 pixels are too few"):
        evaluate(bicubic_x2, [example], 2, name="Mine")
    with pytest.raises(UserError, match=r"Mine/small: cannot compare .*"):
        evaluate(lambda lr: lr, [example], 2, name="Mine")
    with pytest.raises(UserError, match="Mine: no pictures"):
        evaluate(bicubic_x2, [], 2, name="Mine")


def test_samples():
    samples = sample_benchmark(scale=4)
    assert len(samples) == len(SAMPLES)
    example = next(iter(samples))
    assert example.name == "astronaut"
    assert example.hr.shape == (512, 512, 3)
    assert example.lr.shape == (128, 128, 3)


def test_times_exclude_compilation():
    @jax.jit
    def upscale(lr):
        time.sleep(0.5)  # while it is traced
        return jnp.repeat(jnp.repeat(lr, 2, 0), 2, 1)

    hr = picture(32, 32)
    examples = [Example(name, bicubic.downscale(hr, 2), hr) for name in "ab"]
    _, seconds = evaluate(lambda lr: np.asarray(upscale(lr)), examples, 2, name="Pair")
    assert seconds["a"] < 0.4
    assert seconds["b"] < 0.4


def test_degradations_are_parsed():
    assert parse_degradations(["jpeg=40", "blur=1.5"]) == {
        "blur=1.5 jpeg=40": {"blur": 1.5, "jpeg": 40}
    }
    grid = parse_degradations(["grid", "noise=10"])
    assert list(grid) == [
        "clean",
        "jpeg=50",
        "noise=10",
        "blur=2",
        "noise=10 jpeg=50",
        "blur=2 jpeg=50",
        "blur=2 noise=10",
        "blur=2 noise=10 jpeg=50",
    ]
    assert grid["clean"] == {}
    assert grid["blur=2 noise=10 jpeg=50"] == {"blur": 2.0, "noise": 10.0, "jpeg": 50}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["rain=1"], "--degrade rain=1: expected blur=SIGMA"),
        (["blur=1", "blur=2"], "--degrade blur=2: expected .* at most once"),
        (["blur"], "--degrade blur: '' is not a number"),
        (["noise=much"], "--degrade noise=much: 'much' is not a number"),
        (["jpeg=50.5"], "--degrade jpeg=50.5: '50.5' is not a number"),
        (["blur=-1"], "blur is -1.0"),
        (["noise=nan"], "noise is nan"),
        (["jpeg=0"], "jpeg is 0"),
        (["grid", "jpeg=101"], "jpeg is 101"),
    ],
)
def test_invalid_degradations(arguments, problem):
    with pytest.raises(UserError, match=problem):
        parse_degradations(arguments)


def test_degraded_benchmarks(tmp_path):
    """The same every time, with other noise in each picture, and the same HR."""
    write_png(tmp_path / "B" / "HR" / "a.png", picture(32, 32))
    write_png(tmp_path / "B" / "HR" / "b.png", picture(32, 32))
    (benchmark,) = find_benchmarks([tmp_path / "B"], scale=2).values()
    degraded = Degraded(benchmark, {"noise": 20.0, "jpeg": 50})
    assert len(degraded) == 2
    clean, first, again = [*benchmark], [*degraded], [*degraded]
    for i, example in enumerate(first):
        np.testing.assert_array_equal(example.hr, clean[i].hr)
        np.testing.assert_array_equal(example.lr, again[i].lr)
        expected = degradations.apply(clean[i].lr, noise=20.0, jpeg=50, seed=i)
        np.testing.assert_array_equal(example.lr, expected)
    np.testing.assert_array_equal(clean[0].lr, clean[1].lr)
    assert not np.array_equal(first[0].lr, first[1].lr)
