"""`lorajax.models`: parity with the PEFT goldens, execution options, checkpoints in and out, and the errors."""

import json
import os
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lorajax.models import Bert, BertConfig, params_from_hf, params_to_hf, stack_layers, unstack_layers
from lorajax.models.bert import position_ids
from lorajax.models.checkpoint import fresh_params
from lorajax.models.norms import LayerNorm
from lorajax.models.settings import ACTIVATIONS

GOLDENS = Path(__file__).parent / "goldens"
CASES = ["adalora_bert", "lora_all_linear_rslora_bert", "modules_to_save_roberta"]
EXECUTION = {
    "plain": {},
    "scan": {"scan_layers": True},
    "remat": {"remat": "full"},
    "remat_attention": {"remat": "attention"},
    "remat_policy": {"remat": "dots_with_no_batch_dims_saveable"},
    "scan_remat": {"scan_layers": True, "remat": "full"},
}


def base(name):
    folder = GOLDENS / "bases" / name
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def case(name):
    """(HF config, tensors, input ids, attention mask, logits of the base model)."""
    folder = GOLDENS / "cases" / name
    config, tensors = base(Path(json.loads((folder / "case.json").read_text())["base"]).name)
    ids, mask = (jnp.asarray(np.load(folder / f"{part}.npy"), jnp.int32) for part in ("input_ids", "attention_mask"))
    with np.load(folder / "expected.npz") as expected:
        return config, tensors, ids, mask, expected["logits_base"]


def run(config, variables, *inputs, method=None, key=None):
    """One jitted `apply`: in training mode if there is a dropout key."""
    model = Bert(config, deterministic=key is None)
    rngs = None if key is None else {"dropout": key}
    return jax.jit(lambda v, x: model.apply(v, *x, method=method, rngs=rngs))(variables, inputs)


@pytest.mark.parametrize("execution", EXECUTION)
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_golden(name, execution):
    hf, tensors, ids, mask, expected = case(name)
    config = BertConfig.from_hf(hf, **EXECUTION[execution])
    loaded = params_from_hf(config, tensors)
    assert loaded.fresh == () and loaded.ignored == ()
    logits = run(config, loaded.variables, ids, mask)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("execution", [name for name in EXECUTION if name != "plain"])
def test_execution_options_leave_gradients_alone(execution):
    hf, tensors, ids, mask, _ = case("adalora_bert")

    def gradient(**options):
        config = BertConfig.from_hf(hf, **options)
        variables = params_from_hf(config, tensors).variables
        grads = jax.jit(jax.grad(lambda v: jnp.square(Bert(config).apply(v, ids, mask)).sum()))(variables)
        return unstack_layers(grads) if config.scan_layers else grads

    expected, actual = gradient(), gradient(**EXECUTION[execution])
    assert jax.tree.structure(expected) == jax.tree.structure(actual)
    for want, have in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-5, rtol=1e-4)
        # the key bias has no gradient (softmax does not see a shift), every other leaf must have one
    assert (
        sum(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(expected))
        >= len(jax.tree.leaves(expected)) - hf["num_hidden_layers"]
    )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_remat_recomputes(scan_layers):
    """The backward pass of a remat layer repeats its products: more contractions in the compiled program's trace."""
    hf, tensors, ids, mask, _ = case("adalora_bert")

    def contractions(remat):
        config = BertConfig.from_hf(hf, remat=remat, scan_layers=scan_layers)
        variables = params_from_hf(config, tensors).variables
        return str(jax.make_jaxpr(jax.grad(lambda v: Bert(config).apply(v, ids, mask).sum()))(variables)).count(
            "dot_general["
        )

    assert contractions("full") > contractions("none") == contractions("everything_saveable")


