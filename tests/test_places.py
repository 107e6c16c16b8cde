"""Pictures at URLs: s3://, gs:// and others in place of local paths."""

import errno
import io
import os
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from dvmsr_jax.errors import UserError
from dvmsr_jax.pictures import jobs, places
from dvmsr_jax.pictures.places import Remote, place
from dvmsr_jax.pictures.upscaler import PictureUpscaler

MEMORY = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, and an empty memory://."""
    monkeypatch.chdir(tmp_path)
    MEMORY.store.clear()
    MEMORY.pseudo_dirs[:] = [""]
    return tmp_path


@pytest.fixture
def upscaler(doubling):
    return PictureUpscaler(doubling, 2)


def encoded(seed=0, form="PNG"):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def store(*names):
    for name in names:
        MEMORY.pipe(name, encoded())


def there(folder="memory://"):
    return sorted(MEMORY.find(folder))


def run(upscaler, *inputs, output=None, suffix=None, **options):
    planned = jobs.plan(inputs, output, scale=2.0, suffix=suffix)
    return {str(outcome.source): outcome for outcome in jobs.run(planned, upscaler, **options)}


def test_names():
    for name in ("s3://bucket/a/b.png", "memory://a.png", "https://host:80/x/a.png"):
        there = place(name)
        assert isinstance(there, Remote)
        assert str(there) == name
        assert str(there.with_name("c.png")) == name.rpartition("/")[0] + "/c.png"
    assert str(place("s3://bucket/a") / "b" / "c.png") == "s3://bucket/a/b/c.png"
    assert place("s3://bucket/a.tar.png").stem == "a.tar"
    assert place("file:///tmp/a.png") == Path("/tmp/a.png")
    assert place("a/b.png") == Path("a/b.png")


def test_a_remote_folder(upscaler):
    store("/in/a.png", "/in/sub/b.png", "/in/sub/.hidden.png", "/in/notes.txt")
    MEMORY.pipe("/in/broken.png", b"no picture")
    MEMORY.pipe("/in/raw.dng", b"raw")
    outcomes = run(upscaler, "memory://in", output="memory://out/")
    assert {name: one.status for name, one in outcomes.items()} == {
        "memory://in/a.png": "done",
        "memory://in/sub/b.png": "done",
        "memory://in/broken.png": "failed",
        "memory://in/raw.dng": "failed",
    }
    assert outcomes["memory://in/a.png"].what == "memory://out/a_x2.png"
    assert outcomes["memory://in/broken.png"].what.startswith("is not a PNG")
    assert "camera raw" in outcomes["memory://in/raw.dng"].what
    assert there("memory://out") == ["/out/a_x2.png", "/out/sub/b_x2.png"]
    Path("a.png").write_bytes(encoded())
    run(upscaler, "a.png")
    assert MEMORY.cat("/out/a_x2.png") == Path("a_x2.png").read_bytes()
    again = run(upscaler, "memory://in", output="memory://out/")["memory://in/a.png"]
    assert again.status == "skipped"
    assert again.what.startswith("memory://out/a_x2.png exists")


def test_between_local_and_remote(upscaler):
    store("/in/a.png")
    Path("b.png").write_bytes(encoded())
    outcomes = run(upscaler, "memory://in", "b.png", output="out/", suffix=".webp")
    assert sorted(map(str, Path("out").iterdir())) == ["out/a_x2.webp", "out/b_x2.webp"]
    assert {one.status for one in outcomes.values()} == {"done"}
    run(upscaler, "b.png", output="memory://x/c.tif")
    assert there("memory://x") == ["/x/c.tif"]
    with Image.open(io.BytesIO(MEMORY.cat("/x/c.tif"))) as image:
        assert (image.format, image.size) == ("TIFF", (8, 10))


def test_results_beside_remote_pictures(upscaler):
    """Named as they would be in a local folder."""
    store("/in/a.png", "/in/a.bmp", "/in/b.png", "/in/c_x2.png", "/in/b_x2.png")
    for status in ("done", "skipped"):
        outcomes = run(upscaler, "memory://in/*")
        assert outcomes.pop("memory://in/b_x2.png").status == "skipped"
        assert outcomes.pop("memory://in/b.png").status == "skipped"
        done = [one for one in outcomes.values() if "by name" not in one.what]
        assert {one.status for one in done} == {status}
        assert {one.what.split()[0] for one in done} == {
            *("memory://in/a_png_x2.png", "memory://in/a_bmp_x2.png"),
            "memory://in/c_x2_x2.png",
        }
    (outcome,) = run(upscaler, "memory://in/*.gif").values()
    assert outcome.what == "matches no picture"
    (outcome,) = run(upscaler, "memory://in/none.png").values()
    assert outcome.what == "no such file"


