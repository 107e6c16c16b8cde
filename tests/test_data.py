"""Crops are aligned, batches are a function of seed and step, pictures are prepared once."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from dvmsr_jax import data, files, images
from dvmsr_jax.config import DataConfig
from dvmsr_jax.data import prepare
from dvmsr_jax.data.check import find_problems
from dvmsr_jax.data.records import ShardWriter, open_records, open_shard, sub_images
from dvmsr_jax.data.sources import find_sources
from dvmsr_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def aligned_pair(height, width, scale):
    """An LR picture of distinct pixels, and an HR picture that repeats each scale x scale times."""
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


def aligned_records(count, side, scale):
    """Records of equal sizes and different pixels."""
    lr, hr = aligned_pair(side, side, scale)
    return [{"lr": np.roll(lr, i, 0), "hr": np.roll(hr, scale * i, 0)} for i in range(count)]


def test_data_does_not_import_the_network():
    program = "import sys, dvmsr_jax.data; print(*sys.modules)"
    imported = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert "dvmsr_jax.data" in imported
    above = ("model", "vimm", "inference", "pretrained", "checkpoint", "training")
    assert not {f"dvmsr_jax.{name}" for name in above} & set(imported)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_crops_are_aligned(scale):
    records = aligned_records(2, 20, scale)
    config = DataConfig(lr_crop=8, batch_size=100)
    (batch,) = data.batches(records, config, scale=scale, seed=1, start=0, stop=1)
    assert batch["lr"].shape == (100, 8, 8, 3)
    assert batch["hr"].shape == (100, 8 * scale, 8 * scale, 3)
    np.testing.assert_array_equal(batch["hr"][:, ::scale, ::scale], batch["lr"])
    assert len({lr.tobytes() for lr in batch["lr"]}) > 80  # of the 2 x 13 x 13 x 8 there are


def test_crops_come_in_all_eight_orientations():
    records = aligned_records(1, 8, 4)
    config = DataConfig(lr_crop=8, batch_size=200)
    (batch,) = data.batches(records, config, scale=4, seed=0, start=0, stop=1)
    turned = [np.rot90(records[0]["lr"], turns) for turns in range(4)]
    assert {lr.tobytes() for lr in batch["lr"]} == {
        x.tobytes() for t in turned for x in (t, t[:, ::-1])
    }


@pytest.mark.parametrize("with_targets", [False, True])
def test_device_cuts_the_same_batches(with_targets):
    records = aligned_records(5, 13, 4)
    targets = [255 - record["hr"] for record in records] if with_targets else None
    config = DataConfig(lr_crop=6, batch_size=32)
    span = {"seed": 3, "start": 1, "stop": 3}
    host, device = (
        data.make_feed(records, dataclasses.replace(config, cache=cache), scale=4, targets=targets)
        for cache in ("none", "device")
    )
    assert host.load_cache() == {}
    cache = jax.device_put(device.load_cache())
    assert cache.keys() == ({"lr", "hr", "target"} if with_targets else {"lr", "hr"})
    cut = jax.jit(device.crops)
    symmetries = set()
    for batch, plan in zip(host.inputs(**span), device.inputs(**span), strict=True):
        assert host.crops({}, batch) is batch
        result = cut(cache, plan)
        assert result.keys() == batch.keys()
        for name in batch:
            np.testing.assert_array_equal(result[name], batch[name])
        symmetries |= set(plan["symmetry"].tolist())
    assert symmetries == set(range(8))
    if with_targets:
        np.testing.assert_array_equal(batch["target"], 255 - batch["hr"])


@pytest.mark.parametrize("parts", [2, 3])
def test_processes_share_the_same_batches(parts):
    """Each reads only its own records."""

    class Spy(dict):
        def __getitem__(self, name):
            if name == "hr":
                read.append(self["index"])
            return super().__getitem__(name)

    records = [Spy(r, index=i) for i, r in enumerate(aligned_records(5, 13, 4))]
    config = DataConfig(lr_crop=6, batch_size=6)

    def run(shard):
        span = {"seed": 3, "start": 2, "stop": 3, "shard": shard}
        (plan,) = data.plans(records, config, **span)
        read.clear()
        (batch,) = data.batches(records, config, scale=4, **span)
        assert read == plan["index"].tolist()
        return plan | batch

    read = []
    whole, shares = run((0, 1)), [run((i, parts)) for i in range(parts)]
    for name, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), values)


@pytest.mark.parametrize(("height", "width"), [(80, 80), (81, 200), (30, 90), (7, 5)])
def test_sub_images_cover_the_picture(height, width):
    lr, hr = aligned_pair(height, width, 4)
    squares = list(sub_images(lr, hr, 320, 4))
    for lr_square, hr_square in squares:
        assert lr_square.shape == (80, 80, 3)
        np.testing.assert_array_equal(hr_square[::4, ::4], lr_square)
    pixels = {tuple(p) for square, _ in squares for p in square.reshape(-1, 3)}
    assert pixels == {tuple(p) for p in lr.reshape(-1, 3)}


def test_batches_are_a_function_of_seed_and_step():
    records = aligned_records(5, 20, 2)
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


def test_every_epoch_visits_every_record_in_a_new_order():
    records = [{"lr": np.full((4, 4, 3), i, np.uint8)} for i in range(12)]
    records = [record | {"hr": record["lr"].repeat(2, 0).repeat(2, 1)} for record in records]
    config = DataConfig(lr_crop=4, batch_size=3)
    got = [
        b["lr"][:, 0, 0, 0]
        for b in data.batches(records, config, scale=2, seed=0, start=0, stop=12)
    ]
    epochs = np.concatenate(got).reshape(3, 12)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), [range(12)] * 3)
    assert len({tuple(order) for order in [*epochs.tolist(), range(12)]}) == 4


def plan_of(records, config, seed=0, batches=1):
    """The plans of the first batches, one after the other."""
    plans = list(data.plans(records, config, seed=seed, start=0, stop=batches))
    return {name: np.concatenate([plan[name] for plan in plans]) for name in plans[0]}


def test_order_and_crops_depend_on_the_seed():
    records = aligned_records(20, 20, 2)
    config = DataConfig(lr_crop=8, batch_size=20)
    first, again, other = (plan_of(records, config, seed) for seed in (0, 0, 1))
    for name in ("index", "top", "left", "symmetry"):
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).any(), name


def test_crops_differ_from_step_to_step():
    records = aligned_records(20, 20, 2)
    plan = plan_of(records, DataConfig(lr_crop=8, batch_size=20), batches=2)
    for name in ("index", "top", "left", "symmetry"):
        assert (plan[name][:20] != plan[name][20:]).any(), name


@pytest.mark.parametrize("crop", [12, 13])
def test_crops_reach_every_border(crop):
    """All offsets at which a crop fits occur, including the last row and column."""
    plan = plan_of(aligned_records(2, 13, 2), DataConfig(lr_crop=crop, batch_size=200))
    for name in ("top", "left"):
        assert set(plan[name].tolist()) == set(range(13 - crop + 1))


def test_validation_pictures_are_spread_over_the_folders(tmp_path):
    for i in range(9):
        picture = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        images.write_png(tmp_path / f"{i}.png", picture)
    splits = find_sources(DataConfig(hr_dirs=(tmp_path,), val_images=3))
    names = {split: [Path(source.name).stem for source in splits[split]] for split in splits}
    assert names == {"val": ["0", "4", "8"], "train": ["1", "2", "3", "5", "6", "7"]}


def test_pictures_are_prepared_once_and_held_out(photos, tmp_path, monkeypatch):
    config = DataConfig(hr_dirs=(photos,), data_dir=tmp_path / "data", val_images=2, lr_crop=8)
    records = data.load_records(config, 4)
    names = {
        split: {record["name"].decode() for record in getattr(records, split)}
        for split in ("train", "val")
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
    with pytest.raises(AssertionError, match="read again"):  # another scale is another dataset
        data.load_records(config, 2)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("cut_at", [0, 3, 5])
def test_preparation_resumes_where_it_was_interrupted(photos, tmp_path, monkeypatch, cut_at, locks):
    """The records depend neither on the interruption nor on the number of cores."""
    monkeypatch.setattr(prepare, "PICTURES_PER_SHARD", 2)
    pictures = find_sources(DataConfig(hr_dirs=(photos,), val_images=2))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: 3)
        prepare.prepare(pictures, 4, whole)

    read_rgb, read = images.read_rgb, []

    def interrupted(path):
        if len(read) == cut_at:
            raise KeyboardInterrupt
        read.append(path)
        return read_rgb(path)

    with monkeypatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: 1)
        patch.setattr(images, "read_rgb", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(pictures, 4, cut)
        assert not cut.exists()
        (
            tmp_path / ".incomplete-cut" / "sr_sub_images-val.array_record-00000-of-00001.json"
        ).write_text("{}")
        finished = len(read) // 2 * 2
        cut_at, read = None, []
        prepare.prepare(pictures, 4, cut)
        assert len(read) == 6 - finished
        read = []
        prepare.prepare(pictures, 4, cut)  # done: nothing happens
        assert read == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "photos", "whole"]
    assert files_of(cut) == files_of(whole)


def test_two_threads_prepare_once(photos, tmp_path, monkeypatch, locks):
    pictures = find_sources(DataConfig(hr_dirs=(photos,), val_images=1))
    read_rgb, read, waiting = images.read_rgb, [], threading.Event()
    monkeypatch.setattr("builtins.print", lambda *words, **_: waiting.set())

    def slow(path):
        assert waiting.wait(60)
        read.append(path)
        return read_rgb(path)

    monkeypatch.setattr(images, "read_rgb", slow)
    with ThreadPoolExecutor(2) as pool:
        for future in [
            pool.submit(prepare.prepare, pictures, 4, tmp_path / "out") for _ in range(2)
        ]:
            future.result()
    assert len(read) == 6
    assert find_problems(tmp_path / "out") == []
    assert not list(tmp_path.glob(".incomplete*"))


PREPARING = r"""
import errno, fcntl, sys
from pathlib import Path

