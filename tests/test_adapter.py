"""Adapters saved and loaded: bit for bit, on the same base and with the same variants, or refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax as lj
from lorajax.core.fingerprint import fingerprint
from lorajax.io import adapter
from lorajax.io.tensors import AdapterError
from lorajax.variants import DoRA, LoHa, LoRA

SHAPES = {"layer_0/a/kernel": (12, 8), "layer_0/b/kernel": (8, 12), "layer_1/a/kernel": (12, 8),
          "layer_1/b/kernel": (8, 12), "head/kernel": (12, 3), "head/bias": (3,)}  # fmt: skip


VARIANTS = ["lora", "lora-pissa", "lora-pissa-folded", "adalora", "dora", "dora-adalora", "lokr", "gralora", "miss",
            "delora", "ia3-in", "shira", "vera"]  # fmt: skip
"""Rows of the conformance table: every kind of layout, and of array that PEFT does not have."""


class Row:
    def __init__(self, *names: str, form: str = "linear"):
        self.names, self.form = names, form


NAMES = {path: Row(path.replace("/kernel", ".weight").replace("/bias", ".bias").replace("/", "."),
                   form="linear" if path.endswith("kernel") else "same") for path in SHAPES}  # fmt: skip


def model(params: Any, x: jax.Array) -> jax.Array:
    for i in range(2):
        x = x + jnp.tanh(x @ params[f"layer_{i}/a/kernel"]) @ params[f"layer_{i}/b/kernel"]
    return x @ params["head/kernel"] + params["head/bias"][None]


def made(seed: int = 0) -> Any:
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {path: jax.random.normal(key, shape) for key, (path, shape) in zip(keys, SHAPES.items(), strict=True)}


def randomised(tree: Any, seed: int = 3) -> Any:
    """Noise in place of the start."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten([0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def trained(variant: Any, params: Any) -> tuple[Any, Any, Any]:
    sites = lj.sites(model, params, jnp.ones((4, 12)))
    adapt = lj.adapt(sites, [("layer_./a/.*", variant), ("head/.*", lj.Full())])
    trainable, frozen = jax.jit(adapt.init)(jax.random.key(1), params)
    return adapt, randomised(trainable), frozen


def logits(adapt: Any, trainable: Any, frozen: Any) -> Any:
    return lj.lift(model)(adapt.bind(trainable, frozen), jax.random.normal(jax.random.key(9), (4, 12)))


