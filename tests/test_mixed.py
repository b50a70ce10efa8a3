"""Batches whose rows, or spans of tokens, have different adapters: each as if it were alone with its own."""

import functools
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core import jaxprs

import lorajax as lj
from lorajax.io import peft
from lorajax.models import Bert, BertConfig, Llama, LlamaConfig, adapter_names
from lorajax.models.cache import Cache
from lorajax.models.slots import written
from lorajax.quant import NF4, quantize
from lorajax.variants import IA3, AdaLoRA, DoRA, HydraLoRA, LoHa, LoRA, MiSS, VeRA

SIZES = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
         "max_position_embeddings": 12}  # fmt: skip
IDS = np.random.default_rng(0).integers(1, 41, (5, 7)).astype(np.int32)
INDEX = np.array([2, 0, -1, 0, 1], np.int32)
SOME, QV, HEAD = ".*/(query|down)/kernel|.*embedding", ".*/(query|value)/kernel", "params/classifier/.*"


@functools.cache
def model_of(name: str) -> Any:
    """(apply, params, sites, compiled apply) of a tiny model, weights with spread."""
    if name == "bert":
        settings = SIZES | {"type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "num_labels": 3}
        model: Any = Bert(BertConfig.from_hf({"model_type": "bert", **settings, "pad_token_id": 0}))
    else:
        model = llama(name)
    params = golden.variables(model, jnp.asarray(IDS))
    return model.apply, params, lj.sites(model.apply, params, IDS), jax.jit(model.apply)


def llama(name: str) -> Llama:
    settings = SIZES | {"model_type": "llama", "num_key_value_heads": 1, "hidden_act": "silu", "rms_norm_eps": 1e-5}
    settings |= {"tie_word_embeddings": "tied" in name}
    return Llama(LlamaConfig.from_hf(settings, scan_layers="scanned" in name))


def several(adapt: Any, params: Any, k: int = 3) -> tuple[Any, Any]:
    """k random adapters in front of each other, and the frozen partition, which they share."""
    trainable, frozen = adapt.init(jax.random.key(0), params)
    rng = np.random.default_rng(1)
    many = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=(k, *x.shape)) + np.asarray(x)[None], x.dtype),
                        trainable)  # fmt: skip
    return many, frozen


def one(many: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], many)


def alone(name: str, adapt: Any, many: Any, frozen: Any, index: Any = INDEX) -> list[np.ndarray]:
    """Each row of the batch by the plain model on the merged weights of its adapter."""
    apply, params, _, plain = model_of(name)
    if any(choice.routed for choice in adapt.plan.values() if isinstance(choice, lj.Variant)):
        run = jax.jit(lambda tr: lj.lift(apply)(adapt.bind(tr, frozen), IDS))
    else:
        merge = jax.jit(lambda tr: adapt.merge(tr, frozen))
        run = lambda tr: plain(merge(tr), IDS)  # noqa: E731
    return [np.asarray(plain(params, IDS) if i < 0 else run(one(many, i)))[row] for row, i in enumerate(index)]


def mixed(apply: Any) -> Any:
    return jax.jit(lambda bank, index, ids: lj.mixed(apply, strict=True)(bank, index, ids))


CASES: dict[str, Any] = {
    "lora, tied embedding": ("llama tied", [(SOME, LoRA(2, rslora=True, initializer="gaussian"))]),
    "dora of adalora, scanned": ("llama scanned", [(SOME, DoRA(AdaLoRA(2)))]),
    "vera, routed": ("llama scanned", [(".*/query/kernel", VeRA(6)), (".*/value/kernel", HydraLoRA(2))]),
    "pissa, ia3, head": ("bert", [(QV, LoRA(2, initializer="pissa")), (".*/down/kernel", IA3("in")),
                                  (HEAD, lj.Full())]),
}  # fmt: skip


