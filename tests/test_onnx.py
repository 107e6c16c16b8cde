"""Exported ONNX files on ONNX Runtime, against the model."""

import dataclasses
import functools
import json
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dvmsr_jax import images
from dvmsr_jax.bands import Band
from dvmsr_jax.commands import upscale
from dvmsr_jax.config import ModelConfig
from dvmsr_jax.configs import PRESETS
from dvmsr_jax.errors import UserError
from dvmsr_jax.export import export, to_onnx
from dvmsr_jax.model import DVMSR
from dvmsr_jax.onnx import OnnxUpscaler
from dvmsr_jax.onnx.upscaler import make_streamer
from dvmsr_jax.pictures.upscaler import Upscaler
from dvmsr_jax.pretrained import load_weights, save_safetensors

onnx = pytest.importorskip("onnx", reason="needs the package onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")

from dvmsr_jax.onnx import network  # noqa: E402  needs onnx
from tests.random_weights import random_weights  # noqa: E402

SIZES = [(1, 1), (37, 53), (64, 64)]
TINY = ModelConfig(channels=8, rssbs=2, vimms_per_rssb=1, states=4)
OTHERS = {
    **{
        f"{run.model.channels} channels": run.model
        for phases in PRESETS.values()
        for run in phases.values()
    },
    "odd": ModelConfig(channels=20, rssbs=1, vimms_per_rssb=3, states=5, expand=3, conv_width=5),
    "one tap": dataclasses.replace(TINY, conv_width=1),
}


@functools.cache
def expected(config, h, w):
    """The upscaled picture, by JAX."""
    model = random_weights(config).model()
    return np.asarray(nnx.jit(model)(random_image(h, w)[None])[0])


def random_image(h, w):
    return np.random.default_rng(h).random((h, w, 3), np.float32)


def session_of(model):
    return onnxruntime.InferenceSession(model.SerializeToString())


@functools.cache
def plain(config):
    return session_of(network.plain_model(random_weights(config).model()))


@functools.cache
def streaming(config):
    return session_of(network.streaming_model(random_weights(config).model()))


def run_plain(session, image):
    (upscaled,) = session.run(["upscaled"], {"image": image.transpose(2, 0, 1)[None]})
    return upscaled[0].transpose(1, 2, 0)


def run_bands(config, image, band_rows):
    return list(make_streamer(streaming(config), band_rows=band_rows)(image))


def assert_equals_jax(config, h, w, band_rows):
    image, of_jax = random_image(h, w), expected(config, h, w)
    assert np.abs(of_jax).max() < 10  # an error of 1e-5 is one of rounding
    np.testing.assert_allclose(run_plain(plain(config), image), of_jax, atol=1e-5, rtol=0)
    bands = np.concatenate(run_bands(config, image, band_rows))
    np.testing.assert_allclose(bands, of_jax, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("h", "w"), SIZES)
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_pictures_of_any_size(scale, h, w):
    assert_equals_jax(dataclasses.replace(TINY, scale=scale), h, w, band_rows=h + 100)  # one band


@pytest.mark.parametrize("name", OTHERS)
def test_presets_and_other_shapes(name):
    assert_equals_jax(OTHERS[name], 9, 11, band_rows=4)


@pytest.mark.parametrize("band_rows", [1, 3, 8, 36])
@pytest.mark.parametrize("h", [1, 8, 37])
def test_bands(h, band_rows):
    bands = run_bands(TINY, random_image(h, 17), band_rows)
    assert all(len(band) <= band_rows * TINY.scale for band in bands)
    np.testing.assert_allclose(np.concatenate(bands), expected(TINY, h, 17), atol=1e-5, rtol=0)


