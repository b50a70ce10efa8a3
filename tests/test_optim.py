"""LoRA+, LoRA-FA, frozen ranks and the AdamW recipe: groups, states and updates against numpy and PEFT."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorajax.core.masks import Mask
from lorajax.core.variant import FullAdapter, Leaf
from lorajax.optim import (
    NAMES,
    adamw,
    freeze_ranks,
    groups,
    lora_fa,
    lora_fa_projected,
    lora_plus,
    project_b,
    warmup_schedule,
)
from lorajax.variants import AdaLoRA, LoRA
from lorajax.variants.adalora import AdaLoRAAdapter
from lorajax.variants.lora import LoRAAdapter


@pytest.fixture(autouse=True)
def _optax_promotes() -> Iterator[None]:
    """optax's bias correction raises a float to an int32 count, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Dora(NamedTuple):
    A: Any
    B: Any
    m: Any


LABELS = {
    "enc/q/kernel": LoRAAdapter("a", "b"),
    "enc/v/kernel": Dora("a", "b", "magnitude"),
    "enc/k/kernel": AdaLoRAAdapter("a", "e", "b"),
    "embed/table": LoRAAdapter("a", "b"),
    "layers/norm/scale": FullAdapter("full"),
    "layers/fc/bias": FullAdapter("full"),
    "head/kernel": FullAdapter("full"),
    "head/bias": FullAdapter("full"),
    "prompt": FullAdapter("full"),
}


