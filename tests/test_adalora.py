"""AdaLoRA: the triplet, the penalty, the importance, the budget and the masking, against numpy and PEFT."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax as lj
from lorajax.control import Controller, adalora, budget_schedule, compact, identity
from lorajax.control.adalora import moving_averages
from lorajax.variants import AdaLoRA, LoRA
from lorajax.variants.adalora import AdaLoRAAdapter

GOLDEN = Path(__file__).parent / "goldens" / "cases" / "adalora_bert"
SITES = {"q": ((), 12, 8), "layers/v": ((3,), 10, 6)}  # stack, in, out
RANK = 4


def plan() -> SimpleNamespace:
    return SimpleNamespace(plan={**dict.fromkeys(SITES, AdaLoRA(rank=RANK)), "head": LoRA()})


def random_adapters(rng: np.random.Generator) -> dict[str, AdaLoRAAdapter]:
    adapters = {
        path: AdaLoRAAdapter(*(jnp.float32(rng.normal(size=(*stack, *shape)))
                               for shape in ((n_in, RANK), (RANK,), (RANK, n_out))))
        for path, (stack, n_in, n_out) in SITES.items()
    }
    return {**adapters, "head": LoRA().init(jax.random.key(0), jnp.ones((9, 9)))[0]}  # type: ignore[dict-item]


# The triplet


def test_delta_ties_the_scale_to_the_initial_rank() -> None:
    rng = np.random.default_rng(0)
    a, e, b = rng.normal(size=(12, 3)), rng.normal(size=3), rng.normal(size=(3, 8))
    adapter = AdaLoRAAdapter(jnp.float32(a), jnp.float32(e), jnp.float32(b))
    for init_rank, s in ((None, 6 / 3.00001), (12, 6 / 12.00001)):
        variant = AdaLoRA(rank=3, alpha=6.0, init_rank=init_rank)
        assert variant.scale == s
        delta = variant.delta(adapter, jnp.zeros((12, 8)))
        np.testing.assert_allclose(delta, s * a @ np.diag(e) @ b, rtol=1e-5, atol=1e-5)


def test_start_is_identity_and_only_e_has_gradient() -> None:
    variant, w = AdaLoRA(rank=8), jnp.ones((512, 256))
    adapter, same = variant.init(jax.random.key(0), w)
    assert same is w
    assert not variant.delta(adapter, w).any()
    np.testing.assert_allclose([np.std(adapter.A), np.std(adapter.B)], 0.02, rtol=0.05)  # standard error 1.6 % for B
    grads = jax.grad(lambda ad: jnp.sum(jnp.square(1 + variant.delta(ad, w))))(adapter)
    assert [bool(g.any()) for g in grads] == [False, True, False]


def test_penalty_is_the_mean_of_unsquared_norms() -> None:
    rng = np.random.default_rng(0)
    matrices = [(rng.normal(size=(12, 4)), rng.normal(size=(4, 8))) for _ in range(3)]
    norms = [np.linalg.norm(gram - np.eye(4)) for a, b in matrices for gram in (a.T @ a, b @ b.T)]
    ours = sum(AdaLoRA(orth=0.3).penalty(AdaLoRAAdapter(jnp.float32(a), jnp.zeros(4), jnp.float32(b)), 1 / 3)
               for a, b in matrices)
    np.testing.assert_allclose(ours, 0.3 * np.mean(norms), rtol=1e-5)


def test_penalty_has_a_finite_gradient_where_the_factors_are_orthonormal() -> None:
    adapter = AdaLoRAAdapter(jnp.eye(12, 4), jnp.zeros(4), jnp.eye(4, 8))
    value, grads = jax.value_and_grad(lambda ad: AdaLoRA().penalty(ad, 1.0))(adapter)
    assert value == 0.0
    assert all(np.array_equal(g, np.zeros_like(g)) for g in grads)


def test_parameter_count_of_peft() -> None:
    """Llama-3.2-3B, query and value, rank 64: 18,353,664 by PEFT's result file."""
    shapes = [(3072, 3072), (3072, 1024)]
    adapters = [jax.eval_shape(AdaLoRA(rank=64).init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))[0]
                for shape in shapes]
    assert 28 * sum(x.size for x in jax.tree.leaves(adapters)) == 18_353_664


# Importance and budget


def test_moving_averages_of_the_worked_example() -> None:
    mean, deviation, seen = jnp.float32(0), jnp.float32(0), []
    for sensitivity in (1.0, 2.0, 0.0):
        mean, deviation = moving_averages(jnp.float32(sensitivity), mean, deviation, 0.85, 0.85)
        seen.append((mean, deviation, mean * deviation))
    expected = [(0.15, 0.1275, 0.019125), (0.4275, 0.34425, 0.147167), (0.363375, 0.347119, 0.126134)]
    np.testing.assert_allclose(seen, expected, atol=5e-7)


