"""LoRA's starts against NumPy: each paper's equations on one matrix; then on a model's base, which stays as it is."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import lorajax as lj
from lorajax import start as runs
from lorajax.core.variant import Seen
from lorajax.io import adapter as files
from lorajax.variants import INITIALIZERS, DeLoRA, DoRA, KaSA, LoRA, MiCA
from lorajax.variants.corda import CorDA, Covariance
from lorajax.variants.eva import EVA, Spectrum, redistribute
from lorajax.variants.initializer import Initializer, MeanGradient, svd
from lorajax.variants.lora_ga import LoRAGA
from lorajax.variants.lora_one import LoRAOne
from lorajax.variants.milora import MiLoRA
from lorajax.variants.olora import OLoRA
from lorajax.variants.pissa import PiSSA
from lorajax.variants.plain import plain_lora

rng = np.random.default_rng(0)
IN, OUT, R = 24, 18, 4
U, V = (np.linalg.qr(rng.normal(size=(n, OUT)))[0] for n in (IN, OUT))
W = U * np.geomspace(1, 0.03, OUT) @ V.T
X = rng.normal(size=(60, IN)) @ (rng.normal(size=(IN, IN)) * np.geomspace(1, 0.05, IN)) + 0.3
G = rng.normal(size=(IN, OUT)) * 1e-2
SLOPE = MeanGradient(jnp.float32(3 * G), jnp.float32(3))
STATS = {CorDA: Covariance(jnp.float32(X.T @ X), jnp.float32(2)), LoRAGA: SLOPE, LoRAOne: SLOPE}
TAKEN_OFF = [PiSSA(), PiSSA(iterations=6), *[MiLoRA(part) for part in ("min", "mid", "random")], "olora", CorDA(),
             CorDA("kpm"), LoRAGA(), LoRAGA(scale="unit", clip=True), "both"]


@functools.partial(jax.jit, static_argnums=0)
def run(variant: LoRA, alpha: Any, stats: Any = None) -> Any:
    return dataclasses.replace(variant, alpha=alpha).init(jax.random.key(3), jnp.float32(W), stats)


def start(initializer: str | Initializer, alpha: float = 8.0) -> tuple[Any, ...]:
    """(A, B) in float64, s, and the frozen weight."""
    variant = LoRA(rank=R, initializer=initializer)
    adapter, w = run(variant, jnp.float32(alpha), STATS.get(type(variant.initial)))
    return np.float64(adapter.A), np.float64(adapter.B), alpha / R, np.float64(w)


def triplets(w: np.ndarray, chosen: Any) -> np.ndarray:
    """The part of w that the chosen singular triplets make."""
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, chosen] * s[chosen]) @ vt[chosen]


@pytest.mark.parametrize("initializer", TAKEN_OFF, ids=str)
def test_the_start_is_the_pretrained_weight_for_any_scale(initializer: Any) -> None:
    for scale in ({"alpha": 0.7}, {"alpha": 12.0, "rslora": True}):
        variant = LoRA(rank=R, initializer=initializer, **scale)
        s = float(variant.scale)
        adapter, w = run(LoRA(rank=R, initializer=initializer), jnp.float32(s * R), STATS.get(type(variant.initial)))
        update = s * np.float64(adapter.A) @ np.float64(adapter.B)
        assert np.abs(update).max() > 0.01
        np.testing.assert_array_equal(w, jnp.float32(W))
        assert variant.factors(adapter, w).a.shape[1] == 2 * R
        np.testing.assert_allclose(w + variant.delta(adapter, w), W, atol=2e-6)
        folded = dataclasses.replace(variant, fold=True)
        w = folded.restore(adapter, jnp.float32(W))
        np.testing.assert_allclose(w, W - update, atol=2e-6)
        np.testing.assert_allclose(w + folded.delta(adapter, w), W, atol=2e-6)
        assert folded.factors(adapter, w).a.shape[1] == R


def test_pissa_is_the_principal_part_in_equal_halves() -> None:
    for alpha in (4.0, 9.0):
        a, b, s, _ = start("pissa", alpha=alpha)
        np.testing.assert_allclose(s * a @ b, triplets(W, np.arange(R)), atol=1e-6)
        halves = np.diag(np.linalg.svd(W)[1][:R] / s)
        np.testing.assert_allclose(a.T @ a, halves, atol=2e-6)
        np.testing.assert_allclose(b @ b.T, halves, atol=2e-6)


def test_randomised_pissa_approaches_the_exact_one() -> None:
    """By the square of the ratio of singular values, 0.81, an iteration: 0.001 after 16."""
    exact = triplets(W, np.arange(R))
    errors = []
    for iterations in (0, 1, 16):
        a, b, s, _ = start(PiSSA(iterations))
        errors.append(np.linalg.norm(s * a @ b - exact) / np.linalg.norm(exact))
    assert errors[0] < 1e-6
    assert errors[1] > 1e-3 > errors[2]


def test_milora_takes_the_part_asked_for() -> None:
    k = min(IN, OUT)
    for part, chosen in (("min", np.arange(k - R, k)), ("mid", (k - R) // 2 + np.arange(R)), ("max", np.arange(R))):
        a, b, s, _ = start(MiLoRA(part), alpha=3.0)
        np.testing.assert_allclose(s * a @ b, triplets(W, chosen), atol=1e-6)
    a, b, s, _ = start(MiLoRA("random"))
    sizes = np.linalg.svd(s * a @ b)[1]
    nearest = [int(np.argmin(np.abs(np.linalg.svd(W)[1] - size))) for size in sizes[:R]]
    np.testing.assert_allclose(s * a @ b, triplets(W, nearest), atol=1e-5)
    assert len(set(nearest)) == R


def test_olora_projects_the_outputs_on_the_first_rows() -> None:
    """Q_r of W^T = Q R spans the first r rows of W, so A B = W Q_r Q_r^T; s does not enter A B."""
    rows = W[:R]
    projector = rows.T @ np.linalg.inv(rows @ rows.T) @ rows
    for alpha in (1.0, 8.0):
        a, b, _, _ = start("olora", alpha=alpha)
        np.testing.assert_allclose(a @ b, W @ projector, atol=2e-6)
        np.testing.assert_allclose(b @ b.T, np.eye(R), atol=1e-6)


@pytest.mark.parametrize("iterations", [0, 4])
def test_the_sign_of_a_singular_vector_is_that_of_its_largest_entry(iterations: int) -> None:
    def peaks(columns: Any) -> np.ndarray:
        return np.float64(columns)[np.argmax(np.abs(columns), 0), np.arange(columns.shape[1])]

    for w in (W, -W, W[::-1]):
        u, values, vt = svd(jax.random.key(1), jnp.float32(w), OUT, iterations)
        assert (peaks(u) > 0).all()
        np.testing.assert_allclose(u * values[None, :] @ vt, w, atol=2e-6)
        if not iterations:
            assert (peaks(OLoRA().start(jax.random.key(1), jnp.float32(w), R, 1.0, None)[1].T) > 0).all()


def test_both_is_uniform_within_its_bound() -> None:
    a, b, _, _ = start("both")
    for x in (a, b):
        assert 0.9 / np.sqrt(IN) < np.abs(x).max() <= 1 / np.sqrt(IN) + 1e-7


def test_mica_trains_a_against_the_minor_output_directions() -> None:
    adapter, w = MiCA(rank=R).init(jax.random.key(0), jnp.float32(W))
    minor = np.linalg.svd(W)[2][OUT - R:]
    np.testing.assert_allclose(adapter.B.T @ adapter.B, minor.T @ minor, atol=2e-6)
    assert not adapter.A.any()
    np.testing.assert_array_equal(w, jnp.float32(W))
    assert [row.trainable for row in MiCA.leaves.values()] == [True, False]


def test_mica_counts_what_the_paper_counts() -> None:
    """Llama-3.2-3B, query and value, rank 32: 5,505,024."""
    shapes = [(3072, 3072), (3072, 1024)]
    adapters = [jax.eval_shape(MiCA(rank=32).init, jax.random.key(0), jax.ShapeDtypeStruct(x, jnp.float32))[0]
                for x in shapes]
    assert 28 * sum(x.A.size for x in adapters) == 5_505_024


def corda_by_hand(mode: str, s: float) -> np.ndarray:
    c = X.T @ X / 2
    c = c + 0.01 * np.mean(np.diag(c)) * np.eye(IN)
    u, values, vt = np.linalg.svd(W.T @ c, full_matrices=False)  # the paper's layout: W_t C = U S V^T
    vt = vt @ np.linalg.inv(c)
    np.testing.assert_allclose((u * values) @ vt, W.T, atol=1e-9)
    part = slice(0, R) if mode == "ipm" else slice(len(values) - R, None)
    return ((u[:, part] * np.sqrt(values[part] / s)) @ (np.sqrt(values[part] / s)[:, None] * vt[part])).T


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_its_equations(mode: str) -> None:
    a, b, s, _ = start(CorDA(mode), alpha=6.0)
    want = corda_by_hand(mode, s)
    np.testing.assert_allclose(a @ b, want, atol=5e-4 * np.abs(want).max())


def test_corda_damps_until_the_inverse_holds() -> None:
    """A covariance of rank 1 and one of no data at all still give a start."""
    one = rng.normal(size=(1, IN))
    for c in (one.T @ one * 1e6, np.zeros((IN, IN))):
        a, b = CorDA().start(jax.random.key(0), jnp.float32(W), R, 1.0, Covariance(jnp.float32(c), jnp.float32(1)))
        assert np.isfinite(a).all()
        assert np.isfinite(b).all()


def test_corda_divides_each_batch_by_its_largest_input() -> None:
    statistic = CorDA().statistic(R)
    state = statistic.init(IN, OUT)
    for scale in (1.0, 100.0):
        state = statistic.update(state, seen(scale * X))
    np.testing.assert_allclose(state.total, 2 * X.T @ X / np.abs(X).max() ** 2, rtol=1e-4, atol=1e-4)
    assert state.batches == 2


def seen(x: np.ndarray) -> Seen:
    return Seen(jnp.float32(x.T @ x), jnp.float32(x.sum(0)), jnp.float32(len(x)), jnp.float32(np.abs(x).max()))


DIRECTIONS = {"ArB2r": (np.arange(R), np.arange(R, 2 * R)), "A2rBr": (np.arange(R, 2 * R), np.arange(R)),
              "ArBr": (np.arange(1, 2 * R, 2), np.arange(0, 2 * R, 2))}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale", ["stable", "gd", "unit", "weightS"])
def test_lora_ga_is_its_table(direction: str, scale: str) -> None:
    a, b, s, _ = start(LoRAGA(direction, scale, gamma=9.0, iterations=0), alpha=6.0)
    u, _, vt = np.linalg.svd(G.T)  # the released code's layout, (out, in)
    factor = {"stable": OUT**0.25 / 3, "gd": 1 / s, "unit": 1.0,
              "weightS": np.mean(np.sqrt(np.linalg.svd(W)[1][:R] / s))}[scale]
    of_a, of_b = DIRECTIONS[direction]
    for got, want in ((a, vt[of_a].T), (b.T, u[:, of_b])):
        np.testing.assert_allclose(np.abs(got.T @ want), factor * np.eye(R), atol=2e-5)


def test_lora_ga_clips_and_draws() -> None:
    a, b, s, _ = start(LoRAGA("ArB2r", "unit", clip=True, iterations=0), alpha=400.0)
    np.testing.assert_allclose(np.abs(s * a @ b).max(), np.abs(W).max(), rtol=1e-4)
    a, b, _, _ = start(LoRAGA("random", "unit", iterations=0))
    u, _, vt = np.linalg.svd(G.T)
    of_a, of_b = (np.argmax(np.abs(x), 0) for x in (vt @ a, u.T @ b.T))
    assert len({*of_a, *of_b}) == 2 * R == 1 + max(*of_a, *of_b)


def test_lora_one_is_one_step_against_the_gradient() -> None:
    a, b, _, w = start(LoRAOne(gamma=50.0))
    np.testing.assert_allclose(a @ b, triplets(-G, np.arange(R)) / np.linalg.svd(G)[1][0] / 50, atol=1e-6)
    np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-6)
    np.testing.assert_array_equal(np.float32(w), np.float32(W))


# EVA


def stream(eva: EVA, batches: list[np.ndarray], rank: int = R) -> Any:
    statistic = eva.statistic(rank)
    state = statistic.init(IN, OUT)
    for x in batches:
        state = jax.jit(statistic.update)(state, seen(x))
    return state


@pytest.mark.parametrize("center", [False, True])
def test_evas_stream_is_an_svd_of_all_rows_where_it_keeps_every_component(center: bool) -> None:
    batches = [X[:7], X[7:40], X[40:]]
    state = stream(EVA(rho=IN / R, center=center), batches)
    rows = X - X.mean(0) if center else X
    _, values, vt = np.linalg.svd(rows, full_matrices=False)
    np.testing.assert_allclose(state.values, values, rtol=2e-3, atol=2e-3)
    got = np.float64(state.components)
    np.testing.assert_allclose(got[:, :8].T @ got[:, :8], np.eye(8), atol=1e-5)
    np.testing.assert_allclose(np.abs(np.sum(got[:, :8] * vt[:8].T, 0)), 1, atol=1e-4)
    np.testing.assert_allclose(state.scatter, np.sum(rows**2), rtol=1e-4)
    np.testing.assert_allclose(state.mean, X.mean(0), rtol=1e-4, atol=1e-5)


def test_evas_stream_truncates_as_the_incremental_svd_does() -> None:
    batches, k = [X[:20], X[20:40], X[40:]], 2 * R
    state = stream(EVA(), batches)
    values, vt = np.zeros(0), np.zeros((0, IN))
    for x in batches:
        _, values, vt = np.linalg.svd(np.vstack([values[:, None] * vt, x]), full_matrices=False)
        values, vt = values[:k], vt[:k]
    np.testing.assert_allclose(state.values, values, rtol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(np.float64(state.components) * vt.T, 0)), 1, atol=1e-3)


def test_eva_converges_when_no_component_turns() -> None:
    assert not bool(stream(EVA(), [X]).settled)
    assert bool(stream(EVA(), [X, X]).settled)
    assert not bool(stream(EVA(), [X, X @ np.linalg.qr(rng.normal(size=(IN, IN)))[0]]).settled)


def test_eva_starts_along_the_components_with_b_zero() -> None:
    state = stream(EVA(), [X])
    for whiten in (False, True):
        adapter, w = run(LoRA(rank=R, initializer=EVA(whiten=whiten)), jnp.float32(8), state)
        want = np.linalg.svd(X, full_matrices=False)
        scale = np.sqrt(want[1][:R]) if whiten else np.ones(R)
        np.testing.assert_allclose(np.abs(np.sum(adapter.A * want[2][:R].T, 0)), 1 / scale, rtol=1e-3)
        assert not adapter.B.any()
        np.testing.assert_array_equal(w, jnp.float32(W))


# In a model


def net(params: Any, x: jax.Array) -> jax.Array:
    """A stack of three layers, a kernel of three dimensions, a head."""
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
    return jnp.tanh(jnp.einsum("bi,ihd->bhd", x, params["split"]).reshape(x.shape[0], -1)) @ params["head"]["w"]


PARAMS = {"layers": jnp.float32(rng.normal(size=(3, 8, 8))) / 3, "split": jnp.float32(rng.normal(size=(8, 2, 3))) / 3,
          "head": {"w": jnp.float32(rng.normal(size=(6, 2)))}}
INPUT = jnp.float32(rng.normal(size=(5, 8)))
SITES = lj.sites(net, PARAMS, INPUT)


def adapted(variant: Any, params: Any = PARAMS, sites: Any = SITES) -> Any:
    """(adapt, trainable after some change, frozen), compiled: what a reloaded adapter has to equal."""
    adapt = lj.adapt(sites, [("layers|split", variant), ("head/w", lj.Full())])
    trainable, frozen = jax.jit(adapt.init)(jax.random.key(1), params)
    return adapt, jax.tree.map(lambda x: x * 1.5 + 0.01, trainable), frozen


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        (LoRA(rank=2, alpha=3.0, initializer="pissa"), jnp.float32),
        (LoRA(rank=2, initializer="olora", fold=True), jnp.float32),
        (LoRA(rank=2, initializer="olora", fold=True), jnp.bfloat16),
        (DoRA(LoRA(rank=2, initializer="milora")), jnp.float32),
        (MiCA(rank=2), jnp.bfloat16),
    ],
    ids=["pissa", "fold", "fold-bfloat16", "dora", "mica-bfloat16"],
)
def test_a_saved_adapter_comes_back_exactly_without_a_decomposition(variant: Any, dtype: Any, tmp_path: Any,
                                                                    monkeypatch: Any) -> None:
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    adapt, trainable, inside = adapted(variant, params, lj.sites(net, params, INPUT.astype(dtype)))
    # A folded start rounds as its program does: the bits that last are those of `frozen`, which runs start from.
    frozen = adapt.frozen(params, adapt.kept(inside)) if getattr(variant, "fold", False) else inside
    for got, want in zip(jax.tree.leaves(inside), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=1e-5 if dtype == jnp.float32 else 0.01)
    files.save(tmp_path / "adapter", adapt, trainable, frozen)
    assert adapt.shapes

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a decomposition was done again")

    for name in ("svd", "qr"):
        monkeypatch.setattr(jnp.linalg, name, refuse)
    back, again = files.load(tmp_path / "adapter", adapt, params)
    assert jax.tree.structure(again) == jax.tree.structure(frozen)
    for got, want in zip(jax.tree.leaves((back, again)), jax.tree.leaves((trainable, frozen)), strict=True):
        np.testing.assert_array_equal(np.float32(got), np.float32(want))
        assert got.dtype == want.dtype


def test_a_run_of_a_folded_start_begins_with_the_bits_that_it_resumes_with(tmp_path: Any) -> None:
    adapt = lj.adapt(SITES, [("layers|split", LoRA(rank=2, initializer="olora", fold=True))])
    model = SimpleNamespace(variables=PARAMS, fingerprint=None)
    config = ConfigDict({"calibrate": {}, "ranks": {"budget": 0}})
    made = runs.make(config, adapt, model, None, None, jax.random.key(1), lambda batch: batch)
    files.save(tmp_path / "start", *made)
    read = runs.read(config, adapt, model, tmp_path / "start")
    assert jax.tree.structure(read[1:]) == jax.tree.structure(made[1:])
    assert jax.tree.all(jax.tree.map(np.array_equal, read[1:], made[1:]))


def test_adapters_of_several_starts_share_one_base() -> None:
    """Each starts at the pretrained function; the base is the caller's, and two on it add up to both updates."""
    out, results = net(PARAMS, INPUT), {}
    for name in ("pissa", "olora", "milora"):
        adapt = lj.adapt(SITES, [("layers|split", LoRA(rank=2, initializer=name))])
        trainable, frozen = adapt.init(jax.random.key(1), PARAMS)
        assert frozen.base["layers"] is PARAMS["layers"]
        lifted = jax.jit(lambda tr, frozen, adapt=adapt: lj.lift(net, strict=True)(adapt.bind(tr, frozen), INPUT))
        np.testing.assert_allclose(lifted(trainable, frozen), out, atol=5e-6)
        results[name] = adapt, jax.tree.map(lambda x: 1.2 * x, trainable), frozen
    (one, tr1, fr1), (two, tr2, fr2) = results["pissa"], results["olora"]
    both = lj.lift(net, strict=True)(two.bind(tr2, fr2, onto=one.bind(tr1, fr1)), INPUT)
    sums = jax.tree.map(lambda w, x, y: x + y - w, PARAMS, one.merge(tr1, fr1), two.merge(tr2, fr2))
    np.testing.assert_allclose(both, net(sums, INPUT), atol=1e-5)