def test_peft_golden() -> None:
    """Rows of two adapters of different ranks and of the base, as PEFT's `adapter_names` has them."""
    case = golden.load("mixed_batch_llama")
    names = adapter_names(case.model.config)  # type: ignore[attr-defined]
    sites = lj.sites(lambda params, inputs: case.model.apply(params, **inputs), case.params, case.inputs)
    banks = []
    for name in "ab":
        found = peft.read(case.folder / "adapter" / name, sites, names)
        adapt = lj.adapt(sites, found.rules)
        trainable, frozen = peft.fill(found, *jax.jit(adapt.init)(jax.random.key(0), case.params))
        banks.append(lj.bank(adapt, jax.tree.map(lambda x: x[None], trainable), frozen))
    run = jax.jit(lambda bank, index: lj.mixed(case.model.apply, strict=True)(bank, index, **case.inputs))
    bank = jax.jit(lj.join)(banks)
    for names_of_rows, want in (
        (case.info["adapter_names"], "mixed"), ("aaaa", "a"), ("bbbb", "b"), (["__base__"] * 4, "base"),
    ):  # fmt: skip
        index = np.array([{"a": 0, "b": 1, "__base__": -1}[name] for name in names_of_rows])
        expected = case.expected[f"logits_{want}"]
        golden.close(case.real(run(bank, index)), case.real(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_each_row_is_as_it_is_alone(name: str) -> None:
    model, rules = CASES[name]
    apply, params, sites, _ = model_of(model)
    adapt = lj.adapt(sites, rules)
    many, frozen = several(adapt, params)
    run, bank = mixed(apply), lj.bank(adapt, many, frozen, params=params)
    got, want = np.asarray(run(bank, INDEX, IDS)), alone(model, adapt, many, frozen)
    for row, expected in enumerate(want):
        np.testing.assert_allclose(got[row], expected, atol=1e-5, rtol=1e-5)
    if not any(isinstance(choice, lj.Full) for choice in adapt.plan.values()):
        np.testing.assert_array_equal(got[2], want[2])  # the base, bit for bit
    other = np.asarray(run(bank, np.array([1, 1, 1, 1, -1]), IDS))
    assert all(np.abs(other[row] - got[row]).max() > 1e-2 for row in range(4))
    np.testing.assert_allclose(other[4], alone(model, adapt, many, frozen, [-1] * 5)[4], atol=1e-5, rtol=1e-5)
    assert run._cache_size() == 1


def test_adapters_of_different_kinds_in_one_bank() -> None:
    apply, params, sites, plain = model_of("llama scanned")
    rules: list[Any] = [
        [(QV, LoRA(2, 5.0)), (".*norm/scale", lj.Full())], [(SOME, DoRA(AdaLoRA(3)))], [(QV, VeRA(5))],
        [(".*/up/kernel", IA3("in")), (".*embedding", LoRA(1, 9.0))],
    ]  # fmt: skip
    banks, want = [], []
    for rule in rules:
        adapt = lj.adapt(sites, rule)
        many, frozen = several(adapt, params, 1)
        banks.append(lj.bank(adapt, many, frozen, params=params))
        want.append(alone("llama scanned", adapt, many, frozen, [0] * 5))
    want.append([np.asarray(plain(params, IDS))[row] for row in range(5)])
    bank, run = jax.jit(lambda banks: lj.join([lj.join(banks[:2]), *banks[2:]]))(banks), mixed(apply)
    for index in ([0, 1, 2, 3, -1], [3, -1, 1, 0, 2]):
        for row, i in enumerate(index):
            np.testing.assert_allclose(run(bank, np.array(index), IDS)[row], want[i][row], atol=1e-5, rtol=1e-5)


def test_gradients_of_each_adapter_are_those_of_its_rows_alone() -> None:
    """And those of an adapter that no row names are 0; no array of (adapters or rows, in, out) on the way."""
    apply, params, sites, _ = model_of("llama scanned")
    adapt = lj.adapt(sites, [(".*embedding|.*/down/kernel", LoRA(2, 5.0)), (".*/query/kernel", DoRA(AdaLoRA(2))),
                             ("params/norm/scale", lj.Full())])  # fmt: skip
    many, frozen = several(adapt, params, 4)

    def stream(many: Any) -> jax.Array:
        bank = lj.bank(adapt, many, frozen, params=params)
        return jnp.sin(lj.mixed(apply, strict=True)(bank, INDEX, IDS)).sum()

    program = jaxprs.trace(jax.grad(stream), many)
    grads = jaxprs.run(program, many)
    single = jax.jit(jax.grad(lambda tr, rows, i: (
        jnp.where((rows == i)[:, None, None], jnp.sin(lj.lift(apply)(adapt.bind(tr, frozen), IDS)), 0).sum())))
    for i in range(4):
        want = single(one(many, i), INDEX, i)
        for have, expected in zip(jax.tree.leaves(one(grads, i)), jax.tree.leaves(want), strict=True):
            scale = float(jnp.abs(expected).max())
            assert (scale > 0) == (i < 3)
            np.testing.assert_allclose(have, expected, atol=1e-5 * max(scale, 1), rtol=1e-4)
    dense = {jaxprs.squeezed([n, *s]) for n in (4, 5) for site in map(sites.get, adapt.plan) if site
             for s in (site.shape, [site.n_in, site.n_out], [*site.stack_shape, site.n_in, site.n_out])}  # fmt: skip

    def found(jaxpr: Any) -> list[Any]:
        return [shape for _, shape in jaxprs.shapes(jaxpr) if jaxprs.squeezed(shape) in dense]

    assert found(jax.make_jaxpr(jax.vmap(lambda tr: adapt.merge(tr, frozen)))(many)), "the search has teeth"
    assert found(program.jaxpr) == []


def test_spans_of_tokens() -> None:
    """A model without attention: a token is what it is in a row that has its adapter alone."""
    rng = np.random.default_rng(2)
    params = {"table": rng.normal(size=(41, 8)), "up": rng.normal(size=(8, 2, 5)), "out": rng.normal(size=(2, 5, 6))}
    params = jax.tree.map(jnp.float32, params)

    def apply(p: Any, ids: jax.Array) -> jax.Array:
        x = jnp.tanh(jnp.einsum("bti,ihd->bhtd", p["table"][ids], p["up"]))
        return jnp.einsum("bhtd,hdo->bto", x, p["out"])

    adapt = lj.adapt(lj.sites(apply, params, IDS), [("up|table", DoRA(LoRA(2))), ("out", LoRA(2))])
    many, frozen = several(adapt, params)
    index = np.array([[0, 1], [1, 2], [2, 0], [-1, 1], [0, 0]])
    spans = rng.integers(-1, 3, (5, 7))
    run = jax.jit(lambda bank, index, spans: lj.mixed(apply, strict=True)(bank, index, IDS, spans=spans))
    got = np.asarray(run(lj.bank(adapt, many, frozen), index, spans))
    plain, merge = jax.jit(apply), jax.jit(lambda tr: adapt.merge(tr, frozen))
    of = [np.asarray(plain(merge(one(many, i)) if i >= 0 else params, IDS)) for i in (0, 1, 2, -1)]
    for row in range(5):
        for t, span in enumerate(spans[row]):
            i = index[row, span] if 0 <= span < 2 else -1
            np.testing.assert_allclose(got[row, t], of[i][row][t], atol=1e-5, rtol=1e-5)


def test_a_quantised_base() -> None:
    """Banks made from two copies of one packed base; another base is refused."""
    rng = np.random.default_rng(3)
    w, x = np.float32(rng.normal(size=(8, 6))), jnp.float32(rng.normal(size=(3, 4, 8)))

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["w"]

    packed = [{"w": quantize(m, NF4(block=8, double=False))} for m in (w, w, w + 1)]
    adapt = lj.adapt(lj.sites(apply, {"w": w}, x), [("w", LoRA(2))])
    many, _ = several(adapt, packed[0], 1)
    banks = [lj.bank(adapt, jax.tree.map(lambda y, i=i: y * i, many), adapt.frozen(p, {}))
             for i, p in enumerate(packed, 1)]  # fmt: skip
    got = lj.mixed(apply, strict=True)(lj.join(banks[:2]), np.array([1, -1, 0]), x)
    adapter = one(many, 0)["w"]
    update = 4 * adapter.A @ adapter.B  # alpha 8, rank 2
    for row, times in enumerate((4, 0, 1)):
        np.testing.assert_allclose(got[row], x[row] @ (packed[0]["w"].dense() + times * update), atol=1e-5)
    with pytest.raises(ValueError, match="w: .*one base"):
        lj.join([banks[0], banks[2]])


def test_decoding_with_a_cache() -> None:
    """Row by row its own adapter, prompt and next tokens through the cache, as without one."""
    apply, params, sites, _ = model_of("llama scanned")
    model = llama("llama scanned")
    adapt = lj.adapt(sites, [(QV, LoRA(2))])
    many, frozen = several(adapt, params)
    bank = lj.bank(adapt, many, frozen)
    axes = Cache(layers=1, used=None, mask=0, source_mask=0)  # type: ignore[arg-type]

    def decode(params: Any, ids: jax.Array, cache: Cache) -> Any:
        return model.apply(params, ids, cache, method="decode")

    step = jax.jit(lj.mixed(decode, in_axes=(0, axes), out_axes=(0, axes)))
    logits, cache = step(bank, INDEX, IDS[:, :5], model.empty_cache(5, 7))
    then, cache = step(bank, INDEX, IDS[:, 5:], cache)
    want = mixed(apply)(bank, INDEX, IDS)
    np.testing.assert_allclose(jnp.concatenate([logits, then], 1), want, atol=1e-5, rtol=1e-5)
    assert cache.used == 7
    # Rows that write to the same slots write a slice: a scatter would copy the cache of every layer.
    told = jax.make_jaxpr(step)(bank, INDEX, IDS[:, 5:6], cache._replace(used=jnp.int32(5)))
    assert not [name for name in jaxprs.primitives(told) if name.startswith("scatter")]


def test_slots_are_written_alike_whatever_is_vmapped() -> None:
    rng = np.random.default_rng(0)
    old, new = (rng.normal(size=(3, 2, n, 4)).astype(np.float32) for n in (6, 2))
    at = np.asarray([1, 4, 0], np.int32)
    for axes in ((0, 0, 0), (0, None, 0), (0, 0, None), (None, 0, None), (0, None, None)):
        given = [x if axis == 0 else x[1] for x, axis in zip((old, new, at), axes, strict=True)]
        want = old.copy() if axes[0] == 0 else np.repeat(old[1:2], 3, 0)
        for i in range(3):
            start = at[i if axes[2] == 0 else 1]
            want[i, :, start:start + 2] = new[i if axes[1] == 0 else 1]
        np.testing.assert_array_equal(jax.jit(jax.vmap(written, axes))(*given), want)
    for axes in ((0, 0, 0), (0, 0, None)):
        given = [x if axis == 0 else x[1] for x, axis in zip((old, new, at), axes, strict=True)]
        total = lambda old, new: jnp.sum(jnp.square(jax.vmap(written, axes)(old, new, given[2])))  # noqa: B023, E731
        d_old, d_new = jax.grad(total, (0, 1))(old, new)
        for i in range(3):
            start = at[i if axes[2] == 0 else 1]
            np.testing.assert_array_equal(d_new[i], 2 * new[i])
            assert not d_old[i, :, start:start + 2].any()
            np.testing.assert_array_equal(np.delete(d_old[i], [start, start + 1], 1),
                                          2 * np.delete(old[i], [start, start + 1], 1))


def test_dropout_draws_for_each_row() -> None:
    """Equal rows of one adapter differ, the base row does not; in the mean they are the row without dropout. A key of
    the model's own draws for each row too."""
    w = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)), jnp.float32)}
    adapt = lj.adapt(lj.sites(lambda p, x: x @ p["w"], w, jnp.ones((5, 64))), [("w", LoRA(2, dropout=0.5))])
    many, frozen = several(adapt, w, 2)
    bank, still = lj.bank(adapt, many, frozen, key=jax.random.key(0)), lj.bank(adapt, many, frozen)
    x, index = jnp.ones((200, 64)), np.array([0] * 199 + [-1])
    y, z = (jax.jit(lj.mixed(lambda p, x: x @ p["w"]))(b, index, x) for b in (bank, still))
    assert len(np.unique(np.asarray(y)[:, 0])) > 190
    np.testing.assert_array_equal(y[-1], z[-1])
    noisy = lj.mixed(lambda p, x, key: x @ p["w"] + jax.random.normal(key, (1, 3)))
    assert len(np.unique(noisy(still, index, x, jax.random.key(0))[:, 0])) == 200
    np.testing.assert_allclose(y[:-1].mean(0), z[0], atol=4 * float(y[:-1].std(0).max()) / 199**0.5)


