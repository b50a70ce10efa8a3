"""LoRA's maths on one matrix: scale, starts, factors, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorajax.variants import LoRA
from lorajax.variants.lora import LoRAAdapter

W = jnp.asarray(np.random.default_rng(0).normal(size=(48, 32)), jnp.float32)


def start(initializer: str, rank: int = 8, shape: tuple[int, int] = (768, 256), seed: int = 0) -> LoRAAdapter:
    adapter, _ = LoRA(rank=rank, initializer=initializer).init(jax.random.key(seed), jnp.zeros(shape))
    return adapter


def test_delta_is_alpha_over_rank_times_a_b() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(48, 4)), rng.normal(size=(4, 32))
    adapter = LoRAAdapter(jnp.float32(a), jnp.float32(b))
    for rslora, s in ((False, 1.5), (True, 3.0)):
        delta = LoRA(rank=4, alpha=6.0, rslora=rslora).delta(adapter, W)
        np.testing.assert_allclose(delta, s * a @ b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("layers", "rank", "shapes", "count"),
    [
        (28, 32, [(3072, 3072), (3072, 1024)], 9_175_040),  # Llama-3.2-3B, query and value: PEFT's result file
        (28, 10, [(3072, 8192)] * 2 + [(8192, 3072)], 9_461_760),  # its gate, up and down
        (12, 8, [(768, 768)] * 2, 294_912),  # RoBERTa-base, query and value: 0.3M in the paper
        (24, 8, [(1024, 1024)] * 2, 786_432),  # RoBERTa-large: 0.8M
        (12, 2, [(768, 768)] * 4 + [(768, 3072), (3072, 768)], 331_776),  # DeBERTaV3-base, all: 0.33M
    ],
)
def test_published_parameter_counts(layers: int, rank: int, shapes: list[tuple[int, int]], count: int) -> None:
    adapters = [jax.eval_shape(LoRA(rank=rank).init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))[0]
                for shape in shapes]
    assert layers * sum(x.size for x in jax.tree.leaves(adapters)) == count


def test_alpha_may_be_traced() -> None:
    adapter = LoRAAdapter(jnp.ones((48, 2)), jnp.ones((2, 32)))
    deltas = jax.vmap(lambda alpha: LoRA(rank=2, alpha=alpha).delta(adapter, W))(jnp.array([2.0, 4.0]))
    np.testing.assert_allclose(deltas[:, 0, 0], [2.0, 4.0], rtol=1e-5)


@pytest.mark.parametrize("initializer", ["kaiming", "gaussian", "orthogonal", "embedding"])
def test_starts_as_identity_and_leaves_the_weight_alone(initializer: str) -> None:
    adapter, w = LoRA(initializer=initializer, rank=6).init(jax.random.key(0), W)
    assert w is W
    # A B = 0: exactly where a factor is 0, to rounding of |A| |B| where the factors are orthogonal
    product = np.float64(adapter.A) @ np.float64(adapter.B)
    bound = 1e-6 * np.linalg.norm(adapter.A) * np.linalg.norm(adapter.B)
    assert np.abs(product).max() <= bound


def test_kaiming_bound_and_variance() -> None:
    a, b = start("kaiming")
    assert np.abs(a).max() <= 0.0360844 + 1e-7  # 1/sqrt(768)
    assert np.abs(a).max() > 0.0360844 * 0.99
    np.testing.assert_allclose(np.var(a), 1 / (3 * 768), rtol=0.05)  # 6144 draws: standard error 1.1 %
    assert not b.any()


def test_gaussian_width_is_one_over_rank() -> None:
    a, b = start("gaussian", rank=16)
    np.testing.assert_allclose(np.std(a), 1 / 16, rtol=0.03)  # 12288 draws: standard error 0.6 %
    assert abs(np.mean(a)) < 4 / 16 / np.sqrt(a.size)
    assert not b.any()


def test_orthogonal_factors_are_both_nonzero() -> None:
    a, b = start("orthogonal")
    # A = N Q / 10 with orthonormal rows of Q: elements have variance 4 / 8 / 100 on average
    np.testing.assert_allclose(np.mean(np.square(a)), 0.005, rtol=0.1)
    np.testing.assert_allclose(np.mean(np.square(b)), 0.005, rtol=0.2)
    assert np.linalg.matrix_rank(np.asarray(a)) == 4
    assert np.linalg.matrix_rank(np.asarray(b)) == 4


def test_embedding_reverses_the_roles() -> None:
    a, b = start("embedding")
    assert not a.any()
    np.testing.assert_allclose(np.std(b), 1.0, rtol=0.05)  # 2048 draws: standard error 1.6 %


def test_lookup_tables_start_reversed() -> None:
    assert LoRA(rank=6).for_lookup() == LoRA(rank=6, initializer="embedding")
    assert LoRA(rank=6, initializer="orthogonal").for_lookup() == LoRA(rank=6, initializer="orthogonal")


def test_a_frozen_a_is_not_the_zero_one_of_a_table() -> None:
    """LoRA-FA on an embedding would keep A = 0 for good."""
    assert LoRA(rank=6, freeze_a=True).for_lookup() == LoRA(rank=6, freeze_a=True)
    with pytest.raises(ValueError, match=r"freeze_a=True with initializer='embedding' keeps A at 0.*take"):
        LoRA(rank=6, freeze_a=True, initializer="embedding").check(64, 32)


def test_starts_differ_by_key_only() -> None:
    same = jax.tree.map(np.array_equal, start("orthogonal", seed=3), start("orthogonal", seed=3))
    other = jax.tree.map(np.array_equal, start("orthogonal", seed=3), start("orthogonal", seed=4))
    assert same == (True, True)
    assert other == (False, False)


def test_only_b_has_gradient_at_the_start() -> None:
    variant, x = LoRA(), jnp.ones((3, 48))
    adapter, _ = variant.init(jax.random.key(0), W)
    grads = jax.grad(lambda ad: jnp.sum(jnp.sin(x @ (W + variant.delta(ad, W)))))(adapter)
    assert not grads.A.any()
    assert np.abs(grads.B).max() > 0


def test_freeze_a_stops_its_gradient() -> None:
    adapter = LoRAAdapter(jnp.ones((48, 8)), jnp.ones((8, 32)))
    for freeze, moves in ((False, True), (True, False)):
        variant = LoRA(freeze_a=freeze)
        grads = jax.grad(lambda ad, variant=variant: jnp.sum(variant.delta(ad, W)))(adapter)
        assert bool(grads.A.any()) == moves
        assert grads.B.any()


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (LoRA(rank=40), r"rank=40 is outside 1\.\.32.*lower the rank"),
        (LoRA(rank=0), r"rank=0 is outside"),
        (LoRA(dropout=1.0), r"dropout=1.0 is not a probability"),
        (LoRA(initializer="kaimin"), r"'kaimin' is unknown; there are kaiming, .*did you mean 'kaiming'"),
        (LoRA(rank=5, initializer="orthogonal"), r"rank=5 is odd.*use rank=6"),
    ],
)
def test_errors_name_value_limit_and_remedy(variant: LoRA, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        variant.check(48, 32)
