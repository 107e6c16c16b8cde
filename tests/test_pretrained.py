"""Published weights run unchanged; files that are not what they claim are refused, and not run."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dvmsr_jax.config import ModelConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.model import DVMSR, named_parameters
from dvmsr_jax.pretrained import PretrainedError, convert, load_model, save_safetensors
from dvmsr_jax.pth import UnsafeFileError, read_pth

ROOT = Path(__file__).resolve().parents[1]
TINY = ModelConfig(channels=8, rssbs=1, vimms_per_rssb=1, states=4)


# The published weights.


@pytest.fixture(scope="module")
def published(shared):
    return load_model(shared / "reference" / "team07_DVMSR.pth")


def test_published_configuration(published):
    assert published.config == ModelConfig()


def test_published_activations(published, shared):
    expected = np.load(shared / "reference" / "team07_activations.npz")
    image = jnp.asarray(expected["lr_uint8"][None], jnp.float32) / 255

    @jax.jit
    def run(image):
        output, features = published.with_features(image)
        tokens = published.norm_first(features.shallow).reshape(1, -1, 60)
        vimm = published.rssbs[0].vimms[0]
        return output, {
            "conv_first": features.shallow,
            "rssb0_vimm0_norm": vimm.norm(tokens),
            "rssb0_vimm0": vimm(tokens),
            **{f"rssb{i}": x for i, x in enumerate(features.rssbs)},
            "conv_after_body": features.body,
        }

    output, activations = run(image)
    assert np.abs(output[0] - expected["sr"]).max() < 1e-5
    assert activations.keys() == set(expected.files) - {"lr_uint8", "sr"}
    for name, actual in activations.items():
        target = expected[name]
        difference = np.abs(np.asarray(actual).reshape(target.shape) - target).max()
        assert difference < 1e-4 * np.abs(target).max(), name


def test_published_weights_survive_conversion(published, shared, tmp_path):
    target = tmp_path / "out" / "converted.safetensors"
    convert(shared / "reference" / "team07_DVMSR.pth", target)
    converted = named_parameters(load_model(target))
    for name, value in named_parameters(published).items():
        np.testing.assert_array_equal(converted[name], value)


# A .pth written by hand: what torch.save writes, and what it never would.


class Storage:
    """Pickled as torch pickles a storage: by its type, key and size."""

    def __init__(self, kind, key, size):
        self.pid = ("storage", kind, key, "cpu", size)


class Name:
    """Pickled as the global MODULE.NAME, whether there is one or not."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickled as a call of a `Name`, and optionally an assignment of attributes to the result."""

    def __init__(self, function, *arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state


class Pickler(pickle._Pickler):
    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Storage) else None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Name):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
            if obj.state is not None:
                self.save(obj.state)
                self.write(pickle.BUILD)
        else:
            super().save(obj, save_persistent_id)


REBUILD = Name("torch._utils", "_rebuild_tensor_v2")


def tensor(size, shape, strides, *, offset=0, kind="FloatStorage", key="0"):
    storage = Storage(Name("torch", kind), key, size)
    return Call(
        REBUILD, storage, offset, shape, strides, False, Call(Name("collections", "OrderedDict"))
    )


def write_pth(path, contents, storages=(), compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    Pickler(stream, 2).dump(contents)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/byteorder", b"little")
        for key, storage in enumerate(storages):
            archive.writestr(f"archive/data/{key}", storage.tobytes())
    return path


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("FloatStorage", np.float32),
        ("DoubleStorage", np.float64),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
    ],
)
def test_tensors_are_read(tmp_path, kind, dtype):
    storage = np.arange(8).astype(dtype)
    contents = {
        "plain": tensor(8, (2, 4), (4, 1), kind=kind),
        "turned": [3, tensor(8, (3, 2), (1, 4), offset=1, kind=kind)],
    }
    read = read_pth(write_pth(tmp_path / "x.pth", contents, [storage]))
    np.testing.assert_array_equal(read["plain"], storage.reshape(2, 4))
    np.testing.assert_array_equal(read["turned"][1], storage.reshape(2, 4)[:, 1:].T)
    assert read["plain"].dtype == dtype


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("numpy", "load"),
        ("torch.nn", "Linear"),
    ],
)
def test_other_names_are_refused_and_not_run(tmp_path, module, name):
    proof = tmp_path / "proof"
    command = f"touch {proof}" if module == "os" else f"open({str(proof)!r}, 'w')"
    path = write_pth(tmp_path / "evil.pth", {"a": Call(Name(module, name), command)})
    with pytest.raises(UnsafeFileError, match=rf"evil\.pth: refused, it names {module}\.{name}"):
        read_pth(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    "bad",
    [
        tensor(8, (9,), (1,)),
        tensor(8, (2, 4), (5, 1)),
        tensor(8, (4,), (1,), offset=5),
        tensor(8, (4,), (-1,), offset=7),
        tensor(8, (-4,), (1,)),
        tensor(8, (10**9, 10**9), (0, 0)),
        tensor(8, (4, 2), (1,)),
        tensor(9, (4,), (1,)),
        tensor(8, (4,), (1,), key="1"),
        tensor(8, (4,), (1,), key="../0"),
        tensor(8, (4,), (1,), kind="QInt8Storage"),
        Call(REBUILD, "storage", 0, (1,), (1,)),
    ],
    ids=range(12),
)
def test_impossible_tensors_are_refused(tmp_path, bad):
    path = write_pth(tmp_path / "bad.pth", {"a": bad}, [np.arange(8, dtype=np.float32)])
    with pytest.raises(UnsafeFileError, match=r"bad\.pth"):
        read_pth(path)


