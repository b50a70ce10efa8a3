"""AdaLoRA end to end against PEFT: a tiny BERT, 30 steps; losses, budgets, masks, and the pruned result."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import lorajax as lj
from lorajax.control import Controller, adalora, compact
from lorajax.models import params_from_hf
from lorajax.models.bert import Bert
from lorajax.models.bert_config import BertConfig
from lorajax.train.step import init_state, make_step
from lorajax.variants import AdaLoRA
from lorajax.variants.adalora import AdaLoRAAdapter

ROOT = Path(__file__).parent / "goldens"
CASE = ROOT / "cases" / "adalora_bert"
EXPECTED = np.load(CASE / "expected.npz")
INFO = json.loads((CASE / "case.json").read_text())
SCHEDULE = INFO["schedule"]


def our_path(module: str) -> str:
    for theirs, ours in (("bert.encoder.layer.", "params/layer_"), (".attention.self.", "/attention/"),
                         (".intermediate.dense", "/ffn/up")):
        module = module.replace(theirs, ours)
    return f"{module}/kernel"


PATHS = [our_path(module) for module in INFO["trace_modules"]]


def read_adapter(folder: str) -> dict[str, Any]:
    tensors = {k.removeprefix("base_model.model."): jnp.asarray(v)
               for k, v in load_file(CASE / folder / "adapter_model.safetensors").items()}
    sites: dict[str, Any] = {
        our_path(module): AdaLoRAAdapter(*(tensors[f"{module}.lora_{letter}"].T for letter in "AEB"))
        for module in INFO["trace_modules"]
    }
    sites = {path: adapter._replace(E=adapter.E[0]) for path, adapter in sites.items()}
    return {**sites, "params/classifier/kernel": lj.FullAdapter(tensors["classifier.weight"].T),
            "params/classifier/bias": lj.FullAdapter(tensors["classifier.bias"])}


class Setup(NamedTuple):
    model: Bert
    adapt: Any
    trainable: Any
    frozen: Any
    controller: Controller
    batch: dict[str, jax.Array]


@pytest.fixture(scope="module")
def setup() -> Setup:
    base = ROOT / "bases" / "bert_a"
    config = BertConfig.from_hf(json.loads((base / "config.json").read_text()), num_labels=3)
    model = Bert(config)
    params = params_from_hf(config, load_file(base / "model.safetensors")).variables
    batch = {name: jnp.asarray(np.load(CASE / f"{name}.npy"), jnp.int32)
             for name in ("input_ids", "attention_mask", "labels")}
    variant = AdaLoRA(rank=SCHEDULE["init_r"], alpha=float(SCHEDULE["lora_alpha"]), orth=SCHEDULE["orth_reg_weight"])
    adapt = lj.adapt(lj.sites(model.apply, params, batch["input_ids"], batch["attention_mask"]),
                     [(r".*/(query|value|up)/kernel", variant), (r"params/classifier/(kernel|bias)", lj.Full())])
    _, frozen = jax.jit(adapt.init)(jax.random.key(0), params)
    controller = adalora(adapt, total_steps=SCHEDULE["total_step"], target_rank=SCHEDULE["target_r"],
                         t_initial=SCHEDULE["tinit"], t_final=SCHEDULE["tfinal"], delta_t=SCHEDULE["deltaT"])
    return Setup(model, adapt, read_adapter("adapter"), frozen, controller, batch)


def logits(s: Setup, adapt: Any, trainable: Any) -> jax.Array:
    run = jax.jit(lambda tr: lj.lift(s.model.apply, strict=True)(
        adapt.bind(tr, s.frozen), s.batch["input_ids"], s.batch["attention_mask"]))
    return run(trainable)


def task_loss(s: Setup) -> Any:
    def loss(bound: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        out = lj.lift(s.model.apply, strict=True)(bound, batch["input_ids"], batch["attention_mask"])
        return optax.softmax_cross_entropy_with_integer_labels(out, batch["labels"]).mean(), {}

    return loss


def test_logits_loss_penalty_and_gradients(setup: Setup) -> None:
    s = setup
    out = logits(s, s.adapt, s.trainable)
    np.testing.assert_allclose(out, EXPECTED["logits_adapter"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(s.adapt.penalty(s.trainable), 0.5 * EXPECTED["orth_reg0"], rtol=1e-5)

    def total(trainable: Any) -> jax.Array:
        task, _ = task_loss(s)(s.adapt.bind(trainable, s.frozen), s.batch, jax.random.key(0))
        return task + s.adapt.penalty(trainable)

    value, grads = jax.jit(jax.value_and_grad(total))(s.trainable)
    np.testing.assert_allclose(value, EXPECTED["total_loss0"], atol=1e-5)
    for module, path in zip(INFO["trace_modules"], PATHS, strict=True):
        for letter in "AEB":
            theirs = EXPECTED[f"grad/base_model.model.{module}.lora_{letter}"].T
            ours = getattr(grads[path], letter)
            np.testing.assert_allclose(ours, theirs.reshape(ours.shape), rtol=1e-3, atol=5e-5, err_msg=path + letter)


@pytest.fixture(scope="module")
def trained(setup: Setup) -> tuple[Any, list[Any]]:
    """The trainable partition after the 30 steps, and (total loss, budget, E (modules, rank)) of each step."""
    s = setup
    tx = optax.adamw(INFO["optimizer"]["lr"], weight_decay=INFO["optimizer"]["weight_decay"])
    state = init_state(jax.random.key(0), s.trainable, tx, s.controller)
    step = make_step(task_loss(s), s.adapt, tx, s.controller, clip=None)
    trace = []
    for _ in range(SCHEDULE["total_step"]):
        state, metrics = step(state, s.frozen, s.batch)
        e = np.stack([state.trainable[path].E for path in PATHS])
        trace.append((float(metrics["loss"] + metrics["penalty"]), int(state.control.budget), e))
    assert step._cache_size() == 1  # type: ignore[attr-defined]
    return state, trace


def test_thirty_steps(trained: Any) -> None:
    losses, budgets, e = zip(*trained[1], strict=True)
    np.testing.assert_array_equal(budgets, EXPECTED["trace_budget"])
    np.testing.assert_array_equal(np.stack(e) != 0, EXPECTED["trace_mask"])
    np.testing.assert_allclose(losses, EXPECTED["trace_loss"], atol=1e-4)
    np.testing.assert_allclose(np.stack(e), EXPECTED["trace_E"], atol=1e-4)


def test_kept_ranks(trained: Any) -> None:
    kept = trained[0].control.kept
    assert [int(kept[path].sum()) for path in PATHS] == INFO["final_ranks"]


def test_compact_shrinks_without_changing_the_output(setup: Setup, trained: Any) -> None:
    s, trainable = setup, trained[0].trainable
    small, shrunk = compact(s.adapt, trainable)
    assert [small.plan[path].rank for path in PATHS] == INFO["final_ranks"]
    assert [shrunk[path].E.size for path in PATHS] == INFO["final_ranks"]
    after = logits(s, small, shrunk)
    np.testing.assert_allclose(after, logits(s, s.adapt, trainable), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after, EXPECTED["logits_after_trace"], rtol=1e-4, atol=1e-4)
    for path, theirs in read_adapter("adapter_after_trace").items():
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), shrunk[path], theirs)
