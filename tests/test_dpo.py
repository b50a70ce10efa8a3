"""DPO: the losses against NumPy, the first step, and that the base is there once."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import lorajax as lj
from experiments.objective import make_dpo
from lorajax import language
from lorajax.data import Batches, Preferences, Supervised
from lorajax.shard.placement import LOCAL
from lorajax.train.dpo import WithReference, make_dpo_loss, preference_losses, reference, sequence_log_probs
from lorajax.train.step import init_state, make_update
from lorajax.variants.pissa import PiSSA


def made_up(lengths, seed):
    rng = np.random.default_rng(seed)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = rng.integers(3, 60, len(positions)).astype(np.int32)
    return Supervised(ids, positions >= 2, positions, offsets, np.arange(len(lengths)))


PAIRS = Preferences(made_up([6, 5, 4], 0), made_up([4, 7, 6], 1))


RULE = (".*/(query|value)/kernel", lj.LoRA(rank=2))


def world(rule=RULE):
    case = golden.load("lora_qv_llama")
    batch = Batches(PAIRS, 4, shuffle=False, shapes=1).batch(0, 0)  # the last row is empty

    def logits(params, batch):
        two, length = batch["input_ids"].shape[1:]
        flat = {name: batch[name].reshape(-1, length) for name in ("input_ids", "positions", "segments")}
        out = case.model.apply(params, flat["input_ids"], None, flat["positions"], flat["segments"])
        return out.reshape(-1, two, length, out.shape[-1])

    lifted = lj.lift(logits, strict=True)

    def log_probs(params, batch, key):
        return sequence_log_probs(lifted(params, batch), batch["labels"], batch["completion"])

    adapt = lj.adapt(lj.sites(logits, case.params, batch), [rule])
    return case, batch, adapt, logits, log_probs


def moved(adapt, params):
    trainable, frozen = adapt.init(jax.random.key(0), params)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), trainable), frozen


def summed(logits, batch):
    """(B, 2) in float64: log-probabilities of the completions, token by token."""
    logits = np.asarray(logits, np.float64)
    out = np.zeros(logits.shape[:2])
    for row, side, at in np.argwhere(batch["completion"] > 0):
        z = logits[row, side, at]
        out[row, side] += z[batch["labels"][row, side, at]] - np.log(np.exp(z - z.max()).sum()) - z.max()
    return out


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_and_gradients_equal_numpy(smoothing):
    rng = np.random.default_rng(0)
    policy, fixed = rng.normal(-20, 5, (2, 6, 2))
    h = (policy - fixed) @ [1, -1]
    beta, e = 0.1, smoothing
    want = -(1 - e) * np.log(sigmoid(beta * h)) - e * np.log(1 - sigmoid(beta * h))
    slope = beta * (sigmoid(beta * h) - (1 - e))  # of the loss by h: eq. 7's weight, sigmoid(-beta h), without e
    run = jax.vmap(jax.value_and_grad(
        lambda p, f: preference_losses(p[None], f[None], beta=beta, label_smoothing=e)[0]))  # fmt: skip
    have, towards = run(jnp.asarray(policy, jnp.float32), jnp.asarray(fixed, jnp.float32))
    np.testing.assert_allclose(have, want, rtol=1e-5)
    np.testing.assert_allclose(towards, slope[:, None] * [1, -1], atol=1e-6)
    squared = preference_losses(jnp.asarray(policy, jnp.float32), jnp.asarray(fixed, jnp.float32), beta=0.2, kind="ipo")
    np.testing.assert_allclose(squared, (h - 2.5) ** 2, rtol=1e-4)


def test_far_from_the_reference_nothing_overflows():
    policy, fixed = jnp.asarray([[-1e5, 0.0], [0.0, -1e5]]), jnp.zeros((2, 2))
    loss, towards = jax.value_and_grad(lambda p: preference_losses(p, fixed).sum())(policy)
    assert float(loss) == pytest.approx(1e4) and np.isfinite(towards).all()


def test_loss_metrics_and_gradient_of_a_model():
    """Everything that is reported, by NumPy from the logits of merged and of plain params; the gradient is section 4's,
    -beta sigmoid(-beta h) (grad log p(chosen) - grad log p(rejected)), by NumPy's h and merged weights."""
    case, batch, adapt, logits, log_probs = world()
    trainable, frozen = moved(adapt, case.params)
    loss = make_dpo_loss(log_probs, beta=0.3)

    def total(trainable):
        return loss(WithReference(adapt).bind(trainable, frozen), batch, None)

    ((value, told), towards) = jax.jit(jax.value_and_grad(total, has_aux=True))(trainable)
    plain = jax.jit(logits)
    policy, fixed = (summed(plain(p, batch), batch)[:3] for p in (adapt.merge(trainable, frozen), case.params))
    rewards = 0.3 * (policy - fixed)
    margin = rewards[:, 0] - rewards[:, 1]
    assert np.abs(margin).max() > 0.05
    np.testing.assert_allclose(value, np.log1p(np.exp(-margin)).mean(), rtol=1e-4)
    want = {"rewards/chosen": rewards[:, 0], "rewards/rejected": rewards[:, 1], "rewards/margins": margin,
            "rewards/accuracies": margin > 0, "logps/chosen": policy[:, 0], "logps/rejected": policy[:, 1]}  # fmt: skip
    assert told.keys() == want.keys()
    for name, each in want.items():
        np.testing.assert_allclose(told[name], each.mean(), rtol=1e-4, atol=1e-4, err_msg=name)
    push = jnp.asarray(-0.3 * sigmoid(-margin) / 3, jnp.float32)

    def pushed(trainable):
        scores = jax.nn.log_softmax(logits(adapt.merge(trainable, frozen), batch))
        each = jnp.take_along_axis(scores, jnp.asarray(batch["labels"])[..., None], axis=-1)[..., 0]
        sums = (each * batch["completion"]).sum(-1)[:3]
        return (push * (sums[:, 0] - sums[:, 1])).sum()

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6, rtol=1e-4),
                 towards, jax.jit(jax.grad(pushed))(trainable))  # fmt: skip


