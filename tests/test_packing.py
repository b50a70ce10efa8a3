"""Packing: rows, waste, and that a packed row computes what its examples compute alone."""

import dataclasses

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorajax as lj
from lorajax.data import Batches, Supervised, first_fit, pack
from lorajax.data.feed import calls
from lorajax.models.frozen_head import frozen_head_loss
from lorajax.variants import NAMES

DoRA = NAMES["dora"]


def made_up(lengths, seed=0, vocabulary=60):
    """Random ids; the prompt is about half of each example."""
    rng, lengths = np.random.default_rng(seed), np.asarray(lengths)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    prompt = np.repeat([rng.integers(1, n) for n in lengths], lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = rng.integers(3, vocabulary, len(positions)).astype(np.int32)
    return Supervised(ids, positions >= prompt, positions, offsets, np.arange(len(lengths)))


def examples_of(rows):
    """The examples of (packed) rows, as a sorted list of (ids, completion)."""
    starts = np.flatnonzero(rows.positions == 0)
    parts = zip(np.split(rows.ids, starts[1:]), np.split(rows.completion, starts[1:]), strict=True)
    return sorted((ids.tolist(), done.tolist()) for ids, done in parts)


def test_first_fit_by_hand():
    assert first_fit(np.array([7, 5, 5, 3, 2, 2]), 10).tolist() == [0, 1, 1, 0, 2, 2]
    assert first_fit(np.array([4, 4, 4, 6, 2]), 10).tolist() == [0, 0, 1, 1, 0]


@pytest.mark.parametrize("seed", [0, 3])
def test_every_example_once_and_rows_nearly_full(seed):
    lengths = np.random.default_rng(seed).geometric(0.02, 400).clip(2, 256)
    examples = made_up(lengths)
    packed = pack(examples, 256, seed=seed)
    assert packed.lengths.max() <= 256 and examples_of(packed) == examples_of(examples)
    fewest = -(-lengths.sum() // 256)
    assert fewest <= len(packed.lengths) <= 11 / 9 * fewest + 1
    batches = Batches(packed, 4, shapes=1, seed=seed)
    slots = len(batches) * 4 * int(packed.lengths.max())
    assert batches.padding() == pytest.approx(1 - lengths.sum() / slots) and batches.padding() < 0.1
    assert Batches(examples, 4, seed=seed, lengths=[256]).padding() > 0.7


def test_depends_on_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(2, 40, 90)
    first, again, other = (pack(made_up(lengths), 64, seed=seed) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert first.lengths.tolist() == other.lengths.tolist() and (first.ids != other.ids).any()
    epochs = [[Batches(first, 2, seed=5).rows(epoch, i).tolist() for i in range(8)] for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]


def test_too_long_an_example():
    with pytest.raises(ValueError, match=r"an example has 9 tokens, more than a row of 8: .*\(max_length=8"):
        pack(made_up([3, 9]), 8)


def test_micro_batches_and_calls():
    packed = pack(made_up(np.random.default_rng(0).integers(2, 30, 64)), 32)
    batches = Batches(packed, 4, shapes=1)
    call = calls(batches, accumulate=2, steps_per_call=3)(0)
    assert {x.shape for x in call.values()} == {(3, 2, 2, 32)}
    np.testing.assert_array_equal(call["labels"][1].reshape(4, 32), batches.batch(0, 1)["labels"])
    two = batches.stack([{"input_ids": np.ones((1, 2, n), np.int32), "weight": np.ones(1)} for n in (3, 5)])
    assert two["input_ids"].shape == (2, 1, 2, 5) and two["input_ids"][0, 0, 0].tolist() == [1, 1, 1, 0, 0]
    assert two["weight"].shape == (2, 1)


LORA, DORA = lj.LoRA(rank=4), DoRA(lj.LoRA(rank=4))


@pytest.mark.parametrize(
    ("name", "scan_layers", "variant"),
    [("lora_qv_llama", True, DORA), ("lora_conv1d_gpt2", False, LORA), ("lora_conv1d_gpt2", True, None)],
    ids=["llama-scan-dora", "gpt2-lora", "gpt2-scan"],
)
def test_packed_rows_compute_what_examples_compute_alone(name, scan_layers, variant):
    """Logits at each token, the loss and (LoRA) its gradient: five examples in two rows, and each in a row of its own,
    where the model is told neither positions nor segments."""
    case = golden.load(name, scan_layers=scan_layers)
    examples = made_up([9, 7, 5, 6, 3])
    packed = pack(examples, 16)
    assert len(packed.lengths) == 2
    together, alone = (Batches(x, n, lengths=[16]).batch(0, 0) for x, n in ((packed, 2), (examples, 5)))

    def apply(params, batch, told):
        rest = (None, batch["positions"], batch["segments"]) if told else ()
        return case.model.apply(params, batch["input_ids"], *rest)

    sites = lj.sites(lambda params, batch: apply(params, batch, True), case.params, together)
    adapt = lj.adapt(sites, [(".*/(layers|layer_.*)/.*kernel", variant or lj.Full())])
    trainable, frozen = jax.jit(adapt.init)(jax.random.key(0), case.params)
    trainable = jax.tree.map(lambda x: x + 0.05 * np.random.default_rng(1).normal(size=x.shape), trainable)
    trainable = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    lifted = lj.lift(apply, strict=True)

    def total(trainable, batch, told):
        logits = lifted(adapt.bind(trainable, frozen), batch, told)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return (each * batch["weight"]).sum() / batch["weight"].sum(), logits

    def run(batch, told):
        both = jax.value_and_grad(total, has_aux=True) if variant is LORA else lambda *given: (total(*given), ())
        return jax.jit(both, static_argnums=2)(trainable, batch, told)

    ((loss, logits), towards), ((want, apart), wanted) = run(together, True), run(alone, False)
    assert together["weight"].sum() == alone["weight"].sum() == examples.completion.sum()
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4), towards, wanted)
    each = zip(alone["input_ids"], alone["segments"] == 1, np.asarray(apart), strict=True)
    where = {tuple(ids[real].tolist()): row[real] for ids, real, row in each}
    found = 0
    for row, ids, segment in zip(np.asarray(logits), together["input_ids"], together["segments"], strict=True):
        for which in set(segment.tolist()) - {0}:
            at = segment == which
            np.testing.assert_allclose(row[at], where[tuple(ids[at].tolist())], atol=1e-5)
            found += 1
    assert found == 5


def test_no_example_is_asked_for_the_next_ones_first_token():
    """Plain text, all of it to be learned: of each example all tokens but the first are labels."""
    text = made_up([3, 2, 4])
    text = text._replace(completion=np.ones_like(text.completion))
    row = Batches(pack(text, 9), 1, shapes=1).batch(0, 0)
    by_length = [text.ids[text.offsets[i] : text.offsets[i + 1]].tolist() for i in (2, 0, 1)]
    assert row["labels"].tolist() == [[x for ids in by_length for x in (*ids[1:], 0)]]
    assert row["weight"].tolist() == [[1.0, 1, 1, 0, 1, 1, 0, 1, 0]]
    assert row["segments"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 3, 3]]


