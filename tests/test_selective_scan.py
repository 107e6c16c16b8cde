"""Compares every scan with the specification, and the specification with NumPy in float64."""

import functools
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from dvmsr_jax.kernels import native_library, user_cache
from dvmsr_jax.kernels.native_library import NativeLibrary, NativeUnavailableError, checksum
from dvmsr_jax.kernels.selective_scan import native, selective_scan
from tests.jaxprs import equations

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(native.missing() is not None, reason="needs a C++ compiler")
)
FAST = [
    "associative",
    "chunked-carried",
    "chunked-parallel",
    pytest.param("triton", marks=pytest.mark.gpu),
    NATIVE,
]
LENGTHS = [1, 2, 63, 256, 1000]
OPTIONS = ["z", "delta_bias", "delta_softplus", "initial_state"]
ALL_OPTIONS = frozenset(OPTIONS)


def make_inputs(l, *, b=2, d=20, n=16, options=ALL_OPTIONS, dtype=jnp.float32, seed=0):
    """(array arguments, flags) of a call with these options."""
    keys = iter(jax.random.split(jax.random.key(seed), 16))

    def normal(*shape, dtype=dtype):
        return jax.random.normal(next(keys), shape).astype(dtype)

    arrays = {
        "u": normal(b, l, d),
        "delta": normal(b, l, d),
        "A": -jnp.exp(normal(d, n, dtype=jnp.float32)),
        "B": normal(b, l, n),
        "C": normal(b, l, n),
        "D": normal(d, dtype=jnp.float32),
        "z": normal(b, l, d),
        "delta_bias": normal(d, dtype=jnp.float32) - 1,
        "initial_state": normal(b, d, n, dtype=jnp.float32),
    }
    for name in {"z", "delta_bias", "initial_state"} - options:
        del arrays[name]
    if "delta_softplus" not in options:
        # Without softplus, the contract requires step sizes that are not negative.
        arrays["delta"] = abs(arrays["delta"]) * 0.5
        if "delta_bias" in arrays:
            arrays["delta_bias"] = abs(arrays["delta_bias"]) * 0.1
    return arrays, {"delta_softplus": "delta_softplus" in options}


def outputs(arrays, flags, implementation):
    y, state = selective_scan(
        **arrays, **flags, return_final_state=True, implementation=implementation
    )
    return {"y": y, "final_state": state}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _outputs_and_gradients(arrays, delta_softplus, implementation):
    def loss(arrays):
        out = outputs(arrays, {"delta_softplus": delta_softplus}, implementation)
        weighted = (
            jnp.sum(x.astype(jnp.float32) * jax.random.normal(jax.random.key(7), x.shape))
            for x in out.values()
        )
        return sum(weighted), out

    gradients, out = jax.grad(loss, has_aux=True)(arrays)
    return out | {f"gradient by {name}": x for name, x in gradients.items()}


def outputs_and_gradients(arrays, flags, implementation):
    """Outputs, and the gradients by every array of a loss that weights each output differently."""
    return _outputs_and_gradients(arrays, flags["delta_softplus"], implementation)


@functools.cache
def case(l, options, dtype=jnp.float32):
    """(arrays, flags, the specification's outputs and gradients)."""
    arrays, flags = make_inputs(l, options=options, dtype=dtype)
    return arrays, flags, outputs_and_gradients(arrays, flags, "sequential")