def test_what_replaces_a_weight_is_bound_first_or_adds_up() -> None:
    """Onto another adapter: a folded start is refused, since its weight would be lost; a whole weight that trains
    keeps the other's update."""
    one, tr1, fr1 = adapted(LoRA(rank=2, initializer="pissa"))
    tr1, onto = jax.tree.map(lambda x: 1.2 * x, tr1), functools.partial(one.bind, frozen=fr1)
    folded, tr2, fr2 = adapted(LoRA(rank=2, initializer="pissa", fold=True))
    with pytest.raises(ValueError, match=r"LoRA starts from another weight than the base.*bind this one first"):
        folded.bind(tr2, fr2, onto=onto(tr1))
    whole = lj.adapt(SITES, [("split", lj.Full())])
    tr3, fr3 = whole.init(jax.random.key(0), PARAMS)
    both = lj.lift(net, strict=True)(whole.bind(tr3, fr3, onto=onto(tr1)), INPUT)
    np.testing.assert_allclose(both, net(one.merge(tr1, fr1), INPUT), atol=1e-5)


def test_rank_masks_leave_the_start_alone() -> None:
    """All ranks masked: W - s A0 B0, as with PEFT's folded weight."""
    adapt, trainable, frozen = adapted(LoRA(rank=2, alpha=3.0, initializer="pissa"))
    masks = {"layers": jnp.zeros((3, 2)), "split": jnp.zeros(2)}
    merged = adapt.merge(trainable, frozen, masks=masks)
    a0, b0 = (np.float64(x) for x in frozen.aux["layers"][2:])
    np.testing.assert_allclose(merged["layers"], np.float64(PARAMS["layers"]) - 1.5 * a0 @ b0, atol=2e-6)


