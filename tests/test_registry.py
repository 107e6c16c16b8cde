"""Weights by name, those in the repository and those on a server."""

import dataclasses
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from dvmsr_jax import DVMSR, Upscaler, downloads, registry
from dvmsr_jax.commands import evaluate, train, upscale
from dvmsr_jax.config import ModelConfig
from dvmsr_jax.errors import StoppedError, UserError
from dvmsr_jax.model import named_parameters
from dvmsr_jax.pretrained import convert, load_weights, save_safetensors, training_facts
from dvmsr_jax.registry import NAMED, default_for, find
from tests.file_server import serving

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = [name for name, named in NAMED.items() if named.url is None]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights(name):
    """The file is the registered one, loads by its name, and says where it comes from."""
    path = find(name)
    assert path.samefile(ROOT / "checkpoints" / f"{name}.safetensors")
    assert path.stat().st_size < 2e6
    weights = load_weights(name)
    assert weights.config.scale == NAMED[name].scale
    loaded = named_parameters(DVMSR.from_pretrained(name))
    for key, x in load_file(path).items():
        np.testing.assert_array_equal(loaded[key], x, err_msg=key)
    assert training_facts(name)["step"] > 0


def test_every_file_has_a_name():
    files = {path.stem for path in (ROOT / "checkpoints").glob("*.safetensors")}
    assert files == set(SHIPPED)


def test_the_card_has_the_registered_scores():
    card = (ROOT / "checkpoints" / "README.md").read_text()
    for name, named in NAMED.items():
        (row,) = re.findall(rf"^\| `{name}` \|(.* / .*)$", card, re.MULTILINE)
        for psnr_y, ssim_y in named.scores.values():
            assert f"{psnr_y:.3f} / {ssim_y:.4f}" in row, (name, row)


def test_the_list_has_every_name():
    lines = registry.describe().splitlines()
    assert [line.split()[0] for line in lines] == list(NAMED)
    for line, named in zip(lines, NAMED.values(), strict=True):
        assert f"x{named.scale} " in line
        assert line.endswith(named.purpose)


def test_commands_take_names():
    assert evaluate.parse([]).ckpt == Path("x4")
    assert evaluate.parse(["--ckpt", "x4-scratch"]).ckpt == Path("x4-scratch")
    assert upscale.parse(["a.png"]).ckpt is None
    for option in ("--ckpt", "--model"):
        assert upscale.parse(["a.png", option, "x4-scratch"]).ckpt == Path("x4-scratch")
    arguments = ["--phase=student", "--init", "x4", "--distill.teacher", "x4-scratch"]
    config = train.parse(arguments).config
    assert config.init == Path("x4")
    assert config.distill.teacher == Path("x4-scratch")


def test_upscaler_by_name():
    picture = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    by_name = Upscaler.from_pretrained("x4-scratch")(picture)
    np.testing.assert_array_equal(by_name, Upscaler(find("x4-scratch"))(picture))
    assert not np.array_equal(by_name, Upscaler()(picture))


def test_the_default_depends_on_the_scale():
    assert default_for(None) == default_for(4) == default_for(2.5) == default_for(8) == "x4"
    for scale in (2, 3):
        assert default_for(scale) == default_for(float(scale)) == f"x{scale}"
        assert Upscaler(scale=scale)._model_scale == scale
    assert Upscaler("x4-scratch", scale=2)._model_scale == 4