def test_the_first_step():
    """Loss log 2, rewards 0, and a step that makes the chosen text likelier than the rejected one."""
    case, batch, adapt, _, log_probs = world()
    trainable, frozen = adapt.init(jax.random.key(0), case.params)
    tx = optax.adam(1e-2)
    step = jax.jit(make_update(make_dpo_loss(log_probs), WithReference(adapt), tx))
    state = init_state(jax.random.key(1), trainable, tx)
    reports = []
    for _ in range(3):
        state, told = step(state, frozen, batch)
        reports.append({name: float(x) for name, x in told.items()})
    assert reports[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and reports[0]["weight"] == 3.0
    assert reports[0]["rewards/chosen"] == reports[0]["rewards/rejected"] == 0.0
    assert reports[0]["grad_norm"] > 0
    assert reports[2]["loss"] < reports[1]["loss"] < reports[0]["loss"] and reports[2]["rewards/margins"] > 0


def test_there_is_one_copy_of_the_base():
    """Bytes that go into the step's program: state, base once, batch; and no array is a constant of it."""
    case, batch, adapt, _, log_probs = world()
    trainable, frozen = adapt.init(jax.random.key(0), case.params)
    tx = optax.sgd(1e-2)
    state = init_state(jax.random.key(1), trainable, tx)
    update = make_update(make_dpo_loss(log_probs), WithReference(adapt), tx)
    jaxpr = jax.make_jaxpr(update)(state, frozen, batch)

    def size(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    taken = sum(v.aval.size * v.aval.dtype.itemsize for v in jaxpr.jaxpr.invars)
    assert taken == size(state) + size(case.params) + size(batch)
    assert sum(np.size(x) for x in jaxpr.consts) < 100
    same = jax.tree.map(lambda x, y: x is y, reference(adapt, frozen), case.params)
    assert jax.tree.all(same)


def test_only_the_adapter_gets_a_gradient():
    """The reference is behind stop_gradient: the gradient of the loss by the base is the policy's alone."""
    case, batch, adapt, _, log_probs = world()
    trainable, frozen = moved(adapt, case.params)
    loss = make_dpo_loss(log_probs)

    def total(fixed):
        return loss(WithReference(adapt).bind(trainable, frozen)._replace(reference=fixed), batch, None)[0]

    assert not any(np.any(x) for x in jax.tree.leaves(jax.jit(jax.grad(total))(case.params)))


def test_errors():
    case, _, adapt, _, _ = world((".*/query/kernel", lj.Full()))
    with pytest.raises(ValueError, match="trains the weight itself, so the reference is not in the frozen base"):
        reference(adapt, adapt.init(jax.random.key(0), case.params)[1])
    _, _, adapt, _, _ = world((".*/query/kernel", lj.LoRA(rank=2, initializer=PiSSA(), fold=True)))
    with pytest.raises(ValueError, match="starts from another weight than the base.*fold=False"):
        reference(adapt, adapt.init(jax.random.key(0), case.params)[1])
    zeros = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="beta=0 must be positive"):
        preference_losses(zeros, zeros, beta=0)
    with pytest.raises(ValueError, match="kind='kto' is neither"):
        preference_losses(zeros, zeros, kind="kto")
    with pytest.raises(ValueError, match="label_smoothing=0.5 with kind='dpo'"):
        preference_losses(zeros, zeros, label_smoothing=0.5)


def test_dropout_and_noise_are_the_policys_alone():
    """`experiments.objective` on a GPT-2 that drops half of everything: the loss differs by key, at the start too; with
    the policy's rates at 0 it is log 2 again."""
    case = golden.load("lora_conv1d_gpt2", hidden_dropout=0.5, attention_dropout=0.5)
    batch = Batches(PAIRS, 3, shuffle=False, shapes=1).batch(0, 0)
    model = language.Model(case.model, case.params, (), None, None, "", "", "", LOCAL)
    sites = lj.sites(case.model.apply, case.params, batch["input_ids"][:, 0])
    adapt = lj.adapt(sites, [(".*/kernel", lj.LoRA(rank=2))])
    trainable, frozen = jax.jit(adapt.init)(jax.random.key(0), case.params)
    c = ConfigDict({"neftune": 5.0, "packing": False, "quant": {"once": ""},
                    "dpo": {"beta": 0.1, "kind": "dpo", "label_smoothing": 0.0}})

    def told(training, key):
        loss = make_dpo(c, model, adapt, training)
        return jax.jit(lambda tr, key: loss(WithReference(adapt).bind(tr, frozen), batch, key))(trainable, key)[1]

    one, two = (float(told(True, jax.random.key(seed))["rewards/margins"]) for seed in (1, 2))
    assert one != two and 0.0 not in (one, two)
    assert float(told(False, None)["rewards/margins"]) == 0.0
