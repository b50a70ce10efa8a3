"""Every case that PEFT made, read from its folder: logits, merged weights, gradients, five AdamW steps, written back.

`LORAJAX_GOLDENS` names a folder with more cases than tests/goldens; a case whose model is not there yet is skipped.
"""

import json
from pathlib import Path
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lorajax as lj
from lorajax.io import peft
from lorajax.io.peft_names import to_theirs
from lorajax.models import FAMILIES, Llama, LlamaConfig, adapter_names
from lorajax.variants import LoHa, LoRA

SKIPPED = {
    "lora_lora_bias_gpt2": "its bias is our base's: test_lora_bias",
}


def usable(folder: Path) -> bool:
    base = golden.ROOT / "bases" / Path(json.loads((folder / "case.json").read_text())["base"]).name
    known = json.loads((base / "config.json").read_text())["model_type"] in FAMILIES
    return known and (folder / "adapter" / "adapter_config.json").exists() and folder.name not in SKIPPED


CASES = sorted(folder.name for folder in (golden.ROOT / "cases").iterdir() if usable(folder))


def read(case: golden.Case, folder: str = "adapter") -> tuple[Any, Any, Any, Any]:
    names = adapter_names(case.model.config)  # type: ignore[attr-defined]
    sites = lj.sites(lambda params, inputs: case.model.apply(params, **inputs), case.params, case.inputs)
    found = peft.read(case.folder / folder, sites, names)
    adapt = lj.adapt(sites, found.rules)
    return names, adapt, *peft.fill(found, *jax.jit(adapt.init)(jax.random.key(0), case.params))


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, tmp_path: Path) -> None:
    case = golden.load(name)
    names, adapt, trainable, frozen = read(case)

    def loss(tr: Any) -> tuple[jax.Array, jax.Array]:
        bound = adapt.bind(tr, frozen)
        logits = case.logits(bound)
        return case.loss_of(logits) + adapt.penalty(tr), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, logits), grads = step(trainable)
    golden.close(case.real(logits), case.real(case.expected["logits_adapter"]), atol=1e-4, rtol=1e-4)
    if case.info["method"] in ("LORA:pissa", "LORA:olora"):
        return started(case, names, adapt, trainable, frozen, tmp_path)  # gradients and steps: test_initializers.py
    golden.close(value, case.expected["total_loss0" if "total_loss0" in case.expected else "loss0"], atol=2e-5)

    # The writer's layout of our gradients is PEFT's layout of its own.
    ours = peft.content(adapt, grads, frozen, names).tensors
    want = {key.removeprefix("grad/"): x for key, x in case.expected.items() if key.startswith("grad/")}
    assert want and want.keys() <= ours.keys()
    for key, x in want.items():
        golden.close(ours[key], x, atol=5e-5, rtol=1e-3)
    if "train_losses" in case.expected and case.info["optimizer"]["name"] == "AdamW":
        def first(tr: Any) -> tuple[jax.Array, Any]:
            (value, _), grads = step(tr)
            return value, grads

        losses = golden.adamw(first, trainable, case.info["optimizer"])
        golden.close(losses, case.expected["train_losses"], atol=1e-4)

    merged = lj.core.sites.by_path(jax.jit(adapt.merge)(trainable, frozen))[0]
    for module in case.info["merged_samples"]:
        path = case.paths.get(module) or next(p for p, row in names.items() if row.names == (f"{module}.weight",))
        have = to_theirs(np.asarray(merged[path]), names[path].form)
        golden.close(have, case.expected[f"merged/{module}.weight"], atol=2e-5)

    peft.write(tmp_path / "out", adapt, trainable, frozen, names)
    same_tensors(tmp_path / "out", case.folder / "adapter")