def assert_close(actual, expected, tolerance):
    """Largest difference within `tolerance` of the largest value, for each name."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        a = np.asarray(actual[name], np.float64)
        e = np.asarray(expected[name], np.float64)
        difference = np.abs(a - e).max() / max(np.abs(e).max(), 1e-30)
        assert difference <= tolerance, f"{name}: {difference:.2e} > {tolerance:.0e}"


def assert_sharded_like_the_specification(arrays, flags, implementation):
    """Compares y and every gradient with the sequences split between two devices."""
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
    b = arrays["u"].shape[0]
    per_sequence = {"u", "delta", "B", "C", "z", "initial_state"}
    assert all((x.shape[0] == b) == (name in per_sequence) for name, x in arrays.items())
    specs = {name: PartitionSpec(*["data"] * (name in per_sequence)) for name in arrays}
    function = jax.shard_map(
        lambda arrays: outputs(arrays, flags, implementation)["y"],
        mesh=mesh,
        in_specs=(specs,),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )

    def results(function, arrays):
        y, vjp = jax.vjp(function, arrays)
        return {"y": y, **vjp(jnp.cos(y))[0]}

    sharded = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in arrays.items()}
    actual = jax.jit(lambda x: results(function, x))(sharded)
    expected = results(lambda x: outputs(x, flags, "sequential")["y"], arrays)
    assert_close(actual, expected, 1e-4)


def in_numpy(u, delta, A, B, C, D, z=None, delta_bias=None, initial_state=None, *, delta_softplus):
    """The recurrence unrolled over every index, in float64."""
    (b, l, d), n = u.shape, A.shape[1]
    y = np.zeros((b, l, d))
    h = np.zeros((b, d, n)) if initial_state is None else initial_state.copy()
    for i, t, j in itertools.product(range(b), range(l), range(d)):
        step = delta[i, t, j] + (0 if delta_bias is None else delta_bias[j])
        if delta_softplus:
            step = np.log1p(np.exp(step))
        for k in range(n):
            h[i, j, k] = np.exp(step * A[j, k]) * h[i, j, k] + step * B[i, t, k] * u[i, t, j]
        y[i, t, j] = sum(C[i, t, k] * h[i, j, k] for k in range(n)) + D[j] * u[i, t, j]
        if z is not None:
            y[i, t, j] *= z[i, t, j] / (1 + np.exp(-z[i, t, j]))
    return {"y": y, "final_state": h}


def every_subset(options):
    sizes = range(len(options) + 1)
    return [frozenset(chosen) for n in sizes for chosen in itertools.combinations(options, n)]


def name_of(options):
    return "+".join(sorted(options)) or "plain"


@pytest.mark.parametrize("options", every_subset(OPTIONS), ids=name_of)
def test_specification_equals_numpy(options):
    arrays, flags = make_inputs(9, b=2, d=3, n=4, options=options)
    expected = in_numpy(**{k: np.asarray(x, np.float64) for k, x in arrays.items()}, **flags)
    actual = outputs(arrays, flags, "sequential")
    assert_close(actual, {k: x.astype(np.float32) for k, x in expected.items()}, 2e-6)


def test_specification_gradients():
    arrays, flags = make_inputs(5, b=1, d=3, n=2)

    @jax.jit
    def function(arrays):
        # The numerical derivative perturbs in float64.
        arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)
        return outputs(arrays, flags, "sequential")

    check_grads(function, (arrays,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", [frozenset(), ALL_OPTIONS], ids=name_of)
@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize("implementation", FAST)
def test_equals_specification(implementation, l, options, dtype):
    arrays, flags, expected = case(l, options, dtype)
    # Both sides compute in float32; bfloat16 results may round to neighbouring values.
    tolerance = 2e-5 if dtype == jnp.float32 else 8e-3
    assert_close(outputs_and_gradients(arrays, flags, implementation), expected, tolerance)


@pytest.mark.parametrize("implementation", ["sequential", "chunked-carried"])
def test_loops_hold_no_bfloat16(implementation):
    """On CPUs, bfloat16 arrays would make the loops' time grow with the square of l."""
    arrays, flags, _ = case(LENGTHS[-1], ALL_OPTIONS, jnp.bfloat16)

    def loss(arrays):
        found = outputs(arrays, flags, implementation)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(found))

    program = jax.make_jaxpr(jax.grad(loss))(arrays)
    loops = [e for e in equations(program.jaxpr) if e.primitive.name == "scan"]
    assert len(loops) >= 2  # forward and backward
    held = {str(v.aval.dtype) for loop in loops for v in (*loop.invars, *loop.outvars)}
    assert "float32" in held
    assert "bfloat16" not in held


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", [frozenset(), ALL_OPTIONS], ids=name_of)
@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize("implementation", [NATIVE])
def test_undifferentiated_equals_specification(implementation, l, options, dtype):
    arrays, flags, expected = case(l, options, dtype)
    actual = jax.jit(lambda arrays: outputs(arrays, flags, implementation))(arrays)
    tolerance = 2e-5 if dtype == jnp.float32 else 8e-3
    assert_close(actual, {name: expected[name] for name in actual}, tolerance)