@pytest.mark.parametrize("variant", [LoRA(rank=2, alpha=3.0, initializer="pissa"), MiCA(rank=2, alpha=3.0),
                                     LoRA(rank=2, alpha=3.0, rslora=True, initializer="olora"),
                                     LoRA(rank=2, alpha=3.0, initializer="both", fold=True)],
                         ids=["pissa", "mica", "rslora", "fold"])
def test_converted_to_plain_lora_it_is_the_same_function(variant: Any) -> None:
    adapt, trainable, frozen = adapted(variant)
    plain, loras, base = plain_lora(adapt, trainable, frozen, PARAMS)
    for path in ("layers", "split"):
        choice = plain.plan[path]
        assert isinstance(choice, LoRA)
        assert choice.rank == (2 if isinstance(variant, MiCA) else 4)
        assert (choice.initializer, choice.fold) == ("kaiming", False)
        assert float(choice.scale) == pytest.approx(3.0 / (np.sqrt(2) if getattr(variant, "rslora", False) else 2))
        np.testing.assert_array_equal(base.base[path], PARAMS[path])
    assert base.aux == {}
    assert loras["head/w"] is trainable["head/w"]
    assert plain.plan["head/w"] == lj.Full()
    want, got = adapt.merge(trainable, frozen), plain.merge(loras, base)
    assert np.abs(want["layers"] - PARAMS["layers"]).max() > 0.01
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-6), got, want)