def test_bfloat16_computes_and_differentiates():
    hf, tensors, ids, mask, expected = case("adalora_bert")
    config = BertConfig.from_hf(hf, dtype=jnp.bfloat16)
    variables = params_from_hf(config, tensors).variables
    assert run(config, variables, ids, mask, method="encode").dtype == jnp.bfloat16
    logits = run(config, variables, ids, mask)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=0.05)  # 2^-8 relative per operation; logits are of order 1
    assert float(np.abs(logits - expected).max()) > 1e-4  # it did compute in bfloat16
    with jax.numpy_dtype_promotion("standard"):  # JAX's attention mixes dtypes in its backward pass
        grads = jax.jit(jax.grad(lambda v: Bert(config).apply(v, ids, mask).sum()))(variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype("float32")}
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_layer_norm_statistics_are_float32():
    """In bfloat16 the mean of 64 values near 200 is lost; the module must not lose it."""
    config = BertConfig(hidden_size=64, num_heads=1, dtype=jnp.bfloat16)
    x = jnp.asarray(200 + np.random.default_rng(0).normal(0, 2, (3, 64)), jnp.bfloat16)
    y = LayerNorm(config, 64, 1e-12).apply({"params": {"scale": jnp.ones(64), "bias": jnp.zeros(64)}}, x)
    exact = np.asarray(x).astype(np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-12)
    np.testing.assert_allclose(np.asarray(y).astype(np.float64), exact, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "pooling", "scan_layers"),
    [
        ("adalora_bert", "first", False),
        ("adalora_bert", "mean", True),
        ("modules_to_save_roberta", "first", True),
        ("modules_to_save_roberta", "mean", False),
    ],
)
def test_padding_changes_nothing(name, pooling, scan_layers):
    hf, tensors, ids, mask, _ = case(name)
    config = BertConfig.from_hf(hf, pooling=pooling, scan_layers=scan_layers)
    ignore = [r"pooler\..*"] if pooling == "mean" and config.family == "bert" else []
    variables = params_from_hf(config, tensors, ignore=ignore).variables
    wide = [jnp.pad(ids, ((0, 0), (0, 6)), constant_values=config.pad_id), jnp.pad(mask, ((0, 0), (0, 6)))]
    before = run(config, variables, ids, mask)
    np.testing.assert_allclose(run(config, variables, *wide), before, atol=1e-5)
    if config.family == "bert":  # RoBERTa counts positions by the ids themselves
        rubbish = jnp.where(mask != 0, ids, 7)
        np.testing.assert_allclose(run(config, variables, rubbish, mask), before, atol=1e-5)
        assert float(jnp.abs(run(config, variables, rubbish) - before).max()) > 1e-2  # the mask is what does it
        np.testing.assert_array_equal(run(config, variables, ids, mask != 0), before)  # a mask may be boolean
    assert bool(jnp.isfinite(run(config, variables, ids, jnp.zeros_like(mask))).all())  # a row of an unfilled batch


def test_mean_pooling_and_head_by_hand():
    hf, tensors, ids, mask, _ = case("adalora_bert")
    config = BertConfig.from_hf(hf, pooling="mean")
    loaded = params_from_hf(config, tensors, ignore=[r"pooler\..*"])
    assert loaded.ignored == ("bert.pooler.dense.bias", "bert.pooler.dense.weight")
    hidden = np.asarray(run(config, loaded.variables, ids, mask, method="encode"))
    mean = np.stack([row[np.asarray(real) == 1].mean(0) for row, real in zip(hidden, mask, strict=True)])
    np.testing.assert_allclose(run(config, loaded.variables, ids, mask, method="embed"), mean, atol=1e-5)
    logits = mean @ tensors["classifier.weight"].T + tensors["classifier.bias"]
    np.testing.assert_allclose(run(config, loaded.variables, ids, mask), logits, atol=1e-4)


def test_positions_follow_the_family():
    roberta = BertConfig(family="roberta", pad_id=1, max_positions=34)
    ids = jnp.asarray([[0, 9, 9, 2, 1, 1], [0, 9, 2, 1, 1, 1]])
    np.testing.assert_array_equal(position_ids(roberta, ids), [[2, 3, 4, 5, 1, 1], [2, 3, 4, 1, 1, 1]])
    np.testing.assert_array_equal(position_ids(BertConfig(), ids), [[0, 1, 2, 3, 4, 5]])
    assert (roberta.max_length, BertConfig().max_length) == (32, 512)


def test_given_positions_replace_the_rule():
    hf, tensors, ids, mask, expected = case("modules_to_save_roberta")
    config = BertConfig.from_hf(hf)
    variables = params_from_hf(config, tensors).variables
    same = run(config, variables, ids, mask, None, position_ids(config, ids))
    np.testing.assert_allclose(same, expected, atol=1e-4)
    shifted = run(config, variables, ids, mask, None, position_ids(config, ids) + 3)
    assert float(np.abs(shifted - expected).max()) > 1e-2


def test_too_long_a_sequence_names_the_limit():
    hf, tensors, *_ = case("modules_to_save_roberta")
    config = BertConfig.from_hf(hf)
    variables = params_from_hf(config, tensors).variables
    with pytest.raises(ValueError, match="33 tokens; this model has 32 positions: truncate"):
        Bert(config).apply(variables, jnp.full((1, 33), 5))


