"""PiSSA on a tiny Llama and OLoRA on a tiny BERT against PEFT: start, gradients, five AdamW steps, conversion to LoRA.

Signs of singular vectors and of QR's factors are anyone's choice: what is compared is free of them, or aligned first.
"""

import json
from typing import Any

import golden
import jax
import numpy as np
import pytest

from lorajax.core.sites import by_path
from lorajax.variants import LoRA
from lorajax.variants.plain import plain_lora

ALPHA = {"pissa_llama": 4.0, "olora_bert": 8.0}


@pytest.fixture(scope="module", params=[("pissa_llama", False), ("olora_bert", False), ("olora_bert", True)],
                ids=["pissa", "olora", "olora-fold"])
def made(request: Any) -> Any:
    """(case, adapt, trainable, frozen) at the start."""
    name, fold = request.param
    case = golden.load(name)
    adapt = case.adapt(LoRA(rank=4, alpha=ALPHA[name], initializer=name.split("_")[0], fold=fold))
    return case, adapt, *jax.jit(adapt.init)(jax.random.key(0), case.params)


def test_start(made: Any) -> None:
    """s A B and W - s A B of every module, and the logits, which are those of the base."""
    case, adapt, trainable, frozen = made
    s = ALPHA[case.folder.name] / 4
    checked = 0
    for module, path in case.targets.items():
        site = adapt.sites[path]
        update = s * np.float64(trainable[path].A) @ np.float64(trainable[path].B)
        if f"ab/{module}" in case.expected:
            golden.close(update, case.expected[f"ab/{module}"].T, atol=2e-5)
            checked += 1
        w = np.float64(frozen.base[path]).reshape(site.n_in, site.n_out)
        golden.close(w if adapt.plan[path].fold else w - update, case.expected[f"w_res/{module}"].T, atol=2e-5)
    assert checked == 2
    logits = jax.jit(lambda tr: case.logits(adapt.bind(tr, frozen)))(trainable)
    golden.close(case.real(logits), case.real(case.expected["logits_init"]), atol=1e-4, rtol=1e-4)


def test_gradients_and_five_steps(made: Any) -> None:
    case, adapt, trainable, frozen = made
    step = jax.jit(jax.value_and_grad(lambda tr: case.loss(adapt.bind(tr, frozen))))
    loss, grads = step(trainable)
    golden.close(loss, case.expected["loss0"], atol=2e-5)
    theirs, slopes = case.tensors("adapter_init"), case.gradients()
    for module, path in case.targets.items():
        sign = np.sign(np.sum(np.asarray(trainable[path].A) * theirs[f"{module}.lora_A.weight"].T, 0))
        assert set(np.abs(sign)) == {1.0}
        a, b, *_ = (np.asarray(g) for g in grads[path] if g is not None)
        golden.close(a * sign, slopes[f"{module}.lora_A.weight"].T, atol=5e-5, rtol=1e-3)
        golden.close(b * sign[:, None], slopes[f"{module}.lora_B.weight"].T, atol=5e-5, rtol=1e-3)
    # AdamW's step is odd in its gradient and its parameter: the losses do not depend on the signs
    golden.close(golden.adamw(step, trainable, case.info["optimizer"]), case.expected["train_losses"], atol=1e-4)


def test_trained_adapter_merged_and_converted(made: Any) -> None:
    """PEFT's A and B after five steps on our start; then as a plain LoRA of rank 8 of the original base."""
    case, adapt, trainable, frozen = made
    trainable = case.adapters(adapt.plan[next(iter(adapt.plan))], case.tensors(), trainable)
    logits = jax.jit(lambda tr: case.logits(adapt.bind(tr, frozen)))(trainable)
    golden.close(case.real(logits), case.real(case.expected["logits_adapter"]), atol=1e-4, rtol=1e-4)
    merged, _ = by_path(adapt.merge(trainable, frozen))
    for module in case.info["merged_samples"]:
        want = case.expected[f"merged/{module}.weight"].T
        golden.close(np.asarray(merged[case.paths[module]]).reshape(want.shape), want, atol=2e-5)

    plain, loras, base = plain_lora(adapt, trainable, frozen, case.params)
    logits = jax.jit(lambda tr: case.logits(plain.bind(tr, base)))(loras)
    golden.close(case.real(logits), case.real(case.expected["logits_converted"]), atol=1e-4, rtol=1e-4)
    theirs = case.tensors("adapter_converted")
    config = json.loads((case.folder / "adapter_converted" / "adapter_config.json").read_text())
    for module, path in case.targets.items():
        assert (plain.plan[path].rank, plain.plan[path].alpha) == (config["r"], config["lora_alpha"])
        want = theirs[f"{module}.lora_A.weight"].T @ theirs[f"{module}.lora_B.weight"].T
        golden.close(np.asarray(loras[path].A) @ np.asarray(loras[path].B), want, atol=5e-6)