def spectrum(*ratios: Any) -> Spectrum:
    """Of matrices whose components explain these shares of the variance."""
    values = np.sqrt(np.asarray(ratios))
    one, eye = np.ones(values.shape[:-1]), np.eye(8)[:, : values.shape[-1]]
    return Spectrum(jnp.float32(np.broadcast_to(eye, (*one.shape, *eye.shape))), jnp.float32(values), jnp.float32(one),
                    jnp.zeros((*one.shape, 8)), jnp.float32(one), jnp.asarray(one, bool),
                    jnp.asarray(4 * one, jnp.int32))


@pytest.mark.parametrize("wrap", [lambda v: v, DoRA], ids=["lora", "dora"])
def test_redistribution_keeps_the_components_that_explain_most(wrap: Any) -> None:
    """3 layers and a split of rank 2 each have 8 ranks: the 8 largest of 16 ratios, counted by hand."""
    adapt = lj.adapt(SITES, [("layers|split", wrap(LoRA(rank=2, alpha=3.0, initializer="eva")))])
    stats = {"layers": spectrum([0.9, 0.05, 0.03, 0.01], [0.4, 0.3, 0.2, 0.08], [0.05, 0.04, 0.03, 0.02]),
             "split": spectrum(0.6, 0.3, 0.06, 0.04)}
    new, kept = redistribute(adapt, stats)
    assert kept["layers"].keep.tolist() == [1, 4, 0]
    assert kept["split"].keep.tolist() == 3
    assert {path: choice.inner.rank for path, choice in new.plan.items()} == {"layers": 4, "split": 3}
    assert all(float(choice.inner.scale) == pytest.approx(1.5) for choice in new.plan.values())
    trainable, _ = new.init(jax.random.key(0), PARAMS, kept)
    for layer, rank in enumerate([1, 4, 0]):
        np.testing.assert_array_equal(trainable["layers"].A[layer], np.eye(8)[:, :4] * (np.arange(4) < rank))


