"""The wheel: what it contains, and that it works where nothing else is installed."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dvmsr_jax import Upscaler, images
from dvmsr_jax.kernels.selective_scan import native
from dvmsr_jax.registry import NAMED

ROOT = Path(__file__).resolve().parents[1]
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")


def call(*words, **options):
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, because building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    copied = {"dvmsr_jax", "kernels", "configs", "checkpoints", "web"}
    copied |= {"pyproject.toml", "README.md", "LICENSE", "NOTICE"}
    others = {path.name for path in ROOT.iterdir()} - copied

    def ignored(parent, names):
        return others if parent == str(ROOT) else {"__pycache__"}

    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=ignored)
    done = subprocess.run(
        [sys.executable, *PIP, "wheel", "--no-deps", "-w", folder, folder / "source"],
        capture_output=True,
        text=True,
    )
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("needs the package index")
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_it_contains_the_package_and_no_other(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {
        "dvmsr_jax",
        "dvmsr_jax-0.1.0.dist-info",
    }
    shipped = [name for name, named in NAMED.items() if named.url is None]
    assert {f"dvmsr_jax/checkpoints/{name}.safetensors" for name in shipped} <= {*names}
    sources = {
        f"dvmsr_jax/{path.relative_to(ROOT)}"
        for path in (ROOT / "kernels").rglob("*")
        if path.suffix in (".py", ".h", ".cc")
    }
    assert sources
    assert sources <= {*names}
    files = (path for path in (ROOT / "web").iterdir() if path.is_file())
    page = {f"dvmsr_jax/page/{path.name}" for path in files}
    assert "dvmsr_jax/page/dvmsr.wasm" in page
    assert page <= {*names}
    presets = {f"dvmsr_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert presets <= {*names}


def test_it_upscales_where_nothing_else_is_installed(wheel, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    call(python, *PIP, "install", wheel)
    listed = call(python, *PIP, "list", "--format=freeze").lower()
    for package in ("tensorflow", "grain", "tensorboard", "triton", "matplotlib", "scikit-image"):
        assert package not in listed

    pictures = tmp_path / "pictures"
    image = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    images.write_png(pictures / "photo.png", image)
    options = {
        "cwd": pictures,
        "env": {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(tmp_path / "cache")},
    }
    dvmsr = environment / "bin" / "dvmsr"
    call(dvmsr, "upscale", "photo.png", **options)
    large = images.read_rgb(pictures / "photo_x4.png").astype(int)
    assert np.abs(large - Upscaler()(image)).max() <= 1  # the tests compile otherwise
    if native.missing() is None:
        assert {path.name.partition("_")[0] for path in (tmp_path / "cache").rglob("*.so")} == {
            "vimm",
            "conv3x3",
        }

    assert "x4-real" in call(dvmsr, "weights", **options)
    call(dvmsr, "convert", "x4", "copy.safetensors", **options)
    call(dvmsr, "export", "x4", "copy.stablehlo", **options)
    call(dvmsr, "web", "--output", "site", **options)
    assert (pictures / "site" / "weights" / "x4.safetensors").exists()
    assert call(dvmsr, "--version", **options).strip() == "0.1.0"
    for command, extra in [("train", "train"), ("evaluate", "train"), ("data", "train")]:
        done = subprocess.run([dvmsr, command], capture_output=True, text=True, **options)
        assert done.returncode == 1
        assert f'pip install "dvmsr-jax[{extra}]"' in done.stderr
        assert "Traceback" not in done.stderr


def test_importing_it_imports_no_jax():
    program = "import sys, dvmsr_jax; print('jax' in sys.modules)"
    assert call(sys.executable, "-c", program, cwd=ROOT).strip() == "False"
