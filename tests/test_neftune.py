"""NEFTune: what is added to the embeddings, where, and how much."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lorajax as lj
from experiments.neftune import noisy
from lorajax.models import Bert, BertConfig

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 20, (4, 30)), jnp.int32)
MASK = (jnp.arange(30)[None, :] < jnp.array([[30], [7], [1], [0]])).astype(jnp.int32)
D = 16


class Tables(nn.Module):
    """The embeddings themselves, and another table that nothing may touch."""

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        return nn.Embed(20, D, name="word")(ids), nn.Embed(30, D, name="position")(jnp.arange(30))


PARAMS = Tables().init(jax.random.key(0), IDS, MASK)


def noise(alpha: float, seed: int) -> np.ndarray:
    run = noisy(Tables().apply, alpha)
    (word, position), (plain, there) = run(PARAMS, IDS, MASK, rngs={"dropout": jax.random.key(seed)}), Tables().apply(
        PARAMS, IDS, MASK)
    np.testing.assert_array_equal(position, there)
    return np.float64(word) - np.float64(plain)


def test_noise_is_uniform_within_alpha_over_the_root_of_real_tokens_times_width() -> None:
    """Up to float32's rounding of the sum. A uniform draw on (-c, c) has standard deviation c / sqrt(3)."""
    found = noise(5.0, 1)
    for row, tokens in ((0, 30), (1, 7), (2, 1)):
        bound, real = 5.0 / np.sqrt(tokens * D), found[row, :tokens]
        assert 0.85 * bound < np.abs(real).max() <= bound * (1 + 1e-5)
        assert abs(real.mean()) < 5 * bound / np.sqrt(3 * real.size)
        assert real.std() == pytest.approx(bound / np.sqrt(3), rel=0.4 if tokens == 1 else 0.15)
    assert not found[np.asarray(MASK) == 0].any()


def test_noise_is_a_function_of_the_key_and_in_proportion_to_alpha() -> None:
    np.testing.assert_array_equal(noise(5.0, 1), noise(5.0, 1))
    np.testing.assert_allclose(noise(10.0, 1), 2 * noise(5.0, 1), atol=1e-6)
    assert np.abs(noise(5.0, 2) - noise(5.0, 1)).max() > 0.1
    apply = Tables().apply
    assert noisy(apply, 0.0) is apply


def test_an_adapted_encoder_trains_on_noise_and_evaluates_without() -> None:
    config = BertConfig(vocab_size=20, hidden_size=D, num_layers=1, num_heads=2, intermediate_size=16, max_positions=32,
                        hidden_dropout=0.0, attention_dropout=0.0)
    model = Bert(config, deterministic=False)
    params = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, IDS, MASK)
    adapt = lj.adapt(lj.sites(Bert(config).apply, params, IDS, MASK), [("all-linear", lj.LoRA(rank=2)),
                                                                       ("embeddings", lj.LoRA(rank=2))])
    bound = adapt.bind(*adapt.init(jax.random.key(2), params))
    train = jax.jit(lambda key: lj.lift(noisy(model.apply, 5.0))(bound, IDS, MASK, rngs={"dropout": key}))
    plain = lj.lift(model.apply)(bound, IDS, MASK, rngs={"dropout": jax.random.key(3)})
    first, second = train(jax.random.key(3)), train(jax.random.key(4))
    assert np.abs(first - plain).max() > 1e-3
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_allclose(model.apply(params, IDS, MASK), plain, atol=1e-5)  # nothing is left behind


def test_a_model_without_the_table_is_refused() -> None:
    class Other(nn.Module):
        @nn.compact
        def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
            return nn.Embed(20, D, name="tokens")(ids)

    params = Other().init(jax.random.key(0), IDS, MASK)
    with pytest.raises(ValueError, match=r"neftune=5.0 needs one table.*makes 0 calls of modules named 'word'"):
        noisy(Other().apply, 5.0)(params, IDS, MASK, rngs={"dropout": jax.random.key(0)})
    noisy(Other().apply, 5.0, module="tokens")(params, IDS, MASK, rngs={"dropout": jax.random.key(0)})
