"""Crops are aligned, batches are a function of seed and step, pictures are prepared once."""

import re

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dvmsr_jax import data, images
from dvmsr_jax.config import DataConfig
from dvmsr_jax.errors import UserError


def aligned_pair(height, width, scale):
    """LR pixels with values of their own, and an HR picture that repeats each scale x scale."""
    lr = np.random.default_rng(0).permutation(256**2)[: height * width].reshape(height, width)
    lr = np.stack([lr // 256, lr % 256, lr % 7], axis=-1).astype(np.uint8)
    return lr, lr.repeat(scale, axis=0).repeat(scale, axis=1)


@pytest.fixture
def photos(tmp_path):
    """Six small pictures, two of them in a subfolder."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for i in range(6):
        picture = rng.integers(0, 256, (40 + i, 50, 3), np.uint8)
        images.write_png(folder / ("more" if i < 2 else "") / f"{i}.png", picture)
    return folder


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_crops_are_aligned(scale):
    lr, hr = aligned_pair(20, 30, scale)
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(200):
        crop = data.random_crop(lr, hr, 8, scale, rng)
        assert crop["lr"].shape == (8, 8, 3)
        assert crop["hr"].shape == (8 * scale, 8 * scale, 3)
        np.testing.assert_array_equal(crop["hr"][::scale, ::scale], crop["lr"])
        seen.add(crop["lr"].tobytes())
    assert len(seen) > 150  # of the 13 x 23 x 8 there are


def test_crops_come_in_all_eight_orientations():
    lr, hr = aligned_pair(8, 8, 4)
    rng = np.random.default_rng(0)
    seen = {data.random_crop(lr, hr, 8, 4, rng)["lr"].tobytes() for _ in range(200)}
    turned = [np.rot90(lr, turns) for turns in range(4)]
    assert seen == {x.tobytes() for t in turned for x in (t, t[:, ::-1])}


@pytest.mark.parametrize(("height", "width"), [(80, 80), (81, 200), (30, 90), (7, 5)])
def test_sub_images_cover_the_picture(height, width):
    lr, hr = aligned_pair(height, width, 4)
    squares = list(data.sub_images(lr, hr, 320, 4))
    for lr_square, hr_square in squares:
        assert lr_square.shape == (80, 80, 3)
        np.testing.assert_array_equal(hr_square[::4, ::4], lr_square)
    pixels = {tuple(p) for square, _ in squares for p in square.reshape(-1, 3)}
    assert pixels == {tuple(p) for p in lr.reshape(-1, 3)}


def test_batches_are_a_function_of_seed_and_step():
    lr, hr = aligned_pair(20, 20, 2)
    records = [{"lr": np.roll(lr, i, 0), "hr": np.roll(hr, 2 * i, 0)} for i in range(5)]
    config = DataConfig(lr_crop=8, batch_size=3)

    def run(seed, start, stop):
        return list(data.batches(records, config, scale=2, seed=seed, start=start, stop=stop))

    whole, rest = run(0, 0, 7), run(0, 4, 7)
    assert len(whole) == 7
    assert len(rest) == 3
    for a, b in zip(whole[4:], rest, strict=True):
        np.testing.assert_array_equal(a["lr"], b["lr"])
        np.testing.assert_array_equal(a["hr"], b["hr"])
    assert any((a["lr"] != b["lr"]).any() for a, b in zip(whole, run(1, 0, 7), strict=True))


def test_every_epoch_visits_every_record():
    records = [{"lr": np.full((4, 4, 3), i, np.uint8)} for i in range(6)]
    records = [record | {"hr": record["lr"].repeat(2, 0).repeat(2, 1)} for record in records]
    config = DataConfig(lr_crop=4, batch_size=3)
    got = [
        b["lr"][:, 0, 0, 0] for b in data.batches(records, config, scale=2, seed=0, start=0, stop=4)
    ]
    epochs = np.concatenate(got).reshape(2, 6)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), [range(6)] * 2)


def test_pictures_are_prepared_once_and_held_out(photos, tmp_path, monkeypatch):
    config = DataConfig(hr_dirs=(photos,), data_dir=tmp_path / "data", val_images=2, lr_crop=8)
    records = data.load_records(config, 4)
    names = {
        split: {records_of[i]["name"].decode() for i in range(len(records_of))}
        for split, records_of in records._asdict().items()
    }
    assert len(names["val"]) == len(records.val) == 2
    assert len(names["train"]) == 4
    assert not names["val"] & names["train"]
    record = records.train[0]
    source = images.read_rgb(record["name"].decode())
    side = min(source.shape[0], 320)
    np.testing.assert_array_equal(record["hr"][: side // 4 * 4, :48], source[: side // 4 * 4, :48])

    def fail(path):
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(images, "read_rgb", fail)
    again = data.load_records(config, 4)
    np.testing.assert_array_equal(again.train[0]["lr"], record["lr"])
    with pytest.raises(AssertionError, match="read again"):  # another scale is another data set
        data.load_records(config, 2)


def test_unreadable_picture_is_named_and_leaves_nothing(photos, tmp_path):
    bad = photos / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    config = DataConfig(hr_dirs=(photos,), data_dir=tmp_path / "data", val_images=1, lr_crop=8)
    with pytest.raises(UserError, match=re.escape(str(bad))):
        data.load_records(config, 4)
    assert list((tmp_path / "data").glob("*/*")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_images": 6}, "hold 6 pictures, of which data.val_images = 6"),
        ({"val_images": 0}, "val_images is 0, expected at least 1"),
        ({"lr_crop": 81}, "lr_crop is 81, at most 80"),
        ({"hr_dirs": ("missing",)}, "missing: no such folder"),
    ],
)
def test_unusable_settings_are_named(photos, tmp_path, change, message):
    from pathlib import Path

    change = {k: tuple(map(Path, v)) if k == "hr_dirs" else v for k, v in change.items()}
    config = {"hr_dirs": (photos,), "data_dir": tmp_path, "lr_crop": 8} | change
    with pytest.raises(UserError, match=message):
        data.load_records(DataConfig(**config), 4)


def test_without_folders_and_download_it_says_what_to_pass(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", no_network)
    with pytest.raises(UserError, match=r"no network.*--data\.hr-dirs"):
        data.load_records(DataConfig(data_dir=tmp_path), 4)


def test_div2k_goes_through_the_same_preparation(tmp_path, monkeypatch):
    """With a stand-in for TFDS's builder, which downloads: its LR files are used."""
    lr, hr = aligned_pair(90, 80, 4)

    class Builder:
        version = "2.0.0"

        def download_and_prepare(self):
            pass

        def as_data_source(self, split):
            return [{"lr": lr, "hr": hr}] * {"train": 3, "validation": 5}[split]

    def builder(name, **kwargs):
        assert name == "div2k/bicubic_x4"
        return Builder()

    monkeypatch.setattr(tfds, "builder", builder)
    records = data.load_records(DataConfig(data_dir=tmp_path, val_images=2), 4)
    assert len(records.train) == 3 * 2
    assert len(records.val) == 2
    np.testing.assert_array_equal(records.train[0]["lr"], lr[:80])
