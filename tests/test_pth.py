"""The .pth reader with hostile files, and files of weights that do not fit the network.

The pickles are assembled by hand: those of torch.save (protocol 2), and others.
"""

import dataclasses
import functools
import io
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dvmsr_jax.checkpoint import Best, Checkpoints
from dvmsr_jax.config import ModelConfig, TrainConfig
from dvmsr_jax.model import DVMSR, Weights, named_parameters
from dvmsr_jax.pretrained import PretrainedError, load_model, save_safetensors
from dvmsr_jax.pth import PthError, read_pth

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ModelConfig(scale=3, channels=8, rssbs=2, vimms_per_rssb=1, states=4, conv_width=3)


@functools.cache
def weights(seed=0):
    shapes = jax.eval_shape(lambda: named_parameters(DVMSR(CONFIG, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=x.shape).astype(np.float32) for name, x in shapes.items()}


def assert_same(parameters, expected):
    assert parameters.keys() == expected.keys()
    for name, x in parameters.items():
        assert x.dtype == expected[name].dtype
        np.testing.assert_array_equal(x, expected[name], err_msg=name)


@pytest.fixture
def unchecked(monkeypatch):
    """Without the tests' type checks, which would come before the project's own checks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# An assembler of pickles and archives.


class Raw(NamedTuple):
    """Opcodes that leave one value on the stack."""

    opcodes: bytes


class Tensor(NamedTuple):
    """A call of torch._utils._rebuild_tensor_v2."""

    storage: str
    key: object
    size: object
    offset: object
    shape: object
    strides: object


def named(module, name):
    return Raw(f"c{module}\n{name}\n".encode())


def call(function, *arguments):
    return Raw(pickled(function) + pickled(arguments) + b"R")


REBUILD = named("torch._utils", "_rebuild_tensor_v2")
ORDERED_DICT = named("collections", "OrderedDict")


def pickled(x):
    if isinstance(x, Raw):
        return x.opcodes
    if isinstance(x, Tensor):
        pid = ("storage", named("torch", x.storage), x.key, "cpu", x.size)
        storage = Raw(pickled(pid) + b"Q")
        hooks = call(ORDERED_DICT)
        return pickled(call(REBUILD, storage, x.offset, x.shape, x.strides, False, hooks))
    if x is None or isinstance(x, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[x]
    if isinstance(x, int):
        if -(2**31) <= x < 2**31:
            return b"J" + struct.pack("<i", x)
        number = x.to_bytes(x.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(number)]) + number
    if isinstance(x, float):
        return b"G" + struct.pack(">d", x)
    if isinstance(x, str):
        return b"X" + struct.pack("<I", len(x.encode())) + x.encode()
    if isinstance(x, tuple):
        return b"(" + b"".join(map(pickled, x)) + b"t"
    if isinstance(x, list):
        return b"](" + b"".join(map(pickled, x)) + b"e"
    items = b"".join(pickled(key) + pickled(value) for key, value in x.items())
    return pickled(call(ORDERED_DICT)) + b"(" + items + b"u"


class Pth:
    """Writes files as torch.save does."""

    def __init__(self):
        self.storages = {}

    def tensor(self, array):
        key = str(len(self.storages))
        self.storages[key] = array.tobytes()
        storage = {"float32": "Float", "float16": "Half", "int64": "Long"}[array.dtype.name]
        strides = tuple(math.prod(array.shape[i + 1 :]) for i in range(array.ndim))
        return Tensor(storage + "Storage", key, array.size, 0, array.shape, strides)

    def write(self, path, contents, *, compression=zipfile.ZIP_STORED, **members):
        program = b"\x80\x02" + pickled(contents) + b"."
        members = {"data.pkl": program, "byteorder": b"little", "version": b"3\n"} | members
        members |= {f"data/{key}": data for key, data in self.storages.items()}
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in members.items():
                archive.writestr(f"archive/{name}", data)
        return path


def one_tensor(path, **changes):
    """Writes a valid tensor's file with some of its numbers changed."""
    pth = Pth()
    tensor = pth.tensor(np.arange(12, dtype=np.float32).reshape(3, 4))
    return pth.write(path, {"x": tensor._replace(**changes)})


# Tensors and plain values.


def test_views_and_plain_values(tmp_path):
    x = np.arange(-12, 12).reshape(2, 3, 4)
    pth = Pth()
    whole = pth.tensor(x)
    contents = {
        "whole": whole,
        "turned": whole._replace(shape=(4, 3, 2), strides=(1, 4, 12)),
        "part": whole._replace(offset=13, shape=(2, 2), strides=(4, 2)),
        "scalar": whole._replace(offset=5, shape=(), strides=()),
        "empty": whole._replace(shape=(0, 4), strides=(4, 1)),
        "plain": [1, -(2**40), 2.5, "text", None, True, False, (1, (2,))],
    }
    found = read_pth(pth.write(tmp_path / "x.pth", contents))
    expected = {
        "whole": x,
        "turned": x.transpose(2, 1, 0),
        "part": x[1, :2, 1::2],
        "scalar": x[0, 1, 1],
        "empty": x[0, :0],
    }
    assert found.pop("plain") == contents["plain"]
    assert_same(found, {name: np.asarray(y) for name, y in expected.items()})


def test_a_state_dicts_attributes_are_ignored(tmp_path):
    pth = Pth()
    state_dict = pickled({"x": pth.tensor(np.ones(3, np.float32))})
    attributes = pickled({"_metadata": {"": {"version": 1}}, "get": "nothing to call"})
    found = read_pth(pth.write(tmp_path / "x.pth", Raw(state_dict + attributes + b"b")))
    np.testing.assert_array_equal(found.get("x"), np.ones(3))
    assert not hasattr(found, "_metadata")


# Hostile files.


def attacks(marker):
    """Pickles that create the file `marker` when an ordinary unpickler reads them."""
    touch = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w').close()"
    by_stack = pickled("builtins") + pickled("exec") + b"\x93" + pickled((code,)) + b"R"
    return {
        "os.system": call(named("os", "system"), touch),
        "posix.system": call(named("posix", "system"), touch),
        "builtins.eval": call(named("builtins", "eval"), code),
        "by STACK_GLOBAL": Raw(by_stack),
        "by INST": Raw(b"(" + pickled(code) + b"ibuiltins\nexec\n"),
        "by OBJ": Raw(b"(" + pickled(named("test_pth", "Runs")) + pickled(code) + b"o"),
        "by NEWOBJ": Raw(pickled(named("test_pth", "Runs")) + pickled((code,)) + b"\x81"),
        "inside a dictionary": {"params": [call(named("os", "system"), touch)]},
        "numpy": call(named("numpy.testing._private.utils", "runstring"), code, {}),
        "as a persistent id": Raw(pickled(call(named("os", "system"), touch)) + b"Q"),
    }


class Runs:
    """A class that runs code on construction."""

    def __new__(cls, code):
        exec(code)


@pytest.mark.parametrize("attack", list(attacks("")))
def test_nothing_runs(tmp_path, monkeypatch, attack):
    monkeypatch.setitem(sys.modules, "test_pth", sys.modules[__name__])
    marker = tmp_path / "it-ran"
    contents = attacks(marker)[attack]

    class Ordinary(pickle.Unpickler):
        def persistent_load(self, pid):
            return pid

    Ordinary(io.BytesIO(b"\x80\x02" + pickled(contents) + b".")).load()
    assert marker.exists()  # the attack works
    marker.unlink()

    path = Pth().write(tmp_path / "x.pth", contents)
    with pytest.raises(PthError, match=f"^{re.escape(str(path))}: refused, "):
        read_pth(path)
    with pytest.raises(PretrainedError, match=f"^{re.escape(str(path))}: refused, "):
        load_model(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "torch.nn.modules.linear Linear",
        "torch load",
        "torch._utils _rebuild_tensor",
        "torch.storage _load_from_bytes",
        "numpy.core.multiarray _reconstruct",
        "numpy.core.multiarray scalar",
        "numpy dtype",
        "collections defaultdict",
        "builtins getattr",
        "dvmsr_jax.pth read_pth",
    ],
)
def test_other_names_are_refused(tmp_path, name):
    module, name = name.split()
    path = Pth().write(tmp_path / "x.pth", {"x": named(module, name)})
    with pytest.raises(PthError, match=rf"it names {module}\.{name}; only tensors"):
        read_pth(path)