@pytest.mark.parametrize(
    ("l", "d", "n"),
    [*((9, d, n) for d in (1, 8, 17, 40) for n in (1, 5, 16)), (130, 100, 16), (70, 130, 64)],
)
@pytest.mark.parametrize("implementation", [NATIVE])
def test_any_channels_and_states(implementation, l, d, n):
    """Channels that do not fill a vector or a thread's group, tokens that do not fill a chunk."""
    arrays, flags = make_inputs(l, d=d, n=n)
    actual = outputs_and_gradients(arrays, flags, implementation)
    assert_close(actual, outputs_and_gradients(arrays, flags, "sequential"), 2e-5)


@pytest.mark.parametrize("options", every_subset(OPTIONS), ids=name_of)
@pytest.mark.parametrize("implementation", FAST)
def test_any_options_equal_specification(implementation, options):
    """At a length that is not a multiple of any implementation's chunks or lanes.

    `associative` has neither, and longer sequences take XLA longer to compile.
    """
    arrays, flags, expected = case(9 if implementation == "associative" else 130, options)
    assert_close(outputs_and_gradients(arrays, flags, implementation), expected, 2e-5)


@pytest.mark.parametrize("implementation", ["auto", "chunked"])
def test_automatic_choice_equals_specification(implementation):
    arrays, flags, expected = case(63, ALL_OPTIONS)
    assert_close(outputs_and_gradients(arrays, flags, implementation), expected, 2e-5)


@pytest.mark.parametrize("implementation", ["sequential", *FAST])
def test_state_carries_over_any_cut(implementation):
    """Two calls that pass the state on equal a single call, in outputs and gradients."""
    arrays, flags, _ = case(63, ALL_OPTIONS)
    tokens = ("u", "delta", "B", "C", "z")

    def cut_at_20(arrays):
        first = arrays | {k: arrays[k][:, :20] for k in tokens}
        first = outputs(first, flags, implementation)
        second = arrays | {k: arrays[k][:, 20:] for k in tokens}
        second = outputs(second | {"initial_state": first["final_state"]}, flags, implementation)
        return second | {"y": jnp.concatenate([first["y"], second["y"]], axis=1)}

    def whole(arrays):
        return outputs(arrays, flags, implementation)

    @functools.partial(jax.jit, static_argnums=1)
    def run(arrays, function):
        def loss(arrays):
            out = function(arrays)
            return sum(jnp.sum(jnp.sin(x)) for x in out.values()), out

        gradients, out = jax.grad(loss, has_aux=True)(arrays)
        return out | {f"gradient by {name}": x for name, x in gradients.items()}

    assert_close(run(arrays, cut_at_20), run(arrays, whole), 2e-5)


@pytest.mark.parametrize("implementation", FAST)
def test_large_steps_do_not_overflow(implementation):
    """Decays that underflow to zero leave finite outputs and gradients."""
    arrays, flags = make_inputs(256)
    arrays["delta"] = arrays["delta"] * 100
    expected = outputs_and_gradients(arrays, flags, "sequential")
    actual = outputs_and_gradients(arrays, flags, implementation)
    assert all(jnp.isfinite(x).all() for x in actual.values())
    assert_close(actual, expected, 2e-5)
    actual = outputs(arrays, flags, implementation)
    assert_close(actual, {name: expected[name] for name in actual}, 2e-5)


