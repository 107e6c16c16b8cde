"""The programs in docs/deploying.md run as they are, and give the model's result."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from dvmsr_jax import images
from dvmsr_jax.config import ModelConfig
from dvmsr_jax.export import export
from dvmsr_jax.model import DVMSR
from dvmsr_jax.pictures.upscaler import Upscaler
from dvmsr_jax.pretrained import save_safetensors

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/deploying.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
PACKAGES = ("onnx", "onnxruntime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A photograph, weights, and what JAX makes of them."""
    folder = tmp_path_factory.mktemp("deploying")
    config = ModelConfig(channels=8, rssbs=2, vimms_per_rssb=1, states=4)
    save_safetensors(DVMSR(config, rngs=nnx.Rngs(0)), folder / "tiny.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (37, 29, 3), np.uint8)
    images.write_png(folder / "photo.png", pixels)
    images.write_png(folder / "expected.png", Upscaler(folder / "tiny.safetensors")(pixels))
    return folder


@pytest.mark.parametrize("program", PROGRAMS, ids=["onnx", "OnnxUpscaler", "stablehlo"])
def test_programs(program, folder):
    (name,) = re.findall(r'"(x4\.\w+)"', program)
    if name.endswith(".onnx"):
        for package in PACKAGES:
            pytest.importorskip(package, reason=f"needs the package {package}")
    if not (folder / name).exists():
        export(folder / "tiny.safetensors", folder / name)
    (folder / "photo_x4.png").unlink(missing_ok=True)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, check=True)
    large, expected = (images.read_rgb(folder / f"{x}.png") for x in ("photo_x4", "expected"))
    assert large.shape == expected.shape
    assert (large == expected).mean() > 0.999
    assert np.abs(large.astype(int) - expected).max() <= 1
