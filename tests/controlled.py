"""A small regression for controllers: three adapted weights (two in a stack), a head that is trained in full."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorajax as lj
from lorajax.optim import freeze_ranks
from lorajax.train.step import init_state, make_step

RNG = np.random.default_rng(0)
SHAPES = {"stack": (2, 8, 8), "wide": (8, 6), "head": (6, 2)}
PARAMS = {name: np.float32(0.4 * RNG.normal(size=shape)) for name, shape in SHAPES.items()}
BATCH = {"x": np.float32(RNG.normal(size=(16, 8))), "y": np.float32(RNG.normal(size=(16, 2)))}


def fn(params: dict[str, Any], x: Any) -> Any:
    x, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, params["stack"])
    return jnp.tanh(x @ params["wide"]) @ params["head"]


def loss(bound: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
    return jnp.mean(jnp.square(lj.lift(fn)(bound, batch["x"]) - batch["y"])), {}


@functools.cache
def adapted(variant: Any) -> Any:
    return lj.adapt(lj.sites(fn, PARAMS, BATCH["x"]), [("head", lj.Full()), (".*", variant)])


@functools.cache
def start(variant: Any) -> tuple[dict[str, Any], Any]:
    """(trainable, frozen) as `init` makes them."""
    return jax.jit(adapted(variant).init)(jax.random.key(0), PARAMS)


def noisy(trainable: Any, seed: int = 1) -> Any:
    """Arrays away from their start: no B is 0."""
    rng = np.random.default_rng(seed)
    noise = lambda x: jnp.asarray(x + np.float32(0.3 * rng.normal(size=x.shape)))  # noqa: E731
    return jax.tree.map(noise, jax.device_get(trainable))


class Trainer:
    """`adapt`, its controller and AdamW with decay, and a state that has begun."""

    def __init__(self, variant: Any, make: Any, tx: Any = None, **step: Any):
        self.adapt = adapted(variant)
        self.controller = make(self.adapt)
        self.tx = optax.chain(tx or optax.adamw(0.02, weight_decay=0.1), freeze_ranks(self.adapt.plan))
        trainable, self.frozen = start(variant)
        begin = jax.jit(lambda t: init_state(jax.random.key(1), t, self.tx, self.controller))
        self.state = begin(noisy(trainable))
        program = make_step(loss, self.adapt, self.tx, self.controller, **step).__wrapped__
        self.step = jax.jit(program, donate_argnums=0)

    def run(self, steps: int, batch: Any = BATCH) -> Any:
        """The trainable partition after each step."""
        seen = []
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.frozen, batch)
            assert np.all(metrics["finite"])
            seen.append(jax.tree.map(np.array, self.state.trainable))
        return seen
