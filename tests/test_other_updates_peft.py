"""LoHa, LoKr, HiRA, GraLoRA, MiSS, DeLoRA, IA3, SHiRA, KaSA against PEFT itself: one layer's output and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax as lj
from lorajax.core.variant import Variant
from lorajax.variants import IA3, DeLoRA, GraLoRA, HiRA, KaSA, LoHa, LoKr, MiSS, SHiRA

pytestmark = pytest.mark.peft

# variant -> (PEFT's config class, its arguments)
LINEAR: dict[Variant, tuple[str, dict[str, Any]]] = {
    LoHa(rank=3, alpha=6.0): ("LoHaConfig", {"r": 3, "alpha": 6}),
    LoKr(rank=1, alpha=3.0): ("LoKrConfig", {"r": 1, "alpha": 3}),
    LoKr(rank=1, alpha=3.0, decompose_both=True, factor=2): (
        "LoKrConfig", {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 2}),
    HiRA(rank=3): ("HiraConfig", {"r": 3}),
    GraLoRA(rank=4, alpha=8.0): ("GraloraConfig", {"r": 4, "alpha": 8}),
    GraLoRA(rank=4, alpha=8.0, k=4, hybrid_rank=2): (
        "GraloraConfig", {"r": 4, "alpha": 8, "gralora_k": 4, "hybrid_r": 2}),
    MiSS(rank=5): ("MissConfig", {"r": 5}),
    MiSS(rank=4, mode="bat"): ("MissConfig", {"r": 4, "init_weights": "bat"}),
    MiSS(rank=4, mode="mini", mini_rank=2): ("MissConfig", {"r": 4, "init_weights": "mini", "mini_r": 2}),
    DeLoRA(rank=3, strength=15.0): ("DeloraConfig", {"r": 3}),
    IA3(side="in"): ("IA3Config", {"feedforward_modules": ["layer"]}),
    SHiRA(rank=3): ("ShiraConfig", {"r": 3}),
    KaSA(rank=3, alpha=6.0): ("LoraConfig", {"r": 3, "lora_alpha": 6, "kasa_config": {}}),
}  # fmt: skip
CONV: dict[Variant, tuple[str, dict[str, Any]]] = {
    LoHa(rank=3, alpha=6.0): LINEAR[LoHa(rank=3, alpha=6.0)],
    LoKr(rank=2, alpha=3.0, window=6): ("LoKrConfig", {"r": 2, "alpha": 3}),
    LoKr(rank=1, alpha=3.0, window=6): ("LoKrConfig", {"r": 1, "alpha": 3}),
}


def linear(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"][None, :]


def conv(p: Any, x: jax.Array) -> jax.Array:
    numbers = ("NCHW", "HWIO", "NCHW")
    y = jax.lax.conv_general_dilated(x, p["w"], (2, 1), "VALID", dimension_numbers=numbers)
    return y + p["b"][None, :, None, None]


def in_ours(variant: Variant, like: Any, tensors: dict[str, np.ndarray], window: int) -> dict[str, jax.Array]:
    """PEFT's tensors (or their gradients), of one layer, as our adapter's arrays."""
    found = {}
    for name, shape in like._asdict().items():
        stored = f"layer.{variant.leaves[name].peft}"
        if shape is None or stored not in tensors:
            continue
        x = tensors[stored]
        if isinstance(variant, GraLoRA) and name == "B":
            x = x.swapaxes(0, 1)  # (k, r, out / k)
        elif x.ndim == 4:
            x = x.transpose(2, 3, 1, 0)
        elif x.ndim == 2 and not isinstance(variant, MiSS):
            x = x.T
            if name in ("A2", "A1" if isinstance(variant, LoHa) else ""):
                # of the rows, PEFT's run over channels, then the window; ours the other way round
                x = x.reshape(-1, window, x.shape[-1]).swapaxes(0, 1)
        found[name] = jnp.asarray(x.reshape(shape.shape))
    return found


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(("variant", "op"), [*[(v, "linear") for v in LINEAR], *[(v, "conv") for v in CONV]], ids=str)
def test_one_layer(variant: Variant, op: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    peft = pytest.importorskip("peft", reason="peft is not installed (extra: peft)")
    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 8) if op == "linear" else torch.nn.Conv2d(6, 8, (3, 2), stride=(2, 1))
    config, settings = (LINEAR if op == "linear" else CONV)[variant]
    x = torch.randn(5, 12) if op == "linear" else torch.randn(2, 6, 7, 5)
    order = (1, 0) if op == "linear" else (2, 3, 1, 0)
    params = {"w": jnp.asarray(layer.weight.detach().numpy().transpose(order)),
              "b": jnp.asarray(layer.bias.detach().numpy())}
    model = torch.nn.Sequential()
    model.add_module("layer", layer)
    model = peft.get_peft_model(model, getattr(peft, config)(target_modules=["layer"], **settings))
    with torch.no_grad():
        for _, tensor in trained(model):
            tensor.copy_(torch.randn(tensor.shape))
    out = model(x)
    # KaSA has a loss of its own, which PEFT hands out instead of adding
    extra = model.base_model._get_kasa_loss() if isinstance(variant, KaSA) else 0.0
    (torch.sin(out).sum() + extra).backward()

    fn = linear if op == "linear" else conv
    adapt = lj.adapt(lj.sites(fn, params, jnp.asarray(x.numpy())), [("w", variant)])
    trainable, frozen = adapt.init(jax.random.key(0), params)
    values = {name: p.detach().numpy() for name, p in trained(model)}
    grads = {name: p.grad.numpy() for name, p in trained(model)}
    window = 1 if op == "linear" else 6
    if isinstance(variant, SHiRA):
        indices = model.base_model.model.layer.shira_indices["default"].numpy()[::-1].copy()
        frozen = frozen._replace(aux={"w": frozen.aux["w"]._replace(indices=jnp.asarray(indices))})
    ours = trainable["w"]._replace(**in_ours(variant, trainable["w"], values, window))

    def loss(adapter: Any) -> tuple[jax.Array, jax.Array]:
        y = lj.lift(fn)(adapt.bind({"w": adapter}, frozen), jnp.asarray(x.numpy()))
        return jnp.sum(jnp.sin(y)) + adapt.penalty({"w": adapter}), y

    (_, have), have_grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(ours)
    np.testing.assert_allclose(have, out.detach().numpy(), rtol=1e-4, atol=1e-4)
    assert np.abs(have - fn(params, jnp.asarray(x.numpy()))).max() > 0.1
    want_grads = in_ours(variant, trainable["w"], grads, window)
    assert want_grads.keys() == {name for name, x in ours._asdict().items() if x is not None}
    for name, want in want_grads.items():
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(getattr(have_grads, name), want, rtol=1e-3, atol=1e-4 * scale, err_msg=name)


def trained(model: Any) -> list[tuple[str, Any]]:
    """(name without prefix and adapter name, tensor) of what PEFT trains."""
    return [(name.removeprefix("base_model.model.").replace(".default", ""), p)
            for name, p in model.named_parameters() if p.requires_grad]


def test_counts() -> None:
    """PEFT trains as many numbers as we."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    peft = pytest.importorskip("peft", reason="peft is not installed (extra: peft)")
    for variant, (config, settings) in LINEAR.items():
        model = torch.nn.Sequential()
        model.add_module("layer", torch.nn.Linear(12, 8))
        model = peft.get_peft_model(model, getattr(peft, config)(target_modules=["layer"], **settings))
        adapt = lj.adapt(lj.sites(lambda p, x: x @ p["w"], {"w": jnp.ones((12, 8))}, jnp.ones((1, 12))),
                         [("w", variant)])  # fmt: skip
        assert adapt.count() == sum(p.numel() for _, p in trained(model)), variant