def test_bands_of_different_heights_and_values_outside():
    """A program may cut a picture as it likes, and pass anything after the last row."""
    config, image, late = TINY, random_image(20, 5), TINY.rssbs + 3
    outside = np.full((late, 5, 3), np.nan, np.float32)
    rows = np.concatenate([image, outside]).transpose(2, 0, 1)[None]
    session = streaming(config)
    carried = {
        x.name: np.zeros([5 if size == "width" else size for size in x.shape], np.float32)
        for x in session.get_inputs()[3:]
    }
    upscaled = []
    for first, end in [(0, 1), (1, 12), (12, 14), (14, 20 + late)]:
        inputs = {"rows": rows[:, :, first:end], "first": np.array([first]), **carried}
        names = [x.name for x in session.get_outputs()]
        results = dict(
            zip(names, session.run(None, {**inputs, "height": np.array([20])}), strict=True)
        )
        carried = {name: results[f"{name}.next"] for name in carried}
        upscaled.append(results["upscaled"])
    result = np.concatenate(upscaled, axis=2)[0, :, late * config.scale :].transpose(1, 2, 0)
    np.testing.assert_allclose(result, expected(config, 20, 5), atol=1e-5, rtol=0)


def test_distant_rows_affect_the_result():
    """This makes the tests above sharp: the first row has an effect at the bottom."""
    image = random_image(37, 17)
    changed = image.copy()
    changed[0] = 0
    before, after = (np.concatenate(run_bands(TINY, x, 8)) for x in (image, changed))
    assert np.abs(after - before)[-4:].max() > 1e-4


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_bidirectional_models_are_plain(h, w):
    config = dataclasses.replace(TINY, bidirectional=True)
    upscaled = run_plain(plain(config), random_image(h, w))
    np.testing.assert_allclose(upscaled, expected(config, h, w), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"bidirectional .* add --plain"):
        network.streaming_model(random_weights(config).model())


@pytest.mark.parametrize("weights", ["x2", "x3", "x4", "x4-real"])
def test_the_projects_own_weights(weights):
    image = random_image(37, 53)
    whole = np.asarray(nnx.jit(load_weights(weights).model())(image[None])[0])
    upscaled = run_plain(onnxruntime.InferenceSession(to_onnx(weights, plain=True)), image)
    np.testing.assert_allclose(upscaled, whole, atol=1e-5, rtol=0)
    stream = make_streamer(onnxruntime.InferenceSession(to_onnx(weights)), band_rows=16)
    np.testing.assert_allclose(np.concatenate([*stream(image)]), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [network.plain_model, network.streaming_model])
def test_only_standard_operators(make):
    model = make(random_weights(TINY).model())
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    assert {node.domain for node in model.graph.node} == {""}


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_shape_inference_finds_the_scale(scale):
    """Programs such as chaiNNer infer it from the output's size for a given input's."""
    model = network.plain_model(random_weights(dataclasses.replace(TINY, scale=scale)).model())
    for axis, size in ((2, 16), (3, 32)):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    sizes = [size.dim_value for size in inferred.graph.output[0].type.tensor_type.shape.dim]
    assert sizes == [1, 3, 16 * scale, 32 * scale]


def test_carried_arrays_are_those_of_the_model():
    """Their names and sizes."""
    band = Band(jnp.array(0), jnp.array(8), jnp.array(5), 5, None)
    nnx.eval_shape(lambda: DVMSR(TINY, rngs=nnx.Rngs(0))(jnp.zeros((1, 2, 5, 3)), band=band))
    inputs, outputs = streaming(TINY).get_inputs(), streaming(TINY).get_outputs()
    sizes = {
        x.name: np.prod([5 if size == "width" else size for size in x.shape]) for x in inputs[3:]
    }
    assert sizes == {name: x.size for name, x in band.left.items()}
    assert [f"{x.name}.next" for x in inputs[3:]] == [x.name for x in outputs if "." in x.name]
    student = network.streaming_model(random_weights(ModelConfig()).model())
    assert len(student.graph.input) == 3 + 28