def test_budget_of_the_worked_example() -> None:
    table = budget_schedule(1000, 100, 200, 108, 72)
    assert [table[t] for t in (0, 100, 300, 450, 625, 800, 1000)] == [108, 108, 85, 76, 72, 72, 72]


def test_budget_of_peft() -> None:
    trace = np.load(GOLDEN / "expected.npz")["trace_budget"]
    np.testing.assert_array_equal(budget_schedule(30, 5, 8, 36, 18)[:30], trace)


# One run of the controller, against loops over numpy


class Reference:
    """The published loop, in float64, over the matrices of all stacks one by one."""

    def __init__(self, total: int, target: int, first: int, last: int, every: int, timing: str) -> None:
        self.total, self.first, self.last, self.every, self.timing = total, first, last, every, timing
        self.mean: dict = {}
        self.deviation: dict = {}
        self.target = target

    def step(self, t: int, triplets: dict, grads: dict) -> tuple[int, dict[object, np.ndarray]]:
        """Returns the budget, and the new E of every matrix."""
        end = self.total - self.last
        for name, arrays in triplets.items():
            for letter, w in arrays.items():
                key = (name, letter)
                old_mean, old_deviation = self.mean.get(key, 0.0), self.deviation.get(key, 0.0)
                sensitivity = np.abs(w * grads[name][letter])
                if t < end:
                    self.mean[key] = 0.8 * old_mean + 0.2 * sensitivity
                    self.deviation[key] = 0.9 * old_deviation + 0.1 * np.abs(sensitivity - self.mean[key])
        scores = {}
        for name in triplets:
            c = {letter: self.mean[name, letter] * self.deviation[name, letter] for letter in "AEB"}
            scores[name] = np.array([c["E"][i] + np.mean(c["A"][:, i]) + np.mean(c["B"][i]) for i in range(RANK)])
        initial = RANK * len(triplets)
        if t <= self.first:
            budget, mask = initial, False
        elif t > end:
            budget, mask = self.target, True
        else:
            left = 1 - (t - self.first) / (end - self.first)
            budget, mask = int((initial - self.target) * left**3 + self.target), t % self.every == 0
            mask = mask or (t == end and self.timing == "peft")
        new = {name: arrays["E"].copy() for name, arrays in triplets.items()}
        if mask and budget < initial:
            threshold = sorted(s for row in scores.values() for s in row)[initial - budget - 1]
            for name in new:
                new[name][scores[name] <= threshold] = 0.0
        return budget, new


def by_matrix(adapters: dict) -> dict:
    """{(path, layer): {letter: float64 array}}"""
    flat: dict = {}
    for path, (stack, *_) in SITES.items():
        for layer in np.ndindex(*stack):
            flat[path, layer] = {k: np.float64(v[layer]) for k, v in adapters[path]._asdict().items()}
    return flat


@pytest.mark.parametrize("timing", ["peft", "official"])
def test_run_matches_the_published_loop(timing: str) -> None:
    rng = np.random.default_rng(3)
    controller = adalora(plan(), total_steps=20, target_rank=1.5, t_initial=3, t_final=5, delta_t=4,
                         beta1=0.8, beta2=0.9, timing=timing)
    reference = Reference(20, 6, 3, 5, 4, timing)
    state = controller.init(random_adapters(rng))
    update = jax.jit(controller.update)
    masked_steps = []
    for t in range(20):
        old, new, grads = (random_adapters(rng) for _ in range(3))
        allocated, state = update(grads, old, new, state)
        budget, e = reference.step(t, by_matrix(new), by_matrix(grads))
        assert int(state.step) == t + 1
        assert int(state.budget) == budget
        got = by_matrix(allocated)
        for matrix, expected in e.items():
            np.testing.assert_array_equal(got[matrix]["E"] != 0, expected != 0, err_msg=f"step {t} {matrix}")
        same = jax.tree.map(np.array_equal, {p: allocated[p]._replace(E=0) for p in SITES},
                            {p: new[p]._replace(E=0) for p in SITES})
        assert all(jax.tree.leaves(same))
        assert allocated["head"] is not None
        assert jax.tree.all(jax.tree.map(np.array_equal, allocated["head"], new["head"]))
        if any((v == 0).any() for v in e.values()):
            masked_steps.append(t)
            assert sum(int(k.sum()) for k in state.kept.values()) == budget
    # delta_t = 4; the scores stop at 15, which only PEFT masks
    assert masked_steps == [4, 8, 12, *([15] if timing == "peft" else []), 16, 17, 18, 19]
    first = 15 if timing == "peft" else 16
    assert controller.settled == first + 1  # as many updates are done behind the one that masks for good
    assert update._cache_size() == 1


