"""DIV2K and Flickr2K from a local server: small archives of the same layout, and the real code."""

import dataclasses
import hashlib
import io
import itertools
import os
import tarfile
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image

from dvmsr_jax import bicubic, data, downloads
from dvmsr_jax.commands.data import prepare as prepare_command
from dvmsr_jax.config import DataConfig
from dvmsr_jax.data import download
from dvmsr_jax.data.sources import find_sources
from dvmsr_jax.errors import StoppedError, UserError
from tests.file_server import serving

NAMES = ("DIV2K_train_HR.zip", "DIV2K_valid_HR.zip", "Flickr2K.tar")


def png(seed):
    """A picture that PNG cannot compress: 120 kB."""
    pixels = np.random.default_rng(seed).integers(0, 256, (200, 200, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def make_zip(folder, seeds):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{folder}/", b"")
        for seed in seeds:
            archive.writestr(f"{folder}/{seed:04}.png", png(seed))
    return file.getvalue()


def make_tar(seeds):
    """Like Flickr2K's, with low-resolution pictures, and with traps."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:

        def add(name, content=b"", **fields):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in fields.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(content))

        add("Flickr2K", type=tarfile.DIRTYPE)
        for seed in seeds:
            add(f"Flickr2K/Flickr2K_HR/{seed:06}.png", png(seed))
            add(f"Flickr2K/Flickr2K_LR_bicubic/X4/{seed:06}x4.png", b"small")
        add("../outside.png", png(0))
        add("/tmp/outside.png", png(0))
        add("Flickr2K/Flickr2K_HR/../../outside.png", png(0))
        add("Flickr2K/Flickr2K_HR/._000001.png", b"metadata")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            add("Flickr2K/Flickr2K_HR/link.png", type=kind, linkname="/etc/hostname")
    return file.getvalue()


@pytest.fixture(scope="session")
def contents():
    """The archives on the server."""
    archives = (
        make_zip("DIV2K_train_HR", range(1, 6)),
        make_zip("DIV2K_valid_HR", range(801, 804)),
        make_tar(range(11, 14)),
    )
    return dict(zip(NAMES, archives, strict=True))


@pytest.fixture
def server(contents, monkeypatch):
    """A server that has the archives, which `download` uses in place of the public ones."""
    sizes = {"DIV2K_train_HR.zip": 5, "DIV2K_valid_HR.zip": 3, "Flickr2K.tar": 3}

    def local(archive):
        remote = archive.remote
        content = contents[remote.name]
        if remote.sha256 is not None:
            checksum = hashlib.sha256(content).hexdigest()
            remote = remote._replace(size=len(content), sha256=checksum)
        return archive._replace(remote=remote, pictures=sizes[remote.name])

    datasets = {
        name: {split: tuple(map(local, archives)) for split, archives in splits.items()}
        for name, splits in download.DATASETS.items()
    }
    monkeypatch.setattr(download, "DATASETS", datasets)
    monkeypatch.setattr(downloads, "_WAITS", (0, 0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(contents) as server:
        monkeypatch.setenv(downloads.MIRROR, f"{server.url}/")
        yield server


@pytest.fixture
def config(tmp_path):
    return DataConfig(data_dir=tmp_path / "data", val_images=2, lr_crop=8)


@pytest.fixture
def folder(config):
    """The folder that archives are downloaded to, created so that files can be put there."""
    path = config.data_dir / "pictures"
    path.mkdir(parents=True)
    return path


def names(records):
    return {os.path.basename(record["name"].decode()) for record in records}


def test_published_archives():
    """DIV2K's sizes and checksums are those that TFDS ships."""
    lines = files("tensorflow_datasets.datasets.div2k").joinpath("checksums.tsv").read_text()
    published = {url: rest for url, *rest in (line.split("\t") for line in lines.splitlines())}
    for archive in (download._DIV2K_TRAIN, download._DIV2K_VALID):
        remote = archive.remote
        assert [str(remote.size), remote.sha256] == published[remote.url][:2]


def test_div2k_is_the_default(server, config, folder):
    records = data.load_records(config, 4)
    assert names(records.train) == {f"000{i}.png" for i in range(1, 6)}
    assert names(records.val) == {"0801.png", "0802.png"}
    record = records.train[0]
    hr = np.asarray(Image.open(io.BytesIO(png(1))))
    np.testing.assert_array_equal(record["hr"][:200, :200], hr)
    np.testing.assert_array_equal(record["lr"][:50, :50], bicubic.downscale(hr, 4))
    assert server.asked == [("DIV2K_train_HR.zip", None), ("DIV2K_valid_HR.zip", None)]
    left = {path.name for path in folder.iterdir()}
    assert left == {"DIV2K_train_HR", "DIV2K_valid_HR"}

    server.status = 503  # not asked again
    assert data.load_records(config, 4).folder == records.folder
    assert len(server.asked) == 2


def test_df2k_takes_only_high_resolution_pictures(server, config, folder, contents, capsys):
    config = dataclasses.replace(config, dataset="df2k")
    records = data.load_records(config, 4)
    expected = {f"000{i}.png" for i in range(1, 6)} | {f"0000{i}.png" for i in range(11, 14)}
    assert names(records.train) == expected
    assert names(records.val) == {"0801.png", "0802.png"}
    assert not list(folder.parent.parent.rglob("outside.png"))
    assert {path.name for path in (folder / "Flickr2K_HR").iterdir()} == {
        f"0000{i}.png" for i in range(11, 14)
    }
    digest = hashlib.sha256(contents["Flickr2K.tar"]).hexdigest()
    assert (folder / "SHA256SUMS").read_text() == f"{digest}  Flickr2K.tar\n"
    assert f"no checksum is published; its SHA-256 is {digest}" in capsys.readouterr().err


def test_a_validation_picture_is_not_trained_on(server, config, capsys):
    """Pictures of Flickr2K that are also in DIV2K, under other names."""
    server.contents["Flickr2K.tar"] = make_tar([1, 801, 13])
    records = data.load_records(dataclasses.replace(config, dataset="df2k"), 4)
    assert names(records.train) == {f"000{i}.png" for i in range(1, 6)} | {"000013.png"}
    assert names(records.val) == {"0801.png", "0802.png"}
    assert "dropped 2 of 10 pictures" in capsys.readouterr().out


def test_the_prepare_command_downloads(server, config, tmp_path, capsys):
    prepare_command(tmp_path / "out", dataset="df2k", val_images=1, data_dir=config.data_dir)
    records = data.load_records(DataConfig(prepared=tmp_path / "out"), 4)
    assert (len(records.train), len(records.val)) == (8, 1)
    assert "9 pictures" in capsys.readouterr().out


@pytest.mark.parametrize("ranges", [True, False])
def test_a_breaking_connection_is_resumed(server, config, ranges):
    server.ranges, server.cut_after = ranges, 200_000 if ranges else 400_000
    if ranges:
        assert len(data.load_records(config, 4).train) == 5
        asked = [first for name, first in server.asked if name == "DIV2K_train_HR.zip"]
        assert len(asked) > 3
        assert asked[0] is None
        assert asked[1:] == sorted(set(asked[1:]))
        assert all(0 < b - a <= 200_000 for a, b in itertools.pairwise(asked[1:]))
        return
    with pytest.raises(UserError, match=r"the connection was lost; .* bytes are kept in"):
        data.load_records(config, 4)  # it never gets further
    server.cut_after = None
    assert len(data.load_records(config, 4).train) == 5


def test_answers_of_unknown_length(server, config, folder):
    """Only the size of the archive shows whether they are complete."""
    server.lengths, server.cut_after = False, 200_000
    assert len(data.load_records(config, 4).train) == 5
    asked = [first for name, first in server.asked if name == "DIV2K_train_HR.zip"]
    assert asked == [None, 200_000, 400_000, 600_000]


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_download_is_resumed_in_another_run(
    server, config, folder, contents, name, monkeypatch
):
    config = dataclasses.replace(config, dataset="df2k")
    content, partial = contents[name], folder / f"{name}.partial"
    for have in (1000, len(content)):
        partial.write_bytes(content[:have])
        server.asked.clear()
        assert len(find_sources(config)["train"]) == 8
        complete_and_known = have == len(content) and name != "Flickr2K.tar"
        requests = [first for asked, first in server.asked if asked == name]
        assert requests == ([] if complete_and_known else [have])
        assert not partial.exists()
        for path in (folder / "DIV2K_train_HR", folder / "DIV2K_valid_HR", folder / "Flickr2K_HR"):
            path.rename(folder / f"{path.name}-{have}")


def test_ctrl_c_keeps_what_was_downloaded(server, config, folder, monkeypatch):
    update, received = downloads.tqdm.update, []

    def interrupt(self, n=1):
        received.append(n)
        if len(received) == 3:
            raise KeyboardInterrupt
        return update(self, n)

    with monkeypatch.context() as patch:
        patch.setattr(downloads.tqdm, "update", interrupt)
        with pytest.raises(
            StoppedError,
            match=r"files are kept; run the same command again, .* by hand to .*HR\.zip",
        ):
            data.load_records(config, 4)
    have = (folder / "DIV2K_train_HR.zip.partial").stat().st_size
    assert have == sum(received)
    data.load_records(config, 4)
    assert server.asked[1] == ("DIV2K_train_HR.zip", have)


def test_interrupted_unpacking_is_resumed(server, config, folder, monkeypatch):
    copyfileobj, copied = download.shutil.copyfileobj, []

    def interrupt(source, target):
        copied.append(source)
        if len(copied) == 3:
            raise KeyboardInterrupt
        copyfileobj(source, target)

    monkeypatch.setattr(download.shutil, "copyfileobj", interrupt)
    with pytest.raises(StoppedError):
        data.load_records(config, 4)
    assert not (folder / "DIV2K_train_HR").exists()
    assert len(data.load_records(config, 4).train) == 5
    assert (
        len(copied) == 3 + 3 + 3
    )  # three of five were missing, and there are three for validation
    assert [name for name, _ in server.asked].count("DIV2K_train_HR.zip") == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by_hand", [False, True])
def test_damaged_archives_are_named(server, config, folder, contents, name, by_hand):
    """With a checksum, any damage is found; in Flickr2K's archive, missing pictures."""
    config = dataclasses.replace(config, dataset="df2k")
    damaged = bytearray(contents[name])
    if name == "Flickr2K.tar":
        damaged[:] = damaged[: len(damaged) // 2]
    else:
        damaged[len(damaged) // 2] ^= 1
    if by_hand:
        (folder / name).write_bytes(damaged)
    else:
        server.contents[name] = bytes(damaged)
    problem = "cannot be unpacked|holds . pictures" if name == "Flickr2K.tar" else "its SHA-256 is"
    remedy = "replace or remove the file" if by_hand else "the download was removed; run the same"
    with pytest.raises(UserError, match=f"{name}.*: ({problem}).*; {remedy}") as caught:
        data.load_records(config, 4)
    assert "\n" not in str(caught.value)
    assert (folder / name).exists() == by_hand
    assert not (folder / f"{name}.partial").exists()
    server.contents[name] = contents[name]
    (folder / name).unlink(missing_ok=True)
    assert len(data.load_records(config, 4).train) == 8


def test_a_download_that_is_too_large_is_started_again(server, config, folder, contents):
    config = dataclasses.replace(config, dataset="df2k")
    for name in NAMES:
        (folder / f"{name}.partial").write_bytes(contents[name] + b"more")
    for left in (2, 1, 0):
        with pytest.raises(UserError, match=r"partial: has [\d,]+ bytes, .*; the download was rem"):
            data.load_records(config, 4)
        assert len(list(folder.glob("*.partial"))) == left
    assert len(data.load_records(config, 4).train) == 8


def test_a_truncated_file_on_the_server(server, config, contents):
    server.contents["DIV2K_train_HR.zip"] = contents["DIV2K_train_HR.zip"][:-1000]
    size = len(contents["DIV2K_train_HR.zip"])
    with pytest.raises(UserError, match=f"HR.zip: has {size - 1000:,} bytes, expected {size:,}; "):
        data.load_records(config, 4)


def test_an_archive_put_there_by_hand_is_used_and_kept(server, config, folder, contents):
    for name in NAMES:
        (folder / name).write_bytes(contents[name])
    assert len(data.load_records(dataclasses.replace(config, dataset="df2k"), 4).train) == 8
    assert server.asked == []
    assert {path.name for path in folder.iterdir()} >= set(NAMES)


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (403, 1), (503, 3), (429, 3)])
def test_errors_of_the_server(server, config, status, attempts):
    server.status = status
    with pytest.raises(
        UserError, match=rf"/copies/DIV2K_train_HR.zip: HTTP {status} \(.*\); run .* by hand to"
    ) as caught:
        data.load_records(config, 4)
    assert "\n" not in str(caught.value)
    assert len(server.asked) == attempts


@pytest.mark.parametrize(
    ("mirror", "reason"),
    [
        ("http://127.0.0.1:9", "no connection"),
        ("http://nowhere.invalid", "no connection"),
        ("nowhere", "Invalid URL"),
    ],
)
def test_without_a_network(server, config, monkeypatch, mirror, reason):
    monkeypatch.setenv(downloads.MIRROR, mirror)
    with pytest.raises(UserError, match=f"{mirror}/DIV2K_train_HR.zip: {reason}.* by hand") as e:
        data.load_records(config, 4)
    assert "\n" not in str(e.value)


def test_too_little_space_is_found_first(server, config, folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    with pytest.raises(
        UserError, match=rf"{folder}: DIV2K_train_HR.zip needs .* GB here, .* GB are free; make"
    ):
        data.load_records(config, 4)
    assert not (folder / "DIV2K_train_HR.zip.partial").exists()


@pytest.mark.parametrize("name", ["DIV2K_train_HR.zip", "DIV2K_train_HR.zip.partial"])
def test_too_little_space_to_unpack(server, config, folder, contents, monkeypatch, name):
    """The archive is kept, whether downloaded or put there by hand, and nothing is unpacked."""
    (folder / name).write_bytes(contents["DIV2K_train_HR.zip"])
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(downloads.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**5))
        with pytest.raises(UserError, match=rf"{folder}: DIV2K_train_HR.zip needs .* GB here"):
            data.load_records(config, 4)
    assert {path.name for path in folder.iterdir()} == {name}
    assert len(data.load_records(config, 4).train) == 5
    assert [asked for asked, _ in server.asked] == ["DIV2K_valid_HR.zip"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk(server, config, folder):
    (folder / "DIV2K_train_HR.zip.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match="pictures: No space left on device; once this is fixed"):
        data.load_records(config, 4)


def test_an_incomplete_folder_of_pictures(server, config, folder):
    data.load_records(config, 4)
    (folder / "DIV2K_train_HR" / "0003.png").unlink()
    with pytest.raises(UserError, match="HR: holds 4 pictures, expected 5; remove the folder"):
        data.load_records(config, 4)


def test_two_processes_download_once(server, config, locks):
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: data.load_records(config, 4).folder, range(2)))
    assert folders[0] == folders[1]
    assert [name for name, _ in server.asked] == list(NAMES[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_images": 4}, "val_images is 4, but div2k has only 3 pictures for validation"),
        ({"dataset": "df2k", "hr_dirs": ("photos",)}, "data.dataset and data.hr_dirs exclude"),
        ({"dataset": "df2k", "prepared": "records"}, "data.prepared and data.dataset exclude"),
    ],
)
def test_unusable_settings(server, config, tmp_path, change, message):
    paths = {
        "hr_dirs": lambda names: tuple(tmp_path / name for name in names),
        "prepared": lambda name: tmp_path / name,
    }
    change = {name: paths.get(name, lambda x: x)(value) for name, value in change.items()}
    with pytest.raises(UserError, match=message):
        data.load_records(dataclasses.replace(config, **change), 4)


def test_an_archive_with_too_few_pictures(server, config, folder):
    """This can happen without a checksum."""
    (folder / "Flickr2K.tar").write_bytes(make_tar(range(11, 13)))
    config = dataclasses.replace(config, dataset="df2k")
    message = (
        "tar: holds 2 pictures in Flickr2K/Flickr2K_HR, expected 3; replace or remove the file"
    )
    with pytest.raises(UserError, match=message):
        data.load_records(config, 4)
    assert not (folder / "Flickr2K_HR").exists()