def same_tensors(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for key, x in theirs.items():
        np.testing.assert_array_equal(ours[key], x, err_msg=key)


def started(case: golden.Case, names: Any, adapt: Any, trainable: Any, frozen: Any, tmp_path: Path) -> None:
    """A start that PEFT's loader does again: its own form, and the plain LoRA of twice the rank."""
    peft.write(tmp_path / "own", adapt, trainable, frozen, names, convert=False)
    same_tensors(tmp_path / "own", case.folder / "adapter")
    peft.write(tmp_path / "plain", adapt, trainable, frozen, names)
    theirs = json.loads((case.folder / "adapter_converted/adapter_config.json").read_text())
    ours = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    for key in ("r", "lora_alpha", "use_rslora"):
        assert ours[key] == theirs[key]
    one, other = (load_file(folder / "adapter_model.safetensors")
                  for folder in (tmp_path / "plain", case.folder / "adapter_converted"))
    assert one.keys() == other.keys()
    for key in other:  # singular vectors have no sign of their own: the products are compared
        if key.endswith("lora_A.weight"):
            b = key.replace("lora_A", "lora_B")
            golden.close(one[b] @ one[key], other[b] @ other[key], atol=2e-5)


def test_lora_bias() -> None:
    """PEFT's bias of B, times s, is added to the base's bias, which trains: the same function and merged weights."""
    case = golden.load("lora_lora_bias_gpt2")
    names, adapt, trainable, frozen = read(case)
    bound = adapt.bind(trainable, frozen)
    value, logits = (lambda out: (case.loss_of(out), out))(case.logits(bound))
    golden.close(case.real(logits), case.real(case.expected["logits_adapter"]), atol=1e-4, rtol=1e-4)
    golden.close(value, case.expected["loss0"], atol=2e-5)
    biases = {row.names[0]: path for path, row in names.items()}
    for module in case.info["merged_samples"]:
        golden.close(trainable[biases[f"{module}.bias"]].w, case.expected[f"merged/{module}.bias"], atol=2e-5)


def test_a_target_by_its_old_name_is_not_looked_for_by_its_new_one(tmp_path: Path) -> None:
    """Mixtral's router is `block_sparse_moe.gate` in transformers 4 and `mlp.gate` in 5; 'gate' names both."""
    config = LlamaConfig(vocab_size=7, hidden_size=4, num_layers=2, num_heads=1, num_kv_heads=1, head_dim=4,
                         intermediate_size=4, experts=3)  # fmt: skip
    old, new = (adapter_names(config, transformers=version) for version in (4, 5))
    ids = jnp.ones((1, 2), jnp.int32)
    params = golden.variables(Llama(config), ids)
    sites = lj.sites(Llama(config).apply, params, ids)
    adapt = lj.adapt(sites, [(".*/router/kernel", LoRA(1))])
    peft.write(tmp_path / "a", adapt, *adapt.init(jax.random.key(0), params), old)
    file = tmp_path / "a/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["gate"]}))
    assert set(peft.read(tmp_path / "a", sites, [new, old]).arrays) == set(adapt.plan)


def test_a_base_in_half_precision_is_the_one_whose_table_the_file_repeats() -> None:
    case = golden.load("lora_embedding_llama", param_dtype=jnp.bfloat16)
    read(case)
    other = golden.load("lora_embedding_llama", param_dtype=jnp.bfloat16)
    embed = other.params["params"]["embed"]
    embed["embedding"] = embed["embedding"] + 1
    with pytest.raises(peft.AdapterError, match="this base has another one"):
        read(other)


@pytest.mark.parametrize("scan", [False, True])
def test_old_and_new_names_of_modules(scan: bool, tmp_path: Path) -> None:
    """An adapter that transformers 4 wrote goes by the names in checkpoints; with both tables either is read."""
    case = golden.load("loha_vit", scan_layers=scan)
    config = case.model.config  # type: ignore[attr-defined]
    old, new = (adapter_names(config, transformers=version) for version in (4, 5))
    assert old != new
    sites = lj.sites(lambda params, inputs: case.model.apply(params, **inputs), case.params, case.inputs)
    adapt = lj.adapt(sites, [(r".*/(query|up)/kernel", LoHa(4, 4.0))])
    trainable, frozen = adapt.init(jax.random.key(0), case.params)
    for table in (old, new):
        peft.write(tmp_path / "a", adapt, trainable, frozen, table)
        found = peft.read(tmp_path / "a", sites, [new, old])
        again, _ = peft.fill(found, *lj.adapt(sites, found.rules).init(jax.random.key(1), case.params))
        jax.tree.map(np.testing.assert_array_equal, again, trainable)
    with pytest.raises(peft.AdapterError, match="this model has no module 'vit.layers"):
        peft.read(tmp_path / "a", sites, old)
