"""The network compared with its description: counts, shapes, initial weights, gradients."""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dvmsr_jax.config import Compute, ModelConfig
from dvmsr_jax.configs import PRESETS
from dvmsr_jax.errors import UserError
from dvmsr_jax.inference import make_upscaler, upscale_pixels
from dvmsr_jax.model import (
    DVMSR,
    Weights,
    named_parameters,
    parameter_count,
    pixel_shuffle,
)
from dvmsr_jax.rgb import average_over_symmetries
from dvmsr_jax.training import losses
from dvmsr_jax.vimm import ViMM
from tests.jaxprs import equations

TINY = ModelConfig(channels=8, rssbs=2, vimms_per_rssb=1, states=4)
SMALLEST = ModelConfig(channels=8, rssbs=1, vimms_per_rssb=1, states=4)
BIDIRECTIONAL = ModelConfig(channels=8, rssbs=1, vimms_per_rssb=1, states=4, bidirectional=True)


@functools.cache
def weights(config, seed=0):
    """Random weights, larger than the initial ones, so that each part affects the output."""
    shapes = jax.eval_shape(lambda: named_parameters(DVMSR(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    return {name: (rng.normal(size=x.shape) * 0.3).astype(np.float32) for name, x in shapes.items()}


@functools.cache
def compiled(config, scan="auto", precision="float32"):
    """f(parameters, images) -> images."""
    compute = Compute(scan, precision)
    return jax.jit(lambda parameters, x: Weights(config, parameters).model(compute)(x))


def images(b, h, w, seed=0):
    return np.random.default_rng(seed).random((b, h, w, 3), np.float32)


def make_vimm(config, index=0):
    """The network's ViMM number `index`, with random weights."""
    vimm = nnx.eval_shape(lambda: ViMM(config, index, Compute(), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    state = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, jnp.float32),
        nnx.state(vimm, nnx.Param),
    )
    nnx.update(vimm, state)
    return vimm


@nnx.jit
def run(vimm, tokens, keys=None):
    return vimm(tokens, keys)


def make_tokens(b=1, l=9):
    return jax.random.normal(jax.random.key(2), (b, l, 8))


@pytest.mark.parametrize(("phase", "count"), [("student", 424_428), ("teacher", 7_107_312)])
def test_parameter_counts(phase, count):
    config = PRESETS["paper"][phase].model
    assert parameter_count(nnx.eval_shape(lambda: DVMSR(config, rngs=nnx.Rngs(0)))) == count


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (dataclasses.replace(SMALLEST, scale=2), [(5, 3)]),
        (dataclasses.replace(SMALLEST, scale=3), [(5, 3)]),
        (SMALLEST, [(1, 1), (1, 7), (5, 3)]),
        (BIDIRECTIONAL, [(1, 1), (1, 7), (5, 3)]),
    ],
    ids=["x2", "x3", "x4", "bidirectional"],
)
def test_any_size(config, sizes):
    for h, w in sizes:
        y = compiled(config)(weights(config), images(2, h, w))
        assert y.shape == (2, h * config.scale, w * config.scale, 3)
        assert np.isfinite(y).all()


def test_pixel_shuffle_has_pytorchs_order():
    b, h, w, s = 2, 3, 4, 2
    x = np.arange(b * h * w * 3 * s * s).reshape(b, h, w, 3 * s * s).astype(np.float32)
    y = np.asarray(pixel_shuffle(jnp.asarray(x), s))
    assert y.shape == (b, h * s, w * s, 3)
    for row, column, colour in np.ndindex(h * s, w * s, 3):
        channel = colour * s * s + (row % s) * s + column % s
        np.testing.assert_array_equal(
            y[:, row, column, colour], x[:, row // s, column // s, channel]
        )


def test_vimm_has_no_skip():
    vimm, tokens = make_vimm(SMALLEST), make_tokens()
    assert np.abs(run(vimm, tokens)).min() > 0
    vimm.out_proj.kernel[...] = jnp.zeros((16, 8))
    np.testing.assert_array_equal(run(vimm, tokens), np.zeros_like(tokens))


@pytest.mark.parametrize("config", [SMALLEST, BIDIRECTIONAL], ids=["causal", "bidirectional"])
def test_reach_of_a_token(config):
    vimm, tokens = make_vimm(config), make_tokens()
    before = run(vimm, tokens)
    by_first = np.abs(run(vimm, tokens.at[:, 0, 0].add(1.0)) - before).max(axis=(0, 2))
    by_last = np.abs(run(vimm, tokens.at[:, -1, 0].add(1.0)) - before).max(axis=(0, 2))
    assert by_first.min() > 1e-5
    if config.bidirectional:
        assert by_last.min() > 1e-5
    else:
        np.testing.assert_array_equal(by_last[:-1], 0)
        assert by_last[-1] > 1e-2


def test_directions_mirror_each_other():
    vimm, tokens = make_vimm(BIDIRECTIONAL), make_tokens()
    there = run(vimm, tokens)
    assert np.abs(run(vimm, tokens[:, ::-1])[:, ::-1] - there).max() > 0.1
    vimm.forward, vimm.backward = vimm.backward, vimm.forward
    np.testing.assert_allclose(run(vimm, tokens[:, ::-1])[:, ::-1], there, atol=1e-5)


def test_drop_path_rates_grow_linearly():
    config = ModelConfig(channels=8, rssbs=3, vimms_per_rssb=2, states=4, drop_path=0.2)
    model = nnx.eval_shape(lambda: DVMSR(config, rngs=nnx.Rngs(0)))
    rates = [vimm.drop_path for rssb in model.rssbs for vimm in rssb.vimms]
    np.testing.assert_allclose(rates, np.linspace(0, 0.2, 6))


def test_drop_path_drops_the_input_of_whole_samples():
    config = dataclasses.replace(SMALLEST, vimms_per_rssb=2, drop_path=0.25)
    vimm, keys = make_vimm(config, index=1), jax.random.split(jax.random.key(0), 64)
    # Small enough for LayerNorm's epsilon to matter; otherwise, LayerNorm would hide the scaling.
    tokens = 2e-3 * make_tokens(b=64)
    kept, dropped = run(vimm, tokens / 0.75), run(vimm, jnp.zeros_like(tokens))
    out = run(vimm, tokens, keys)

    def same(x, y):
        return np.abs(x - y).max(axis=(1, 2)) < 1e-6

    assert not same(kept, dropped).any()
    assert not same(kept, run(vimm, tokens)).any()
    assert (same(out, kept) ^ same(out, dropped)).all()
    assert 5 <= same(out, dropped).sum() <= 28  # of 64; not for one seed in a thousand
    # Each sample has its own key, in any batch.
    assert same(run(vimm, tokens[::-1], keys[::-1])[::-1], out).all()
    assert not same(run(vimm, tokens, keys[::-1]), out).all()


def test_drop_path_is_for_training_only():
    config = ModelConfig(channels=8, rssbs=1, vimms_per_rssb=2, states=4, drop_path=0.9)
    parameters, x = weights(config), images(4, 3, 3)
    never = compiled(dataclasses.replace(config, drop_path=0.0))(parameters, x)
    np.testing.assert_array_equal(compiled(config)(parameters, x), never)

    @jax.jit
    def train(parameters, x):
        keys = jax.random.split(jax.random.key(0), len(x))
        return Weights(config, parameters).model().with_features(x, keys=keys)[0]

    assert np.abs(train(parameters, x) - never).max() > 1e-2


def uniform(bound):
    def check(x):
        n = x.size
        assert bound * 1e-3 ** (1 / n) < np.abs(x).max() <= bound  # not for one seed in a thousand
        assert abs(x.mean()) < 4 * bound / (3 * n) ** 0.5  # four standard deviations

    return check


def constant(value):
    return lambda x: np.testing.assert_array_equal(x, value)


def dense(x):
    # Cut off at two standard deviations, which leaves 0.8796 of the deviation.
    assert np.abs(x).max() <= 0.04
    np.testing.assert_allclose(x.std(), 0.8796 * 0.02, rtol=0.1)


def states(x):
    np.testing.assert_allclose(x, np.tile(np.log([1, 2, 3, 4, 5]), (64, 1)), rtol=1e-6)


def step_sizes(x):
    steps = np.log1p(np.exp(x.astype(np.float64)))
    assert 1e-3 * (1 - 1e-4) <= steps.min() < 2e-3
    assert 0.05 < steps.max() <= 0.1 * (1 + 1e-4)
    assert abs(np.log10(steps).mean() + 2) < 0.3


def test_initial_weights():
    config = ModelConfig(channels=32, rssbs=1, vimms_per_rssb=1, states=5, conv_width=3)
    expected = {
        r"conv_first\.(kernel|bias)": uniform(27**-0.5),
        r"(rssbs\.0\.conv|conv_last|reconstruct)\.(kernel|bias)": uniform((9 * 32) ** -0.5),
        r".*norm(_first|_last)?\.scale": constant(1),
        r".*norm(_first|_last)?\.bias": constant(0),
        r".*\.(in_proj|x_proj|out_proj)\.kernel": dense,
        r".*\.forward\.conv\.(kernel|bias)": uniform(3**-0.5),
        r".*\.dt_proj\.kernel": uniform(2**-0.5),  # r = 32 / 16
        r".*\.dt_bias": step_sizes,
        r".*\.A_log": states,
        r".*\.D": constant(1),
    }
    init = jax.jit(lambda key: named_parameters(DVMSR(config, rngs=nnx.Rngs(key))))
    for name, x in init(jax.random.key(0)).items():
        (check,) = [check for pattern, check in expected.items() if re.fullmatch(pattern, name)]
        check(np.asarray(x))


def by_the_paper(config, p, image):
    """DVMSR in NumPy and float64: (output, features: shallow, RSSBs', body) of one image."""
    p = {name: x.astype(np.float64) for name, x in p.items()}

    def norm(x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
        return x * p[f"{name}.scale"] + p[f"{name}.bias"]

    def conv(x, name):
        h, w, _ = x.shape
        x = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        taps = [x[i : i + h, j : j + w] @ p[f"{name}.kernel"][i, j] for i, j in np.ndindex(3, 3)]
        return sum(taps) + p[f"{name}.bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    def scan(u, z, name):
        kernel = p[f"{name}.conv.kernel"]
        width, rank, n = len(kernel), math.ceil(config.channels / 16), config.states
        padded = np.pad(u, ((width - 1, 0), (0, 0)))
        u = sum(kernel[i] * padded[i : i + len(u)] for i in range(width))
        u = silu(u + p[f"{name}.conv.bias"])
        delta, B, C = np.split(u @ p[f"{name}.x_proj.kernel"], [rank, rank + n], axis=-1)
        delta = np.log1p(np.exp(delta @ p[f"{name}.dt_proj.kernel"] + p[f"{name}.dt_bias"]))
        A, state, y = -np.exp(p[f"{name}.A_log"]), 0.0, []
        for t in range(len(u)):
            state = np.exp(delta[t, :, None] * A) * state + np.outer(delta[t] * u[t], B[t])
            y.append(state @ C[t] + p[f"{name}.D"] * u[t])
        return np.array(y) * silu(z)

    def vimm(tokens, name):
        u, z = np.split(norm(tokens, f"{name}.norm") @ p[f"{name}.in_proj.kernel"], 2, axis=-1)
        y = scan(u, z, f"{name}.forward")
        if config.bidirectional:
            y = y + scan(u[::-1], z[::-1], f"{name}.backward")[::-1]
        return y @ p[f"{name}.out_proj.kernel"]

    mean = np.array([0.4488, 0.4371, 0.4040])
    shallow = conv(image - mean, "conv_first")
    x, rssbs = norm(shallow, "norm_first"), []
    for i in range(config.rssbs):
        tokens = x.reshape(-1, config.channels)
        for j in range(config.vimms_per_rssb):
            tokens = vimm(tokens, f"rssbs.{i}.vimms.{j}")
        x = conv(tokens.reshape(x.shape), f"rssbs.{i}.conv") + x
        rssbs.append(x)
    body = conv(norm(x, "norm_last"), "conv_last")
    small = jnp.asarray(conv(body + shallow, "reconstruct"), jnp.float32)
    output = np.asarray(pixel_shuffle(small[None], config.scale)[0]) + mean
    return output, shallow, rssbs, body


def test_against_the_papers_formulas():
    config = ModelConfig(
        scale=2, channels=20, rssbs=2, vimms_per_rssb=2, states=4, bidirectional=True
    )
    parameters, image = weights(config), images(1, 3, 5)

    @jax.jit
    def run(parameters, image):
        model = Weights(config, parameters).model()
        return model(image), *model.with_features(image)

    alone, output, features = run(parameters, image)
    np.testing.assert_array_equal(output, alone)
    expected = by_the_paper(config, parameters, image[0].astype(np.float64))
    found = (output, *features)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x[0].shape == y.shape
        np.testing.assert_allclose(x[0], y, atol=1e-5 * np.abs(y).max(), rtol=0)


def test_gradients_reach_every_parameter():
    config = dataclasses.replace(TINY, bidirectional=True)
    weight = np.random.default_rng(3).normal(size=(1, 16, 20, 3)).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradients(parameters, x):
        return jnp.sum(weight * Weights(config, parameters).model()(x))

    for name, gradient in gradients(weights(config), images(1, 4, 5)).items():
        assert np.isfinite(gradient).all(), name
        assert np.all(np.abs(gradient) > 0), name


def test_parameters_round_trip():
    parameters = weights(TINY)
    again = Weights.of(Weights(TINY, parameters).model()).parameters
    assert again.keys() == parameters.keys()
    for name, x in again.items():
        np.testing.assert_array_equal(x, parameters[name], err_msg=name)


def test_parameters_that_do_not_fit():
    good = weights(TINY)
    without = {name: x for name, x in good.items() if name != "conv_first.bias"}
    with pytest.raises(ValueError, match=r"do not fit the model: conv_first\.bias is missing$"):
        Weights(TINY, without)
    with pytest.raises(ValueError, match=r"model: more is not part of the model$"):
        Weights(TINY, good | {"more": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=r"conv_first\.bias has shape \(9,\), expected \(8,\)$"):
        Weights(TINY, good | {"conv_first.bias": np.zeros(9, np.float32)})
    with pytest.raises(ValueError, match=rf"\(and {len(good) - 2 - 3} more\)$"):
        Weights(TINY, dict(list(good.items())[:2]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("channels", 0), ("rssbs", -1), ("conv_width", 0), ("drop_path", 1.0), ("drop_path", np.nan)],
)
def test_impossible_configurations(field, value):
    with pytest.raises(UserError, match=f"{field} is {value}"):
        dataclasses.replace(TINY, **{field: value})


def test_weights_are_a_tree_of_their_parameters():
    network = Weights(TINY, weights(TINY))
    doubled = jax.jit(lambda w: jax.tree.map(lambda x: 2 * x, w))(network)
    assert type(doubled) is Weights
    assert doubled.config == TINY
    assert doubled.parameters.keys() == network.parameters.keys()
    for name, x in doubled.parameters.items():
        np.testing.assert_array_equal(x, 2 * network.parameters[name])
    with pytest.raises(dataclasses.FrozenInstanceError):
        doubled.config = SMALLEST


def test_an_absurd_depth_is_refused_at_once():
    with pytest.raises(ValueError, match="for 1000000000 RSSBs"):
        Weights(dataclasses.replace(TINY, rssbs=10**9), weights(TINY))


@pytest.mark.parametrize("scan", ["associative", "chunked-carried", "chunked-parallel", "auto"])
def test_scans_agree(scan):
    parameters, x = weights(SMALLEST), images(1, 20, 15)
    expected = compiled(SMALLEST, "sequential")(parameters, x)
    # The scan affects the output, so that a wrong result would show.
    slower = parameters | {"rssbs.0.vimms.0.forward.A_log": np.zeros((16, 4), np.float32)}
    assert np.abs(compiled(SMALLEST, "sequential")(slower, x) - expected).max() > 1e-2
    np.testing.assert_allclose(compiled(SMALLEST, scan)(parameters, x), expected, atol=1e-5)


def test_bfloat16_is_for_convolutions_and_projections():
    """The result is close to float32's; parameters, norms and the scan's sums stay float32."""
    parameters, x = weights(TINY), images(2, 9, 7)
    exact = compiled(TINY)(parameters, x)
    rounded = compiled(TINY, precision="bfloat16")(parameters, x)
    assert rounded.dtype == jnp.float32
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 3e-2

    model = jax.eval_shape(lambda: Weights(TINY, parameters).model(Compute(precision="bfloat16")))
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    in_jax = compiled(TINY, "sequential", precision="bfloat16")
    program = jax.make_jaxpr(lambda p: in_jax(p, x))(parameters)
    types = collections.defaultdict(set)
    for equation in equations(program.jaxpr):
        if equation.primitive.name in ("dot_general", "conv_general_dilated", "exp", "rsqrt"):
            types[equation.primitive.name] |= {str(v.aval.dtype) for v in equation.invars}
    assert types == {
        "dot_general": {"bfloat16"},
        "conv_general_dilated": {"bfloat16"},
        "exp": {"float32"},
        "rsqrt": {"float32"},
    }


def test_float32_is_not_rounded_on_accelerators():
    """JAX's default would be to round. This includes the gradient."""
    parameters, x = weights(TINY), images(2, 9, 7)
    loss = lambda p: compiled(TINY, "sequential")(p, x).sum()  # noqa: E731
    program = jax.make_jaxpr(jax.grad(loss))(parameters)
    products = [
        equation
        for equation in equations(program.jaxpr)
        if equation.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    assert len(products) == 3 * (2 * 4 + 5) - 1  # without the gradient by the picture
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert {equation.params["precision"] for equation in products} == {highest}


@pytest.mark.parametrize("config", [TINY, BIDIRECTIONAL])
def test_rematerialisation_changes_no_gradient(config):
    config = dataclasses.replace(config, drop_path=0.3)
    x = jnp.asarray(images(3, 5, 4))
    keys = jax.random.split(jax.random.key(0), 3)

    def gradient(remat):
        def loss(parameters):
            model = Weights(config, parameters).model()
            return jnp.mean(model.with_features(x, keys=keys, remat=remat)[0] ** 2)

        return jax.jit(jax.grad(loss))(weights(config))

    kept, again = gradient(False), gradient(True)
    for name, value in kept.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(again[name], value, atol=1e-6 * scale, rtol=1e-6, err_msg=name)


def test_average_over_symmetries():
    parameters = weights(SMALLEST)

    @jax.jit
    def average(parameters, x):
        return average_over_symmetries(Weights(SMALLEST, parameters).model(), x)

    x = jnp.asarray(images(1, 4, 4))
    expected = average(parameters, x)
    turn = functools.partial(jnp.rot90, axes=(1, 2))
    for symmetry in (lambda x: x[:, ::-1], lambda x: x[:, :, ::-1], turn):
        np.testing.assert_allclose(
            average(parameters, symmetry(x)), symmetry(expected), atol=1e-5, rtol=0
        )
    model = compiled(SMALLEST)
    assert np.abs(model(parameters, turn(x)) - turn(model(parameters, x))).max() > 1e-2


def test_average_over_symmetries_of_numpy_arrays_is_one():
    def doubled(x):
        assert isinstance(x, np.ndarray)
        return x.repeat(2, axis=1).repeat(2, axis=2)

    x = np.random.default_rng(0).random((1, 3, 5, 3), np.float32)
    average = average_over_symmetries(doubled, x)
    assert isinstance(average, np.ndarray)
    np.testing.assert_allclose(average, doubled(x), rtol=1e-6)


def upscale(parameters, picture):
    x = np.asarray(picture[None], np.float32) / 255
    return np.asarray(compiled(SMALLEST)(parameters, x)[0])


@pytest.mark.parametrize("self_ensemble", [False, True])
def test_upscaler(self_ensemble):
    parameters = weights(SMALLEST)
    picture = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    expected = upscale(parameters, picture)
    if self_ensemble:
        outputs = []
        for k in range(4):
            for axes in ((0, 1, 2), (1, 0, 2)):
                x = np.rot90(picture, k).transpose(axes)
                outputs.append(np.rot90(upscale(parameters, x).transpose(axes), -k))
        assert np.abs(outputs[0] - outputs[1]).max() > 0.1
        expected = np.mean(outputs, axis=0)
    assert 0.1 < np.mean((expected > 0) & (expected < 1)) < 0.9  # some are clamped
    model = Weights(SMALLEST, parameters).model()
    upscaled = make_upscaler(model, self_ensemble=self_ensemble)(picture)
    assert upscaled.dtype == np.uint8
    assert upscaled.shape == (16, 20, 3)
    # Rounding to the nearest of 0 .. 255, up to rounding errors before that.
    np.testing.assert_allclose(upscaled, np.clip(expected, 0, 1) * 255, atol=0.501, rtol=0)


def test_many_sizes_share_a_program():
    """Those of 17 and 18 columns, of any height; the pictures are those of whole images."""
    model = Weights(SMALLEST, weights(SMALLEST)).model()
    upscale = make_upscaler(model)
    compiled = []

    def note(event, duration_secs, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration_secs)

    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (h, w, 3), np.uint8) for h in (9, 20, 33) for w in (17, 18)]
    upscale(pictures[0])
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        results = [upscale(picture) for picture in pictures]
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not compiled
    for picture, result in zip(pictures, results, strict=True):
        whole = upscale_pixels(model, jnp.asarray(picture)[None], self_ensemble=False)[0]
        difference = np.abs(result.astype(int) - np.asarray(whole, int))
        assert difference.max() <= 1  # where rounding decides
        assert (difference > 0).mean() < 1e-3


def test_losses():
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 2, 3, 4, 3), np.float32)
    expected = np.mean(np.abs(x.astype(np.float64) - y))
    np.testing.assert_allclose(losses.l1(jnp.asarray(x), jnp.asarray(y)), expected, rtol=1e-6)

    student = rng.random((2, 1, 3, 4, 5), np.float32)
    teacher = rng.random((2, 1, 3, 4, 6), np.float32)
    projections = rng.random((2, 5, 6), np.float32)
    expected = [
        np.mean(np.abs(np.einsum("bhwc,ck->bhwk", s, p, dtype=np.float64) - t))
        for s, t, p in zip(student, teacher, projections, strict=True)
    ]
    student, teacher, projections = (list(jnp.asarray(x)) for x in (student, teacher, projections))
    program = jax.make_jaxpr(losses.mid_level)(student, teacher, projections)
    products = [e for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 2
    assert {e.params["precision"] for e in products} == {(jax.lax.Precision.HIGHEST,) * 2}
    loss = losses.mid_level(student, teacher, projections)
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-6)
    with pytest.raises(ValueError, match=r"shorter"):
        losses.mid_level(student, teacher[:1], projections)