def test_masked_e_revives_until_the_next_masking() -> None:
    controller = adalora(plan(), total_steps=20, target_rank=2, t_initial=0, t_final=4, delta_t=10)
    rng = np.random.default_rng(0)
    state = controller.init(random_adapters(rng))
    for t in range(12):
        new, state = controller.update(random_adapters(rng), None, random_adapters(rng), state)
        zeros = sum(int((new[p].E == 0).sum()) for p in SITES)
        assert (zeros > 0) == (t == 10)


def test_a_full_budget_masks_nothing() -> None:
    """The case k = 0, an error in kthvalue of PyTorch."""
    controller = adalora(plan(), total_steps=4, target_rank=RANK)
    adapters = random_adapters(np.random.default_rng(0))
    new, state = controller.update(jax.tree.map(jnp.zeros_like, adapters), adapters, adapters,
                                   controller.init(adapters)._replace(step=jnp.int32(3)))
    assert int(state.budget) == 16
    assert all(np.array_equal(new[p].E, adapters[p].E) for p in SITES)


def test_ties_at_the_threshold_all_go() -> None:
    """Without gradient all scores are equal: the budget is a ceiling, not a promise."""
    controller = adalora(plan(), total_steps=4, target_rank=2)
    adapters = random_adapters(np.random.default_rng(0))
    new, _ = controller.update(jax.tree.map(jnp.zeros_like, adapters), adapters, adapters,
                               controller.init(adapters)._replace(step=jnp.int32(3)))
    assert not any(new[p].E.any() for p in SITES)


def test_state_is_float32_for_bfloat16_adapters() -> None:
    adapters = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_adapters(np.random.default_rng(0)))
    controller = adalora(plan(), total_steps=4, target_rank=2)
    new, state = controller.update(adapters, adapters, adapters, controller.init(adapters))
    assert {x.dtype for x in jax.tree.leaves((state.mean, state.deviation))} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}


def test_identity_controller_passes_through() -> None:
    controller = identity()
    assert isinstance(controller, Controller)
    assert controller.masks(controller.init({})) is None
    assert controller.update(1, 2, 3, ()) == (3, ())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"total_steps": 10, "t_initial": 4, "t_final": 6}, r"total_steps=10 leaves no step.*train longer than 10"),
        ({"total_steps": 10, "t_initial": -1}, r"t_initial=-1"),
        ({"total_steps": 10, "timing": "huggingface"}, r"timing='huggingface' is unknown; there are 'peft'"),
        ({"total_steps": 10, "delta_t": 0}, r"delta_t=0 is below 1"),
        ({"total_steps": 10, "beta2": 1.0}, r"beta2=1.0 is outside \(0, 1\)"),
    ],
)
def test_schedule_errors(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        adalora(plan(), **options)


@pytest.mark.parametrize(("target", "budget"), [(0.5, 2), (5.0, 20)])
def test_budget_errors_name_the_range(target: float, budget: int) -> None:
    controller = adalora(plan(), total_steps=10, target_rank=target)
    with pytest.raises(ValueError, match=rf"budget of {budget} triplets for 4 matrices that start with 16.*1\.\.4"):
        controller.init(random_adapters(np.random.default_rng(0)))


def test_no_site_error_names_what_is_there() -> None:
    with pytest.raises(ValueError, match=r"no AdaLoRA site; the rules made LoRA.*control\.identity"):
        adalora(SimpleNamespace(plan={"q": LoRA()}), total_steps=10)


def test_init_rank_below_rank_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"init_rank=4 is below rank=8.*at least 8"):
        AdaLoRA(rank=8, init_rank=4).check(16, 16)


# Compact


def pruned() -> tuple[Any, Any, Any, jax.Array, Any]:
    """(fn, adapt, frozen, x, trainable): three stacked layers that keep 2, 0 and 1 triplets, one site none, one two."""

    def fn(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda h, w: (h + jnp.sin(h @ w), None), x, params["stack"])
        return jnp.sin(x @ params["dropped"]) @ params["kept"] @ params["head"]

    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.float32(rng.normal(size=shape))  # noqa: E731
    params = {"stack": draw(3, 8, 8), "dropped": draw(8, 8), "kept": draw(8, 6), "head": draw(6, 2)}
    x = draw(5, 8)
    adapt = lj.adapt(lj.sites(fn, params, x), [("head", lj.Full()), (".*", AdaLoRA(rank=4, alpha=3.0))])
    trainable, frozen = adapt.init(jax.random.key(0), params)
    e = {"stack": [[0, 1, 0, 2], [0, 0, 0, 0], [0, 0, 3, 0]], "dropped": [0, 0, 0, 0], "kept": [-1, 0, 2, 0]}
    for path, values in e.items():
        a, _, b = trainable[path]
        trainable[path] = AdaLoRAAdapter(draw(*a.shape), jnp.float32(values), draw(*b.shape))
    return fn, adapt, frozen, x, trainable


