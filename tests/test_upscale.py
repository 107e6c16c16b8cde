"""upscale.py: its inputs, the names of results, and the files that it must not touch."""

import errno
import io
import itertools
import os
import re
import signal
import struct
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import ExifTags, Image

from dvmsr_jax.commands import upscale
from dvmsr_jax.config import ModelConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.model import DVMSR
from dvmsr_jax.pictures import formats, jobs, reading
from dvmsr_jax.pictures.jobs import STANDARD, Job, Outcome
from dvmsr_jax.pictures.upscaler import PictureUpscaler
from dvmsr_jax.pretrained import save_safetensors


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def upscaler(doubling):
    return PictureUpscaler(doubling, 2)


def make(*names, size=(4, 3)):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "red").save(name)


def targets(planned):
    """The targets by source, as written on the command line."""
    return {str(job.source): str(job.target) for job in planned if isinstance(job, Job)}


def plan(*inputs, output=None, suffix=None):
    return jobs.plan(inputs, output, scale=4.0, suffix=suffix)


def run(upscaler, *inputs, output=None, suffix=None, **options):
    planned = jobs.plan(inputs, output, scale=2.0, suffix=suffix)
    return {str(outcome.source): outcome for outcome in jobs.run(planned, upscaler, **options)}


def test_results_lie_beside_the_inputs():
    make("a.jpg", "sub/b.png", "sub/deep/c.webp")
    Path("sub/notes.txt").touch()
    assert targets(plan("a.jpg", "sub")) == {
        "a.jpg": "a_x4",
        "sub/b.png": "sub/b_x4",
        "sub/deep/c.webp": "sub/deep/c_x4",
    }


def test_subfolders_are_recreated_in_the_output():
    make("in/a.jpg", "in/sub/b.png", "c.png")
    assert targets(plan("in/", "c.png", output="out/")) == {
        "in/a.jpg": "out/a_x4",
        "in/sub/b.png": "out/sub/b_x4",
        "c.png": "out/c_x4",
    }


def test_patterns():
    make("in/a.jpg", "in/sub/b.jpg", "in/sub/c.png", "in/b[1].jpg")
    Path("in/notes.txt").touch()
    assert set(targets(plan("in/*"))) == {"in/a.jpg", "in/b[1].jpg"}
    assert targets(plan("in/**/*.jpg", output="out")) == {
        "in/a.jpg": "out/a_x4",
        "in/b[1].jpg": "out/b[1]_x4",
        "in/sub/b.jpg": "out/sub/b_x4",
    }
    assert set(targets(plan("in/b[1].jpg"))) == {"in/b[1].jpg"}  # a file of this name exists
    (outcome,) = plan("in/*.gif")
    assert (outcome.status, outcome.what) == ("failed", "matches no picture")


def test_names_that_would_coincide():
    make("a.jpg", "a.png", "b.png", "other/A.webp")
    assert targets(plan("a.jpg", "a.png", "b.png", "./a.jpg")) == {
        "a.jpg": "a_jpg_x4",
        "a.png": "a_png_x4",
        "b.png": "b_x4",
    }
    make("cases/a.png", "cases/A.png")
    assert set(targets(plan("cases")).values()) == {"cases/a_png_x4", "cases/A_png_x4"}
    in_one_folder = targets(plan("a.jpg", "other/A.webp", output="out/"))
    assert set(in_one_folder.values()) == {"out/a_jpg_x4", "out/A_webp_x4"}


def test_a_name_does_not_depend_on_other_inputs(upscaler):
    """Pictures with the same stem, given separately or together, repeatedly and in any order."""
    make("a.jpg", "a.png", "b.jpg", "c/a.bmp")
    Path("b.png").symlink_to("b.jpg")
    alone = {"a.jpg": "a_jpg_x4", "a.png": "a_png_x4", "b.jpg": "b_jpg_x4", "b.png": "b_png_x4"}
    for name, target in alone.items():
        assert targets(plan(name)) == {name: target}
        assert targets(plan(name, output="out/")) == {name: f"out/{target}"}
    del alone["b.png"]  # is b.jpg
    assert targets(plan(".")) == {**alone, "c/a.bmp": "c/a_x4"}
    assert [run(upscaler, name)[name].what for name in ("a.jpg", "a.png")] == [
        *("a_jpg_x2.png", "a_png_x2.png")
    ]
    for inputs in (["."], ["a.png"], ["a.png", "a.jpg", "b.jpg"]):
        outcomes = run(upscaler, *inputs)
        assert outcomes["a.png"].what.startswith("a_png_x2.png exists")