@pytest.mark.parametrize(
    ("name", "where", "scan_layers"),
    [
        ("adalora_bert", "hidden_dropout", False),
        ("adalora_bert", "attention_dropout", True),
        ("adalora_bert", "head_dropout", False),
        ("modules_to_save_roberta", "head_dropout", False),
    ],
)
def test_dropout_acts_only_in_training(name, where, scan_layers):
    hf, tensors, ids, mask, expected = case(name)
    config = BertConfig.from_hf(hf, **{"scan_layers": scan_layers, "head_dropout": 0.0} | {where: 0.5})
    variables = params_from_hf(config, tensors).variables

    training = jax.jit(lambda v, key: Bert(config, False).apply(v, ids, mask, rngs={"dropout": key}))

    def train(seed):
        return training(variables, jax.random.key(seed))

    np.testing.assert_allclose(run(config, variables, ids, mask), expected, atol=1e-4)
    np.testing.assert_array_equal(train(0), train(0))
    assert float(jnp.abs(train(0) - train(1)).max()) > 1e-2


def test_attention_with_dropout_is_the_same_attention():
    """Training with a rate too small to drop anything runs the other attention path: the golden's logits again."""
    hf, tensors, ids, mask, expected = case("adalora_bert")
    config = BertConfig.from_hf(hf, attention_dropout=1e-9)
    variables = params_from_hf(config, tensors).variables
    logits = run(config, variables, ids, mask, key=jax.random.key(0))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_gelu_is_the_exact_one():
    from scipy.stats import norm

    x = np.linspace(-4, 4, 33, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS["gelu"](jnp.asarray(x)), x * norm.cdf(x), atol=1e-6)
    assert float(np.abs(ACTIVATIONS["gelu_new"](jnp.asarray(x)) - x * norm.cdf(x)).max()) > 1e-4
    half = jnp.asarray(x, jnp.bfloat16)  # computed wide, rounded once
    near = np.asarray(half, np.float64) * norm.cdf(np.asarray(half, np.float64))
    np.testing.assert_array_equal(ACTIVATIONS["gelu"](half), jnp.asarray(near, jnp.float32).astype(jnp.bfloat16))
    assert "erfc" not in str(jax.make_jaxpr(ACTIVATIONS["gelu"])(half))  # ten times the arithmetic
    for name in ("gelu", "gelu_new"):  # what is kept for the backward pass: x alone
        _, back = jax.vjp(ACTIVATIONS[name], jnp.asarray(x))
        assert [leaf.shape for leaf in jax.tree.leaves(back) if jnp.shape(leaf)] == [x.shape]
    (slope,) = jax.vjp(ACTIVATIONS["gelu"], jnp.asarray(x))[1](jnp.ones_like(x))
    np.testing.assert_allclose(slope, norm.cdf(x) + x * norm.pdf(x), atol=1e-5)


def test_first_initialisation_has_the_documented_tree():
    sizes = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "intermediate_size": 16, "vocab_size": 11}
    ids, key = jnp.zeros((1, 3), jnp.int32), jax.random.key(0)
    plain = jax.eval_shape(Bert(BertConfig(**sizes)).init, key, ids)
    assert set(plain["params"]) == {"embeddings", "layer_0", "layer_1", "pooler", "classifier"}
    assert plain["params"]["layer_1"]["ffn"]["up"]["kernel"].shape == (8, 16)
    scan = Bert(BertConfig(**sizes, scan_layers=True))
    stacked = jax.eval_shape(scan.init, key, ids)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, jax.eval_shape(stack_layers, plain))
    up = jax.jit(lambda key: scan.init(key, ids)["params"]["layers"]["ffn"]["up"]["kernel"])(key)
    assert up.shape == (2, 8, 16) and float(jnp.abs(up[0] - up[1]).max()) > 0


# --- checkpoints ---


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", ["bert_a", "roberta_a"])
def test_state_dict_round_trip_is_exact(name, scan_layers):
    hf, tensors = base(name)
    config = BertConfig.from_hf(hf, scan_layers=scan_layers)
    back = params_to_hf(config, params_from_hf(config, tensors).variables)
    assert back.keys() == tensors.keys()
    for key, array in tensors.items():
        assert back[key].flags.c_contiguous
        np.testing.assert_array_equal(back[key], array)


def test_stacking_round_trip_is_exact():
    hf, tensors = base("bert_a")
    variables = params_from_hf(BertConfig.from_hf(hf), tensors).variables
    back = unstack_layers(stack_layers(variables))
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_stacking_errors_name_what_is_there():
    with pytest.raises(ValueError, match=r"must hold layer_0 .. layer_\(L-1\); it holds \['layer_1'\]"):
        stack_layers({"params": {"layer_1": {}}})
    with pytest.raises(ValueError, match=r"must hold 'layers'; it holds \['layer_0'\]"):
        unstack_layers({"params": {"layer_0": {}}})