def test_files_say_how_to_use_them():
    for session, facts in (
        (plain(TINY), {"graph": "plain", "scale": "4"}),
        (streaming(TINY), {"graph": "streaming", "scale": "4", "rows_late": "5"}),
    ):
        found = session.get_modelmeta()
        metadata = found.custom_metadata_map
        assert ModelConfig(**json.loads(metadata.pop("config"))) == TINY
        assert metadata == facts
        for x in (*session.get_inputs()[:3], session.get_outputs()[0]):
            assert re.search(rf'^{x.name} |"{x.name}"', found.description, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """TINY in three forms: weights, an .onnx file, and a plain one."""
    folder = tmp_path_factory.mktemp("onnx")
    save_safetensors(random_weights(TINY).model(), folder / "tiny.safetensors")
    export(folder / "tiny.safetensors", folder / "tiny.onnx")
    export(folder / "tiny.safetensors", folder / "plain.onnx", plain=True)
    return folder


@pytest.mark.parametrize("options", [{}, {"scale": 2.5}, {"self_ensemble": True}])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_equal_those_of_jax(folder, channels, options):
    picture = np.random.default_rng(0).integers(0, 256, (20, 13, channels), np.uint8)
    ours = OnnxUpscaler(folder / "tiny.onnx", **options)(picture)
    theirs = Upscaler(folder / "tiny.safetensors", **options)(picture)
    assert ours.shape == theirs.shape
    assert (ours == theirs).mean() > 0.999
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_weights_are_exported_in_memory(folder):
    picture = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    by_file, by_weights = (
        OnnxUpscaler(folder / name)(picture) for name in ("tiny.onnx", "tiny.safetensors")
    )
    np.testing.assert_array_equal(by_file, by_weights)
    assert OnnxUpscaler(scale=3).scale == 3
    assert OnnxUpscaler("x2").scale == 2


def test_upscaling_needs_neither_jax_nor_onnx(folder):
    code = f"""
import sys
import numpy as np
from dvmsr_jax.onnx import OnnxUpscaler
large = OnnxUpscaler({str(folder / "tiny.onnx")!r})(np.zeros((3, 5, 3), np.uint8))
assert large.shape == (12, 20, 3)
assert not {{"jax", "onnx", "flax"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bad_files_are_refused(folder, tmp_path):
    other = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1] x) => (float[1] y) { y = Neg(x) }'
    )
    (tmp_path / "other.onnx").write_bytes(other.SerializeToString())
    (tmp_path / "damaged.onnx").write_bytes((folder / "tiny.onnx").read_bytes()[:1000])
    for path, message in (
        (tmp_path / "none.onnx", "no such file"),
        (tmp_path / "other.onnx", r"was not made by dvmsr export"),
        (tmp_path / "damaged.onnx", "ONNX Runtime cannot load it"),
        (folder / "plain.onnx", "whole pictures only; export it without --plain"),
    ):
        with pytest.raises(UserError, match=rf"{path.name}: .*{message}"):
            OnnxUpscaler(path)


def test_upscale_py(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    images.write_png("a.png", pixels)
    by_file, by_weights = str(folder / "tiny.onnx"), str(folder / "tiny.safetensors")
    for name, options in (
        ("file", ["--model", by_file]),
        ("weights", ["--model", by_weights, "--backend", "onnx"]),
        ("jax", ["--model", by_weights]),
    ):
        assert upscale.run(upscale.parse(["a.png", "-o", f"{name}.png", *options])) == 0
    of_jax = images.read_rgb("jax.png")
    for name in ("file", "weights"):
        assert (images.read_rgb(f"{name}.png") == of_jax).mean() > 0.999
    for options, message in (
        (["--model", by_file, "--tile", "64"], "--tile has no effect on ONNX Runtime"),
        (["--backend", "onnx", "--precision", "bfloat16"], "--precision has no effect"),
        (["--model", by_file, "--backend", "jax"], r"tiny\.onnx: needs --backend onnx"),
    ):
        with pytest.raises(UserError, match=message):
            upscale.run(upscale.parse(["a.png", *options]))


def test_nothing_is_overwritten(folder):
    before = (folder / "tiny.onnx").read_bytes()
    with pytest.raises(UserError, match=r"tiny\.onnx: already exists"):
        export(folder / "tiny.safetensors", folder / "tiny.onnx")
    with pytest.raises(UserError, match=r"name must end in \.onnx or"):
        export(folder / "tiny.safetensors", folder / "tiny.pb")
    assert (folder / "tiny.onnx").read_bytes() == before


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_packages_are_named(package, folder, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("dvmsr_jax.onnx.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("dvmsr_jax.onnx.network")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf"{package} is not installed: pip install .dvmsr-jax\[onnx\]"
    ):
        OnnxUpscaler(folder / "tiny.safetensors")