@pytest.mark.parametrize("target", [REBUILD, ORDERED_DICT], ids=["function", "class"])
def test_accepted_classes_cannot_be_changed(tmp_path, target):
    good = one_tensor(tmp_path / "good.pth")
    change = {"__call__": "x", "__init__": "x", "_budget": 10**9, "__setstate__": None}
    for state in (change, (None, change), ({}, change)):
        changed = Raw(pickled(target) + pickled(state) + b"b")
        with pytest.raises(PthError):
            read_pth(Pth().write(tmp_path / "x.pth", changed))
        np.testing.assert_array_equal(read_pth(good)["x"], np.arange(12).reshape(3, 4))


HUGE = 10**9
# A tuple of itself, sixty times over: 2**60 to hash, compare or print, in 500 bytes.
DOUBLED = Raw(b")" + b"".join(bytes([ord("q"), i, ord("h"), i, 0x86]) for i in range(60)))
DEEP = Raw(b")" + b"\x85" * 200_000)
# 10**(2.4 million)
LONG = Raw(b"\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6)


def limited(path):
    """The output of a process that reads the file, within 20 s and 4 GiB of address space."""
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
from pathlib import Path
from dvmsr_jax.pth import PthError, read_pth
try:
    print(type(read_pth(Path({str(path)!r}))))
except (PthError, OSError) as error:
    print(f"refused: {{error}}")
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout


@pytest.mark.parametrize("value", [DOUBLED, DEEP, LONG], ids=["doubled", "deep", "long"])
@pytest.mark.parametrize("place", ["key", "storage", "storage type", "size", "shape", "class"])
def test_time_and_memory_are_limited(tmp_path, value, place):
    pth = Pth()
    tensor = pth.tensor(np.zeros(3, np.float32))
    pid = ["storage", named("torch", "FloatStorage"), "0", "cpu", 3]
    if place == "key":
        contents = {value: 1}
    elif place in ("storage type", "storage", "size"):
        pid[{"storage": 0, "storage type": 1, "size": 4}[place]] = value
        contents = Raw(pickled(tuple(pid)) + b"Q")
    elif place == "shape":
        contents = tensor._replace(shape=(value, value), strides=(value, value))
    else:
        contents = call(value, 1)
    path = pth.write(tmp_path / "x.pth", contents)
    assert limited(path).startswith(f"refused: {path}: ")


def test_nested_values_are_not_weights(tmp_path):
    for value in (DOUBLED, DEEP):
        path = Pth().write(tmp_path / "x.pth", {"params": value})
        assert limited(path) == "<class 'dict'>\n"
        with pytest.raises(PretrainedError, match="does not hold a dictionary of tensors"):
            load_model(path)


def test_a_tensor_is_not_a_storage(tmp_path):
    """A single number seen as twelve by its strides would be read beyond its end."""
    pth = Pth()
    one = pth.tensor(np.zeros(1, np.float32))._replace(shape=(12,), strides=(0,))
    padding = pth.tensor(np.zeros(100, np.float32))
    again = call(REBUILD, one, 0, (12,), (1,), False, call(ORDERED_DICT))
    with pytest.raises(PthError, match="a tensor without a storage"):
        read_pth(pth.write(tmp_path / "x.pth", {"padding": padding, "again": again}))


def test_messages_are_one_line(tmp_path):
    pth = Pth()
    name = "\x1b[2J\n" + "x" * 10_000
    path = pth.write(tmp_path / "x.pth", {name: pth.tensor(np.zeros(1, np.float32))})
    with pytest.raises(PretrainedError) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: holds \\x1b[2J\\nxxx")
    assert len(str(caught.value)) < 2000


LOADING = """
import resource, sys
from pathlib import Path
from dvmsr_jax.pretrained import PretrainedError, load_model
resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))
for path in map(Path, sys.argv[1:]):
    try:
        load_model(path)
    except PretrainedError as error:
        print(error)
"""


def test_only_regular_files_are_read(tmp_path):
    """Devices and pipes may never end. In a process of its own, to limit time and memory."""
    expected = {}
    for suffix in [".pth", ".safetensors"]:
        device, pipe, large = (tmp_path / f"{name}{suffix}" for name in ("device", "pipe", "large"))
        device.symlink_to("/dev/zero")
        os.mkfifo(pipe)
        large.touch()
        os.truncate(large, 2**40)  # sparse: it takes no disk space
        expected |= dict.fromkeys((device, pipe), "not a regular file")
        expected[large] = "has 1,099,511,627,776 bytes, more than the 1,073,741,824 expected"
    done = subprocess.run(
        [sys.executable, "-c", LOADING, *map(str, expected)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    lines = [f"{path}: {problem}" for path, problem in expected.items()]
    assert done.stdout.splitlines() == lines


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"shape": (4, 4)}, "larger than its storage"),
        ({"offset": 1}, "larger than its storage"),
        ({"offset": 10**30}, "impossible shape"),
        ({"strides": (8, 1)}, "larger than its storage"),
        ({"shape": (HUGE, HUGE), "strides": (0, 0)}, "larger than its storage"),
        ({"shape": (HUGE,), "strides": (0,)}, "larger than its storage"),
        ({"shape": (2**64, 2**64), "strides": (0, 0)}, "impossible shape"),
        ({"shape": (HUGE, HUGE)}, "larger than its storage"),
        ({"shape": (-1, 4)}, "impossible shape"),
        ({"strides": (-4, 1)}, "impossible shape"),
        ({"offset": -1}, "impossible shape"),
        ({"shape": (3.0, 4)}, "impossible shape"),
        ({"shape": (3, 4, 1)}, "impossible shape"),
        ({"shape": (True, 4)}, "impossible shape"),
        ({"shape": 12}, "impossible shape"),
        ({"shape": None}, "impossible shape"),
        ({"shape": (0, 2**70)}, "impossible shape"),
        ({"shape": (1,) * 100, "strides": (1,) * 100}, "impossible shape"),
        ({"size": 13}, "holds 12 numbers instead of 13"),
        ({"size": "12"}, "unknown kind of storage"),
        ({"size": 12.0}, "unknown kind of storage"),
        ({"storage": "HalfStorage"}, "holds 24 numbers instead of 12"),
        ({"storage": "UntypedStorage"}, "it names torch.UntypedStorage"),
        ({"key": "1"}, "damaged"),
        ({"key": "../data.pkl"}, "damaged"),
        ({"key": 0}, "unknown kind of storage"),
    ],
    ids=str,
)
def test_impossible_tensors(tmp_path, changes, problem):
    path = one_tensor(tmp_path / "x.pth", **changes)
    with pytest.raises(PthError, match=f"^{re.escape(str(path))}: .*{re.escape(problem)}"):
        read_pth(path)


