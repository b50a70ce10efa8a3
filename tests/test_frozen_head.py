"""The frozen head's chunked loss: value and gradient of the plain one, and how much memory its program needs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorajax.models.frozen_head import frozen_head_log_probs, frozen_head_loss


def plain(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    each = -jnp.take_along_axis(jax.nn.log_softmax(hidden @ kernel), labels[..., None], axis=-1)[..., 0]
    return (each * weights).sum() / weights.sum()


def arrays(tokens: tuple[int, ...], width: int, vocab: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    weights = (jax.random.uniform(keys[3], tokens) > 0.3).astype(jnp.float32)
    return (jax.random.normal(keys[0], (*tokens, width)), jax.random.normal(keys[1], (width, vocab)),
            jax.random.randint(keys[2], tokens, 0, vocab), weights)  # fmt: skip


@pytest.mark.parametrize("chunk", [4, 7, 14, 100])
def test_value_and_gradient_are_the_plain_ones(chunk: int) -> None:
    given = arrays((2, 7), 8, 31)
    want, towards = jax.value_and_grad(plain)(*given)
    have, found = jax.jit(jax.value_and_grad(lambda h: 3.0 * frozen_head_loss(h, *given[1:], chunk=chunk)))(given[0])
    np.testing.assert_allclose(have, 3 * want, rtol=1e-6)
    np.testing.assert_allclose(found, 3 * towards, atol=1e-6)
    np.testing.assert_allclose(frozen_head_loss(*given, chunk=chunk), want, rtol=1e-6)


@pytest.mark.parametrize("chunk", [5, 100])
def test_smoothed_labels(chunk: int) -> None:
    """Against the cross entropy of optax's smoothed targets."""
    hidden, kernel, labels, weights = arrays((2, 7), 8, 31)

    def smooth(hidden: jax.Array) -> jax.Array:
        target = optax.smooth_labels(jax.nn.one_hot(labels, 31), 0.1)
        return (optax.softmax_cross_entropy(hidden @ kernel, target) * weights).sum() / weights.sum()

    want, towards = jax.value_and_grad(smooth)(hidden)
    mine = jax.jit(jax.value_and_grad(
        lambda h: frozen_head_loss(h, kernel, labels, weights, chunk=chunk, smoothing=0.1)))  # fmt: skip
    have, found = mine(hidden)
    np.testing.assert_allclose(have, want, rtol=1e-6)
    np.testing.assert_allclose(found, towards, atol=1e-6)


def test_what_has_no_weight_needs_no_label() -> None:
    """-100 where nothing counts, as Hugging Face marks it; a table smaller than that has no such row."""
    hidden, kernel, labels, weights = arrays((9,), 4, 7)
    marked = jnp.where(weights > 0, labels, -100)
    one, two = (jax.value_and_grad(frozen_head_loss)(hidden, kernel, x, weights, chunk=4) for x in (labels, marked))
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])


def test_the_head_gets_no_gradient() -> None:
    given = arrays((5,), 4, 9)
    assert not jax.grad(lambda k: frozen_head_loss(given[0], k, *given[2:], chunk=2))(given[1]).any()


def test_memory_is_a_chunk_of_logits() -> None:
    """Bytes that the compiled programs want beside arguments and results: two chunks at most, not the whole logits."""
    given = arrays((512,), 16, 1000)

    def temporary(loss) -> int:  # type: ignore[no-untyped-def]
        program = jax.jit(jax.grad(loss)).lower(*given).compile()
        return program.memory_analysis().temp_size_in_bytes

    whole = 512 * 1000 * 4
    assert temporary(plain) >= whole
    assert temporary(lambda *x: frozen_head_loss(*x, chunk=32)) < whole / 4


@pytest.mark.parametrize("chunk", [4, 14, 100])
def test_log_probabilities_and_their_gradient_are_the_plain_ones(chunk: int) -> None:
    hidden, kernel, labels, by = arrays((2, 7), 8, 31)

    def want(hidden: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jax.nn.log_softmax(hidden @ kernel), labels[..., None], axis=-1)[..., 0]

    have, back = jax.vjp(jax.jit(lambda h: frozen_head_log_probs(h, kernel, labels, chunk)), hidden)
    there, towards = jax.vjp(want, hidden)
    np.testing.assert_allclose(have, there, atol=1e-5)
    np.testing.assert_allclose(back(by)[0], towards(by)[0], atol=1e-5)
    assert not jax.grad(lambda k: frozen_head_log_probs(hidden, k, labels, chunk).sum())(kernel).any()


def test_memory_of_log_probabilities_is_a_chunk_of_logits() -> None:
    hidden, kernel, labels, _ = arrays((512,), 16, 1000)

    def sharp(hidden: jax.Array) -> jax.Array:
        return jnp.square(frozen_head_log_probs(hidden, kernel, labels, 32)).sum()

    assert jax.jit(jax.grad(sharp)).lower(hidden).compile().memory_analysis().temp_size_in_bytes < 512 * 1000