def test_a_name_does_not_change_with_the_results(upscaler):
    """Neither results nor other kinds of files beside the inputs count as namesakes."""
    make("a.jpg", "a_x2.jpg", ".a.png")
    for name in ("a.txt", "a.nef"):
        Path(name).touch()
    for status in ("done", "skipped"):
        for name, result in (("a_x2.jpg", "a_x2_x2.png"), ("a.jpg", "a_x2.png")):
            (outcome,) = run(upscaler, name).values()
            assert (outcome.status, outcome.what.split()[0]) == (status, result)
    assert run(upscaler, "a.jpg", suffix=".webp")["a.jpg"].what == "a_x2.webp"


def test_results_in_the_inputs_own_formats(upscaler):
    """Formats are recognised by the contents, not the name."""
    formats_of = {"a.jpeg": "JPEG", "b.png": "PNG", "c.tiff": "TIFF", "d.webp": "WEBP"}
    formats_of |= {"e.bmp": "BMP", "f.gif": "GIF", "g.avif": "AVIF"}
    make(*formats_of, size=(40, 30))
    Path("h.png").write_bytes(Path("a.jpeg").read_bytes())
    Image.effect_noise((40, 30), 50).save("i.webp", lossless=True)
    results = {
        name: Path(one.what) for name, one in run(upscaler, ".", suffix=formats.SAME).items()
    }
    assert {path.name for path in results.values()} == {
        *("a_x2.jpg", "b_x2.png", "c_x2.tif", "d_x2.webp", "e_x2.bmp", "f_x2.gif", "g_x2.png"),
        *("h_x2.jpg", "i_x2.webp"),
    }
    for name, form in formats_of.items():
        with Image.open(results[name]) as image:
            assert (image.format, image.size) == (form.replace("AVIF", "PNG"), (80, 60))
    assert reading.Picture("i_x2.webp").is_lossless_webp()
    assert not reading.Picture("d_x2.webp").is_lossless_webp()
    (job,) = plan("a.jpeg", output="-", suffix=formats.SAME)
    assert job == Job(Path("a.jpeg"), STANDARD, formats.SAME)
    with pytest.raises(UserError, match="--format same"):
        plan("a.jpeg", output="x.jpg", suffix=formats.SAME)


def test_results_of_earlier_runs_are_not_inputs():
    make("a.jpg", "b.jpg", "b.png", "a_x4.png", "a_x2.webp", "b_jpg_x1.5.png", "c_x4.png")
    planned = plan(".")
    assert set(targets(planned)) == {"a.jpg", "b.jpg", "b.png", "c_x4.png"}
    skipped = {str(job.source) for job in planned if isinstance(job, Outcome)}
    assert skipped == {"a_x4.png", "a_x2.webp", "b_jpg_x1.5.png"}
    assert targets(plan("a_x4.png")) == {"a_x4.png": "a_x4_x4"}  # named explicitly
    make("out/d.png")
    assert "out/d.png" not in targets(plan(".", output="out"))
    assert "out/d.png" in targets(plan("out", output="out"))


@pytest.mark.parametrize(
    "output", ["ph/out/", "./ph/out", "{cwd}/ph/out/", "ph/../ph/out/", "link/"]
)
@pytest.mark.parametrize("name", ["ph", "{cwd}/ph", "ph/../ph/", "ph/**/*", "{cwd}/p*/**/*.*"])
def test_the_output_folder_is_not_an_input(folder, name, output):
    make("ph/a.jpg", "ph/out/a_x4.png", "ph/out/deep/b_x4.png")
    Path("link").symlink_to("ph/out")
    (job,) = plan(name.format(cwd=folder), output=output.format(cwd=folder))
    assert isinstance(job, Job)
    assert job.source.name == "a.jpg"