def equal(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", VARIANTS)
def test_reloads_exactly_from_its_folder_alone(tmp_path: Path, name: str) -> None:
    """With what PEFT's file holds, and from our own file alone."""
    params = made()
    adapt, trainable, frozen = trained(conformance.ROWS[name].variant, params)
    for names in (NAMES, None):
        adapter.save(tmp_path / "a", adapt, trainable, frozen, names=names)
        rules = {re.sub(r"\\(.)", r"\1", pattern): choice for pattern, choice in adapter.rules(tmp_path / "a")}
        assert rules == adapt.plan
        back, fixed = adapter.load(tmp_path / "a", adapt, params)
        equal(back, trainable)
        equal(fixed, frozen)


def test_what_the_folder_holds(tmp_path: Path) -> None:
    theirs = {"adapter_model.safetensors", "adapter_config.json", adapter.RECORD}
    for variant, files in ((LoRA(2), theirs), (DoRA(LoRA(2)), theirs | {adapter.OWN}),
                           (DoRA(LoHa(2)), {adapter.RECORD, adapter.OWN})):
        adapter.save(tmp_path / "a", *trained(variant, made()), names=NAMES)
        assert {file.name for file in (tmp_path / "a").iterdir()} == files
    record = json.loads((tmp_path / "a" / adapter.RECORD).read_text())
    assert "a DoRA of LoHa, which PEFT does not have" in record["peft"]


def test_another_base_is_refused_by_both_names(tmp_path: Path) -> None:
    params, other = made(), made(seed=5)
    adapt, trainable, frozen = trained(LoRA(2), params)
    adapter.save(tmp_path / "a", adapt, trainable, frozen, names=NAMES)
    mine, theirs = (fingerprint({p: x for p, x in tree.items() if p in frozen.base}) for tree in (params, other))
    with pytest.raises(adapter.AdapterMismatch, match=f"fingerprint {mine}, this base has {theirs}: load the base"):
        adapter.load(tmp_path / "a", adapt, other)
    back, fixed = adapter.load(tmp_path / "a", adapt, other, allow_mismatch=True)
    equal(back, trainable)
    np.testing.assert_array_equal(fixed.base["layer_0/a/kernel"], other["layer_0/a/kernel"])
    # The head is the adapter's own: another start of it is no other base.
    adapter.load(tmp_path / "a", adapt, params | {"head/kernel": other["head/kernel"]})


@pytest.mark.parametrize(("variant", "words"), [
    (LoHa(2), r"layer_0/a/kernel is a 'lora' there and a 'loha' in these rules"),
    (LoRA(3), r"rank=2 there and rank=3 in these rules: use adapter.rules"),
    (LoRA(2, 16.0), r"alpha=8.0 there and alpha=16.0"),
    (DoRA(LoRA(2)), r"is a 'lora' there and a 'dora'"),
])  # fmt: skip
def test_another_variant_is_refused(tmp_path: Path, variant: Any, words: str) -> None:
    params = made()
    adapter.save(tmp_path / "a", *trained(LoRA(2), params), names=NAMES)
    adapt, _, _ = trained(variant, params)
    with pytest.raises(adapter.AdapterMismatch, match=words):
        adapter.load(tmp_path / "a", adapt, params)


def test_dropout_is_no_difference_and_shapes_are_one_even_when_allowed(tmp_path: Path) -> None:
    params = made()
    adapter.save(tmp_path / "a", *trained(LoRA(2), params), names=NAMES)
    adapter.load(tmp_path / "a", trained(LoRA(2, dropout=0.1, unit_dropout=0.1), params)[0], params)
    with pytest.raises(adapter.AdapterMismatch, match=r"layer_0/a/kernel.A is \(12, 2\) in .*, asked for \(12, 3\)"):
        adapter.load(tmp_path / "a", trained(LoRA(3), params)[0], params, allow_mismatch=True)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", adapter.OWN])
def test_one_flipped_bit_of_the_numbers_is_noticed(tmp_path: Path, name: str) -> None:
    params = made()
    adapt, trainable, frozen = trained(DoRA(LoRA(2)), params)
    adapter.save(tmp_path / "a", adapt, trainable, frozen, names=NAMES)
    data = bytearray((tmp_path / "a" / name).read_bytes())
    data[-3] ^= 1
    (tmp_path / "a" / name).write_bytes(data)
    with pytest.raises(AdapterError, match=f"{name}' is not the file that was saved"):
        adapter.load(tmp_path / "a", adapt, params)


def test_a_failed_save_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = made()
    adapt, trainable, frozen = trained(LoRA(2), params)
    adapter.save(tmp_path / "a", adapt, trainable, frozen, names=NAMES)
    monkeypatch.setattr(adapter, "described", lambda choice: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter.save(tmp_path / "a", adapt, trainable, frozen, names=NAMES)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    monkeypatch.undo()
    equal(adapter.load(tmp_path / "a", adapt, params)[0], trainable)


def test_a_folder_that_lorajax_did_not_write(tmp_path: Path) -> None:
    params = made()
    adapt, _, _ = trained(LoRA(2), params)
    with pytest.raises(AdapterError, match="read it with lorajax.io.peft"):
        adapter.load(tmp_path, adapt, params)
    (tmp_path / adapter.RECORD).write_text('{"version": 7, "base": "", "arrays": {}, "sites": {}, "sha256": {}}')
    with pytest.raises(AdapterError, match="is no record of this version: 7"):
        adapter.load(tmp_path, adapt, params)
    (tmp_path / adapter.RECORD).write_text(
        '{"version": 2, "base": "", "arrays": {}, "sites": {"a": {"variant": "nonesuch"}}, "sha256": {}}')
    with pytest.raises(AdapterError, match="a variant that this version does not have: 'nonesuch'"):
        adapter.rules(tmp_path)