def test_attributes_cannot_be_set(tmp_path):
    """Except a state_dict's own, which torch notes its versions in."""
    versions = Call(Name("collections", "OrderedDict"), state={"_metadata": {"version": 1}})
    assert read_pth(write_pth(tmp_path / "a.pth", versions)) == OrderedDict()

    stream = io.BytesIO()
    Pickler(stream, 2).dump(REBUILD)
    built = stream.getvalue()[:-1] + pickle.dumps({"__call__": 1}, 2)[2:-1] + pickle.BUILD + b"."
    path = tmp_path / "b.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", built)
    with pytest.raises(UnsafeFileError, match=r"b\.pth"):
        read_pth(path)


def test_files_that_are_something_else(tmp_path):
    compressed = write_pth(
        tmp_path / "bomb.pth",
        {"a": tensor(10**6, (10**6,), (1,))},
        [np.zeros(10**6, np.float32)],
        zipfile.ZIP_DEFLATED,
    )
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    (tmp_path / "legacy.pth").write_bytes(pickle.dumps({"a": 1}, 2))
    (tmp_path / "empty.pth").write_bytes(b"")
    for path in (compressed, *(tmp_path / f"{name}.pth" for name in ("other", "legacy", "empty"))):
        with pytest.raises(UnsafeFileError, match=path.name):
            read_pth(path)


def test_damage_is_refused_or_harmless(tmp_path):
    """Cut anywhere or with any byte changed, a file is refused by name or read: nothing else."""
    storage = np.arange(8, dtype=np.float32)
    path = write_pth(tmp_path / "x.pth", {"a": tensor(8, (2, 4), (4, 1))}, [storage])
    whole = path.read_bytes()

    def refusal(content):
        path.write_bytes(content)
        try:
            read_pth(path)
        except UnsafeFileError as error:
            return str(error)
        return ""

    assert all("x.pth" in refusal(whole[:length]) for length in range(0, len(whole), 7))
    rng = np.random.default_rng(0)
    refusals = []
    for _ in range(1000):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        refusals.append(refusal(damaged))
    assert all("x.pth" in message for message in refusals if message)
    assert sum(map(bool, refusals)) > 300


def test_weights_that_do_not_fit_are_named(tmp_path):
    storage = [np.zeros(8, np.float32)]
    other = write_pth(tmp_path / "other.pth", {"fc.weight": tensor(8, (2, 4), (4, 1))}, storage)
    with pytest.raises(PretrainedError, match=r"other\.pth: holds fc\.weight, which is not part"):
        load_model(other)
    part = write_pth(tmp_path / "part.pth", {"conv_first.bias": tensor(8, (8,), (1,))}, storage)
    with pytest.raises(PretrainedError, match=r"part\.pth: .*is missing"):
        load_model(part)
    number = write_pth(tmp_path / "number.pth", {"epoch": 3})
    with pytest.raises(PretrainedError, match=r"number\.pth: does not hold"):
        load_model(number)


# Our own files.


@pytest.fixture
def tiny(tmp_path):
    model = DVMSR(TINY, rngs=nnx.Rngs(0))
    path = tmp_path / "tiny.safetensors"
    save_safetensors(model, path, {"note": "for a test"})
    return model, path


def test_safetensors_round_trip(tiny):
    model, path = tiny
    loaded = load_model(path)
    assert loaded.config == TINY
    for name, value in named_parameters(model).items():
        np.testing.assert_array_equal(named_parameters(loaded)[name], value)
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata()["note"] == "for a test"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "has no DVMSR configuration"),
        ({"config": "{"}, "Expecting property name"),
        ({"config": '{"depth": 3}'}, "depth"),
        ({"config": '{"channels": -8}'}, "channels is -8"),
        ({"config": "{}"}, "is missing"),
        ({"config": '{"channels": 9, "rssbs": 1, "vimms_per_rssb": 1, "states": 4}'}, "has shape"),
    ],
)
def test_unusable_safetensors_are_refused(tiny, metadata, message):
    _, path = tiny
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, metadata)
    with pytest.raises(PretrainedError, match=rf"tiny\.safetensors.*{message}"):
        load_model(path)


def test_paths_that_hold_no_weights(tiny, tmp_path):
    _, path = tiny
    path.write_bytes(path.read_bytes()[:-10])
    (tmp_path / "notes.txt").write_text("weights")
    (tmp_path / "folder").mkdir()
    for name in ("tiny.safetensors", "missing.pth", "notes.txt", "folder"):
        with pytest.raises(UserError, match=name):
            load_model(tmp_path / name)


def test_convert_overwrites_nothing(tiny, tmp_path):
    _, path = tiny
    before = path.read_bytes()
    with pytest.raises(PretrainedError, match="exists already"):
        convert(path, path)
    with pytest.raises(PretrainedError, match=r"must end in \.safetensors"):
        convert(path, tmp_path / "out.pth")
    assert path.read_bytes() == before


def test_conversion_command(tiny, tmp_path):
    _, path = tiny

    def run(*arguments):
        command = [sys.executable, "-m", "dvmsr_jax.pretrained", *map(str, arguments)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    done = run(path, tmp_path / "copy.safetensors")
    assert done.returncode == 0, done.stderr
    assert load_model(tmp_path / "copy.safetensors").config == TINY
    failed = run(tmp_path / "missing.pth", tmp_path / "new.safetensors")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert "missing.pth: no such file" in failed.stderr
    assert "Traceback" not in failed.stderr
