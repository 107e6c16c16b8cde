"""The page's engine (web/engine.js and dvmsr.wasm) in Node, against the JAX model."""

import functools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from benchmarks.web_engine import node
from dvmsr_jax.config import Compute, ModelConfig
from dvmsr_jax.kernels.wasm.build import PAGE, PROGRAMS, TOOLS, VERSION, build
from dvmsr_jax.pretrained import load_weights, save_safetensors
from tests.conftest import ROOT
from tests.random_weights import random_weights

BANDS = [[1], [5, 1, 20], [100]]
OTHERS = {
    "small": ModelConfig(channels=8, rssbs=2, vimms_per_rssb=1, states=4),
    "odd": ModelConfig(channels=20, rssbs=1, vimms_per_rssb=3, states=5, expand=3, conv_width=5),
    "one tap": ModelConfig(channels=16, rssbs=1, vimms_per_rssb=1, states=1, conv_width=1),
    "long convolution": ModelConfig(channels=5, rssbs=1, vimms_per_rssb=2, conv_width=99),
}


def node_lacks() -> str | None:
    """Why Node cannot run the engine, or None."""
    if shutil.which("node") is None:
        return "needs Node"
    version = subprocess.run(["node", "--version"], capture_output=True, text=True).stdout
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    return None if numbers >= (16, 4) else f"needs Node 16.4, not {version.strip()}"


pytestmark = pytest.mark.skipif(node_lacks() is not None, reason=str(node_lacks()))


def run_node(script, command=None, **variables):
    """The object that a script leaves in `result`; `variables` are constants in it."""
    module = (ROOT / "tests" / "web_engine.mjs").as_uri()
    constants = "".join(f"const {name} = {json.dumps(x)};\n" for name, x in variables.items())
    program = (
        f"import fs from 'node:fs';\n"
        f"import {{ Engine, parseSafetensors, programFile }} from '{module}';\n"
        f"import {{ fileBuffer, makeEngine, upscale, errorOf }} from '{module}';\n"
        f"{constants}let result;\n{script}\nconsole.log(JSON.stringify(result));"
    )
    command = command or node()
    done = subprocess.run(
        [*command, "--input-type=module", "-e", program],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def random_image(h, w):
    return np.random.default_rng(h).random((h, w, 3), np.float32)


def by_jax(weights, image):
    """Upscaled by XLA's code, with nothing of the C++ that the engine shares."""
    return np.asarray(_jitted(weights)(image[None])[0])


@functools.cache
def _jitted(weights):
    return nnx.jit(weights.model(Compute("chunked-carried")))


def by_engine(path, program, sizes_and_bands, folder):
    """Pictures through one engine, one after the other: the upscaled ones, and the scale."""
    pictures = []
    for i, (h, w, bands) in enumerate(sizes_and_bands):
        pixels, upscaled = folder / f"{i}.pixels", folder / f"{i}.upscaled"
        pixels.write_bytes(random_image(h, w).tobytes())
        pictures.append([str(pixels), w, h, bands, str(upscaled)])
    scale = run_node(
        """
        const engine = await makeEngine(weights, program);
        for (const [pixels, width, height, bands, upscaled] of pictures) {
          const rows = new Float32Array(fileBuffer(pixels));
          fs.writeFileSync(upscaled, upscale(engine, rows, width, height, bands));
        }
        result = engine.scale;
        """,
        weights=str(path),
        program=program,
        pictures=pictures,
    )
    upscaled = [
        np.fromfile(folder / f"{i}.upscaled", np.float32).reshape(h * scale, w * scale, 3)
        for i, (h, w, _) in enumerate(sizes_and_bands)
    ]
    return upscaled, scale


def assert_equals_jax(weights, path, program, sizes, folder):
    """In bands of different sizes, which give the same bits."""
    pictures = [(h, w, bands) for h, w in sizes for bands in BANDS]
    upscaled, scale = by_engine(path, program, pictures, folder)
    assert scale == weights.config.scale
    for (h, w, bands), actual in zip(pictures, upscaled, strict=True):
        if bands is BANDS[0]:
            first, expected = actual, by_jax(weights, random_image(h, w))
            assert np.abs(expected).max() < 10  # an error of 1e-5 is one of rounding
        np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(actual, first)


@functools.cache
def chosen(*command):
    """The file of the program that the engine chooses in this Node."""
    return run_node("result = programFile()", command or None)


@pytest.fixture(params=PROGRAMS)
def program(request):
    if request.param not in ("dvmsr.wasm", chosen()):
        pytest.skip("needs Node with relaxed SIMD")
    return request.param


def test_the_fastest_program_is_chosen():
    for command in (["node"], node()):
        relaxed = run_node(
            "result = WebAssembly.validate(fs.readFileSync(file))",
            command,
            file=str(PAGE / "dvmsr-relaxed.wasm"),
        )
        assert chosen(*command) == ("dvmsr-relaxed.wasm" if relaxed else "dvmsr.wasm")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("x2", [(37, 53)]), ("x3", [(37, 53)]), ("x4", [(1, 1), (37, 53), (64, 64)])],
)
def test_equals_the_model(name, sizes, program, tmp_path):
    path = ROOT / "checkpoints" / f"{name}.safetensors"
    assert_equals_jax(load_weights(path), path, program, sizes, tmp_path)


