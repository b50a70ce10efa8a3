"""Which attention a model computes: what 'auto' comes to, runs side by side, and what configs say."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import glue_folder, model_folder

from experiments import members
from lorajax import build, config
from lorajax.models import Bert, attention
from lorajax.models.attention import attend, side_by_side
from lorajax.models.short_attention import short_attention, short_side_by_side
from lorajax.sweep import groups, launch


def heads(runs: int = 3, dtype: Any = jnp.float32) -> tuple[list[jax.Array], jax.Array]:
    """q, k and v (runs, 2, 6, 2, 8), and a mask (runs, 2, 1, 1, 6) of which each row sees another number of keys."""
    keys = jax.random.split(jax.random.key(0), 3)
    seen = jnp.arange(6).reshape(1, 1, 1, 1, 6) < 1 + jnp.arange(runs * 2).reshape(runs, 2, 1, 1, 1) % 6
    return [jax.random.normal(key, (runs, 2, 6, 2, 8)).astype(dtype) for key in keys], seen


def pull(how: Any) -> Any:
    """(q, k, v, mask) of one run -> the gradient of what attention gives by q, k and v."""
    def total(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return jnp.sin(attend(q, k, v, mask=mask, implementation=how).astype(jnp.float32)).sum()

    return jax.grad(total, (0, 1, 2))


def on(monkeypatch: pytest.MonkeyPatch, backend: str, kind: str) -> None:
    monkeypatch.setattr(attention.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(attention.jax, "devices", lambda: [SimpleNamespace(
        device_kind=kind, compute_capability="7.5" if "T4" in kind else "9.0")])


@pytest.mark.parametrize(("backend", "kind", "dtype", "size", "expected"), [
    ("gpu", "NVIDIA H200", jnp.bfloat16, 32, "cudnn"),
    ("gpu", "NVIDIA H200", jnp.float16, 128, "cudnn"),
    ("gpu", "NVIDIA H200", jnp.float32, 64, None),
    ("gpu", "NVIDIA H200", jnp.bfloat16, 12, None),
    ("gpu", "NVIDIA H200", jnp.bfloat16, 256, None),
    ("gpu", "NVIDIA T4", jnp.float16, 64, None),
    ("gpu", "AMD Instinct MI300X", jnp.bfloat16, 64, None),
    ("tpu", "TPU v5e", jnp.bfloat16, 64, None),
    ("cpu", "cpu", jnp.bfloat16, 64, None),
])  # fmt: skip
def test_auto(
    monkeypatch: pytest.MonkeyPatch, backend: str, kind: str, dtype: Any, size: int, expected: str | None
) -> None:
    on(monkeypatch, backend, kind)
    asked = []

    def kernel(q: Any, k: Any, v: Any, *, implementation: Any, **how: Any) -> Any:
        asked.append(implementation)
        return q

    monkeypatch.setattr(attention.jax.nn, "dot_product_attention", kernel)
    x = jnp.zeros((1, 3, 2, size), dtype)
    attend(x, x, x, implementation="auto")
    attend(x, x, x, mask=jnp.ones((1, 1, 1, 3), bool), implementation="auto")  # odd lengths
    assert asked == [expected, None]


def test_runs_side_by_side_take_cudnns_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced only: both passes under a vmap, one kernel for all runs, whose bias is of each head."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    for check in ("check_cudnn_version", "check_compute_capability"):
        if hasattr(cudnn, check):
            monkeypatch.setattr(cudnn, check, lambda *_: 99999)
    on(monkeypatch, "gpu", "NVIDIA H200")
    (q, k, v), mask = heads(dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        text = str(jax.make_jaxpr(jax.vmap(pull(side_by_side)))(q, k, v, mask))
    kernels = [line for line in text.splitlines() if "dot_product_attention_" in line]
    assert len(kernels) >= 2 and "bf16[6,2,6,6]" in text  # 3 runs of 2 rows


def test_runs_side_by_side_are_the_runs() -> None:
    (q, k, v), mask = heads()
    together = jax.vmap(pull(side_by_side))(q, k, v, mask)
    for i in range(3):
        for found, expected in zip(together, pull(None)(q[i], k[i], v[i], mask[i]), strict=True):
            np.testing.assert_allclose(found[i], expected, atol=1e-6)


@pytest.mark.gpu
def test_cudnns_attention_of_runs_side_by_side() -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    (q, k, v), mask = heads(dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        fused, plain = (jax.jit(jax.vmap(pull(how)))(q, k, v, mask) for how in (side_by_side, "xla"))
        for each in (mask, mask[0]):  # of every run, and, as in evaluation, the same for all
            axes = (0, 0, 0, 0 if each is mask else None)
            seen = [jax.vmap(lambda q, k, v, m, how=how: attend(q, k, v, mask=m, implementation=how), axes)(
                        q, k, v, each) for how in (side_by_side, "xla")]  # fmt: skip
            np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in seen), atol=0.03)
    for found, expected in zip(fused, plain, strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(expected, np.float32), atol=0.03)


def test_configs_choose(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    c = config.load("configs/lora.py")
    assert build.attention(c) is short_attention
    c.mesh.data = 2
    assert build.attention(c) is None
    c.mesh.data = 1
    assert build.attention(config.load("configs/e2e.py")) is None  # decoders, whose masks no GPU has seen
    c.attention, c.compute_dtype = "cudnn", "bfloat16"
    assert build.attention(c) == "cudnn"
    c.compute_dtype = "float32"
    with pytest.raises(config.ConfigError, match="attention=cudnn computes in 16 bits.*attention=auto"):
        build.attention(c)
    c.attention = "cudn"
    with pytest.raises(config.ConfigError, match="cudnn"):
        build.attention(c)
    # A single run computes as its config says, and a pack as runs under a vmap can.
    model, data = model_folder(tmp_path / "model"), glue_folder(tmp_path / "glue")
    trial = {"config": "lora", "arg.task": "sst2", "arg.model": str(model), "arg.rank": 2, "data": str(data),
             "max_length": 16, "batch": 4, "attention": "auto"}  # fmt: skip
    one = launch(trial)
    found = build.load_data(one.config)
    assert build.load_model(one.config, found.task, jax.random.key(0)).net.config.attention is short_attention
    (group,) = groups([one], ["lr"], 2)
    monkeypatch.setattr(members, "LOADED", {})
    alone = members.prepared(members.shared_config(group)).model
    assert alone.net.config.attention is short_side_by_side
    # cuDNN's own, asked for in a pack, is what a vmap can take.
    asked = alone._replace(net=Bert(dataclasses.replace(alone.net.config, attention="cudnn")))
    monkeypatch.setattr(build, "load_model", lambda *_: asked)
    assert members.load_model(one.config, found.task).net.config.attention is side_by_side