def test_redistribution_drops_a_weight_without_a_component_and_may_keep_alpha() -> None:
    variant = LoRA(rank=2, alpha=3.0, rslora=True, initializer=EVA(adjust=False))
    adapt = lj.adapt(SITES, [("layers|split", variant)])
    stats = {"layers": spectrum([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]),
             "split": spectrum(0.01, 0.01, 0.01, 0.01)}
    new, _ = redistribute(adapt, stats)
    assert list(new.plan) == ["layers"]
    assert new.plan["layers"].alpha == 3.0


@pytest.mark.parametrize(
    ("initializer", "rank", "words"),
    [
        (PiSSA(-1), 4, r"iterations=-1 is negative: 0 is the exact"),
        (MiLoRA("minn"), 4, r"part='minn' is unknown: it is one of min, mid"),
        (CorDA("ipn"), 4, r"mode='ipn' is unknown: it is one of ipm, kpm"),
        (LoRAGA("AB"), 4, r"direction='AB' is unknown: it is one of ArB2r"),
        (LoRAGA(), 10, r"rank=10 needs 20 singular vectors.*a \(24, 18\) weight has 18: lower the rank to 9"),
        (LoRAGA(gamma=0.0), 4, r"gamma=0.0 must be positive"),
        (LoRAGA(iterations=-1), 4, r"iterations=-1 is negative: 0 is the exact"),
        (LoRAOne(0.0), 4, r"gamma=0.0 must be positive"),
        (LoRAOne(iterations=-1), 4, r"iterations=-1 is negative: 0 is the exact"),
        (EVA(rho=0.5), 4, r"rho=0.5 must be at least 1"),
        ("pisa", 4, r"'pisa' is unknown; there are .*did you mean 'pissa'"),
    ],
)
def test_errors_name_value_limit_and_remedy(initializer: Any, rank: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LoRA(rank=rank, initializer=initializer).check(IN, OUT)


def test_a_start_without_its_data_says_where_to_get_it() -> None:
    adapt = lj.adapt(SITES, [("layers|split", LoRA(rank=2, initializer="eva"))])
    with pytest.raises(ValueError, match=r"'layers' \(and 1 other paths\) starts from data: .*lorajax\.calibrate"):
        adapt.init(jax.random.key(0), PARAMS)


def test_every_start_is_documented_with_its_paper() -> None:
    """Of those that have one: the first five are loralib's, PEFT's and a repository's."""
    for name, cls in list(INITIALIZERS.items())[5:]:
        assert "arXiv 2" in (cls.__doc__ or ""), name
        assert all(field.name in (cls.__doc__ or "") for field in dataclasses.fields(cls)), name


# PEFT itself


@pytest.mark.peft
def test_eva_is_pefts_incremental_pca() -> None:
    """Components, singular values and explained-variance ratios of the released code, which takes the mean off."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    pca = pytest.importorskip("peft.utils.incremental_pca", reason="peft is not installed (extra: peft)")
    theirs = pca.IncrementalPCA(n_components=2 * R)
    batches = [X[:20], X[20:40] + 0.5, X[40:] * 2]
    for x in batches:
        theirs.partial_fit(torch.from_numpy(np.float32(x)))
    state = stream(EVA(center=True), batches)
    np.testing.assert_allclose(state.values, theirs.singular_values_, rtol=2e-4)
    got = np.square(np.float64(state.values)) / float(state.scatter)
    np.testing.assert_allclose(got, theirs.explained_variance_ratio_, rtol=1e-3)
    cosines = np.sum(np.float64(state.components) * np.float64(theirs.components_).T, 0)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-3)


@pytest.mark.peft
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_pefts(mode: str) -> None:
    """s A B from the same inputs in two samples; the largest |input| is positive, where PEFT divides by |max|."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    peft = pytest.importorskip("peft", reason="peft is not installed (extra: peft)")
    corda = pytest.importorskip("peft.tuners.lora.corda", reason="its import needs attrs, which is not installed")
    settings = pytest.importorskip("peft.tuners.lora.config")
    samples = [x * np.sign(x.ravel()[np.argmax(np.abs(x))]) for x in (X[:30], X[30:])]
    net = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False))
    net[0].weight.data = torch.from_numpy(np.float32(W.T).copy())
    config = peft.LoraConfig(r=R, lora_alpha=6, target_modules=["0"], init_lora_weights="corda",
                             corda_config=settings.CordaConfig(corda_method=mode))
    corda.preprocess_corda(net, config, run_model=lambda: [net(torch.from_numpy(np.float32(x))[None]) for x in samples])
    layer = peft.get_peft_model(net, config).base_model.model[0]
    want = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().numpy().T
    statistic = CorDA(mode).statistic(R)
    state = statistic.init(IN, OUT)
    for x in samples:
        state = statistic.update(state, seen(x))
    adapter, _ = run(LoRA(rank=R, initializer=CorDA(mode)), jnp.float32(6), state)
    np.testing.assert_allclose(adapter.A @ adapter.B, want, atol=1e-3 * np.abs(want).max())