@pytest.mark.parametrize("name", OTHERS)
def test_networks_of_other_sizes(name, program, tmp_path):
    weights, path = random_weights(OTHERS[name]), tmp_path / "weights.safetensors"
    save_safetensors(weights.model(), path)
    assert_equals_jax(weights, path, program, [(9, 11), (3, 200)], tmp_path)


def test_stages_give_the_same_bits(program):
    """However many there are, for narrow and wide pictures, after one that was given up."""
    all_equal = run_node(
        """
        result = true;
        for (const [width, height] of [[1, 30], [37, 23], [1100, 3]]) {
          const pixels = new Float32Array(width * height * 3).map((_, i) => (i * 7 % 11) / 11);
          const expected = upscale(await makeEngine(weights, program), pixels, width, height, [4]);
          for (const count of [2, 3, 4]) {
            const stages = [];
            while (stages.length < count) {
              stages.push(await makeEngine(weights, program, stages.length, count));
            }
            for (const stage of stages) {
              stage.start(5, 5);
              stage.start(width, height);
            }
            const parts = [];
            for (let first = 0; first < height; first += 3) {
              let rows = pixels.subarray(first * width * 3, (first + 3) * width * 3);
              for (const stage of stages) rows = stage.push(rows);
              parts.push(Buffer.from(rows.buffer));
            }
            result &&= Buffer.concat(parts).equals(expected);
          }
        }
        """,
        weights=str(ROOT / "checkpoints" / "x4.safetensors"),
        program=program,
    )
    assert all_equal is True


@pytest.fixture
def small(tmp_path):
    """Weights of a small network."""
    path = tmp_path / "small.safetensors"
    save_safetensors(random_weights(OTHERS["small"]).model(), path)
    return path


def test_pictures_do_not_affect_each_other(small):
    """Neither those before, nor one that was given up."""
    alone, after_others = run_node(
        """
        const pixels = new Float32Array(23 * 31 * 3).map((_, i) => (i * 7 % 11) / 11);
        const alone = upscale(await makeEngine(weights), pixels, 23, 31, [8]);
        const engine = await makeEngine(weights);
        upscale(engine, pixels, 31, 23, [4]);
        engine.start(7, 10);
        engine.push(pixels.subarray(0, 7 * 3 * 9));
        result = [alone, upscale(engine, pixels, 23, 31, [8])].map((x) => x.toString("hex"));
        """,
        weights=str(small),
    )
    assert alone == after_others


def test_memory_is_reused_and_bounded():
    """40 MB for what 8,000 columns leave for the rows below, and half as much again."""
    megabytes = run_node(
        """
        const { Instance } = WebAssembly;
        let memory;
        WebAssembly.Instance = function (module) {
          const instance = new Instance(module);
          memory = instance.exports.memory;
          return instance;
        };
        const engine = await makeEngine(weights);
        result = [];
        for (const [width, height] of [[8000, 1], [64, 3], [8000, 1], [1, 300]]) {
          upscale(engine, new Float32Array(width * height * 3), width, height, [3]);
          result.push(memory.buffer.byteLength / 1e6);
        }
        """,
        weights=str(ROOT / "checkpoints" / "x4.safetensors"),
    )
    assert len(set(megabytes)) == 1
    assert megabytes[0] < 80


def test_misuse_leaves_the_engine_usable(small):
    """Also after memory has run out, when it needs a new program."""
    messages, equal, programs = run_node(
        """
        const { Instance } = WebAssembly;
        let programs = 0;
        WebAssembly.Instance = function (module) {
          ++programs;
          return new Instance(module);
        };
        const engine = await makeEngine(weights);
        const pixels = new Float32Array(4 * 5 * 3).fill(0.5);
        const before = upscale(engine, pixels, 4, 5, [5]);
        const messages = [];
        for (const misuse of [
          () => engine.push(pixels),
          () => engine.start(0, 5),
          () => engine.start(4, 2.5),
          () => engine.start(2 ** 30, 1),
          () => { engine.start(4, 5); engine.push(pixels.subarray(1)); },
          () => { engine.start(4, 4); engine.push(pixels); },
          () => { engine.start(4, 5); engine.push(pixels); engine.push(pixels); },
        ]) messages.push(await errorOf(misuse));
        result = [messages, before.equals(upscale(engine, pixels, 4, 5, [2])), programs];
        """,
        weights=str(small),
    )
    assert messages == [
        "Error: no picture has been started",
        "RangeError: there is no picture of 0 x 5 pixels",
        "RangeError: there is no picture of 4 x 2.5 pixels",
        "Error: there is not enough memory for this picture",
        "RangeError: 59 numbers are not whole rows of 12",
        "RangeError: the picture has only 4 rows",
        "Error: no picture has been started",
    ]
    assert equal
    assert programs == 2