def test_a_damaged_file_is_not_used(monkeypatch, tmp_path):
    (tmp_path / "x4.safetensors").write_bytes(find("x4").read_bytes()[:-1] + b"?")
    monkeypatch.setattr(registry, "_FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"x4\.safetensors: is not the file named x4"):
        load_weights("x4")


def test_a_file_with_the_name_of_weights(monkeypatch, tmp_path):
    """Neither is silently preferred."""
    monkeypatch.chdir(tmp_path)
    convert(Path("x4-scratch"), tmp_path / "mine.safetensors")
    (tmp_path / "mine.safetensors").rename("x4")
    with pytest.raises(UserError, match=rf"x4: is a name .* there is also {tmp_path}/x4; pass"):
        load_weights("x4")
    load_weights("x4-scratch")


@pytest.fixture
def published(tmp_path):
    """The content of a file to publish."""
    path = tmp_path / "weights.safetensors"
    save_safetensors(DVMSR(ModelConfig(channels=48, rssbs=1), rngs=nnx.Rngs(0)), path)
    return path.read_bytes()


@pytest.fixture
def server(published, tmp_path, monkeypatch):
    """A server that has the file, which `published` names, and an empty cache."""
    monkeypatch.setattr(downloads, "_WAITS", (0, 0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving({"weights.safetensors": published}) as server:
        named = dataclasses.replace(
            NAMED["published"],
            url=f"{server.url}/weights.safetensors",
            sha256=hashlib.sha256(published).hexdigest(),
        )
        monkeypatch.setattr(registry, "NAMED", {"published": named})
        yield server


def folder(tmp_path):
    return tmp_path / "cache" / "dvmsr_jax" / "weights"


def test_published_weights_are_downloaded_once(server, published, tmp_path, capsys):
    path = find("published")
    assert path == folder(tmp_path) / "weights.safetensors"
    assert path.read_bytes() == published
    output = capsys.readouterr()
    assert output.out == ""  # where upscale.py may write a picture
    assert "weights.safetensors: 100%" in output.err
    load_weights("published")
    assert len(server.asked) == 1
    assert [child.name for child in folder(tmp_path).iterdir()] == [path.name]


def test_an_interrupted_download_resumes(server, published, tmp_path, monkeypatch):
    server.cut_after = 100_000
    monkeypatch.setattr(downloads, "_WAITS", ())
    for _ in range(2):
        with pytest.raises(UserError, match=r"lost; .* bytes are kept .* by hand to .*weights"):
            find("published")
    server.cut_after = None
    assert find("published").read_bytes() == published
    assert [first for _, first in server.asked] == [None, 65536, 131072]


def test_ctrl_c(server, tmp_path, monkeypatch):
    def interrupt(self, n=1):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(downloads.tqdm, "update", interrupt)
        with pytest.raises(StoppedError, match="run the same command again"):
            find("published")
    find("published")


def test_another_file_on_the_server(server, published, tmp_path):
    server.contents["weights.safetensors"] = published[:-1] + b"?"
    with pytest.raises(UserError, match=r"its SHA-256 is \w+, expected \w+; the download was rem"):
        find("published")
    assert not list(folder(tmp_path).glob("weights*"))
    server.contents["weights.safetensors"] = published
    assert find("published").read_bytes() == published


def test_a_file_put_there_by_hand(server, published, tmp_path):
    folder(tmp_path).mkdir(parents=True, mode=0o700)
    folder(tmp_path).parent.chmod(0o700)
    path = folder(tmp_path) / "weights.safetensors"
    path.write_bytes(published)
    assert find("published") == path
    path.write_bytes(published[:-1])
    with pytest.raises(UserError, match=rf"{path}: its SHA-256 is .*; replace or remove the file"):
        find("published")
    assert not server.asked


def test_a_mirror(server, published, monkeypatch):
    broken = dataclasses.replace(
        registry.NAMED["published"], url="http://nowhere.invalid/some/weights.safetensors"
    )
    monkeypatch.setattr(registry, "NAMED", {"published": broken})
    with pytest.raises(UserError, match=r"nowhere\.invalid/some/weights\.safetensors: no connect"):
        find("published")
    monkeypatch.setenv(downloads.MIRROR, server.url)
    assert find("published").read_bytes() == published


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_cache_that_cannot_be_written_to(server, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        find("published")


def test_a_cache_that_is_a_file(server, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match=r"in the cache \(.*Not a directory.*\); set XDG"):
        find("published")


def test_the_command_without_a_network(tmp_path):
    """One line on standard error, with the address and what to do."""
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path),
        downloads.MIRROR: "http://127.0.0.1:9/none",
        "NO_PROXY": "127.0.0.1",
    }
    code = (
        "from dvmsr_jax import downloads; downloads._WAITS = ();"
        "from dvmsr_jax.commands import evaluate; evaluate.main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "--ckpt", "published"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: http://127.0.0.1:9/none/team07_DVMSR.pth: no connection")
    assert f"by hand to {tmp_path}/dvmsr_jax/weights/team07_DVMSR.pth" in last