@pytest.mark.peft
def test_mica_is_pefts() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    peft = pytest.importorskip("peft", reason="peft is not installed (extra: peft)")
    net = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False))
    net[0].weight.data = torch.from_numpy(np.float32(W.T).copy())
    config = peft.LoraConfig(r=R, lora_alpha=6, target_modules=["0"], init_lora_weights="mica")
    layer = peft.get_peft_model(net, config).base_model.model[0]
    b = np.float64(layer.lora_B["default"].weight.detach().numpy().T)
    ours, _ = MiCA(rank=R).init(jax.random.key(0), jnp.float32(W))
    np.testing.assert_allclose(np.float64(ours.B).T @ np.float64(ours.B), b.T @ b, atol=1e-5)
    assert not layer.lora_A["default"].weight.detach().numpy().any()


@pytest.mark.parametrize("variant", [
    lj.LoRA(rank=4, initializer="pissa", rank_dropout=0.5), DeLoRA(rank=4, initializer="residual", rank_dropout=0.5),
    DoRA(of=lj.LoRA(rank=4, initializer="pissa"), rank_dropout=0.5)])  # fmt: skip
def test_a_component_is_dropped_with_what_takes_its_start_off(variant: Any) -> None:
    """At the start each component and its frozen copy cancel, so dropping any of them changes nothing."""
    w, x = {"w": jnp.float32(np.random.default_rng(0).normal(size=(12, 8)))}, jnp.ones((3, 12))
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    adapt = lj.adapt(lj.sites(fn, w, x), [("w", variant)])
    trainable, frozen = adapt.init(jax.random.key(0), w)
    for seed in range(4):
        out = lj.lift(fn)(adapt.bind(trainable, frozen, key=jax.random.key(seed)), x)
        np.testing.assert_allclose(out, x @ w["w"], rtol=1e-4, atol=1e-4)


def test_what_kasa_took_from_the_weight_is_never_dropped() -> None:
    """B = 0 at the start, so with every rank dropped or kept the weight is W without its least components."""
    w, x = {"w": jnp.float32(np.random.default_rng(0).normal(size=(12, 8)))}, jnp.ones((3, 12))
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    adapt = lj.adapt(lj.sites(fn, w, x), [("w", KaSA(rank=3, rank_dropout=0.5))])
    trainable, frozen = adapt.init(jax.random.key(0), w)
    u, s, vt = np.linalg.svd(np.float64(w["w"]), full_matrices=False)
    want = np.float64(x) @ (u[:, :-3] * s[:-3]) @ vt[:-3]
    for seed in range(4):
        out = lj.lift(fn)(adapt.bind(trainable, frozen, key=jax.random.key(seed)), x)
        np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)