def test_tensors_together_are_no_larger_than_the_file(tmp_path):
    pth = Pth()
    tensor = pth.tensor(np.zeros(10_000, np.float32))
    path = pth.write(tmp_path / "x.pth", [tensor] * 3)
    with pytest.raises(PthError, match="larger than its storage"):
        read_pth(path)


@pytest.mark.parametrize(
    "bomb",
    [
        ("PUT", b"Np500000000\n"),
        ("BYTEARRAY8", b"\x96" + struct.pack("<Q", 8) + bytes(8)),
        ("BINBYTES8", b"\x8e" + struct.pack("<Q", 8) + bytes(8)),
    ],
    ids=lambda bomb: bomb[0],
)
def test_the_pickle_cannot_claim_memory(tmp_path, bomb):
    name, opcodes = bomb
    with pytest.raises(PthError, match=f"does not write {name} instructions$"):
        read_pth(Pth().write(tmp_path / "x.pth", Raw(opcodes)))


def test_a_memo_of_any_number(tmp_path):
    """CPython 3.11's unpickler would allocate 8 GiB."""
    path = Pth().write(tmp_path / "x.pth", Raw(pickled("x") + b"r\xff\xff\xff\x1f"))
    assert limited(path) == "<class 'str'>\n"


def test_other_archives(tmp_path):
    path = tmp_path / "x.pth"
    good = one_tensor(path).read_bytes()
    program = b"\x80\x02" + pickled({}) + b"."

    def archive(**members):
        with zipfile.ZipFile(path, "w") as file:
            for name, data in members.items():
                file.writestr(name, data)

    def refused(problem):
        with pytest.raises(PthError, match=f"^{re.escape(str(path))}: .*{problem}"):
            read_pth(path)

    for data in (b"", b"PK", b"some text", pickle.dumps(0x1950A86A20F9469CFC6C, 2)):
        path.write_bytes(data)
        refused("not a PyTorch checkpoint, or a truncated one")
    path.write_bytes(good[:300] + good[400:])
    refused("damaged|truncated")
    archive()
    refused("not one written by torch.save")
    archive(**{"data.pkl": program})
    refused("not one written by torch.save")
    archive(**{"a/data.pkl": program, "b/data.pkl": program})
    refused("not one written by torch.save")
    archive(**{"a/data.pkl": program, "a/byteorder": b"big"})
    refused("not little-endian")
    archive(**{"a/data.pkl": b""})
    refused("damaged")
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        Pth().write(path, {}, compression=compression, zeros=bytes(10**6))
        refused("compressed")
    encrypted = bytearray(one_tensor(path).read_bytes())
    encrypted[encrypted.find(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(encrypted)
    refused("damaged")


def test_overlapping_members(tmp_path):
    """A directory that lists the same bytes many times over."""
    pth = Pth()
    path = pth.write(tmp_path / "x.pth", pth.tensor(np.zeros(1000, np.float32)))
    with zipfile.ZipFile(path, "a") as archive:
        last = archive.infolist()[-1]
        for i in range(100):
            copy = zipfile.ZipInfo(f"archive/data/{i + 1}")
            copy.file_size = copy.compress_size = last.file_size
            copy.CRC, copy.header_offset = last.CRC, last.header_offset
            archive.filelist.append(copy)
            archive.NameToInfo[copy.filename] = copy
        archive._didModify = True  # so that closing writes the directory
    with pytest.raises(PthError, match="compressed"):
        read_pth(path)


# A whole model under the published names.


def published(parameters):
    """Our parameters under the published names, in PyTorch's layouts."""
    tensors = {}
    for name, x in parameters.items():
        name = name.replace("norm_first.", "patch_embed.norm.").replace("norm_last.", "norm_f.")
        name = name.replace("conv_last.", "conv_after_body.").replace("reconstruct.", "upsample.0.")
        name = name.replace("dt_bias", "dt_proj.bias").replace("forward.conv.", "forward.conv1d.")
        name = re.sub(r"(forward\.)|(in_proj|out_proj)", r"mixer.\2", name)
        name = re.sub(r"^rssbs\.(\d)\.vimms\.", r"rssbs.\1.residual_group.blocks.", name)
        name = re.sub(r"^rssbs", "layers", name)
        name = re.sub(r"\.(kernel|scale)$", ".weight", name)
        if name.endswith("conv1d.weight"):
            x = x.T[:, None]
        elif name.endswith("weight"):
            x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
        tensors[name] = np.ascontiguousarray(x)
    return tensors


def write_published(path, tensors):
    pth = Pth()
    return pth.write(path, {name: pth.tensor(x) for name, x in tensors.items()})


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_published_layout(tmp_path, dtype):
    stored = {name: x.astype(dtype) for name, x in weights().items()}
    model = load_model(write_published(tmp_path / "x.pth", published(stored)))
    assert model.config == CONFIG
    expected = {name: x.astype(np.float32) for name, x in stored.items()}
    assert_same(named_parameters(model), expected)


def test_the_average_is_preferred(tmp_path):
    pth = Pth()
    raw, ema = (
        {name: pth.tensor(x) for name, x in published(weights(seed)).items()} for seed in (0, 1)
    )
    both = pth.write(tmp_path / "both.pth", {"params": raw, "params_ema": ema})
    assert_same(named_parameters(load_model(both)), weights(1))
    one = pth.write(tmp_path / "one.pth", {"params": raw})
    assert_same(named_parameters(load_model(one)), weights(0))


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("conv_first.weight", None, "conv_first.kernel is missing"),
        ("conv_first.weight", (8,), "conv_first.kernel has shape (8,)"),
        ("conv_first.weight", (), "conv_first.kernel has shape ()"),
        ("conv_first.weight", (0, 3, 3, 3), "conv_first.kernel has shape (3, 3, 3, 0)"),
        ("conv_first.weight", (9, 3, 3, 3), "conv_first.bias has shape (8,), expected (9,)"),
        ("conv_first.bias", (9,), "conv_first.bias has shape (9,), expected (8,)"),
        ("conv_first.more", (9,), "conv_first.more is not part of the model"),
        ("classifier.weight", (9, 9), "holds classifier.weight, which is not part of a DVMSR"),
        ("layers.2.conv.bias", (8,), "rssbs.2.vimms.0.forward.A_log is missing"),
        ("upsample.0.bias", (300,), "scale is 10, not 2, 3 or 4"),
        ("upsample.0.bias", (28,), "reconstruct.bias has shape (28,), expected (27,)"),
        (".mixer.A_log", (16,), "A_log has shape (16,)"),
        (".mixer.A_log", (4, 4), "expand is 0"),
        (".mixer.A_log", None, "A_log is missing"),
        (".mixer.conv1d.weight", (16, 2, 3), "conv.kernel has shape (3, 2, 16)"),
        (".mixer.conv1d.weight", (16, 1, 0), "conv.kernel has shape (0, 16)"),
        (".mixer.in_proj.weight", (32, 9), "in_proj.kernel has shape (9, 32), expected (8, 32)"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, unchecked, name, shape, problem):
    tensors = published(weights())
    if name.startswith("."):
        name = "layers.0.residual_group.blocks.0" + name
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = np.zeros(shape, np.float32)
    path = write_published(tmp_path / "x.pth", tensors)
    with pytest.raises(PretrainedError, match=f"^{re.escape(str(path))}: .*{re.escape(problem)}"):
        load_model(path)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("kind", ["published", "safetensors", "checkpoint"])
def test_numbers_that_are_not_finite(tmp_path, kind, value):
    parameters = weights()
    parameters["rssbs.0.conv.kernel"][0, 1, 2, 3] = value
    if kind == "published":
        path = write_published(tmp_path / "x.pth", published(parameters))
    elif kind == "safetensors":
        path = tmp_path / "x.safetensors"
        safetensors.numpy.save_file(
            parameters, path, {"config": json.dumps(dataclasses.asdict(CONFIG))}
        )
    else:
        checkpoints = Checkpoints(TrainConfig(workdir=tmp_path, model=CONFIG))
        checkpoints.save(1, Best(), jax.tree.map(jnp.asarray, parameters), {"step": jnp.ones(())})
        checkpoints.close()
        path = tmp_path / "student"
    problem = f"^{re.escape(str(path))}.*: rssbs.0.conv.kernel holds numbers that are not finite$"
    with pytest.raises(PretrainedError, match=problem):
        load_model(path)


def test_numbers_that_float32_cannot_hold(tmp_path):
    path = tmp_path / "x.safetensors"
    large = weights() | {"conv_first.bias": np.full(8, 1e300)}
    safetensors.numpy.save_file(large, path, {"config": json.dumps(dataclasses.asdict(CONFIG))})
    with pytest.raises(PretrainedError, match="bias holds numbers that are not finite"):
        load_model(path)


@pytest.mark.parametrize("contents", [[], 5, None, {"params": 5}, {"params_ema": {"a": 1}}])
def test_files_without_weights(tmp_path, contents):
    path = Pth().write(tmp_path / "x.pth", contents)
    with pytest.raises(PretrainedError, match="does not hold a dictionary of tensors"):
        load_model(path)


def test_truncated_and_flipped(tmp_path):
    """Damage is detected, or has not changed the weights."""
    path = write_published(tmp_path / "x.pth", published(weights()))
    whole, expected = path.read_bytes(), read_pth(path)
    rng = np.random.default_rng(0)
    for length in [*range(0, len(whole), 500), *range(len(whole) - 30, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(PthError):
            read_pth(path)

    noticed = 0
    for position in rng.integers(0, len(whole), 300):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            assert_same(read_pth(path), expected)
        except PthError:
            noticed += 1
    assert noticed > 200


def test_pickles_with_flipped_bits(tmp_path):
    """Like an attacker's, they have the right checksums."""
    path = write_published(tmp_path / "x.pth", published(weights()))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    program = members["archive/data.pkl"]
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(200):
        damaged = bytearray(program)
        for position in rng.integers(0, len(program), rng.integers(1, 4)):
            damaged[position] ^= 1 << rng.integers(8)
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in (members | {"archive/data.pkl": bytes(damaged)}).items():
                archive.writestr(name, data)
        try:
            load_model(path)
        except PretrainedError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert all(message.startswith(f"{path}: ") for message in messages)


# .safetensors


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_safetensors(Weights(CONFIG, weights()).model(), path)
    before = path.read_bytes()

    def fill_the_disk(path, data):
        with path.open("wb") as file:
            file.write(data[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        save_safetensors(Weights(CONFIG, weights(1)).model(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_safetensors(Weights(CONFIG, weights()).model(), path)
    whole = path.read_bytes()
    for length in [*range(0, 20), *range(20, len(whole), 1000), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(PretrainedError, match=f"^{re.escape(str(path))}: "):
            load_model(path)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"extra": 1}, "extra"),
        ({"scale": 5}, "scale is 5, not 2, 3 or 4"),
        ({"channels": 0}, "channels is 0, not a whole"),
        ({"channels": -8}, "channels is -8, not a whole"),
        ({"channels": 8.0}, "channels is 8.0, not a whole"),
        ({"channels": "8"}, "channels is '8', not a whole"),
        ({"channels": None}, "channels is None, not a whole"),
        ({"channels": [8]}, "channels is [8], not a whole"),
        ({"channels": 10**30}, "do not fit the model: conv_first"),
        ({"states": 10**12}, "A_log has shape"),
        ({"rssbs": 10**9}, "for 1000000000 RSSBs"),
        ({"vimms_per_rssb": 0}, "vimms_per_rssb is 0, not a whole"),
        ({"expand": 0}, "expand is 0, not a whole"),
        ({"conv_width": 0}, "conv_width is 0, not a whole"),
        ({"bidirectional": "no"}, "bidirectional is 'no', not true"),
        ({"bidirectional": True}, "backward.A_log is missing"),
        ({"drop_path": 2.0}, "drop_path is 2.0, not within"),
        ({"drop_path": math.nan}, "drop_path is nan, not within"),
        ("", "Expecting value"),
        ("[]", "must be a mapping"),
        ("null", "must be a mapping"),
        ("[" * 100_000, "recursion"),
        ('{"channels": ' + "9" * 5000 + "}", "digits"),
        ("{}", "do not fit the model"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_absurd_configurations(tmp_path, unchecked, config, problem):
    path = tmp_path / "x.safetensors"
    if not isinstance(config, str):
        config = json.dumps(dataclasses.asdict(CONFIG) | config)
    safetensors.numpy.save_file(weights(), path, {"config": config})
    with pytest.raises(PretrainedError) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(np.int8, "I8"), (np.complex64, "C64"), (np.bool_, "BOOL"), (ml_dtypes.float8_e4m3fn, "F8")],
)
def test_types_that_are_not_weights(tmp_path, dtype, name):
    path = tmp_path / "x.safetensors"
    odd = weights() | {"conv_first.bias": np.ones(8).astype(dtype)}
    safetensors.numpy.save_file(odd, path, {"config": json.dumps(dataclasses.asdict(CONFIG))})
    with pytest.raises(PretrainedError, match=f"conv_first.bias holds numbers of type {name}"):
        load_model(path)