def test_inputs_inside_the_output_folder():
    make("ph/sub/a.jpg")
    for name in ("ph/sub", "ph/sub/*", "ph/s*/*"):
        assert len(targets(plan(name, output="ph/"))) == 1
    assert len(targets(plan("ph/sub", output="ph/sub"))) == 1


def test_explicitly_named_pictures_are_upscaled():
    make("a.jpg", "a_x2.jpg", "a_x4.png")
    assert set(targets(plan("a.jpg", "a_x2.jpg"))) == {"a.jpg", "a_x2.jpg"}
    assert set(targets(plan("a.jpg", "a_x4.png", output="q/"))) == {"a.jpg", "a_x4.png"}
    assert set(targets(plan(".", "a_x2.jpg"))) == {"a.jpg", "a_x2.jpg"}
    # Unless a shell may have expanded *.* in a folder with results of an earlier command.
    assert set(targets(plan("a.jpg", "a_x4.png"))) == {"a.jpg"}


def test_one_file_as_output():
    make("a.png", "b.png", "folder.png/c.png")
    assert plan("a.png", output="x.jpg") == [Job(Path("a.png"), Path("x.jpg"), "")]
    assert plan("a.png", output="folder.png") == [Job(Path("a.png"), Path("folder.png/a_x4"), None)]
    for output, reason in (("x.xyz", "written as .png"), ("x.png", "--format")):
        with pytest.raises(UserError, match=reason):
            plan("a.png", output=output, suffix=".jpg")
    with pytest.raises(UserError, match="end a folder's name in /"):
        plan("a.png", "b.png", output="x.png")
    with pytest.raises(UserError, match="several results; name a folder"):
        plan("a.png", "b.png", output="-")


def test_standard_input_and_output():
    make("a.png")
    assert plan("-") == [Job(STANDARD, STANDARD, None)]
    assert plan("-", suffix=".jpg") == [Job(STANDARD, STANDARD, ".jpg")]
    assert plan("-", output="x.jpg") == [Job(STANDARD, Path("x.jpg"), "")]
    assert plan("a.png", output="-", suffix=".tif") == [Job(Path("a.png"), STANDARD, ".tif")]


def test_existing_results_are_skipped(upscaler):
    make("a.png", "b.png")
    Path("a_x2.png").write_text("precious")
    first = run(upscaler, "a.png", "b.png")
    assert first["a.png"].status == "skipped"
    assert "a_x2.png exists" in first["a.png"].what
    assert Path("a_x2.png").read_text() == "precious"
    assert first["b.png"] == Outcome(Path("b.png"), "done", "b_x2.png", 4 * 3 / 1e6)
    assert run(upscaler, ".")["b.png"].status == "skipped"
    assert run(upscaler, ".", overwrite=True)["a.png"].status == "done"
    with Image.open("a_x2.png") as image:
        assert image.size == (8, 6)


def test_inputs_are_never_overwritten(upscaler):
    make("a.png", "b.png")
    original = Path("a.png").read_bytes()
    Path("link.png").symlink_to("a.png")
    Path("hard.png").hardlink_to("a.png")
    for output in ("a.png", "./a.png", "link.png", "hard.png"):
        (outcome,) = run(upscaler, "a.png", output=output, overwrite=True).values()
        assert outcome.status == "failed"
        assert "an input" in outcome.what
    assert Path("a.png").read_bytes() == original
    # An input that is itself skipped because of its name.
    make("icon.png", "icon_x2.png")
    named = ["icon.png", "icon_x2.png"]
    for overwrite, status in ((False, "skipped"), (True, "failed")):
        outcomes = run(upscaler, *named, keep=named, overwrite=overwrite)
        assert outcomes["icon_x2.png"].status == "skipped"
        assert outcomes["icon.png"].status == status
    assert "named as an input" in outcomes["icon.png"].what
    with Image.open("icon_x2.png") as image:
        assert image.size == (4, 3)
    # An input that comes later, and has the name of a result.
    make("c.png", "d/c_x2.png")
    outcomes = run(upscaler, "c.png", "d/c_x2.png", output="d/", overwrite=True)
    assert "an input" in outcomes["c.png"].what