def test_chunked_loss_of_a_packed_batch():
    """`frozen_head_loss` takes labels and weights as they are."""
    packed = Batches(pack(made_up([9, 7, 5, 6, 3]), 16), 2, shapes=1).batch(0, 0)
    rng = np.random.default_rng(0)
    hidden, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 16, 8), (8, 60)))
    logits = hidden.astype(np.float64) @ kernel
    each = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, packed["labels"][..., None], -1)[..., 0]
    want = each[packed["weight"] > 0].mean()
    chunked = frozen_head_loss(jnp.asarray(hidden), jnp.asarray(kernel), packed["labels"], packed["weight"], chunk=8)
    np.testing.assert_allclose(chunked, want, rtol=1e-5)


class Asked(Exception):
    pass


def test_segments_reach_the_fused_kernel_whole(monkeypatch):
    """cuDNN's bias is not broadcast: a number for each query and key, beside its own causal mask."""
    case = golden.load("lora_qv_llama", dtype=jnp.bfloat16)
    model = type(case.model)(dataclasses.replace(case.model.config, attention="cudnn"))
    batch = Batches(pack(made_up([9, 7, 5, 6, 3]), 16), 2, shapes=1).batch(0, 0)
    segments = batch["segments"]

    def look(q, k, v, *, mask, is_causal, implementation, **_):
        assert implementation == "cudnn" and is_causal and mask.dtype == bool
        np.testing.assert_array_equal(mask, (segments[:, :, None] == segments[:, None, :])[:, None])
        raise Asked

    monkeypatch.setattr(jax.nn, "dot_product_attention", look)
    with pytest.raises(Asked):
        model.apply(case.params, batch["input_ids"], None, batch["positions"], segments)


@pytest.mark.gpu
def test_packed_rows_with_the_fused_kernel():
    """Logits and gradients of a packed batch are those of the plain attention, both in bfloat16."""
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    batch = Batches(pack(made_up([60, 40, 30, 20, 9]), 64), 3, shapes=1).batch(0, 0)
    found = []
    for attention in ("xla", "cudnn"):
        case = golden.load("lora_qv_llama", attention=attention, dtype=jnp.bfloat16)

        def loss(params, case=case):
            out = case.model.apply(params, batch["input_ids"], None, batch["positions"], batch["segments"])
            each = optax.softmax_cross_entropy_with_integer_labels(out, batch["labels"])
            return (each * batch["weight"]).sum() / batch["weight"].sum(), out

        with jax.numpy_dtype_promotion("standard"):  # JAX's attention mixes dtypes in its backward pass
            found.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(case.params))
    ((one, plain), towards), ((two, fused), back) = found
    real = batch["segments"] > 0
    np.testing.assert_allclose(np.asarray(fused)[real], np.asarray(plain)[real], atol=0.3)  # the logits reach 10
    np.testing.assert_allclose(two, one, rtol=2e-2)
    flat = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (towards, back))
    a, b = flat
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99