def params(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {
        "enc/q/kernel": LoRAAdapter((6, 2), (2, 4)),
        "enc/v/kernel": Dora((3, 6, 2), (3, 2, 4), (3, 4)),  # three stacked layers
        "enc/k/kernel": AdaLoRAAdapter((6, 2), (2,), (2, 4)),
        "embed/table": LoRAAdapter((9, 2), (2, 6)),
        "layers/norm/scale": FullAdapter((3, 6)),
        "layers/fc/bias": FullAdapter((3, 4)),
        "head/kernel": FullAdapter((6, 3)),
        "head/bias": FullAdapter((3,)),
        "prompt": FullAdapter((5,)),
    }
    is_shape = lambda x: type(x) is tuple  # noqa: E731
    return jax.tree.map(lambda shape: jnp.float32(rng.normal(size=shape)), shapes, is_leaf=is_shape)


def test_official_groups() -> None:
    assert groups(params(), LABELS, embeddings=["embed/table"]) == {
        "enc/q/kernel": LoRAAdapter("slow", "fast"),
        "enc/v/kernel": Dora("slow", "fast", "fast"),
        "enc/k/kernel": AdaLoRAAdapter("slow", "slow", "fast"),
        "embed/table": LoRAAdapter("embedding", "embedding"),
        "layers/norm/scale": FullAdapter("fast_no_decay"),
        "layers/fc/bias": FullAdapter("fast_no_decay"),
        "head/kernel": FullAdapter("slow"),
        "head/bias": FullAdapter("fast_no_decay"),
        "prompt": FullAdapter("fast"),
    }


def test_paper_groups() -> None:
    assert groups(params(), LABELS, grouping="paper", embeddings=["embed/table"]) == {
        "enc/q/kernel": LoRAAdapter("slow", "fast"),
        "enc/v/kernel": Dora("slow", "fast", "slow"),
        "enc/k/kernel": AdaLoRAAdapter("slow", "slow", "fast"),
        "embed/table": LoRAAdapter("slow", "fast"),
        "layers/norm/scale": FullAdapter("slow_no_decay"),
        "layers/fc/bias": FullAdapter("slow_no_decay"),
        "head/kernel": FullAdapter("slow"),
        "head/bias": FullAdapter("slow_no_decay"),
        "prompt": FullAdapter("slow"),
    }


def test_group_errors() -> None:
    with pytest.raises(ValueError, match=r"grouping='peft' is unknown; there are 'official' \(also PEFT's\)"):
        groups(params(), LABELS, grouping="peft")
    with pytest.raises(ValueError, match=r"embeddings=\['wte'\] are not adapted; the adapted paths are \['embed/"):
        groups(params(), LABELS, embeddings=["wte"])


def numpy_adamw(w: np.ndarray, grads: list[np.ndarray], lrs: list[float], decay: float) -> np.ndarray:
    m = v = np.zeros_like(w)
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w = w - lr * step - lr * decay * w
    return w


def run(tx: optax.GradientTransformation, start: Any, grads: list[Any], **extra: Any) -> Any:
    state, current = tx.init(start), start
    tx = optax.with_extra_args_support(tx)
    for g in grads:
        updates, state = tx.update(g, state, current, **extra)
        current = optax.apply_updates(current, updates)
    return current


@pytest.mark.parametrize("scheduled", [False, True])
def test_lora_plus_steps_match_adamw_by_group(scheduled: bool) -> None:
    rates = [1e-2, 5e-3, 2.5e-3] if scheduled else [1e-2] * 3
    lr = (lambda step: jnp.asarray(rates)[step]) if scheduled else 1e-2
    tx = lora_plus(lr, 8.0, labels=LABELS, embeddings=["embed/table"], embedding_lr=1e-3, weight_decay=0.1)
    start, grads = params(), [params(seed) for seed in (1, 2, 3)]
    end = run(tx, start, grads)
    factors = {"slow": 1.0, "fast": 8.0, "fast_no_decay": 8.0}
    for path, adapter in groups(start, LABELS, embeddings=["embed/table"]).items():
        for name, group in adapter._asdict().items():
            lrs = [1e-3] * 3 if group == "embedding" else [rate * factors[group] for rate in rates]
            expected = numpy_adamw(np.float64(getattr(start[path], name)),
                                   [np.float64(getattr(g[path], name)) for g in grads], lrs,
                                   0.0 if group == "fast_no_decay" else 0.1)
            np.testing.assert_allclose(getattr(end[path], name), expected, rtol=2e-5, atol=2e-6, err_msg=path + name)


def test_first_adam_step_from_b_zero_is_finite_and_leaves_a() -> None:
    variant, w = LoRA(rank=2), jnp.ones((6, 4))
    start = {"q": variant.init(jax.random.key(0), w)[0]}
    grads = jax.grad(lambda tr: jnp.sum(jnp.cos(w + variant.delta(tr["q"], w))))(start)
    labels = {"q": LoRAAdapter("a", "b")}
    for tx in (adamw(1e-2), lora_plus(1e-2, labels=labels)):
        end = run(tx, start, [grads])
        assert np.array_equal(end["q"].A, start["q"].A)
        assert np.isfinite(end["q"].B).all()
        assert end["q"].B.all()


# LoRA-FA


def test_lora_fa_trains_b_and_head_only_and_keeps_no_state_for_a() -> None:
    """Llama-3.2-3B, query and value, rank 32: Adam has two moments of 3,670,016 numbers (PEFT's count)."""
    shapes = {"q": (3072, 3072), "v": (3072, 1024)}
    trainable = {f"{i}/{path}": LoRAAdapter(jax.ShapeDtypeStruct((n_in, 32), jnp.float32),
                                            jax.ShapeDtypeStruct((32, n_out), jnp.float32))
                 for i in range(28) for path, (n_in, n_out) in shapes.items()}
    labels = {path: LoRAAdapter("a", "b") for path in trainable}
    moments = lambda tx: sum(x.size for x in jax.tree.leaves(jax.eval_shape(tx.init, trainable)) if x.ndim)  # noqa: E731
    assert moments(optax.adamw(1e-3)) == 2 * 9_175_040
    assert moments(lora_fa(optax.adamw(1e-3), labels)) == 2 * 3_670_016
    assert moments(lora_fa_projected(1e-3, labels, {})) == 2 * 3_670_016


def test_lora_fa_moves_all_but_a() -> None:
    start = params()
    end = run(lora_fa(optax.adamw(1e-2, weight_decay=0.1), LABELS), start, [params(1), params(2)])
    moved = jax.tree.map(lambda x, y: bool((x != y).all()), start, end)
    assert moved == jax.tree.map(lambda label: label != "a", LABELS)


def test_projected_gradient_moves_the_product_along_the_projected_full_gradient() -> None:
    """With g_B = s A^T G, s A g_B' must be the projection of G on the columns of A, for every matrix of a stack."""
    rng = np.random.default_rng(0)
    s = 0.25
    a, full = rng.normal(size=(3, 40, 4)), rng.normal(size=(3, 40, 10))
    adapter = LoRAAdapter(jnp.float32(a), jnp.zeros((3, 4, 10)))
    grads = LoRAAdapter(jnp.zeros((3, 40, 4)), jnp.float32(s * np.swapaxes(a, 1, 2) @ full))
    tx = project_b({"q": s})
    updates, _ = tx.update({"q": grads, "head": FullAdapter(jnp.ones(3))}, tx.init({}), {"q": adapter})
    for i in range(3):
        q, _ = np.linalg.qr(a[i])
        np.testing.assert_allclose(s * a[i] @ np.float64(updates["q"].B[i]), q @ q.T @ full[i], atol=1e-5)
    assert np.array_equal(updates["head"].w, jnp.ones(3))


def test_projected_errors() -> None:
    tx = project_b({"k": 1.0})
    with pytest.raises(ValueError, match=r"needs the parameters: call tx.update\(grads, state, params\)"):
        tx.update({}, tx.init({}))
    with pytest.raises(ValueError, match=r"scales names \['k'\], which are not trained; the trained paths are \['q'\]"):
        tx.update({"q": None}, tx.init({}), {"q": None})


# Frozen ranks


PLAN = {"q": AdaLoRA(rank=3), "layers/v": LoRA(rank=3), "head": SimpleNamespace(leaves={"w": Leaf("full", ())})}
MASKS = {"q": jnp.array([1.0, 0.0, 1.0]), "layers/v": jnp.array([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])}


def ranked(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.float32(rng.normal(size=shape))  # noqa: E731
    return {"q": AdaLoRAAdapter(draw(5, 3), draw(3), draw(3, 4)), "layers/v": LoRAAdapter(draw(2, 5, 3), draw(2, 3, 4)),
            "head": FullAdapter(draw(4, 2))}


def frozen_parts(tree: dict[str, Any]) -> list[jax.Array]:
    q, v = tree["q"], tree["layers/v"]
    return [q.A[:, 1], q.E[1], q.B[1], v.A[0, :, 0], v.B[0, 0], v.A[1, :, 2], v.B[1, 2]]


@pytest.mark.parametrize("given", ["built in", "at each step"])
def test_masked_ranks_do_not_move_by_momentum_or_decay(given: str) -> None:
    adam = optax.adamw(1e-2, weight_decay=0.1)
    start = ranked(0)
    warm = run(adam, start, [ranked(1)])
    state = adam.init(start)
    _, state = adam.update(ranked(1), state, start)  # momentum in every rank
    tx = optax.chain(adam, freeze_ranks(PLAN, MASKS if given == "built in" else None))
    extra = {} if given == "built in" else {"masks": MASKS}
    free, current, chained = warm, warm, (state, optax.EmptyState())
    for seed in (2, 3):
        g = ranked(seed)
        updates, state = adam.update(g, state, free)
        free = optax.apply_updates(free, updates)
        updates, chained = tx.update(g, chained, current, **extra)
        current = optax.apply_updates(current, updates)
    assert all(np.array_equal(x, y) for x, y in zip(frozen_parts(current), frozen_parts(warm), strict=True))
    assert all((x != y).all() for x, y in zip(frozen_parts(free), frozen_parts(warm), strict=True))
    # all other ranks, and the head, move as without the mask
    same = sum(int((x == y).sum()) for x, y in zip(jax.tree.leaves(current), jax.tree.leaves(free), strict=True))
    assert same == sum(x.size for x in jax.tree.leaves(free)) - sum(x.size for x in frozen_parts(free))


def test_masking_the_gradient_alone_is_not_enough() -> None:
    """Why freeze_ranks acts on the update: the same optimizer, with the gradient masked, moves the frozen rank."""
    start = ranked(0)
    zero = jax.tree.map(jnp.zeros_like, start)
    end = run(optax.adamw(1e-2, weight_decay=0.1), start, [ranked(1), zero])
    first = run(optax.adamw(1e-2, weight_decay=0.1), start, [ranked(1)])
    assert all((x != y).all() for x, y in zip(frozen_parts(end), frozen_parts(first), strict=True))


def test_a_real_multiplier_does_not_scale_the_update() -> None:
    tx = freeze_ranks(PLAN)
    g = ranked(0)
    updates, _ = tx.update(g, tx.init(g), g, masks={"q": jnp.array([0.5, 2.0, 0.0])})
    assert np.array_equal(updates["q"].E, [g["q"].E[0], g["q"].E[1], 0.0])
    assert updates["layers/v"] is g["layers/v"]


def test_masks_of_single_arrays_freeze_these() -> None:
    """As sparse LoRA has them; and of a mask that acts, trains and moves by different numbers, the last counts."""
    tx, g = freeze_ranks(PLAN), ranked(0)
    on = jnp.asarray(np.random.default_rng(1).integers(0, 2, (2, 3, 4)), bool)
    rank = jnp.array([1.0, 0.0, 1.0])
    masks = {"layers/v": LoRAAdapter(None, on), "q": Mask(jnp.ones(3), jnp.zeros(3), rank)}
    updates, _ = jax.jit(tx.update)(g, tx.init(g), g, masks=masks)
    np.testing.assert_array_equal(updates["layers/v"].B, np.where(on, g["layers/v"].B, 0.0))
    np.testing.assert_array_equal(updates["layers/v"].A, g["layers/v"].A)
    np.testing.assert_array_equal(updates["q"].E, g["q"].E * rank)


def test_frozen_slots_and_unknown_paths() -> None:
    tx = freeze_ranks(PLAN)
    partial = {"layers/v": LoRAAdapter(None, jnp.ones((2, 3, 4)))}
    updates, _ = tx.update(partial, tx.init(partial), partial, masks={"layers/v": MASKS["layers/v"]})
    assert updates["layers/v"].A is None
    assert int(updates["layers/v"].B.sum()) == 16
    with pytest.raises(ValueError, match=r"masks names \['k'\], which are not trained.*\['layers/v'\]"):
        tx.update(partial, tx.init(partial), partial, masks={"k": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"mask of shape \(3,\) does not fit B of shape \(2, 3, 4\)"):
        tx.update(partial, tx.init(partial), partial, masks={"layers/v": jnp.ones(3)})


# The recipe


def test_schedules_at_known_steps() -> None:
    at = lambda decay, warmup, *steps: [float(warmup_schedule(2.0, 100, warmup, decay)(t)) for t in steps]  # noqa: E731
    np.testing.assert_allclose(at("linear", 0.2, 0, 10, 20, 60, 100), [0, 1, 2, 1, 0], atol=1e-6)
    np.testing.assert_allclose(at("cosine", 20, 0, 10, 20, 60, 100), [0, 1, 2, 1, 0], atol=1e-6)
    np.testing.assert_allclose(at("constant", 0.0, 0, 50, 100), [2, 2, 2], atol=1e-6)


def test_schedule_errors() -> None:
    with pytest.raises(ValueError, match=r"decay='linar' is unknown; there are linear, .*did you mean 'linear'"):
        warmup_schedule(1.0, 10, decay="linar")
    with pytest.raises(ValueError, match=r"warmup=10 is 10 steps of a run of 10: it must be shorter"):
        warmup_schedule(1.0, 10, warmup=10)


def test_adamw_decays_no_bias_and_no_norm() -> None:
    start = params()
    end = run(adamw(1e-2, weight_decay=0.5), start, [jax.tree.map(jnp.zeros_like, start)])
    still = {path for path in start if all(jax.tree.leaves(jax.tree.map(np.array_equal, start[path], end[path])))}
    assert still == {"layers/norm/scale", "layers/fc/bias", "head/bias"}
    np.testing.assert_allclose(end["head/kernel"].w, start["head/kernel"].w * 0.995, rtol=1e-6)


# PEFT


def test_lora_plus_golden() -> None:
    """Five steps of PEFT's create_loraplus_optimizer on a tiny Llama: ratio 8, decay 0.01; losses and last tensors."""
    case = golden.load("loraplus_llama")
    case.check(LoRA(rank=4, alpha=8.0), steps=False)
    adapt = case.adapt(LoRA(rank=4, alpha=8.0))
    trainable, frozen = jax.jit(adapt.init)(jax.random.key(0), case.params)
    trainable = case.adapters(LoRA(rank=4), case.tensors(), trainable)
    settings = case.info["optimizer"]
    tx = NAMES["lora_plus"](settings["lr"], adapt=adapt, weight_decay=settings["loraplus_weight_decay"],
                            ratio=settings["loraplus_lr_ratio"])
    step = jax.jit(jax.value_and_grad(lambda tr: case.loss(adapt.bind(tr, frozen))))
    update, state, losses = jax.jit(tx.update), tx.init(trainable), []
    for _ in range(settings["steps"]):
        loss, grads = step(trainable)
        losses.append(loss)
        updates, state = update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    losses.append(step(trainable)[0])
    np.testing.assert_allclose(losses, case.expected["train_losses"], atol=1e-4)
    after = {name.removeprefix("after5/base_model.model."): x for name, x in case.expected.items() if "after5/" in name}
    want = case.adapters(LoRA(rank=4), after, trainable)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), trainable, want)


@pytest.mark.peft
def test_groups_match_pefts() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peft)")
    peft = pytest.importorskip("peft", reason="peft is not installed (extra: peft)")
    from peft.optimizers import create_loraplus_optimizer

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(9, 6)
            self.q = torch.nn.Linear(6, 4)
            self.norm = torch.nn.LayerNorm(4)
            self.head = torch.nn.Linear(4, 3)

    model = peft.get_peft_model(Model(), peft.LoraConfig(r=2, target_modules=["embed", "q"], use_dora=False,
                                                         modules_to_save=["norm", "head"]))
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=0.1)
    theirs = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    values = {"slow": (1e-3, 0.1), "fast": (8e-3, 0.1), "fast_no_decay": (8e-3, 0.0), "embedding": (1e-6, 0.1)}
    names = {  # our path and leaf -> PEFT's parameter
        ("embed", "A"): "embed.lora_embedding_A.default", ("embed", "B"): "embed.lora_embedding_B.default",
        ("q", "A"): "q.lora_A.default.weight", ("q", "B"): "q.lora_B.default.weight",
        **{(f"{m}/{leaf}", "w"): f"{m}.modules_to_save.default.{leaf}" for m in ("norm", "head")
           for leaf in ("weight", "bias")},
    }
    peft_parameters = {name: p for name, p in model.base_model.model.named_parameters() if p.requires_grad}
    assert sorted(names.values()) == sorted(peft_parameters)
    labels: dict[str, Any] = {path: LoRAAdapter("a", "b") for path in ("embed", "q")}
    labels |= {path: FullAdapter("full") for path, leaf in names if leaf == "w"}
    leaves = {path: type(adapter)(*(jnp.zeros(peft_parameters[names[path, leaf]].shape) for leaf in adapter._fields))
              for path, adapter in labels.items()}
    ours = groups(leaves, labels, embeddings=["embed"])
    for (path, leaf), name in names.items():
        assert values[getattr(ours[path], leaf)] == pytest.approx(theirs[id(peft_parameters[name])]), name