@pytest.mark.parametrize("implementation", FAST)
def test_under_vmap(implementation):
    arrays, flags, expected = case(20, ALL_OPTIONS)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), arrays)
    for function in (outputs_and_gradients, outputs):
        actual = jax.vmap(lambda arrays, f=function: f(arrays, flags, implementation))(stacked)
        actual = {name: x[1] for name, x in actual.items()}
        assert_close(actual, {name: expected[name] for name in actual}, 2e-5)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        (
            "u",
            np.zeros((2, 3), np.float32),
            ValueError,
            r"u has shape \(2, 3\), expected \(b, l, d",
        ),
        ("u", np.zeros((2, 0, 20), np.float32), ValueError, "at least one token"),
        ("A", np.zeros(20, np.float32), ValueError, r"A has shape \(20,\), expected \(d, n\)"),
        ("B", np.zeros((2, 9, 4), np.float32), ValueError, r"B .*\(2, 9, 4\), .*\(b, l, n\) = \("),
        ("delta", np.zeros((2, 8, 20), np.float32), ValueError, r"delta .*\(2, 8, 20\), expected"),
        ("D", np.zeros((1, 20), np.float32), ValueError, r"D has .*\(d\) = \(20,\)"),
        ("z", np.zeros((2, 9), np.float32), ValueError, "z has shape"),
        ("initial_state", np.zeros((2, 16, 20), np.float32), ValueError, "initial_state has shape"),
        ("C", np.zeros((2, 9, 16), np.int32), TypeError, "C has dtype int32, expected float32 or"),
        (
            "A",
            jnp.zeros((20, 16), jnp.bfloat16),
            TypeError,
            "A has dtype bfloat16, expected float32",
        ),
        ("B", None, ValueError, r"B has shape \(\), expected"),
    ],
)
def test_wrong_arguments_are_named(name, value, error, message):
    arrays, flags = make_inputs(9)
    with pytest.raises(error, match=message):
        selective_scan(**(arrays | {name: value}), **flags)


def test_unknown_implementation_is_refused():
    arrays, flags = make_inputs(9)
    with pytest.raises(ValueError, match="'fast', expected one of 'auto', 'sequential'"):
        selective_scan(**arrays, **flags, implementation="fast")


