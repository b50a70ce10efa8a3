"""Every combination type of PEFT's `add_weighted_adapter`, against PEFT itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax as lj
from lorajax import compose
from lorajax.compose import peft_forms
from lorajax.variants import LoRA

TYPES = ["cat", "svd", *[name.removeprefix("peft_") for name in compose.FORMS]]
WEIGHTS = [0.7, -0.5, 0.9]


@pytest.mark.peft
@pytest.mark.parametrize(("kind", "majority"), [(kind, "total") for kind in TYPES]
                         + [(kind, "frequency") for kind in TYPES if "ties" in kind])
def test_add_weighted_adapter(kind: str, majority: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    peft = pytest.importorskip("peft", reason="peft is not installed (extra: peft)")
    from peft.utils import merge_utils

    # What is dropped must be the same on both sides: entries where row + column is odd, whatever the layout.
    checkers = lambda shape: np.add.outer(*map(np.arange, shape)) % 2 == 0  # noqa: E731
    monkeypatch.setattr(peft_forms, "stays", lambda key, p, like: checkers(like.shape))
    monkeypatch.setattr(merge_utils.torch, "bernoulli", lambda x: torch.tensor(checkers(x.shape), dtype=x.dtype))

    free = kind.endswith("svd") or kind == "cat"  # of one rank for all
    ranks, alphas = ([2, 3, 4] if free else [3, 3, 3]), [5.0, 3.0, 8.0]
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(12, 9, bias=False), torch.nn.Linear(9, 7, bias=False))
    model: Any = None
    for i, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0", "1"], init_lora_weights=False)
        model = peft.get_peft_model(net, config, f"a{i}") if i == 0 else model
        _ = i and model.add_adapter(f"a{i}", config)
    names = [f"a{i}" for i in range(3)]
    model.base_model.add_weighted_adapter(names, WEIGHTS, "new", combination_type=kind, density=0.5,
                                          majority_sign_method=majority)
    layers = [model.base_model.model[i] for i in range(2)]
    want = [layer.get_delta_weight("new").detach().numpy().T for layer in layers]

    params = {f"w{i}": jnp.asarray(layer.base_layer.weight.detach().numpy().T) for i, layer in enumerate(layers)}
    sites = lj.sites(lambda p, x: x @ p["w0"] @ p["w1"], params, jnp.ones((1, 12)))
    adapters = []
    for name, rank, alpha in zip(names, ranks, alphas, strict=True):
        adapt = lj.adapt(sites, [("w.", LoRA(rank=rank, alpha=alpha))])
        trainable, frozen = adapt.init(jax.random.key(0), params)
        for i, layer in enumerate(layers):
            a, b = (getattr(layer, f"lora_{x}")[name].weight.detach().numpy().T for x in "AB")
            trainable[f"w{i}"] = trainable[f"w{i}"]._replace(A=jnp.asarray(a), B=jnp.asarray(b))
        adapters.append(compose.Adapter(adapt, trainable, frozen))
    exact = kind in ("cat", "svd")
    method = compose.Sum() if exact else compose.FORMS[f"peft_{kind}"](density=0.5, majority=majority)
    made = compose.compose(adapters, method, weights=WEIGHTS, rank=4 if "svd" in kind else None,
                           key=jax.random.key(0), measure=False)
    merged = made.adapt.merge(made.trainable, made.frozen)
    for i, delta in enumerate(want):
        np.testing.assert_allclose(merged[f"w{i}"] - params[f"w{i}"], delta, atol=2e-5)
        assert np.abs(delta).max() > 0.1