def test_results_do_not_overwrite_each_other(upscaler):
    make("x/a.png", "y/a.png")
    for overwrite, first in ((False, "done"), (False, "skipped"), (True, "done")):
        outcomes = run(upscaler, "x", "y", output="out/", overwrite=overwrite)
        assert [outcome.status for outcome in outcomes.values()] == [first, "failed"]
        assert "would have the name of x/a.png's" in outcomes["y/a.png"].what
    # A skipped input does not occupy a name.
    make("x/a_x2.png", "z/a_x2.png")
    outcomes = run(upscaler, "x", "z", output="new/")
    assert outcomes["x/a_x2.png"].status == "skipped"
    assert outcomes["z/a_x2.png"].status == "done"
    # Names that are equal only to the file system.
    make("z/b.png")
    Path("z/c_x2.png").symlink_to(Path("b_x2.png"))
    make("z/c.png")
    outcomes = run(upscaler, "z/b.png", "z/c.png", overwrite=True)
    assert "the result of z/b.png" in outcomes["z/c.png"].what


def test_failures_are_reported_and_the_rest_is_done(upscaler):
    make("in/a.png", "in/z.png")
    Path("in/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    Path("in/empty.png").touch()
    make("in/large.png", size=(200, 200))
    outcomes = run(upscaler, "in", "missing.png", max_pixels=10_000)
    assert [outcome.status for outcome in outcomes.values()].count("done") == 2
    reasons = {name: one.what for name, one in outcomes.items() if one.status == "failed"}
    assert reasons.keys() == {"in/broken.jpg", "in/empty.png", "in/large.png", "missing.png"}
    assert reasons["in/empty.png"] == "is empty"
    assert reasons["missing.png"] == "no such file"
    assert "--max-megapixels" in reasons["in/large.png"]
    assert sorted(Path("in").glob("*_x2*")) == [Path("in/a_x2.png"), Path("in/z_x2.png")]
    text = jobs.summary(list(outcomes.values()))
    assert text.startswith("2 done, 0 skipped, 4 failed\n")
    assert "  failed: in/empty.png: is empty" in text.splitlines()


def test_summary_is_short():
    outcomes = [Outcome(Path(f"{i}.png"), "skipped", "exists") for i in range(9)]
    lines = jobs.summary([*outcomes, Outcome(Path("a.png"), "done", "b.png")]).splitlines()
    assert lines[0] == "1 done, 9 skipped, 0 failed"
    assert lines[-1] == "  skipped: 6 more"
    assert len(lines) == 5


def test_animations_stay_animations(upscaler):
    first, *others = (Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue"))
    for name in ("a.gif", "b.webp", "c.png", "d.tif"):
        first.save(name, save_all=True, append_images=others)
    outcomes = run(upscaler, ".", output="out/")
    assert {Path(one.what).name for one in outcomes.values()} == {
        *("a_x2.gif", "b_x2.webp", "c_x2.png", "d_x2.tif")
    }
    for outcome in outcomes.values():
        with Image.open(outcome.what) as image:
            assert (image.n_frames, image.size) == (3, (16, 16))
    outcomes = run(upscaler, "a.gif", "d.tif", suffix=".jpg")
    assert "3 frames" in outcomes["a.gif"].what
    assert "3 pages" in outcomes["d.tif"].what
    make("still.gif")
    assert run(upscaler, "still.gif")["still.gif"].what == "still_x2.png"


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (MemoryError(), "out of memory.*--tile"),
        (OSError(errno.ENOSPC, "No space"), r"^unexpected OSError: \[Errno 28\] No space$"),
        (ZeroDivisionError("of a bug"), "^unexpected ZeroDivisionError: of a bug$"),
    ],
)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_failed_results_leave_no_files(doubling, suffix, error, answer):
    """After an error in the middle of a picture."""

    def failing(image):
        yield from list(doubling(image))[:1]
        raise error

    make("a.png", "b.png", size=(4, 40))
    outcomes = run(PictureUpscaler(failing, 2), "a.png", "b.png", suffix=suffix)
    assert [outcome.status for outcome in outcomes.values()] == ["failed", "failed"]
    assert re.search(answer, outcomes["a.png"].what)
    assert sorted(map(str, Path().iterdir())) == ["a.png", "b.png"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EFBIG])