@pytest.mark.parametrize("overwrite", [False, True])
def test_inputs_are_not_overwritten(upscaler, overwrite):
    store("/a.png")
    before = MEMORY.cat("/a.png")
    (outcome,) = run(
        upscaler, "memory://a.png", output="memory://a.png", overwrite=overwrite
    ).values()
    assert outcome.status == ("failed" if overwrite else "skipped")
    assert MEMORY.cat("/a.png") == before
    store("/in/a.png")
    run(upscaler, "memory://in", output="memory://out/")
    MEMORY.pipe("/out/a_x2.png", b"earlier")
    run(upscaler, "memory://in", output="memory://out/", overwrite=overwrite)
    assert (MEMORY.cat("/out/a_x2.png") == b"earlier") != overwrite


def test_results_appear_whole(upscaler, monkeypatch):
    """Nothing is left of an upload, or of a computation, that fails."""
    store("/in/a.png")
    copy = places.shutil.copyfileobj

    def interrupted(source, file):
        file.write(source.read(10))
        file.flush()
        assert there("memory://out") == []
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(places.shutil, "copyfileobj", interrupted)
    (outcome,) = run(upscaler, "memory://in", output="memory://out/").values()
    assert (outcome.status, outcome.what) == ("failed", "memory://out/a_x2.png: reset by peer")
    assert there("memory://out") == []
    monkeypatch.setattr(places.shutil, "copyfileobj", copy)

    def failing(image):
        raise ZeroDivisionError

    run(PictureUpscaler(failing, 2), "memory://in", output="memory://out/")
    assert there("memory://out") == []
    (outcome,) = run(upscaler, "memory://in", output="memory://out/").values()
    assert outcome.status == "done"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_web(upscaler, web):
    pytest.importorskip("aiohttp", reason="needs aiohttp")
    Path("pictures").mkdir()
    for i in range(2):
        Path(f"pictures/{i}.png").write_bytes(encoded(i))
    one = run(upscaler, f"{web}/pictures/0.png", output="one/")
    assert [outcome.what for outcome in one.values()] == ["one/0_x2.png"]
    run(upscaler, f"{web}/pictures/", output="all/")
    run(upscaler, "pictures", output="local/")
    for name in ("0_x2.png", "1_x2.png"):
        assert Path("all", name).read_bytes() == Path("local", name).read_bytes()
    (outcome,) = run(upscaler, f"{web}/pictures/0.png").values()
    assert outcome.what.endswith("0_x2 cannot be written: choose another --output")
    with pytest.raises(UserError, match=r"/out: https?: can only be read$"):
        run(upscaler, "pictures", output=f"{web}/out")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_signed_urls(upscaler, web):
    pytest.importorskip("aiohttp", reason="needs aiohttp")
    Path("signed").mkdir()
    Path("signed/0.png").write_bytes(encoded())
    signed = f"{web}/signed/0.png?a=1/2&b=c*.png"
    (outcome,) = run(upscaler, signed, output="out/").values()
    assert (outcome.status, outcome.what) == ("done", "out/0_x2.png")
    assert str(outcome.source) == f"{web}/signed/0.png"  # signatures are not for logs
    there = place(signed)
    assert pickle.loads(pickle.dumps(there)).url == there.url == signed
    (outcome,) = run(upscaler, f"{web}/signed/0.png?a=2&secret=3", output="other/").values()
    assert outcome.status == "failed"
    assert "403" in outcome.what
    assert "secret" not in outcome.what
    # Two pictures that only their queries tell apart are not taken for one.
    planned = jobs.plan([signed, f"{web}/signed/0.png?a=2"], "both/", scale=2.0, suffix=None)
    assert "choose another --output" in planned[1].what


def test_a_full_disk(upscaler, monkeypatch):
    """Under the temporary copy of a remote picture: it ends the run, and says what to do."""
    store("/bucket/a.png")

    def get_file(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(MEMORY), "get_file", get_file)
    with pytest.raises(jobs.DiskFullError, match=r"dvmsr-.*: No space.*set TMPDIR"):
        run(upscaler, "memory://bucket/a.png", output="out/")


def test_mistakes_name_the_place(upscaler, monkeypatch):
    (outcome,) = run(upscaler, "nothing://a/b.png", output="out/").values()
    assert (outcome.status, outcome.what) == ("failed", "Protocol not known: nothing")

    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    (outcome,) = run(upscaler, "s3://bucket/b.png", output="out/").values()
    assert outcome.what == "Install s3fs to access S3"
    Path("a.png").write_bytes(encoded())
    with pytest.raises(UserError, match=r"^s3://bucket/out: Install s3fs to access S3$"):
        run(upscaler, "a.png", output="s3://bucket/out/")