def test_old_names_prefixes_and_known_unused_tensors():
    """A checkpoint without prefix, with LayerNorm's old names, position buffer and MLM head: all of it explained."""
    hf, tensors = base("bert_a")
    config = BertConfig.from_hf(hf)
    expected = params_from_hf(config, tensors).variables
    old = {}
    for name, array in tensors.items():
        name = name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
        old[name.replace("LayerNorm.bias", "LayerNorm.beta")] = array
    old["embeddings.position_ids"] = np.arange(32)[None]
    old["cls.predictions.bias"] = old["lm_head.dense.weight"] = np.zeros(96, np.float32)
    loaded = params_from_hf(config, old)
    assert loaded.ignored == ("cls.predictions.bias", "embeddings.position_ids", "lm_head.dense.weight")
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected)


def test_absent_head_is_fresh_and_says_so():
    hf, tensors = base("bert_a")
    encoder = {name: array for name, array in tensors.items() if not name.startswith("classifier")}
    config = BertConfig.from_hf(hf, num_labels=1)
    with pytest.raises(ValueError, match=r"has no 'params/classifier/kernel': give a `key`"):
        params_from_hf(config, encoder)
    loaded = params_from_hf(config, encoder, key=jax.random.key(3))
    assert loaded.fresh == ("params/classifier/kernel", "params/classifier/bias")
    kernel = np.asarray(loaded.variables["params"]["classifier"]["kernel"])
    assert kernel.shape == (64, 1) and 0.01 < kernel.std() < 0.03  # initializer_range is 0.02
    again, other = (params_from_hf(config, encoder, key=jax.random.key(seed)).variables for seed in (3, 4))
    np.testing.assert_array_equal(again["params"]["classifier"]["kernel"], kernel)
    assert not np.array_equal(other["params"]["classifier"]["kernel"], kernel)
    assert run(config, loaded.variables, jnp.ones((2, 5), jnp.int32)).shape == (2, 1)


def test_a_head_of_another_width_is_replaced_only_on_request():
    hf, tensors = base("roberta_a")
    config = BertConfig.from_hf(hf, num_labels=2)
    with pytest.raises(
        ValueError, match=r"classifier.out_proj.weight' has shape \(3, 64\), the model expects \(2, 64\)"
    ):
        params_from_hf(config, tensors)
    loaded = params_from_hf(config, tensors, key=jax.random.key(0), ignore=[r"classifier\..*"])
    assert len(loaded.fresh) == 4 and len(loaded.ignored) == 4


def test_an_unused_tensor_is_an_error_with_its_nearest_name():
    hf, tensors = base("bert_a")
    tensors["bert.encoder.layer.0.attention.self.querry.weight"] = np.zeros((64, 64), np.float32)
    with pytest.raises(ValueError) as error:
        params_from_hf(BertConfig.from_hf(hf), tensors)
    assert "no place in the model: 'encoder.layer.0.attention.self.querry.weight'" in str(error.value)
    assert "nearest in the model is 'encoder.layer.0.attention.self.query.weight'" in str(error.value)


def test_a_layer_too_many_and_an_unneeded_pooler_are_errors():
    hf, tensors = base("bert_a")
    with pytest.raises(ValueError, match=r"16 tensors of the checkpoint have no place in the model: 'encoder.layer.1"):
        params_from_hf(BertConfig.from_hf(hf, num_layers=1), tensors)
    with pytest.raises(ValueError) as error:
        params_from_hf(BertConfig.from_hf(hf, pooling="mean"), tensors)
    assert r"ignore=['pooler\\..*']" in str(error.value)


@pytest.mark.parametrize(
    "name", ["bert.encoder.layer.1.output.dense.bias", "classifier.bias", "bert.pooler.dense.weight"]
)
def test_a_missing_tensor_is_an_error_that_names_it(name):
    hf, tensors = base("bert_a")
    del tensors[name]
    with pytest.raises(ValueError, match=f"1 tensors that the model needs .*{name.removeprefix('bert.')}"):
        params_from_hf(BertConfig.from_hf(hf), tensors, key=jax.random.key(0))