def damaged_files(small):
    """(file contents, what the error says)"""
    good = small.read_bytes()
    header_end = 8 + int.from_bytes(good[:8], "little")
    with safetensors.safe_open(small, "numpy") as file:
        metadata = file.metadata()
    arrays = safetensors.numpy.load(good)
    config = json.loads(metadata["config"])

    def saved(changes=(), metadata=metadata):
        return safetensors.numpy.save(arrays | dict(changes), metadata)

    def configured(**changes):
        return saved(metadata={"config": json.dumps(config | changes)})

    bias = arrays["conv_first.bias"]
    fewer = {name: x for name, x in arrays.items() if name != "conv_first.bias"}
    return [
        (b"", "not a .safetensors file"),
        (b"<!doctype html><title>Not found</title>", "not a .safetensors file"),
        (good[: header_end - 1], "not a .safetensors file"),
        (good[:8] + b"x" + good[9:], "header of this .safetensors file is damaged"),
        (good[:-1], "cut off"),
        (good + b"x", "left over"),
        (good.replace(b'"F32"', b'"I32"', 1), "holds numbers of type I32"),
        (good.replace(b'"shape":[8]', b'"shape":[9]', 1), "entry in the header is damaged"),
        (safetensors.numpy.save(fewer, metadata), "conv_first.bias is missing"),
        (saved({"conv_first.bias": bias[1:]}), "conv_first.bias has shape (7), expected (8)"),
        (saved({"conv_first.bias": bias * np.nan}), "conv_first.bias holds numbers that are not f"),
        (saved({"other": bias}), "other is not part of the network"),
        (saved(metadata={}), "no configuration"),
        (saved(metadata={"config": "{"}), "configuration in the metadata is not that of a DVMSR"),
        (configured(states=0), "configuration in the metadata is not that of a DVMSR"),
        (configured(rssbs=10**12), "rssbs.2.vimms.0.norm.scale is missing"),
        (configured(bidirectional=True), "bidirectional"),
    ]


def test_damaged_weights_are_errors(small, tmp_path):
    cases = damaged_files(small)
    paths = [tmp_path / f"{i}.safetensors" for i in range(len(cases))]
    for path, (contents, _) in zip(paths, cases, strict=True):
        path.write_bytes(contents)
    messages = run_node(
        """
        result = [];
        for (const path of paths) result.push(await errorOf(() => makeEngine(path)));
        """,
        paths=[str(path) for path in paths],
    )
    for message, (_, expected) in zip(messages, cases, strict=True):
        assert message.startswith("Error: ")
        assert expected in message


def test_all_types_of_floats(tmp_path):
    """Including infinities, zeros of both signs and the smallest numbers."""
    import ml_dtypes

    numbers = np.array([0.0, -0.0, 1.5, -(2.0**-24), 6e-5, 65504, np.inf, -np.inf, 0.1, 1e-40])
    path = tmp_path / "floats.safetensors"
    with np.errstate(over="ignore"):
        arrays = {t: numbers.astype(t) for t in ("float64", "float32", "float16")}
    arrays["bfloat16"] = numbers.astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file(arrays, path, {"key": "value"})
    metadata, tensors = run_node(
        """
        const { metadata, tensors } = parseSafetensors(fileBuffer(path));
        result = [metadata, [...tensors].map(([name, { shape, data }]) => {
          return [name, shape, [...new Uint32Array(data.buffer)]];
        })];
        """,
        path=str(path),
    )
    assert metadata == {"key": "value"}
    assert len(tensors) == 4
    for name, shape, bits in tensors:
        assert shape == [10]
        assert bits == arrays[name].astype(np.float32).view(np.uint32).tolist()


def test_the_programs_are_what_their_sources_compile_to(tmp_path):
    for tool in TOOLS:
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
        found = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
        if VERSION not in found.split():
            pytest.skip(f"needs {tool} {VERSION}, not {found.splitlines()[0]}")
    build(tmp_path)
    for name in PROGRAMS:
        assert (tmp_path / name).read_bytes() == (PAGE / name).read_bytes()