@pytest.mark.parametrize("implementation", ["chunked-carried", NATIVE])
def test_states_of_single_tokens_are_not_kept(implementation):
    """The point of the hand-written VJPs: temporary memory far below b l d n floats."""
    arrays, flags = make_inputs(4096, b=1, d=64, n=16)
    step = jax.jit(lambda arrays: outputs_and_gradients(arrays, flags, implementation))
    memory = step.lower(arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 64 * 16 * 4 / 2


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dvmsr_jax"


@pytest.mark.parametrize("compiler", ["", "#!/bin/sh\necho broken >&2\nexit 1\n"])
def test_native_is_never_required(compiler, empty_cache, monkeypatch, tmp_path):
    """Without a working compiler, "auto" uses another form, and "native" raises the reason."""
    monkeypatch.setenv("PATH", str(tmp_path))
    if compiler:
        (tmp_path / "c++").write_text(compiler)
        (tmp_path / "c++").chmod(0o755)
    NativeLibrary.register.cache_clear()
    NativeLibrary.missing.cache_clear()
    try:
        arrays, flags, expected = case(20, ALL_OPTIONS)
        actual = outputs(arrays, flags, "auto")
        assert_close(actual, {name: expected[name] for name in actual}, 2e-5)
        with pytest.raises(RuntimeError, match="broken" if compiler else "is no C"):
            selective_scan(**arrays, **flags, implementation="native")
        assert not list(empty_cache.glob("*"))
    finally:
        NativeLibrary.register.cache_clear()
        NativeLibrary.missing.cache_clear()


@pytest.fixture
def compilations(request, monkeypatch, tmp_path):
    """Counts the runs of a compiler that only copies an existing library."""
    name, _ = native.LIBRARY.load()
    library = user_cache.folder() / f"{name}.so"
    request.getfixturevalue("empty_cache")
    calls = tmp_path / "calls"
    calls.touch()
    (tmp_path / "c++").write_text(f"""#!{shutil.which("sh")}
if [ "$1" = --version ]; then echo copier 1; exit; fi
for output; do :; done
echo "$output" >> {calls}
exec {shutil.which("cp")} {library} "$output"
""")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return lambda: len(calls.read_text().splitlines())


@pytest.mark.skipif(native.missing() is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize("damage", ["truncated", "not loadable", "no symbol", "of others", "newer"])
def test_a_library_is_used_only_if_intact_and_private(damage, compilations, tmp_path):
    cache = user_cache.folder()
    name, _ = native.LIBRARY.load()
    assert native.LIBRARY.load()[0] == name
    assert compilations() == 1
    (library,) = cache.glob("*.so")
    assert library.stat().st_mode & 0o077 == cache.stat().st_mode & 0o077 == 0
    data = library.read_bytes()
    if damage == "of others":
        library.chmod(0o777)
    elif damage == "newer":
        (tmp_path / "c++").write_text(
            (tmp_path / "c++").read_text().replace("copier 1", "copier 2")
        )
    else:
        library.unlink()  # not changed in place, because it is loaded
        if damage == "truncated":
            data = data[:5000]
        else:  # intact, judging by its checksum
            stem = library.stem.rpartition("_")[0]
            unknown = data.replace(b"\0SelectiveScan\0", b"\0SelectiveNone\0")
            data = b"no library" if damage == "not loadable" else unknown
            library = library.with_name(f"{stem}_{checksum(data)}.so")
        library.write_bytes(data)
    native.LIBRARY.load()
    assert compilations() == 2
    (whole,) = set(cache.glob("*.so")) - ({library} if damage == "newer" else set())
    assert whole.stat().st_mode & 0o077 == 0
    native.LIBRARY.load()
    assert compilations() == 2


@pytest.mark.skipif(native.missing() is not None, reason="needs a C++ compiler")
def test_a_changed_header_is_compiled(compilations, monkeypatch, tmp_path):
    header = tmp_path / "kernels" / "cpp" / "vectors.h"
    shutil.copytree(native_library.KERNELS / "cpp", header.parent)
    monkeypatch.setattr(native_library, "KERNELS", tmp_path / "kernels")
    native.LIBRARY.load()
    header.write_text(header.read_text() + "// changed\n")
    names = {native.LIBRARY.load()[0] for _ in range(2)}
    assert (len(names), compilations()) == (1, 2)


@pytest.mark.skipif(native.missing() is not None, reason="needs a C++ compiler")
def test_a_compiler_may_write_nonsense(compilations, tmp_path):
    (tmp_path / "c++").write_text(f"#!{shutil.which('sh')}\nfor out; do :; done\necho > $out\n")
    with pytest.raises(NativeUnavailableError, match="cannot compile and load"):
        native.LIBRARY.load()


@pytest.mark.parametrize("implementation", [NATIVE])
def test_native_among_64_bit_types(implementation):
    arrays, flags, _ = case(5, frozenset())

    def outputs_and_a_gradient(implementation):
        y, vjp = jax.vjp(lambda arrays: outputs(arrays, flags, implementation), arrays)
        return y | vjp(y)[0]

    expected = outputs_and_a_gradient("sequential")
    with jax.enable_x64(True):
        actual = outputs_and_a_gradient(implementation)
    assert_close(actual, expected, 2e-5)


@pytest.mark.parametrize("name", make_inputs(1)[0])
@pytest.mark.parametrize("implementation", FAST)
def test_nan_is_not_hidden(implementation, name):
    arrays, flags, _ = case(20, ALL_OPTIONS)
    arrays = arrays | {name: arrays[name].at[(0,) * arrays[name].ndim].set(jnp.nan)}
    expected = outputs_and_gradients(arrays, flags, "sequential")
    actual = outputs_and_gradients(arrays, flags, implementation)
    for result, values in expected.items():
        hidden = np.isnan(values) & ~np.isnan(actual[result])
        assert not hidden.any(), f"{np.sum(hidden)} values of {result}"