def test_compact_keeps_the_output_and_drops_empty_sites() -> None:
    fn, adapt, frozen, x, trainable = pruned()
    small, shrunk = compact(adapt, trainable)
    assert {path: getattr(v, "rank", None) for path, v in small.plan.items()} == {"stack": 2, "kept": 2, "head": None}
    assert shrunk["stack"].A.shape == (3, 8, 2)
    np.testing.assert_array_equal(shrunk["stack"].E, [[1, 2], [0, 0], [3, 0]])
    np.testing.assert_array_equal(shrunk["kept"].E, [-1, 2])
    before, after = (lj.lift(fn)(a.bind(tr, frozen), x) for a, tr in ((adapt, trainable), (small, shrunk)))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    assert np.abs(before - fn({**frozen.base, "head": trainable["head"].w}, x)).max() > 0.1
    again, twice = compact(small, shrunk)
    assert again.plan == small.plan
    assert jax.tree.all(jax.tree.map(np.array_equal, twice, shrunk))


def test_compact_of_nothing_is_an_error() -> None:
    w = {"w": jnp.ones((4, 4))}
    adapt = lj.adapt(lj.sites(lambda p, x: x @ p["w"], w, jnp.ones((2, 4))), [("w", AdaLoRA(rank=2))])
    with pytest.raises(ValueError, match=r"every E or gate is 0: nothing is left.*not trained yet"):
        compact(adapt, adapt.init(jax.random.key(0), w)[0])


@pytest.mark.peft
def test_masks_match_pefts_allocator() -> None:
    """PEFT's RankAllocator, fed the same random parameters and gradients for a whole schedule."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    pytest.importorskip("peft", reason="peft is not installed (extra: peft)")
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator

    rng = np.random.default_rng(5)
    config = AdaLoraConfig(init_r=RANK, target_r=2, tinit=2, tfinal=6, deltaT=3, total_step=24)
    model = torch.nn.Module()
    names: dict[str, tuple[str, tuple]] = {}
    for i, (path, layer) in enumerate(by_matrix(random_adapters(rng))):
        n_in, n_out = SITES[path][1:]
        module = torch.nn.Module()
        for letter, shape in (("A", (RANK, n_in)), ("E", (RANK, 1)), ("B", (n_out, RANK))):
            parameter = torch.nn.Parameter(torch.zeros(shape))
            setattr(module, f"lora_{letter}", torch.nn.ParameterDict({"default": parameter}))
        model.add_module(f"m{i}", module)
        names[f"m{i}"] = (path, layer)
    allocator = RankAllocator(model, config, "default")
    controller = adalora(plan(), total_steps=24, target_rank=2, t_initial=2, t_final=6, delta_t=3)
    state = controller.init(random_adapters(rng))
    pattern: dict = {}
    masked = 0
    for t in range(24):
        new, grads = random_adapters(rng), random_adapters(rng)
        for name, (path, layer) in names.items():
            for letter in "AEB":
                p = model.get_submodule(name).get_parameter(f"lora_{letter}.default")
                value, grad = (np.array(getattr(tree[path], letter)[layer]) for tree in (new, grads))
                p.data = torch.from_numpy(value.T.reshape(p.shape).copy())
                p.grad = torch.from_numpy(grad.T.reshape(p.shape).copy())
        if t < 18:  # AdaLoraModel.update_and_allocate
            _, found = allocator.update_and_allocate(model, t)
            pattern = found or pattern
        elif t == 18:
            _, pattern = allocator.update_and_allocate(model, t, force_mask=True)
            allocator.reset_ipt()
        else:
            allocator.mask_using_rank_pattern(model, pattern)
        new, state = controller.update(grads, None, new, state)
        assert int(state.budget) == allocator.budget_schedule(t)[0]
        for name, (path, layer) in names.items():
            theirs = model.get_submodule(name).get_parameter("lora_E.default").detach().numpy().ravel() != 0
            np.testing.assert_array_equal(np.asarray(new[path].E[layer]) != 0, theirs, err_msg=f"step {t} {name}")
            masked += int((~theirs).sum())
    assert masked > 0