def test_what_cannot_be_mixed_says_so() -> None:
    params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4))}

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["w"] @ p["v"]

    def bank_of(variant: Any, path: str = "w", on: Any = params) -> Any:
        adapt = lj.adapt(lj.sites(apply, on, jnp.ones((2, 4))), [(path, variant)])
        return lj.bank(adapt, *several(adapt, on))

    bank, x = bank_of(LoRA(2)), jnp.ones((2, 4))
    for call, words in (
        (lambda: bank_of(LoHa(2)), "LoHa has no low-rank factors.*lorajax.compose.as_lora"),
        (lambda: bank_of(MiSS(2, mode="bat")), "MiSS has no low-rank factors"),
        (lambda: bank_of(LoRA(2, initializer="pissa", fold=True)), "another weight than the base.*fold=False"),
        (lambda: bank_of(lj.Full()), "w is trained in full.*give params"),
        (lambda: lj.mixed(apply)(bank, np.array([0, 3]), x), "index holds 0 to 3, and the bank has 3 adapters"),
        (lambda: lj.mixed(apply)(bank, np.array([0.0, 1.0]), x), "dtype float32: give one integer for each row"),
        (lambda: lj.mixed(apply)(bank, np.array([0, 1, 2]), x), r"shape \(2, 4\) has 2 rows .*names 3"),
        (lambda: lj.mixed(apply)(params, np.array([0, 1]), x), "no bank.*lorajax.bank"),
        (lambda: lj.lift(apply)(bank, x), "which one a row reads: run it by lorajax.mixed"),
        (lambda: lj.mixed(lambda p, x: x @ p["w"] ** 2)(bank, np.array([0, 1]), x), "w: each row .* `integer_pow`"),
        (lambda: lj.mixed(lambda p, x: x.sum(1) @ p["w"])(bank, np.array([[0, 1]] * 2), jnp.ones((2, 3, 4)),
                                                          spans=np.ones((2, 3), int)), "w: spans name .*rows of"),
        (lambda: lj.join([bank, bank_of(LoRA(2), on={**params, "w": jnp.zeros((4, 4))})]), "w: .*one base"),
        (lambda: lj.join([bank_of(IA3("in")), bank_of(IA3())]), "w: .*inputs of this weight and others its outputs"),
        (lambda: lj.join([bank, bank_of(HydraLoRA(2))]), "w: .*router"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()


def test_jit_counts_the_index_among_the_arguments() -> None:
    """A cache behind params, index and tokens can be donated: the signature is not fn's."""
    params, x = {"w": jnp.eye(4)}, jnp.ones((2, 4))
    sites = lj.sites(lambda params, x: x @ params["w"], params, x[:1])
    many, frozen = several(lj.adapt(sites, [("w", LoRA(rank=1))]), params)
    bank = lj.bank(lj.adapt(sites, [("w", LoRA(rank=1))]), many, frozen)
    run = lj.mixed(lambda params, x: x @ params["w"])
    want = run(bank, jnp.array([0, -1]), x)
    np.testing.assert_allclose(jax.jit(run, donate_argnums=2)(bank, jnp.array([0, -1]), x + 0), want, rtol=1e-6)
    index = jnp.array([0, -1])
    np.testing.assert_allclose(jax.jit(lambda bank, x: run(bank, index, x))(bank, x), want, rtol=1e-6)  # closed over
