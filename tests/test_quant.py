"""Formats and the quantised weight: against NumPy derivations of the papers' formulas, bitsandbytes and llama.cpp."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import lorajax as lj
import lorajax.core.sites
import lorajax.variants
from lorajax import quant
from lorajax.quant import FP4, NF4, Q4_1, Q8_0, Int8, Quantized, dynamic, quantize

FORMS = [NF4(), FP4(double=False), Int8(), Q4_1()]


def normals(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32) * np.float32(0.05)


# Values, codes, order


def test_nf4_values_are_quantiles_of_the_normal_distribution() -> None:
    offset = 1 - (1 / 32 + 1 / 30) / 2
    positive, negative = norm.ppf(np.linspace(offset, 0.5, 9)[:-1]), -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort([*positive, 0.0, *negative])
    np.testing.assert_allclose(NF4.table, values / values.max(), atol=2e-7)


def test_fp4_values_are_sign_exponent_mantissa() -> None:
    # bits seem: a code e m is (1 + m/2) 2^-e' with the exponents in bitsandbytes' order, 0 and 0.0625 below them
    above = {2: (0, 0), 3: (0, 1), 4: (1, 0), 5: (1, 1), 6: (2, 0), 7: (2, 1)}
    for code, (e, m) in above.items():
        assert FP4.table[code] * 12 == pytest.approx((1 + m / 2) * 8 / 2**e)
    np.testing.assert_array_equal(FP4.table[8:], -FP4.table[:8])


def test_dynamic_map() -> None:
    signed, unsigned = dynamic.dynamic_map(), dynamic.dynamic_map(signed=False)
    assert len(set(signed.tolist())) == len(set(unsigned.tolist())) == 256
    assert (signed[0], signed[-1]) == (np.float32(-0.99296874), 1)
    assert min(abs(signed[signed != 0])) == pytest.approx(5.5e-7)
    for i in range(7):  # 2^i equal parts of each decade
        decade = signed[(signed > 10.0 ** (i - 7)) & (signed < 10.0 ** (i - 6))]
        np.testing.assert_allclose(np.diff(decade), 0.9 * 10.0 ** (i - 6) / 2**i, rtol=1e-3)
        assert len(decade) == 2**i


def test_micro_oracle() -> None:
    """A block [.5, -2, .03, 1]: codes 10, 0, 7, 12, the first in the high half."""
    w = quantize(np.float32([[0.5], [-2.0], [0.03], [1.0]]), NF4(block=4, double=False))
    np.testing.assert_array_equal(w.codes, [[0xA0, 0x7C]])
    np.testing.assert_array_equal(w.scales[0], [[2.0]])
    np.testing.assert_allclose(w.dense()[:, 0], [0.49222460, -2.0, 0.0, 0.88141966], rtol=1e-6)


@pytest.mark.parametrize("cls", [NF4, FP4])
def test_codes_are_the_nearest_and_blocks_are_in_torchs_order(cls: Any) -> None:
    w = normals(128, 6)
    w[:64, 2] = 0
    got = quantize(w, cls(double=False))
    flat = w.T.reshape(-1, 64)  # torch's (out, in), row by row
    absmax = np.abs(flat).max(1)
    with np.errstate(invalid="ignore"):
        scaled = np.where(absmax[:, None] > 0, flat / absmax[:, None], 0)
    distance = np.abs(scaled[..., None] - cls.table)
    codes = np.stack([np.asarray(got.codes) >> 4, np.asarray(got.codes) & 15], -1).reshape(-1, 64)
    chosen = np.take_along_axis(distance, codes[..., None].astype(int), -1)[..., 0]
    assert np.all(chosen <= distance.min(-1) + 1e-7)
    np.testing.assert_array_equal(np.asarray(got.scales[0]).reshape(-1), absmax)
    np.testing.assert_allclose(got.dense(), (cls.table[codes] * absmax[:, None]).reshape(6, 128).T, rtol=1e-6)
    if cls is NF4:
        assert set(codes[4]) == {7}  # the block of zeros


@pytest.mark.parametrize("form", [NF4(), NF4(double=False, block=32), FP4(), Q4_1()], ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_are_the_float32_products_rounded_once(form: Any, dtype: str) -> None:
    w = normals(192, 7).astype(dtype)
    got = quantize(w, form)
    codes = np.stack([np.asarray(got.codes) >> 4, np.asarray(got.codes) & 15], -1).reshape(7, -1, form.block)
    if isinstance(form, Q4_1):
        d, m = (np.asarray(x, np.float32)[..., None] for x in got.scales)
        values = codes.astype(np.float32) * d + m
    else:
        values = form.table[codes] * np.asarray(got.single().scales[0])[..., None]
    dense = got.dense()
    assert dense.dtype == dtype
    np.testing.assert_array_equal(dense, values.reshape(7, 192).T.astype(dtype))
    if dtype != "float32":  # a word of two numbers, joined by no concatenation, so that a GPU's thread writes 16 bytes
        assert "concatenate" not in str(jax.make_jaxpr(lambda w: w.dense())(got))


def test_double_quantisation_is_that_of_the_scales_less_their_mean() -> None:
    w = normals(1024, 40)
    one, two = quantize(w, NF4(double=False)), quantize(w, NF4())
    np.testing.assert_array_equal(one.codes, two.codes)
    absmax = np.asarray(one.scales[0]).reshape(-1)
    eight, second, mean = (np.asarray(x) for x in two.scales)
    assert eight.dtype == np.uint8 and second.shape == (math.ceil(absmax.size / 256),)
    np.testing.assert_allclose(mean, absmax.mean(), rtol=1e-6)
    for k in range(len(second)):
        block = absmax[256 * k:256 * (k + 1)] - mean
        np.testing.assert_allclose(second[k], np.abs(block).max(), rtol=1e-6)
        codes = eight.reshape(-1)[256 * k:256 * (k + 1)]
        distance = np.abs(block[:, None] / second[k] - dynamic.dynamic_map())
        assert np.all(distance[np.arange(len(block)), codes] <= distance.min(-1) + 1e-7)
    back = dynamic.dynamic_map()[eight.reshape(-1)] * np.repeat(second, 256)[:absmax.size] + mean
    np.testing.assert_allclose(two.single().scales[0].reshape(-1), back, rtol=1e-6)
    np.testing.assert_allclose(two.dense(), np.asarray(one.dense()) * (back / absmax).reshape(40, 16).repeat(64, 1).T,
                               rtol=1e-5)


@pytest.mark.parametrize(("form", "bits"), [(NF4(), 4.12695), (NF4(double=False), 4.5), (FP4(), 4.12695),
                                            (Int8(), 8 + 32 / 4096), (Q8_0(), 8.5), (Q4_1(), 5.0)])
def test_bits_for_an_element(form: Any, bits: float) -> None:
    w = jax.eval_shape(lambda w: quantize(w, form), jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16))
    assert w.nbytes * 8 / 4096**2 == pytest.approx(bits, abs=1e-4)


def test_int8_is_within_half_a_step_of_each_row() -> None:
    w = normals(96, 5)
    got = quantize(w, Int8())
    steps = np.abs(w).max(0) / 127
    np.testing.assert_allclose(got.scales[0][:, 0], np.abs(w).max(0))
    assert np.all(np.abs(got.dense() - w) <= 0.5001 * steps)
    assert np.abs(got.codes).max() == 127


def test_llama_cpp_types_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra: weights)")
    w = normals(256, 24)
    for form, kind in ((Q8_0(), gguf.GGMLQuantizationType.Q8_0), (Q4_1(), gguf.GGMLQuantizationType.Q4_1)):
        theirs = gguf.quants.dequantize(gguf.quants.quantize(w.T.copy(), kind), kind).T
        np.testing.assert_array_equal(quantize(w, form).dense(), theirs)


@pytest.mark.peft
def test_bitsandbytes() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    for signed in (True, False):
        np.testing.assert_array_equal(dynamic.dynamic_map(signed), bnb.create_dynamic_map(signed=signed).numpy())
    w = normals(256, 192)
    w[:64, 0] = 0
    for name, cls in (("nf4", NF4), ("fp4", FP4)):
        for block in (64, 128):
            codes, state = bnb.quantize_4bit(torch.tensor(w.T.copy()), blocksize=block, quant_type=name)
            ours = quantize(w, cls(block=block, double=False))
            np.testing.assert_array_equal(ours.codes.reshape(-1), codes.numpy().reshape(-1))
            np.testing.assert_array_equal(ours.scales[0].reshape(-1), state.absmax.numpy())
            np.testing.assert_array_equal(ours.dense(), bnb.dequantize_4bit(codes, state).numpy().T)
    codes, state = bnb.quantize_4bit(torch.tensor(w.T.copy()), compress_statistics=True, quant_type="nf4")
    eight, second, mean = quantize(w, NF4()).scales
    np.testing.assert_allclose(mean, float(state.offset), rtol=2e-7)
    np.testing.assert_allclose(second, state.state2.absmax.numpy(), rtol=1e-6)
    # Its kernel for CPUs takes a neighbour of the nearest value here and there, which no formula says: ours is nearer.
    theirs, values = state.absmax.numpy(), dynamic.dynamic_map()
    exact = (np.abs(w.T.reshape(-1, 64)).max(1) - np.float32(mean)) / np.repeat(second, 256)[:theirs.size]
    assert np.all(np.abs(values[eight.reshape(-1)] - exact) <= np.abs(values[theirs] - exact) + 1e-6)
    assert np.mean(eight.reshape(-1) != theirs) < 0.01
    codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(torch.tensor(w.T.copy()))
    eight_bit = quantize(w[:, 1:], Int8())
    np.testing.assert_array_equal(eight_bit.codes, codes.numpy()[1:])
    np.testing.assert_array_equal(eight_bit.scales[0][:, 0], absmax.numpy()[1:])


# The node


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_a_weight_is_one_node_of_its_shape(form: Any) -> None:
    w = jnp.asarray(normals(128, 64), jnp.bfloat16)
    q = quantize(w, form)
    assert (q.shape, q.dtype, q.ndim, q.size) == ((128, 64), jnp.bfloat16, 2, 128 * 64)
    assert q.dense().shape == q.shape and q.dense().dtype == q.dtype
    tree = {"w": q, "b": jnp.zeros(3)}
    assert list(lj.core.sites.by_path(tree)[0]) == ["b", "w"]
    back = jax.jit(lambda t: t)(tree)["w"]
    assert isinstance(back, Quantized) and back.format == form
    np.testing.assert_array_equal(back.dense(), q.dense())


def test_the_rows_of_every_shape_of_kernel() -> None:
    """A kernel (in, heads, head) or (heads, head, out) has the blocks of its (in, out) matrix."""
    w = normals(64, 96)
    form = NF4(double=False)
    want = quantize(w, form).dense()
    q = quantize(w.reshape(64, 4, 24), form, order=(1, 2, 0))
    np.testing.assert_array_equal(q.dense(), want.reshape(64, 4, 24))
    o = quantize(w.reshape(4, 16, 96), form, order=(2, 0, 1), run=2)
    np.testing.assert_array_equal(o.dense(), want.reshape(4, 16, 96))


@pytest.mark.parametrize("form", [NF4(), Int8()], ids=repr)
def test_a_stack_is_its_matrices(form: Any) -> None:
    w = normals(3, 128, 64)
    stack = quantize(w, form, order=(0, 2, 1), stack=1)
    alone = [quantize(x, form) for x in w]
    for i, one in enumerate(alone):
        np.testing.assert_allclose(stack.dense()[i], one.dense(), rtol=1e-5)
    joined = jax.tree.map(lambda *xs: jnp.stack(xs), *alone)
    assert joined.shape == (3, 128, 64)
    np.testing.assert_allclose(joined.dense(), stack.dense(), rtol=1e-5)
    sliced = jax.lax.scan(lambda c, q: (c, q.dense()), 0, stack)[1]
    np.testing.assert_array_equal(sliced, stack.dense())


# What cannot be


@pytest.mark.parametrize(
    ("w", "form", "words"),
    [
        (np.zeros(8, np.float32), NF4(), ["shape (8,)", "biases, norms", "leave them out"]),
        (np.zeros((8, 8), np.int32), NF4(), ["dtype int32", "cast it"]),
        (np.zeros((96, 8), np.float32), NF4(), ["block=64 does not divide its rows of 96", "block=48 fits"]),
        (np.zeros((7, 8), np.float32), NF4(), ["rows of 7", "no even block fits", "leave this weight out"]),
        (np.zeros((64, 8), np.float32), NF4(block=0 - 2), ["block=-2", "positive, even"]),
        (np.float32([[1, np.nan], [np.inf, 2]]), NF4(block=2), ["2 numbers that are not finite", "load"]),
        (np.full((64, 8), 1e8, np.float32), Q8_0(), ["reaches 1e+08", "q8_0 has no scale", "another format"]),
        (np.full((64, 8), 3e38, np.float32), NF4(), ["reaches 3e+38", "nf4 has no scale"]),
        (np.zeros((64, 8), np.float32), "nf4", ["'nf4' is no format", "NF4()", "int8"]),
    ],
)
def test_bad_input(w: np.ndarray, form: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        quantize(w, form)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_order_is_checked() -> None:
    with pytest.raises(ValueError, match="order=.* names each of"):
        quantize(np.zeros((64, 64), np.float32), NF4(), order=(0, 0))


# Which weights


def model(p: Any, x: jax.Array) -> jax.Array:
    x = p["table"][x] + p["bias"][None]
    return jnp.tanh(x @ p["up"]) @ p["down"]


def params() -> dict[str, Any]:
    return {"table": normals(20, 64), "bias": normals(64), "up": normals(64, 128), "down": normals(128, 64)}


def test_plan_and_streaming() -> None:
    sites = lj.sites(model, params(), jnp.arange(5))
    plan = quant.plan(sites, [("up", None), ("embeddings", Q8_0()), (".*", NF4())])
    assert {p: type(row.form) for p, row in plan.rows.items()} == {"table": Q8_0, "down": NF4}
    whole = plan.quantize(params())
    assert isinstance(whole["down"], Quantized) and whole["up"].shape == (64, 128)
    assert whole["table"].dims == (0, 1)  # along the features
    streamed = {path: plan.place(path, w) for path, w in params().items()}
    assert jax.tree.structure(streamed) == jax.tree.structure(jax.tree.map(jnp.asarray, whole))
    assert jax.tree.all(jax.tree.map(np.array_equal, streamed, whole))
    with pytest.raises(ValueError, match="down is quantised already"):
        plan.quantize(whole)
    with pytest.raises(ValueError, match="other is no leaf of the model"):
        plan.place("other", np.zeros(3))
    for rules, words in (([("bias", NF4())], "matches only 'bias'"), ([("upp", NF4())], "takes nothing"),
                         ([("up", 4)], "such as NF4")):
        with pytest.raises(lj.RuleError, match=words):
            quant.plan(sites, rules)
    with pytest.raises(ValueError, match="up .64, 128.: block=48 does not divide"):
        quant.plan(sites, [("up", NF4(block=48))])


def test_full_and_folded_starts_refuse_a_quantised_weight() -> None:
    sites = lj.sites(model, params(), jnp.arange(5))
    quantised = quant.plan(sites, [("up", NF4())]).quantize(params())
    folded = lj.LoRA(initializer="pissa", fold=True)
    for choice, words in ((lj.Full(), "Full.. cannot train it"), (folded, "fold=False")):
        with pytest.raises(ValueError, match=words):
            lj.adapt(sites, [("up", choice)]).init(jax.random.key(0), quantised)
    adapt = lj.adapt(sites, [("up", lj.Full()), ("down", lj.LoRA())])
    assert set(quant.plan(sites, [(".*", NF4(block=16))]).without(adapt).rows) == {"table", "down"}


# Merging


def test_merging_is_dense_or_quantised_again_and_never_drifts() -> None:
    p = params()
    sites = lj.sites(model, p, jnp.arange(5))
    quantised = quant.plan(sites, [(".*", NF4(block=32))]).quantize(p)
    adapt = lj.adapt(sites, [("up", lj.LoRA(rank=2)), ("down", lj.LoRA(rank=2))])
    trainable, frozen = adapt.init(jax.random.key(0), quantised)
    trainable["up"] = trainable["up"]._replace(B=jnp.asarray(normals(2, 128)))
    dense = adapt.merge(trainable, frozen)
    want = quantised["up"].dense() + 4 * np.asarray(trainable["up"].A) @ np.asarray(trainable["up"].B)
    np.testing.assert_allclose(dense["up"], want, atol=1e-6)
    assert dense["table"].shape == (20, 64) and not isinstance(dense["table"], Quantized)
    again, errors = quant.requantize(dense, quantised)
    assert again["down"] is quantised["down"] and errors["down"] == 0.0  # B = 0 there
    measured = np.linalg.norm(again["up"].dense() - dense["up"]) / np.linalg.norm(dense["up"])
    assert errors["up"] == pytest.approx(measured, rel=1e-5) and 0.05 < errors["up"] < 0.15
    for _ in range(3):
        more, _ = quant.requantize(adapt.merge(trainable, frozen), quantised)
        assert jax.tree.all(jax.tree.map(np.array_equal, more, again))


# LoftQ and QPiSSA


def turns(w: np.ndarray, rank: int, t: int, ends_on_svd: bool) -> tuple[np.ndarray, np.ndarray]:
    """(Q, L) of arXiv 2310.08659, algorithm 1, and of PiSSA's released loop, with NumPy's SVD."""
    def low(m: np.ndarray) -> np.ndarray:
        u, s, vt = np.linalg.svd(m.astype(np.float64), full_matrices=False)
        return (u[:, :rank] * s[:rank] @ vt[:rank]).astype(np.float32)

    def q(m: np.ndarray) -> np.ndarray:
        return np.asarray(quantize(m, NF4(double=False)).dense())

    part, base = np.zeros_like(w), np.zeros_like(w)
    for _ in range(t):
        if ends_on_svd:
            base = q(w - part)
            part = low(w - base)
        else:
            part = low(w - base)
            base = q(w - part)
    return base, part


@pytest.mark.parametrize("start", ["loftq", "qpissa"])
@pytest.mark.parametrize(("t", "alpha"), [(1, 8.0), (3, 3.0)])
def test_loftq_and_qpissa(start: str, t: int, alpha: float) -> None:
    w = normals(64, 96) + 0.1 * normals(64, 4, seed=1) @ normals(4, 96, seed=2) / 0.0025
    sites = lj.sites(lambda p, x: x @ p["w"], {"w": w}, jnp.ones((2, 64)))
    plan = quant.plan(sites, [("w", NF4(double=False))])
    make = lj.variants.INITIALIZERS[start](iterations=t)
    adapt = lj.adapt(sites, [("w", lj.LoRA(rank=8, alpha=alpha, initializer=make))])
    base, stats = plan.start(adapt, {"w": w})
    trainable, frozen = adapt.init(jax.random.key(0), base, stats)
    want_base, want_part = turns(w, 8, t, start == "loftq")
    part = alpha / 8 * trainable["w"].A @ trainable["w"].B
    if t == 1 and start == "loftq":
        np.testing.assert_array_equal(frozen.base["w"].dense(), want_base)
    # Rounding of the decomposition moves few elements to the next code.
    assert np.mean(np.abs(frozen.base["w"].dense() - want_base) > 1e-3 * np.abs(w).max()) < 0.01
    np.testing.assert_allclose(part, want_part, atol=0.02 * np.abs(want_part).max())
    # The identity of each end: LoftQ's part is the best for its base, QPiSSA's base the nearest for its part.
    dense = np.asarray(frozen.base["w"].dense())
    if start == "loftq":
        u, s, vt = np.linalg.svd(w - dense, full_matrices=False)
        np.testing.assert_allclose(part, u[:, :8] * s[:8] @ vt[:8], atol=1e-5)
    else:
        again = quantize(w - np.asarray(part), NF4(double=False)).dense()
        assert np.mean(np.abs(dense - again) > 1e-5) < 0.01
    plain = np.linalg.norm(w - plan.quantize({"w": w})["w"].dense())
    assert np.linalg.norm(w - adapt.merge(trainable, frozen)["w"]) < 0.9 * plain


def test_a_start_from_the_quantisation_says_what_it_needs() -> None:
    sites = lj.sites(model, params(), jnp.arange(5))
    adapt = lj.adapt(sites, [("up", lj.LoRA(initializer="loftq"))])
    with pytest.raises(ValueError, match="pass init.* what lorajax.quant.plan"):
        adapt.init(jax.random.key(0), params())
    with pytest.raises(ValueError, match="no rule quantises it"):
        quant.plan(sites, [("down", NF4())]).start(adapt, params())
    base, stats = quant.plan(sites, [("up", NF4())]).start(adapt, params())
    adapt.init(jax.random.key(0), base, stats)
    with pytest.raises(ValueError, match="up .*hold it as it was before: pass the params that quant.plan"):
        adapt.init(jax.random.key(0), params(), stats)


@pytest.mark.parametrize("start", ["loftq", "qpissa"])
def test_randomised_singular_values_come_close_to_the_exact_ones(start: str) -> None:
    """On what quantisation leaves, whose spectrum is nearly flat: the hard case for Halko et al., arXiv 0909.4061."""
    w = normals(128, 192)
    sites = lj.sites(lambda p, x: x @ p["w"], {"w": w}, jnp.ones((2, 128)))
    plan, errors = quant.plan(sites, [("w", NF4(double=False))]), {}
    for power in (0, 1, 8):
        make = lj.variants.INITIALIZERS[start](iterations=2, power=power)
        adapt = lj.adapt(sites, [("w", lj.LoRA(rank=8, initializer=make))])
        base, stats = plan.start(adapt, {"w": w})
        trainable, frozen = adapt.init(jax.random.key(0), base, stats)
        errors[power] = np.linalg.norm(w - adapt.merge(trainable, frozen)["w"])
    gain = np.linalg.norm(w - plan.quantize({"w": w})["w"].dense()) - errors[0]
    assert 0 < errors[8] - errors[0] < 0.1 * gain < errors[1] - errors[0]
    with pytest.raises(ValueError, match="power=-1 is negative: 0 is the exact SVD"):
        lj.LoRA(rank=2, initializer=lj.variants.INITIALIZERS[start](power=-1)).check(8, 8)


@pytest.mark.parametrize("start", ["loftq", "qpissa"])
def test_a_start_that_never_quantises_is_refused(start: str) -> None:
    made = lj.variants.INITIALIZERS[start](iterations=0)
    with pytest.raises(ValueError, match=f"iterations=0: {type(made).__name__} quantises at least once"):
        lj.LoRA(rank=2, initializer=made).check(8, 8)
