"""What lorajax writes, loaded by the installed PEFT on the same base: the same logits, method by method."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_models

import lorajax as lj
from lorajax.compose import plain
from lorajax.io import peft
from lorajax.io.hf import open_checkpoint
from lorajax.io.tensors import AdapterError
from lorajax.models import adapter_names, model_from_hf, params_from_hf
from lorajax.variants import IA3, AdaLoRA, DeLoRA, DoRA, GraLoRA, HiRA, LoHa, LoKr, LoRA, MiCA, MiSS, VeRA

pytestmark = pytest.mark.peft
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30,
         "max_position_embeddings": 12, "num_labels": 3, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0}  # fmt: skip
IDS = np.random.default_rng(0).integers(1, 30, (3, 7)).astype(np.int32)
QV, HEAD = r".*/(query|value)/kernel", (r"params/classifier/.*", lj.Full())


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Any:
    folder = tmp_path_factory.mktemp("base")
    torch_models.build("AutoModelForSequenceClassification", "bert", **SIZES).save_pretrained(folder)
    config, tensors = open_checkpoint(folder)
    made = {}
    for scan in (False, True):
        model = model_from_hf(config, num_labels=3, scan_layers=scan)
        params = params_from_hf(model.config, tensors).variables  # type: ignore[attr-defined]
        sites = lj.sites(lambda p, ids, model=model: model.apply(p, ids, jnp.ones_like(ids)), params, IDS)
        made[scan] = model, params, sites
    return folder, made


def randomised(tree: Any) -> Any:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3 + float(x.ndim == 0), x.dtype), tree)


def theirs(folder: Path, adapter: Path) -> np.ndarray:
    import peft as torch_peft
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    model = torch_peft.PeftModel.from_pretrained(model, adapter).eval()
    return torch_models.run(model, input_ids=IDS, attention_mask=np.ones_like(IDS))


CASES: dict[str, Any] = {
    "lora": [(r".*layer_0/.*/query/kernel", LoRA(3, 5.0)), (QV, LoRA(2)), HEAD],
    "rslora": [(QV, LoRA(4, 6.0, rslora=True))],
    "embedding": [(r".*/word/embedding", LoRA(2)), (QV, LoRA(2))],
    "dora": [(r".*/(query|up|down)/kernel", DoRA(LoRA(2))), HEAD],
    "pissa": [(QV, LoRA(2, 3.0, initializer="pissa")), HEAD],
    "mica": [(QV, MiCA(2))],
    "adalora": [(QV, AdaLoRA(3)), HEAD],
    "adalora-pruned": [(r".*layer_0/.*/query/kernel", AdaLoRA(2, init_rank=3)), (QV, AdaLoRA(3))],
    "loha": [(r".*/(query|up)/kernel", LoHa(2)), HEAD],
    "lokr": [(r".*/(query|up)/kernel", LoKr(2, factor=4)), HEAD],
    "hira": [(r".*/(query|down)/kernel", HiRA(2))],
    "miss": [(r".*/(query|up)/kernel", MiSS(4))],
    "miss-bat": [(r".*/(query|up)/kernel", MiSS(4, mode="bat"))],
    "miss-mini": [(r".*/(query|up)/kernel", MiSS(4, mode="mini", mini_rank=2))],
    "ia3": [(r".*/down/kernel", IA3("in"))],
    "ia3 with biases": [(r".*/(key|value)/kernel", IA3()), (r".*/down/kernel", IA3("in")),
                        (r".*layer_0/attention/value/bias", lj.Full()), HEAD],
    "gralora": [(r".*/(query|up)/kernel", GraLoRA(4, 8.0, hybrid_rank=2))],
    "delora": [(r".*/(query|up)/kernel", DeLoRA(2))],
    "vera": [(r".*/(query|down)/kernel", VeRA(4)), HEAD],
    "all biases": [(QV, LoRA(2)), (r".*/bias", lj.Full())],
    "their biases": [(QV, LoRA(2)), (r".*/(query|value)/bias", lj.Full())],
    "one of their biases": [(QV, LoRA(2)), (r".*layer_0/attention/query/bias", lj.Full()), HEAD],
    "one of theirs, one of the others": [(QV, LoRA(2)), (r".*layer_0/(attention/query|ffn/up)/bias", lj.Full())],
    "some biases": [(QV, LoRA(2)), (r".*layer_1/ffn/up/bias|.*/ffn_norm/.*", lj.Full())],
}


def ours(base: Any, rules: Any, scan: bool = False) -> Any:
    model, params, sites = base[1][scan]
    adapt = lj.adapt(sites, rules)
    trainable, frozen = adapt.init(jax.random.key(0), params)
    trainable = randomised(trainable)
    logits = lj.lift(model.apply)(adapt.bind(trainable, frozen), IDS, jnp.ones_like(IDS))
    return adapt, trainable, frozen, np.asarray(logits), model.apply(params, IDS, jnp.ones_like(IDS))


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # of AdaLoRA's own files, PEFT 0.21
@pytest.mark.parametrize("name", CASES)
def test_peft_computes_the_same(base: Any, name: str, tmp_path: Path) -> None:
    adapt, trainable, frozen, logits, before = ours(base, CASES[name])
    assert np.abs(logits - before).max() > 4e-3
    names = adapter_names(base[1][False][0].config)
    peft.write(tmp_path / "a", adapt, trainable, frozen, names, base=str(base[0]))
    np.testing.assert_allclose(theirs(base[0], tmp_path / "a"), logits, rtol=1e-4, atol=2e-5)


def test_scanned_layers_are_written_apart_and_read_back(base: Any, tmp_path: Path) -> None:
    adapt, trainable, frozen, logits, _ = ours(base, [(QV, LoRA(2)), HEAD], scan=True)
    names = adapter_names(base[1][True][0].config)
    peft.write(tmp_path / "a", adapt, trainable, frozen, names)
    np.testing.assert_allclose(theirs(base[0], tmp_path / "a"), logits, rtol=1e-4, atol=1e-4)
    found = peft.read(tmp_path / "a", base[1][True][2], names)
    again, _ = peft.fill(found, *lj.adapt(base[1][True][2], found.rules).init(jax.random.key(5), base[1][True][1]))
    jax.tree.map(np.testing.assert_array_equal, again, trainable)


@pytest.mark.parametrize("name", ["loha", "dora", "vera", "miss", "gralora", "adalora"])
def test_any_method_leaves_as_plain_lora(base: Any, name: str, tmp_path: Path) -> None:
    adapt, trainable, frozen, logits, _ = ours(base, CASES[name])
    made = plain.as_lora(adapt, trainable, frozen)
    assert set(made.errors.values()) == {0.0}
    names = adapter_names(base[1][False][0].config)
    peft.write(tmp_path / "a", made.adapt, made.trainable, made.frozen, names)
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and not settings["use_dora"]
    np.testing.assert_allclose(theirs(base[0], tmp_path / "a"), logits, rtol=1e-3, atol=1e-3)


def test_what_peft_has_no_form_for_says_so(base: Any, tmp_path: Path) -> None:
    names = adapter_names(base[1][False][0].config)
    for rules, words in (
        ([(r".*/query/kernel", LoRA(2)), (r".*/value/kernel", LoHa(2))], "holds one method, .*'LOHA', 'LORA'"),
        ([(QV, DoRA(LoHa(2)))], "a DoRA of LoHa, which PEFT does not have: write it as a plain LoRA"),
        ([(r".*/query/kernel", MiSS(2)), (r".*/value/kernel", MiSS(4))], "one r for all modules.*has .2, 4."),
        ([(r".*/query/kernel", LoRA(2)), (r".*/value/kernel", LoRA(2, rslora=True))], "differ in .'use_rslora'."),
        ([(QV, LoHa(2)), (r".*layer_0/attention/query/bias", lj.Full())], "no mode of this method"),
    ):
        adapt, trainable, frozen, _, _ = ours(base, rules)
        with pytest.raises(peft.AdapterError, match=words):
            peft.write(tmp_path / "a", adapt, trainable, frozen, names)
    adapt, trainable, frozen, _, _ = ours(base, [(QV, LoRA(2))])
    adapt = lj.adapt(adapt.sites, [(QV, LoRA(2, initializer="loftq"))])  # its base is quantised, and not in a file
    with pytest.raises(peft.AdapterError, match="corrects a quantised base that PEFT's file does not hold"):
        peft.write(tmp_path / "a", adapt, trainable, frozen, names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scan", [False, True])
def test_ia3_of_a_layer_with_a_bias(base: Any, tmp_path: Path, scan: bool) -> None:
    """PEFT's own file, in which the bias is scaled with the output: the same logits here, and from our file again."""
    import peft as torch_peft
    import torch
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(base[0], attn_implementation="eager")
    config = torch_peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])
    model = torch_peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "ia3_l" in name:
            torch.nn.init.normal_(weight, 1.0, 0.5)
    model.save_pretrained(tmp_path / "theirs")
    want = torch_models.run(model, input_ids=IDS, attention_mask=np.ones_like(IDS))
    ours_model, params, sites = base[1][scan]
    names = adapter_names(ours_model.config)
    found = peft.read(tmp_path / "theirs", sites, names)
    adapt = lj.adapt(sites, found.rules)
    trainable, frozen = peft.fill(found, *adapt.init(jax.random.key(0), params))
    logits = lj.lift(ours_model.apply)(adapt.bind(trainable, frozen), IDS, jnp.ones_like(IDS))
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=2e-5)
    peft.write(tmp_path / "ours", adapt, trainable, frozen, names)
    np.testing.assert_allclose(theirs(base[0], tmp_path / "ours"), want, rtol=1e-4, atol=2e-5)
    again = peft.read(tmp_path / "ours", sites, names)
    back, _ = peft.fill(again, *lj.adapt(sites, again.rules).init(jax.random.key(0), params))
    assert back.keys() == trainable.keys()
    for path, adapter in trainable.items():
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), back[path], adapter)


def test_ia3_with_a_scale_of_nothing(base: Any, tmp_path: Path) -> None:
    adapt, trainable, frozen, *_ = ours(base, [(r".*/key/kernel", IA3())])
    (path, *_) = trainable
    trainable[path] = trainable[path]._replace(l_out=trainable[path].l_out.at[3].set(0.0))
    with pytest.raises(AdapterError, match="one of its scales is 0, which no bias survives: write it as a plain LoRA"):
        peft.write(tmp_path / "a", adapt, trainable, frozen, adapter_names(base[1][False][0].config))
