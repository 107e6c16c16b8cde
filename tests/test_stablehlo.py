"""The exported StableHLO program, loaded again, against the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvmsr_jax import inference
from dvmsr_jax.config import ModelConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.export import export
from dvmsr_jax.model import Weights, parameter_shapes
from dvmsr_jax.pretrained import save_safetensors

TINY = ModelConfig(scale=3, channels=8, rssbs=2, vimms_per_rssb=1, states=4)
ROWS, COLUMNS = 6, 20


def random_weights(config):
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(config).items()
    return Weights(config, {name: np.float32(rng.normal(size=x) * 0.2) for name, x in shapes})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("stablehlo") / "tiny.safetensors"
    save_safetensors(random_weights(TINY).model(), path)
    return path


@pytest.fixture(scope="module")
def program(weights):
    """The program, read from its file."""
    path = weights.with_name("tiny.stablehlo")
    export(weights, path, rows=ROWS, columns=COLUMNS)
    return jax.export.deserialize(bytearray(path.read_bytes()))


@pytest.mark.parametrize(("h", "w"), [(1, 1), (13, 20), (37, 17)])
def test_bands_equal_the_model(program, h, w):
    image = np.random.default_rng(0).random((h, w, 3), np.float32)
    arguments, _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    carried = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), arguments[0])
    step = jax.jit(program.call)
    bands, end = [], 0
    while end < h:
        rows = np.full((ROWS, COLUMNS, 3), 7, np.float32)  # any values outside the picture
        first = len(bands) * ROWS
        part = image[first : first + ROWS]
        rows[: len(part), :w] = part
        carried, upscaled, place = step(carried, rows, *np.int32([first, h, w]))
        bands.append(upscaled)
        end = int(place) + ROWS
    late = len(bands) * ROWS - end
    result = np.concatenate(bands)[3 * late : 3 * (late + h), : 3 * w]
    whole = inference.make_whole(random_weights(TINY).model())(image[None])[0]
    np.testing.assert_allclose(result, whole, atol=1e-5, rtol=0)


def test_it_is_portable(program):
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert "custom_call" not in program.mlir_module()


def test_mistakes_are_named(weights, tmp_path):
    both = random_weights(dataclasses.replace(TINY, bidirectional=True))
    save_safetensors(both.model(), tmp_path / "both.safetensors")
    for source, name, options, message in (
        (weights, "a.stablehlo", {"plain": True}, "--plain is for ONNX only"),
        (weights, "a.onnx", {"rows": 3}, "--rows and --columns are for StableHLO"),
        (weights, "a.stablehlo", {"rows": 0}, "at least one row and one column, not 0 and 256"),
        (weights, "a.mlir", {}, r"name must end in \.onnx or \.stablehlo"),
        (tmp_path / "both.safetensors", "a.stablehlo", {}, "bidirectional"),
    ):
        with pytest.raises(UserError, match=message):
            export(source, tmp_path / name, **options)
    assert not (tmp_path / "a.stablehlo").exists()