def flock(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")

fcntl.flock = flock
from dvmsr_jax import images
from dvmsr_jax.config import DataConfig
from dvmsr_jax import files
from dvmsr_jax.data import prepare
from dvmsr_jax.data.sources import find_sources

read_rgb, folder = images.read_rgb, Path(sys.argv[1])

def slow(path):
    print("read\n", end="", flush=True)
    sys.stdin.readline()
    return read_rgb(path)

images.read_rgb, files._POLL = slow, 0.01
pictures = find_sources(DataConfig(hr_dirs=(folder / "photos",), val_images=1))
prepare.prepare(pictures, 4, folder / "out")
"""


def preparing(folder):
    """A process without locks, which prints "read" for each picture and waits for a line.

    Its messages come with its output, and it shows no progress.
    """
    return subprocess.Popen(
        [sys.executable, "-c", PREPARING, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"TQDM_DISABLE": "1"},
        text=True,
    )


def test_two_processes_without_locks_prepare_once(photos, tmp_path):
    with preparing(tmp_path) as first, preparing(tmp_path) as second:
        lines = {process: process.stdout.readline() for process in (first, second)}
        assert any(line == "read\n" for line in lines.values())
        (waits,) = [process for process, line in lines.items() if line.startswith("waiting for")]
        works = first if waits is second else second
        works.stdin.write("\n" * 6)
        works.stdin.close()
        assert works.stdout.read() == "read\n" * 5
        assert waits.stdout.read() == ""
    assert first.returncode == second.returncode == 0
    assert find_problems(tmp_path / "out") == []
    assert not list(tmp_path.glob(".incomplete*"))


def test_without_locks_a_killed_process_is_named_and_its_work_kept(
    photos, tmp_path, monkeypatch, no_locks
):
    with preparing(tmp_path) as killed:
        assert killed.stdout.readline() == "read\n"
        killed.kill()
    monkeypatch.setattr(files, "_PATIENCE", 0.1)
    pictures = find_sources(DataConfig(hr_dirs=(photos,), val_images=1))
    lock = tmp_path / ".incomplete-out.lock"
    with pytest.raises(UserError, match=f"{lock}: .* has not touched it for .* remove"):
        prepare.prepare(pictures, 4, tmp_path / "out")
    lock.unlink()
    prepare.prepare(pictures, 4, tmp_path / "out")
    assert find_problems(tmp_path / "out") == []


def test_few_unreadable_pictures_are_left_out(photos, tmp_path, capsys):
    bad = photos / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    config = DataConfig(hr_dirs=(photos,), data_dir=tmp_path / "data", val_images=1, lr_crop=8)
    with pytest.raises(
        UserError, match=rf"1 of 7 pictures \(14\.3%\) .*max-unreadable .*\n  {re.escape(str(bad))}"
    ):
        data.load_records(config, 4)
    (unfinished,) = (tmp_path / "data").glob("*/*")
    assert unfinished.name.startswith(".incomplete-")

    records = data.load_records(dataclasses.replace(config, max_unreadable=0.2), 4)
    assert f"left out: {bad}" in capsys.readouterr().out
    assert len(records.train) == 5
    assert not unfinished.exists()


def test_repaired_pictures_are_read_again(photos, tmp_path):
    """Even if their names, sizes and middles are unchanged."""
    pictures = find_sources(DataConfig(hr_dirs=(photos,), val_images=1))
    path = photos / "3.png"
    content = path.read_bytes()
    path.write_bytes(b"overwrit" + content[8:])
    with pytest.raises(UserError, match=rf"Fix or remove.*\n  {path}"):
        prepare.prepare(pictures, 4, tmp_path / "out")
    path.write_bytes(content)
    prepare.prepare(pictures, 4, tmp_path / "out")
    assert len(open_records(tmp_path / "out").train) == 5


def test_another_set_leaves_an_interrupted_one_alone(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PICTURES_PER_SHARD", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    read_rgb, read = images.read_rgb, []

    def interrupted(path):
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(path)
        return read_rgb(path)

    config = DataConfig(hr_dirs=(photos,), data_dir=tmp_path / "data", val_images=1, lr_crop=8)
    monkeypatch.setattr(images, "read_rgb", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load_records(config, 4)
    monkeypatch.setattr(images, "read_rgb", read_rgb)
    data.load_records(dataclasses.replace(config, hr_dirs=(photos / "more",)), 4)
    monkeypatch.setattr(images, "read_rgb", lambda path: read.append(path) or read_rgb(path))
    data.load_records(config, 4)
    assert len(read) == len(set(read)) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_images": 6}, "contain 6 pictures, of which data.val_images = 6"),
        ({"val_images": 0}, "--data.val-images is 0, not a whole number from 1 up"),
        ({"lr_crop": 81}, "lr_crop is 81, at most 80"),
        ({"hr_dirs": ("missing",)}, "missing: no such folder"),
    ],
)
def test_unusable_settings_are_named(photos, tmp_path, change, message):
    change = {k: tuple(map(Path, v)) if k == "hr_dirs" else v for k, v in change.items()}
    config = {"hr_dirs": (photos,), "data_dir": tmp_path, "lr_crop": 8} | change
    with pytest.raises(UserError, match=message):
        data.load_records(DataConfig(**config), 4)


def test_records_are_a_tfds_dataset(photos, tmp_path):
    """TFDS reads the same as our own reader."""
    prepare.prepare(find_sources(DataConfig(hr_dirs=(photos,), val_images=2)), 4, tmp_path / "r")
    records = data.load_records(DataConfig(prepared=tmp_path / "r"), 4)
    source = tfds.builder_from_directory(tmp_path / "r").as_data_source("train")
    assert len(source) == len(records.train)
    for ours, theirs in zip(records.train, source, strict=True):
        assert list(ours) == ["hr", "lr", "name"]  # the same in every process, for equal bytes
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_an_explicit_folder(photos, tmp_path):
    folder = tmp_path / "prepared"
    config = DataConfig(prepared=folder)
    with pytest.raises(UserError, match=rf"prepare --hr-dirs DIR .* --out {folder}"):
        data.load_records(config, 4)
    pictures = find_sources(DataConfig(hr_dirs=(photos,), val_images=1))
    prepare.prepare(pictures, 4, folder)
    assert len(data.load_records(config, 4).train) == 5
    with pytest.raises(UserError, match="was prepared for x4, but the model is for x2"):
        data.load_records(config, 2)
    with pytest.raises(UserError, match=r"data\.prepared and data\.hr_dirs exclude each other"):
        data.load_records(DataConfig(prepared=folder, hr_dirs=(photos,)), 4)
    with pytest.raises(UserError, match="prepared: holds records of other pictures"):
        prepare.prepare({"train": pictures["train"][1:], "val": pictures["val"]}, 4, folder)
    with pytest.raises(UserError, match="photos: is a file, or contains something else"):
        prepare.prepare(pictures, 4, photos)
    assert len(images.find_images(photos)) == 6


def test_moved_and_copied_pictures_are_the_same(photos, tmp_path):
    """A changed picture is a different one, even of equal size and time."""
    config = DataConfig(hr_dirs=(photos,), data_dir=tmp_path / "data", val_images=1)
    before = data.load_records(config, 4).folder
    moved = dataclasses.replace(config, hr_dirs=(photos.rename(tmp_path / "moved"),))
    path = tmp_path / "moved" / "3.png"
    os.utime(path, (0, 0))
    assert data.load_records(moved, 4).folder == before
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    moved = dataclasses.replace(moved, max_unreadable=0.9)  # if it cannot be read any more
    assert data.load_records(moved, 4).folder != before


def test_identity_does_not_depend_on_the_location(photos, tmp_path, monkeypatch):
    def identity(folder, name, *, scale=4, val_images=1):
        splits = find_sources(DataConfig(hr_dirs=(folder,), val_images=val_images))
        prepare.prepare(splits, scale, tmp_path / name, max_unreadable=0.2)
        return data.identity(tmp_path / name)

    first = identity(photos, "first")
    assert re.fullmatch("[0-9a-f]{12}", first)
    copied = shutil.copytree(photos, tmp_path / "copied")
    assert identity(copied, "again") == first
    assert data.identity((tmp_path / "first").rename(tmp_path / "moved")) == first

    others = [identity(photos, "two", val_images=2), identity(photos, "x2", scale=2)]
    (copied / "5.png").unlink()
    others.append(identity(copied, "fewer"))

    read_rgb, unreadable = images.read_rgb, None

    def read(path):
        if path.name == unreadable:
            raise images.ImageError(f"{path}: cannot be read")
        return read_rgb(path)

    monkeypatch.setattr(images, "read_rgb", read)
    for unreadable in ("3.png", "4.png"):
        others.append(identity(photos, unreadable))
    assert len({first, *others}) == 6


def test_changes_of_pictures_are_described(photos, tmp_path):
    config = DataConfig(hr_dirs=(photos,), data_dir=tmp_path / "data", val_images=1, lr_crop=8)
    first = data.load_records(config, 4).folder
    before = data.identity(first)

    def change(**options):
        folder = data.load_records(dataclasses.replace(config, **options), 4).folder
        assert folder != first
        return data.describe_change(folder, before)

    content = (photos / "3.png").read_bytes()
    picture = images.read_rgb(photos / "3.png")
    images.write_png(photos / "3.png", 255 - picture)
    assert change() == "pictures: the same names and sizes, with other contents"
    images.write_png(photos / "3.png", picture[:32])
    assert change() == "pictures: 1 of other sizes"
    (photos / "3.png").write_bytes(content)
    assert change(val_images=2) == "pictures: 1 moved between training and validation"
    for i, added in enumerate(("3a", "3b")):
        images.write_png(photos / f"{added}.png", picture + np.uint8(1 + i))
    (photos / "4.png").unlink()
    assert change() == "pictures: 2 added, 1 removed"
    changed = data.load_records(config, 4).folder
    shutil.rmtree(first)
    assert data.describe_change(changed, before).startswith("7 pictures now; the earlier folder")


def test_superseded_folders_are_named(photos, tmp_path, capsys):
    """Only those with the same settings, and nothing is deleted."""
    config = DataConfig(hr_dirs=(photos,), data_dir=tmp_path / "data", val_images=1, lr_crop=8)
    first = data.load_records(config, 4).folder
    data.load_records(dataclasses.replace(config, val_images=2), 4)
    data.load_records(dataclasses.replace(config, hr_dirs=(photos / "more",)), 4)
    data.load_records(config, 2)
    assert capsys.readouterr().out == ""
    (photos / "3.png").unlink()
    for _ in range(2):  # the second time, nothing is left to prepare
        data.load_records(config, 4)
        (line,) = capsys.readouterr().out.splitlines()
        assert re.search(rf"0\.0 GB, which you may delete .*: {first}$", line)
    assert len(open_records(first).train) == 5


@pytest.fixture
def prepared(photos, tmp_path):
    """A folder with a file of three pictures and one of two, and a picture for validation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "PICTURES_PER_SHARD", 3)
        pictures = find_sources(DataConfig(hr_dirs=(photos,), val_images=1))
        prepare.prepare(pictures, 4, tmp_path / "prepared")
    return tmp_path / "prepared"