def test_wrong_shape_twice_the_same_and_idle_ignore_are_errors():
    hf, tensors = base("bert_a")
    config = BertConfig.from_hf(hf)
    with pytest.raises(ValueError, match=r"ignore \['poler.*'\] matches no tensor"):
        params_from_hf(config, tensors, ignore=["poler.*"])
    with pytest.raises(ValueError, match="'pooler.dense.bias' twice: as 'bert.pooler.dense.bias' and as 'pooler.dense"):
        params_from_hf(config, tensors | {"pooler.dense.bias": np.zeros(64)})
    with pytest.raises(ValueError, match=r"'pooler.dense.bias' has shape \(63,\), the model expects \(64,\)"):
        params_from_hf(config, tensors | {"bert.pooler.dense.bias": np.zeros(63)})
    with pytest.raises(ValueError, match="unexpected 'params/extra', missing 'params/pooler/bias'"):
        variables = params_from_hf(config, tensors).variables
        params = dict(
            variables["params"], pooler={"kernel": variables["params"]["pooler"]["kernel"]}, extra=jnp.ones(1)
        )
        params_to_hf(config, {"params": params})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "robertta"}, "did you mean 'roberta'"),
        ({"hidden_act": "gelu_nwe"}, "did you mean 'gelu_new'"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not implemented"),
        ({"is_decoder": True}, "is_decoder is true"),
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_heads 5"),
    ],
)
def test_config_errors_say_what_and_what_instead(change, words):
    with pytest.raises(ValueError, match=words):
        BertConfig.from_hf(base("bert_a")[0] | change)


def test_config_missing_key_and_remat_typo():
    hf = base("bert_a")[0]
    with pytest.raises(ValueError, match="did you mean 'dots_saveable'"):
        BertConfig.from_hf(hf, remat="dots_savable")
    del hf["vocab_size"]
    with pytest.raises(ValueError, match=r"config.json lacks \['vocab_size'\]"):
        BertConfig.from_hf(hf)


# --- real weights ---


@pytest.mark.slow
@pytest.mark.data
def test_minilm_ranks_sts_b_as_published(monkeypatch):
    """Cosine of mean-pooled all-MiniLM-L6-v2 embeddings, STS-B dev: Spearman 0.867."""
    import pyarrow.parquet
    from scipy.stats import spearmanr
    from tokenizers import Tokenizer

    from lorajax.io import assets
    from lorajax.io.hf import open_checkpoint

    file = Path(os.environ.get("LORAJAX_DATA", "/nowhere"), "glue", "stsb", "validation.parquet")
    if not file.is_file():
        pytest.skip("LORAJAX_DATA does not name a folder with glue/stsb/validation.parquet")

    def no_download(*_):
        raise OSError("this test does not download")

    monkeypatch.setattr(assets, "_install", no_download)
    try:
        folder = assets.resolve("minilm").path
    except FileNotFoundError:
        pytest.skip("the weights are not in the cache: lorajax.io.assets.resolve('minilm') fetches them")
    hf, tensors = open_checkpoint(folder)
    config = BertConfig.from_hf(hf, pooling="mean")
    loaded = params_from_hf(config, tensors, key=jax.random.key(0), ignore=[r"pooler\..*"])
    assert loaded.ignored == ("embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight")
    embed = jax.jit(lambda ids, mask: Bert(config).apply(loaded.variables, ids, mask, method="embed"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    rows = pyarrow.parquet.read_table(file).to_pydict()
    encoded = [e.ids for e in tokenizer.encode_batch(rows["sentence1"] + rows["sentence2"])]
    order = np.argsort([len(ids) for ids in encoded], kind="stable").reshape(-1, 100)
    embeddings = np.zeros((order.size, config.hidden_size))
    for batch in order:
        ids = np.zeros((len(batch), -(-len(encoded[batch[-1]]) // 16) * 16), np.int32)
        for row, index in enumerate(batch):
            ids[row, : len(encoded[index])] = encoded[index]
        embeddings[batch] = embed(ids, ids != 0)
    first, second = np.split(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), 2)
    assert spearmanr((first * second).sum(1), rows["label"]).statistic == pytest.approx(0.867, abs=5e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_fresh_head_is_its_normal_draw_times_the_spread(dtype):
    """Bit for bit as operation by operation, though one program makes it."""
    key, config = jax.random.key(3), BertConfig(num_labels=3, param_dtype=dtype)
    path = "params/classifier/kernel"
    drawn = fresh_params(config, {path: jnp.zeros((64, 3)), "params/classifier/bias": jnp.zeros(3)}, key)
    noise = jax.random.normal(jax.random.fold_in(key, zlib.crc32(path.encode())), (64, 3), jnp.float32)
    np.testing.assert_array_equal(drawn[path], (noise * 0.02).astype(dtype))
    assert drawn[path].dtype == dtype and not np.any(drawn["params/classifier/bias"])
