"""One process of a small training program: what `experiments.glue` does on several hosts, without a language model.

    python tests/process.py FOLDER MESH [PROCESS:STEP:SIGNAL]

MESH is JSON; at STEP, PROCESS sends itself SIGNAL. The coordinator comes from the environment.
"""

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import lorajax as lj
from lorajax.control import adalora
from lorajax.core.fingerprint import fingerprint
from lorajax.models.parts import onto
from lorajax.shard import hosts
from lorajax.shard.mesh import make_mesh
from lorajax.shard.placement import Placement
from lorajax.train.checkpoint import Checkpoints
from lorajax.train.run import EXIT_INTERRUPTED, Run, stop_on_signal
from lorajax.train.step import init_state, make_step

STEPS, ROWS = 12, 8
RULES = (("up", ("fsdp", "tensor")), ("down", (("tensor", "fsdp"), None)))


def net(p: Any, x: jax.Array) -> jax.Array:
    return x + jax.numpy.tanh(x @ p["up"]) @ p["down"]


def loss(bound: Any, batch: Any, key: jax.Array) -> Any:
    return jax.numpy.mean(jax.numpy.square(lj.lift(net)(bound, batch["x"]) - batch["y"])), {}


def digest(tree: Any) -> str:
    arrays = jax.tree.leaves(hosts.fetch(jax.tree.map(
        lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)))
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in arrays)).hexdigest()


def train(folder: Path, mesh: dict[str, int], fate: str = "") -> None:
    place = Placement(make_mesh(mesh), RULES)
    rng = np.random.default_rng(0)
    base = {name: np.float32(rng.normal(size=shape) / 4) for name, shape in (("up", (8, 16)), ("down", (16, 8)))}
    x = np.float32(rng.normal(size=(STEPS, ROWS, 8)))
    sites = lj.sites(net, base, x[0])
    adapt = lj.adapt(sites, [(".*", lj.AdaLoRA(rank=4))])
    if place.mesh:
        base = {name: onto(at, base[name].shape, np.float32, base[name].__getitem__)
                for name, at in place.base(sites.leaves).items()}
    trainable, frozen = jax.jit(adapt.init, out_shardings=place.adapters(adapt))(jax.random.key(0), base)
    tx, controller = optax.adamw(1e-2), adalora(adapt, total_steps=STEPS, target_rank=2, t_initial=1, t_final=2)
    begin = lambda k, t: init_state(k, t, tx, controller)  # noqa: E731
    where = place.state(adapt, jax.eval_shape(begin, jax.random.key(1), trainable))
    step_fn = make_step(loss, adapt, tx, controller, shardings=(where, place.whole))
    share = place.share(ROWS)
    told = fingerprint({"base": base, "scalar": jax.device_put(np.float32(1), place.whole)})  # of all processes' parts
    own = Run(folder, {}, fingerprints={"base": told}, tensorboard=False)
    with own as run, Checkpoints(run.checkpoints) as saved, stop_on_signal() as stop:
        state = jax.jit(begin, out_shardings=where)(jax.random.key(1), trainable)
        if saved.latest() is not None:
            state, told = saved.restore(state)
            assert digest(state) == told["digest"]
            print("restored", saved.latest(), flush=True)
        step = int(state.step)
        run.rewind(step)
        while step < STEPS:
            rows = x[step][share]
            state, metrics = step_fn(state, frozen, place.batch({"x": rows, "y": np.sin(3 * rows)}, 0, ROWS))
            step += 1
            run.log(step, {name: metrics[name] for name in ("loss", "grad_norm")})
            who, when, what = fate.split(":") if fate else ("-1", "0", "SIGTERM")
            if jax.process_index() == int(who) and step == int(when):
                os.kill(os.getpid(), getattr(signal, what))
            leave = stop.now()
            if step % 4 == 0 or leave:
                saved.save(step, state, {"digest": digest(state)})
            if leave:
                saved.wait()
                print(f"saved at {step}", flush=True)
                raise SystemExit(EXIT_INTERRUPTED)
            if fate:
                import time
                time.sleep(0.2)  # a notice takes a second to go round
        kept = {path: np.asarray(k).tolist() for path, k in hosts.fetch(state.control.kept).items()}
        run.finish({"digest": digest(state.trainable), "kept": kept})


def main(argv: list[str]) -> None:
    hosts.start()
    train(Path(argv[0]), json.loads(argv[1]), *argv[2:])


if __name__ == "__main__":
    hosts.run(main, ())
