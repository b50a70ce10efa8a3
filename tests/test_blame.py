"""What a step says of its NaN: which array, or which operation of the model, and that the real core hands it on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import lorajax as lj
from lorajax.train.blame import blame
from lorajax.train.step import init_state, make_step


def project(params, x):
    return x @ params["proj"]["w"]


def root(bound, batch, key):
    """Its loss is NaN where an output is negative; its gradient alone is where one is 0."""
    return jnp.mean(jnp.sqrt(lj.lift(project, strict=True)(bound, batch["x"]))), {}


def parts(scale):
    """(adapt, trainable, frozen, batch): every output is 8 times `scale`."""
    params, batch = {"proj": {"w": jnp.full((4, 3), scale)}}, {"x": jnp.full((8, 4), 2.0)}
    adapt = lj.adapt(lj.sites(project, params, batch["x"]), [("proj/w", lj.LoRA(rank=2))])
    return adapt, *adapt.init(jax.random.key(0), params), batch


def blamed(loss, adapt, trainable, frozen, batch, tx=None, accumulate=1):
    tx = tx or optax.sgd(0.1)
    state = init_state(jax.random.key(0), trainable, tx)
    state, metrics = make_step(loss, adapt, tx, accumulate=accumulate)(state, frozen, batch)
    assert not metrics["finite"]
    return blame(loss, adapt, state, frozen, batch, accumulate=accumulate)


def test_names_the_array():
    adapt, trainable, frozen, batch = parts(1.0)
    healthy = init_state(jax.random.key(0), trainable, optax.sgd(0.1))
    assert blame(root, adapt, healthy, frozen, batch).cause == "update"  # nothing else is left
    pair = trainable["proj/w"]
    broken = {"proj/w": pair._replace(B=pair.B.at[0, 0].set(jnp.inf))}
    found = blamed(root, adapt, broken, frozen, batch)
    assert (found.cause, found.where) == ("adapter", ("proj/w.B",))
    assert str(found) == "trainable values are not finite already before the step: proj/w.B"
    broken = frozen._replace(base={"proj/w": frozen.base["proj/w"].at[0, 0].set(jnp.nan)})
    found = blamed(root, adapt, trainable, broken, batch)
    assert (found.cause, found.where) == ("base", ("base.proj/w",))
    found = blamed(root, adapt, trainable, frozen, {"x": batch["x"].at[0, 0].set(jnp.nan)})
    assert (found.cause, found.where) == ("batch", ("x",))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_tells_loss_from_gradient_and_finds_the_operation(accumulate):
    adapt, trainable, frozen, batch = parts(-1.0)
    batch = batch if accumulate == 1 else {"x": batch["x"].reshape(2, 4, 4)}
    found = blamed(root, adapt, trainable, frozen, batch, accumulate=accumulate)
    assert found.cause == "loss"
    assert found.origin.startswith("first NaN: sqrt in ")
    assert "test_blame.py" in found.origin
    assert found.origin.endswith("(root)")
    assert ("[0]" in found.origin) == (accumulate == 2)  # the micro-batch
    assert "an activation is" in str(found)
    adapt, trainable, frozen, _ = parts(0.0)
    found = blamed(root, adapt, trainable, frozen, batch, accumulate=accumulate)
    assert found.cause == "gradient"
    assert "proj/w.B" in found.where
    assert found.origin.startswith("first ")


def test_tells_penalty_and_update():
    adapt, trainable, frozen, batch = parts(1.0)

    class Lost:
        bind = staticmethod(adapt.bind)

        def penalty(self, trainable):
            return jnp.log(-1.0 - jnp.sum(trainable["proj/w"].B ** 2))

    assert blamed(root, Lost(), trainable, frozen, batch).cause == "penalty"
    found = blamed(root, adapt, trainable, frozen, batch, tx=optax.sgd(jnp.inf))
    assert found.cause == "update"
    assert "optimizer" in str(found)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(4, name="dense")(x) * 1e12, None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=5)
        return scanned(name="layers")(x, None)[0]


def test_names_the_module_and_the_layer_of_a_scanned_model():
    """Layer n multiplies by 1e12, so that float32 overflows in the fourth."""
    model, x = Stack(), jnp.ones((2, 4))
    params = jax.tree.map(jnp.ones_like, model.init(jax.random.key(0), x))
    adapt = lj.adapt(lj.sites(model.apply, params, x), [(".*kernel", lj.LoRA(rank=2))])
    trainable, frozen = adapt.init(jax.random.key(1), params)

    def loss(bound, batch, key):
        return jnp.mean(lj.lift(model.apply)(bound, batch["x"])), {}

    found = blamed(loss, adapt, trainable, frozen, {"x": x})
    assert found.cause == "loss"
    overflow, nan = found.origin.split("; ")
    assert overflow.startswith("first infinity: mul in jvp(Stack)/layers[3], ")
    assert "test_blame.py" in overflow
    assert overflow.endswith("(Layer.__call__)")
    assert nan.startswith("first NaN: dot_general in jvp(Stack)/layers/dense[4], ")  # infinity times B = 0