def test_unwritable_results_fail(upscaler, monkeypatch, number):
    def write(path, *arguments, **options):
        Path(path).write_bytes(b"half")
        raise OSError(number, "for a reason")

    make("a.png", "b.png")
    monkeypatch.setattr(formats, "write", write)
    outcomes = run(upscaler, "a.png", "b.png")
    assert [outcome.status for outcome in outcomes.values()] == ["failed", "failed"]
    assert outcomes["a.png"].what == "a_x2.png cannot be written (for a reason)"
    assert sorted(map(str, Path().iterdir())) == ["a.png", "b.png"]


def test_unwritable_results_fail_before_the_work(monkeypatch):
    def idle(image):
        raise AssertionError("there was work")

    make("a.png")
    Path("a_x2.png").mkdir()
    (outcome,) = run(PictureUpscaler(idle, 2), "a.png", overwrite=True).values()
    assert outcome.what == "the result a_x2.png would replace a folder"
    touch = Path.touch

    def locked(path, *arguments, **options):
        if path.name.startswith(".dvmsr-"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return touch(path, *arguments, **options)

    monkeypatch.setattr(Path, "touch", locked)
    (outcome,) = run(PictureUpscaler(idle, 2), "a.png", suffix=".webp").values()
    assert outcome.what == "a_x2.webp cannot be written (Permission denied)"


def test_impossible_file_names(upscaler):
    make("a.png")
    too_long = "b" * 300 + ".png"
    outcomes = run(upscaler, too_long, "", "a.png")
    assert outcomes["a.png"].status == "done"
    assert outcomes[too_long].status == "failed"
    assert outcomes["."].what == "an empty name"


def test_two_names_of_a_file():
    make("a.png", "folder.png/b.png", "line\nbreak.png", "line\nbreak_x4.png")
    Path("link.png").symlink_to("a.png")
    for names in (("a.png", "link.png"), ("link.png", "a.png")):
        assert plan(*names)[::-1] == [
            Job(Path("a.png"), Path("a_x4"), None),
            Outcome(Path("link.png"), "skipped", "is a.png"),
        ]
    assert plan("a.png", "link.png", output="x.png")[-1] == Job(Path("a.png"), Path("x.png"), "")
    assert set(targets(plan("*.png"))) == {"a.png", "line\nbreak.png"}


def test_long_names(upscaler):
    longest = os.pathconf(".", "PC_NAME_MAX")
    fits, too_long = "a" * (longest - 7) + ".png", "b" * (longest - 4) + ".png"
    make(fits, too_long)
    outcomes = run(upscaler, fits, too_long)
    assert outcomes[fits].status == "done"
    assert outcomes[too_long].what.endswith("cannot be written (File name too long)")


def test_a_full_disk_stops_the_run(doubling, upscaler, monkeypatch):
    make("a.png", "b.png", "c.png")
    written = []

    def write(path, *arguments, **options):
        if written:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        Path(path).touch()

    monkeypatch.setattr(formats, "write", write)
    outcomes = jobs.run(jobs.plan(["."], None, scale=2.0, suffix=None), upscaler)
    assert next(outcomes).status == "done"
    with pytest.raises(jobs.DiskFullError, match=r"b_x2\.png: No space.*--output"):
        next(outcomes)
    assert sorted(map(str, Path().iterdir())) == ["a.png", "a_x2.png", "b.png", "c.png"]


@pytest.fixture
def weights(tmp_path_factory):
    """A file of tiny random weights."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    config = ModelConfig(channels=8, rssbs=1, vimms_per_rssb=1, states=4)
    save_safetensors(DVMSR(config, rngs=nnx.Rngs(0)), path)
    return path


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["upscale.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        upscale.main()
    return stop.value.code


def test_the_command(weights, monkeypatch, capsys):
    make("in/a.png", "in/b.jpg")
    Path("in/c.png").write_text("no picture")
    arguments = ("in", "-o", "out/", "--format", "webp", "--ckpt", weights, "--quality", "80")
    assert run_main(monkeypatch, *arguments) == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert "in/a.png -> out/a_x4.webp" in printed.err
    assert "2 done, 0 skipped, 1 failed" in printed.err
    with Image.open("out/b_x4.webp") as image:
        assert image.size == (16, 12)
    Path("in/c.png").unlink()
    assert run_main(monkeypatch, *arguments) == 0
    assert "0 done, 2 skipped, 0 failed" in capsys.readouterr().err
    assert run_main(monkeypatch, "in/a.png", "--ckpt", weights, "--scale", "1.5") == 0
    with Image.open("in/a_x1.5.png") as image:
        assert image.size == (6, 4)
    same = ("in/b.jpg", "--ckpt", weights, "--format", "same", "--quality", "90")
    assert run_main(monkeypatch, *same) == 0
    with Image.open("in/b_x4.jpg") as image:
        assert image.format == "JPEG"
    arguments = ("in/a.png", "-o", "a.webp", "--quality", "lossless", "--ckpt", weights)
    assert run_main(monkeypatch, *arguments) == 0
    assert reading.Picture("a.webp").is_lossless_webp()


def test_mistakes_are_one_line(weights, monkeypatch, tmp_path):
    make("a.png")
    missing = tmp_path / "none.safetensors"
    for arguments, reason in (
        (["a.png", "--ckpt", missing], "none.safetensors: no such file"),
        (["a.png", "--ckpt", weights, "--quality", "0"], "--quality is 0"),
        (["a.png", "--ckpt", weights, "--scale", "400"], "scale is 400"),
        (["a.png", "--ckpt", weights, "-o", "x.xyz"], "written as .png"),
        (["a.png", "--ckpt", weights, "--tile", "4"], "overlap"),
        (["a.png", "--ckpt", weights, "--overlap", "4"], "--tile"),
        (["a.png", "--ckpt", weights, "--quality", "80"], "add --format"),
        (["a.png", "--ckpt", weights, "--quality", "80", "--format", "png"], "add --format"),
        (["a.png", "--ckpt", weights, "--quality", "80", "-o", "x.png"], "add --format"),
        (["a.png", "--ckpt", weights, "--quality", "101", "--format", "same"], "--quality is 101"),
        *(
            (
                ["a.png", "--ckpt", weights, "--max-megapixels", value],
                f"--max-megapixels is {value}",
            )
            for value in ("inf", "nan", "0", "-1")
        ),
        (["--ckpt", weights], "name at least one"),
    ):
        message = run_main(monkeypatch, *arguments)
        assert message.startswith("error: ")
        assert reason in message
        assert "\n" not in message


def test_file_names_are_safe_to_print(weights, monkeypatch, capsys):
    """Without escape codes, or line breaks that look like another message."""
    good, bad = "\x1b[2Jgood\n0 failed.png", "\x1b[2Jbad\n0 failed.png"
    make(good)
    Path(bad).write_text("no picture")
    assert run_main(monkeypatch, ".", "--ckpt", weights) == 1
    printed = capsys.readouterr().err
    assert "\x1b" not in printed
    lines = printed.splitlines()
    assert r"\x1b[2Jgood\n0 failed.png -> \x1b[2Jgood\n0 failed_x4.png" in lines
    assert r"  failed: \x1b[2Jbad\n0 failed.png: is not a PNG" in lines[-1]
    message = run_main(monkeypatch, ".", "-o", "\x1b[2J.xyz", "--ckpt", weights)
    assert message.startswith(r"error: \x1b[2J.xyz: pictures are written as")


def test_a_full_folder_for_temporary_files_is_named(upscaler, monkeypatch, tmp_path):
    def write(path, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    make("a.png")
    monkeypatch.setattr(formats, "write", write)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(jobs.DiskFullError, match=rf"^{tmp_path}/.*: No space.*TMPDIR"):
        run(upscaler, "a.png", output="-")
    assert os.listdir() == ["a.png"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_behind_standard_output(upscaler, monkeypatch):
    make("a.png")
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr("sys.stdout", types.SimpleNamespace(buffer=full))
        with pytest.raises(jobs.DiskFullError, match=r"^standard output: No space left"):
            run(upscaler, "a.png", output="-")


@pytest.fixture
def platforms():
    """JAX's setting, restored afterwards."""
    before = jax.config.values["jax_platforms"]
    yield
    jax.config.update("jax_platforms", before)


@pytest.mark.usefixtures("platforms")
def test_device(weights, monkeypatch):
    make("a.png")
    here = jax.default_backend()
    assert run_main(monkeypatch, "a.png", "--ckpt", weights, "--device", here) == 0
    Path("a_x4.png").unlink()
    for elsewhere in {"gpu", "tpu"} - {here}:
        message = run_main(monkeypatch, "a.png", "--ckpt", weights, "--device", elsewhere)
        assert message.startswith(f"error: --device {elsewhere}: JAX finds none, only {here}")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # as with JAX's CUDA plugin
    jax.config.update("jax_platforms", "cpu")  # as JAX_PLATFORMS does
    upscale.use_device("gpu")
    assert jax.config.values["jax_platforms"] is None
    assert not Path("a_x4.png").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals(upscaler, monkeypatch, capsys, number):
    make("a.png", "b.png", "c.png", size=(4, 40))
    count = 0

    def stopping(image):
        nonlocal count
        count += 1
        yield from list(upscaler._upscale(image))[:1]
        if count == 2:
            assert list(Path().glob(".dvmsr-*"))
            signal.raise_signal(number)
        yield from list(upscaler._upscale(image))[1:]

    stop = PictureUpscaler(stopping, 2)
    monkeypatch.setattr(upscale, "Upscaler", lambda *_, **__: stop)
    # Even if nohup, or a shell in the background, has started the tests.
    before = {
        each: signal.signal(each, handler)
        for each, handler in (
            (signal.SIGTERM, signal.SIG_DFL),
            (signal.SIGHUP, signal.SIG_DFL),
            (signal.SIGINT, signal.default_int_handler),
        )
    }
    try:
        assert run_main(monkeypatch, ".", "--format", "tif") == 128 + number
    finally:
        for other, handler in before.items():
            signal.signal(other, handler)
    assert "1 done, 0 skipped, 0 failed" in capsys.readouterr().err
    assert sorted(map(str, Path().iterdir())) == ["a.png", "a_x2.tif", "b.png", "c.png"]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(monkeypatch, capsys, terminal):
    """On a terminal, a bar, and elsewhere a line from time to time."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    seconds = iter(range(0, 1000, 25))
    clock = types.SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr(jobs, "time", clock)
    outcomes = [jobs.Outcome(Path(f"{i}.png"), "done", "", 2.5) for i in range(5)]
    outcomes[1] = outcomes[1]._replace(status="failed", megapixels=0)
    assert list(jobs.shown(outcomes, 8)) == outcomes
    printed = capsys.readouterr().err
    if terminal:
        assert "5/8" in printed
        assert "10.0 MP, 0.08 MP/s, 1 failed" in printed
    else:
        (line,) = printed.splitlines()
        assert line.startswith("38%")
        assert " 3/8 " in line
        assert "5.0 MP, 0.07 MP/s, 1 failed" in line
    assert list(jobs.shown(outcomes[:1], 1, silent=True)) == outcomes[:1]
    assert not capsys.readouterr().err


def test_no_picture_on_a_terminal(weights, monkeypatch):
    make("a.png")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    message = run_main(monkeypatch, "a.png", "-o", "-", "--ckpt", weights)
    assert message.startswith("error: standard output is a terminal")


def test_closed_streams(weights, monkeypatch):
    make("a.png")
    for stream, arguments in (("stdin", ["-", "-o", "x.png"]), ("stdout", ["a.png", "-o", "-"])):
        with monkeypatch.context() as patch:
            patch.setattr(sys, stream, None)
            message = run_main(patch, *arguments, "--ckpt", weights)
        assert message == f"error: standard {stream[3:]}put is closed"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert run_main(patch, "a.png", "--ckpt", weights) == 0
        sys.stderr.close()
    assert Path("a_x4.png").exists()


def test_pipes(weights, monkeypatch):
    """In a process of its own, because no library may write anything besides the picture."""
    make("a.png")
    # Its programs belong in the tests' cache, not in the user's.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.values["jax_compilation_cache_dir"])
    program = Path(__file__).parents[1] / "upscale.py"
    command = [sys.executable, program, "-", "--ckpt", weights]
    data = Path("a.png").read_bytes()
    result = subprocess.run([*command, "--format", "tif"], input=data, capture_output=True)
    assert result.returncode == 0, result.stderr
    with Image.open(io.BytesIO(result.stdout)) as image:
        assert (image.format, image.size) == ("TIFF", (16, 12))
        assert np.asarray(image).shape == (12, 16, 3)
    assert sorted(map(str, Path().iterdir())) == ["a.png"]

    result = subprocess.run(command, input=b"no picture", capture_output=True)
    assert result.returncode == 1
    assert not result.stdout
    assert b"failed: -: is not a PNG" in result.stderr


def exif_with(*entries):
    """EXIF whose main directory has these entries: (tag, type, count, value or its bytes)."""
    data, rest = struct.pack("<H", len(entries)), b""
    behind = 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in entries:
        if len(value) > 4:
            value, rest = struct.pack("<I", behind + len(rest)), rest + value
        data += struct.pack("<2HI", tag, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + data + bytes(4) + rest


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_text_in_exif_is_unchanged(upscaler, suffix):
    """In UTF-8, although the standard requires ASCII; in the main directory and in another."""
    text = "© 2023 Jürgen".encode()
    exif = Image.Exif()
    exif[ExifTags.Base.Copyright] = text
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.LensModel] = "????"
    data = exif.tobytes().replace(b"????", "Öß".encode())
    for name in ("a.png", "b.jpg", "c.webp"):
        Image.new("RGB", (4, 3)).save(name, exif=data)
    run(upscaler, "a.png", output="d.tif")  # Pillow would not keep it
    for name in ("a.png", "b.jpg", "c.webp", "d.tif"):
        (outcome,) = run(upscaler, name, suffix=suffix).values()
        with Image.open(outcome.what) as image:
            again = image.getexif()
            assert again[ExifTags.Base.Copyright].encode("latin-1") == text
            lens = again.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.LensModel]
            assert lens.encode("latin-1").decode() == "Öß"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_numbers_of_every_kind_in_exif(upscaler, suffix):
    """Even in place of other types: type, count and value of a text or small-number field."""
    numbers = [
        *((1, 1, b"\xff"), (3, 1, b"\xff\xff"), (3, 3, bytes(range(6))), (4, 1, b"\xff" * 4)),
        *((6, 1, b"\x80"), (8, 1, b"\xff\xff"), (9, 1, b"\xff" * 4), (9, 2, b"\xff" * 8)),
        *((5, 1, bytes(8)), (10, 1, b"\xff" * 8), (11, 1, b"\xff" * 4), (12, 1, b"\xff" * 8)),
        *((7, 4, b"\xff\xfea\0"), (2, 4, b"\xff\xfea\0"), (16, 1, b"\xff" * 8)),
    ]
    tags = ExifTags.Base.Rating, ExifTags.Base.ImageDescription, ExifTags.Base.XPTitle
    for i, number in enumerate(itertools.product(tags, numbers)):
        tag, (kind, count, value) = number
        exif = exif_with((tag, kind, count, value))
        Image.new("RGB", (4, 3)).save(f"{i}.jpg", exif=exif)
        (outcome,) = run(upscaler, f"{i}.jpg", suffix=suffix).values()
        assert outcome.status == "done", outcome
    for i, rating in enumerate((-1, 5)):
        exif = exif_with((ExifTags.Base.Rating, 9, 1, struct.pack("<i", rating)))
        Image.new("RGB", (4, 3)).save(f"rating{i}.jpg", exif=exif)
        (outcome,) = run(upscaler, f"rating{i}.jpg", suffix=suffix).values()
        with Image.open(outcome.what) as image:
            assert image.getexif()[ExifTags.Base.Rating] == rating