def test_check_accepts_good_records(prepared):
    assert find_problems(prepared) == []


@pytest.mark.parametrize("file", ["train.array_record-00001-of-00002", "val.array_record-00000"])
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "checksum"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"lr", b"rl")), "checksum"),
    ],
)
def test_check_finds_damaged_files(prepared, file, damage, problem):
    (path,) = prepared.glob(f"*{file}*")
    damage(path)
    (found,) = find_problems(prepared)
    assert re.search(rf"{path.name}: .*{problem}", found)


@pytest.mark.parametrize("file", ["train.array_record-00001-of-00002", "val.array_record-00000"])
def test_damaged_files_are_named_when_used(prepared, file):
    (path,) = prepared.glob(f"*{file}*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    records = open_records(prepared)
    with pytest.raises(UserError, match=rf"{path}: cannot be read .*\n.*data check {prepared}"):
        list(itertools.chain(records.train, records.val))
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{path}: has {len(content) - 1} bytes, not"):
        open_records(prepared)
    path.unlink()
    with pytest.raises(UserError, match=rf"{path}: is missing"):
        open_records(prepared)


SHARD = {"key": "", "split": "train", "records": 0, "bytes": 0, "sha256": "", "left_out": []}


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "nothing",
        '{"scale": 4, "shards": []}',
        '{"scale": 4, "shards": {"a": null}}',
        '{"scale": "4", "shards": {}}',
        json.dumps({"scale": 4, "shards": {"a": SHARD | {"pictures": [{"name": "a.png"}]}}}),
        "[" * 100_000,
    ],
)
def test_another_preparation_file_is_refused(tmp_path, text):
    (tmp_path / "preparation.json").write_text(text)
    for use in (find_problems, data.identity, open_records):
        with pytest.raises(UserError, match="holds no prepared records"):
            use(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda pairs: [(np.roll(lr, 1, 1), hr, n) for lr, hr, n in pairs],
            "LR is not its downscaled HR",
        ),
        (lambda pairs: pairs[:-1], "holds 2 records, 3 were written"),
        (lambda pairs: [*pairs, pairs[0]], "holds 4 records, 3 were written"),
        (lambda pairs: [pairs[1], pairs[0], pairs[2]], "record [01] is of .*, not of"),
    ],
)
def test_check_finds_wrong_records(prepared, change, problem):
    """Even if their checksum is right."""
    (path,) = prepared.glob("*train.array_record-00000*")
    pairs = [(record["lr"], record["hr"], record["name"].decode()) for record in open_shard(path)]
    writer = ShardWriter(path)
    for pair in change(pairs):
        writer.write(*pair)
    writer.close()
    preparation = json.loads((prepared / "preparation.json").read_text())
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    preparation["shards"][path.name]["sha256"] = checksum
    (prepared / "preparation.json").write_text(json.dumps(preparation))
    found = find_problems(prepared)
    assert found
    assert all(re.search(problem, line) for line in found)
