"""Config -> parts: what each key does, and errors that name the nearest valid choice."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import glue_folder, model_folder

import lorajax as lj
from lorajax import build, config, control, data
from lorajax.io import adapter
from lorajax.variants import AdaLoRA, DoRA, bitfit, ia3, layernorm
from lorajax.variants import full as full_page


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return model_folder(root / "model"), glue_folder(root / "data")


def parse(files, name="lora", arg="", *words):
    model, data = files
    base = [f"--config=configs/{name}.py:task=sst2,model={model}{arg}", f"--config.data={data}"]
    return config.parse([*base, "--config.max_length=16", "--config.batch=8", *words]).config


def adapted(c):
    found = build.load_data(c)
    model = build.load_model(c, found.task, jax.random.key(0))
    batches = build.batches(c, build.tokens(c, found, model.folder))
    batch = batches["train"].batch(0, 0)
    sites = lj.sites(model.net.apply, model.variables, batch["input_ids"])
    return found, model, batches, lj.adapt(sites, build.rules(c, model))


def test_data_and_batches(files):
    c = parse(files, "lora", "", "--config.examples=20", "--config.shapes=2", "--config.padding=0.0")
    found, _, batches, _ = adapted(c)
    assert {name: len(split.labels) for name, split in found.splits.items()} == {"train": 20, "validation": 20}
    assert len(batches["train"]) == 3
    assert batches["train"].lengths == batches["validation"].lengths
    assert len(batches["train"].lengths) == 2
    assert found.fingerprint != build.load_data(parse(files)).fingerprint


def test_the_head_is_trained_and_the_rest_gets_the_variant(files):
    _, model, _, adapt = adapted(parse(files, "lora", ",rank=3,targets=qv", "--config.variant.alpha=5"))
    assert model.fresh == ("params/classifier/kernel", "params/classifier/bias")
    full = {path for path, choice in adapt.plan.items() if isinstance(choice, lj.Full)}
    assert full == set(model.fresh)
    rest = {path: choice for path, choice in adapt.plan.items() if path not in full}
    assert set(rest) == {f"params/layer_{i}/attention/{name}/kernel" for i in range(2) for name in ("query", "value")}
    assert all(choice == lj.LoRA(rank=3, alpha=5.0) for choice in rest.values())


def test_full_fine_tuning_takes_every_leaf(files):
    _, _, _, adapt = adapted(parse(files, "full"))
    assert set(adapt.plan) == set(adapt.sites.leaves)
    assert all(isinstance(choice, lj.Full) for choice in adapt.plan.values())


FILES = sorted({path.stem for path in Path("configs").glob("*.py")} - {"__init__", "base"})
CONFIGS = [name for name in FILES if config.load(f"configs/{name}.py").study == "glue"]  # the methods


@pytest.fixture(scope="module")
def traced(files):
    c = parse(files)
    model = build.load_model(c, build.load_data(c).task, jax.random.key(0))
    return model, lj.sites(model.net.apply, model.variables, jnp.zeros((2, 16), jnp.int32))


def test_the_configs_are_there():
    assert {"bitfit", "delora", "full", "gralora", "hira", "hybrid", "ia3", "layernorm", "loha", "lokr", "lora", "miss",
            "shira"} <= set(CONFIGS)  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_makes_rules_an_optimizer_and_a_controller(files, traced, name):
    model, sites = traced
    ranked = "rank" in config.load(f"configs/{name}.py").args
    # Lengths that divide the tiny model's sides, tokens of its small vocabulary.
    small = {"vb_lora": ",vector_length=4", "oft": ",block_size=8", "trainable_tokens": ",tokens=2+3"}.get(name, "")
    c = parse(files, name, (",rank=2" if ranked else "") + small)
    adapt = lj.adapt(sites, build.rules(c, model))
    head = sum(model.variables["params"]["classifier"][leaf].size for leaf in ("kernel", "bias"))
    assert adapt.count() == head if name == "head" else adapt.count() > head
    build.optimizer(c, adapt, model, 100)
    build.controller(c, adapt, 100)


def test_a_controller_is_told_the_seed_and_the_learning_rate_of_the_run(files, traced):
    model, sites = traced
    for seed in (0, 5):
        c = parse(files, "dylora", "", f"--config.seed={seed}")
        state = build.controller(c, lj.adapt(sites, build.rules(c, model)), 100).init({})
        assert jnp.array_equal(jax.random.key_data(state.key), jax.random.key_data(jax.random.key(seed)))
    c = parse(files, "sora", "", "--config.controller.threshold=2")
    adapt = lj.adapt(sites, build.rules(c, model))
    controller, zeros = build.controller(c, adapt, 100), jax.tree.map(lambda x: jnp.zeros(x.shape), adapt.shapes[0])
    _, state = controller.update(None, None, zeros, controller.init(zeros)._replace(step=jnp.int32(53)))
    np.testing.assert_allclose(state.threshold, 2 * c.lr * 0.5, rtol=1e-6)  # half-way from step 6, the end of warm-up


def of_config(files, traced, name, arg=""):
    model, sites = traced
    plan = dict(lj.adapt(sites, build.rules(parse(files, name, arg), model)).plan)
    assert {plan.pop(path) for path in model.fresh} == {lj.Full()}
    return plan


def of_page(traced, rules):
    return {p: c for p, c in lj.adapt(traced[1], rules).plan.items() if p not in traced[0].fresh}


def test_bitfit_trains_the_biases(files, traced):
    plan = of_config(files, traced, "bitfit")
    biases = {path for path in traced[1].leaves if path.endswith("/bias")}
    assert plan == dict.fromkeys(biases - set(traced[0].fresh), lj.Full())
    assert "params/layer_0/ffn_norm/bias" in plan
    assert plan == of_page(traced, bitfit.rules())
    small = of_config(files, traced, "bitfit", ",targets=.*/(query|up)/bias")
    assert small == of_page(traced, bitfit.rules("query-and-middle"))
    assert set(small) == {f"params/layer_{i}/{name}/bias" for i in range(2) for name in ("attention/query", "ffn/up")}


def test_layernorm_trains_the_norms(files, traced):
    plan = of_config(files, traced, "layernorm")
    owners = ["embeddings/norm", *[f"layer_{i}/{name}" for i in range(2) for name in ("attention_norm", "ffn_norm")]]
    assert plan == {f"params/{owner}/{leaf}": lj.Full() for owner in owners for leaf in ("scale", "bias")}
    assert plan == of_page(traced, layernorm.rules())
    for path in ("h/ln_1/scale", "model/norm/weight", "LayerNorm_0/bias", "ln_f/scale"):
        assert re.fullmatch(layernorm.NORMS, path)
    assert not re.fullmatch(layernorm.NORMS, "normal/kernel/bias")


def test_ia3_scales_keys_and_values_out_and_the_feed_forward_in(files, traced):
    plan = of_config(files, traced, "ia3")
    sides = {path.removeprefix("params/layer_0/"): variant.side for path, variant in plan.items() if "layer_0" in path}
    assert sides == {"attention/key/kernel": "out", "attention/value/kernel": "out", "ffn/down/kernel": "in"}
    assert len(plan) == 6
    assert plan == of_page(traced, ia3.rules())


def test_hybrid_trains_some_in_full_and_the_rest_by_lora(files, traced):
    plan = of_config(files, traced, "hybrid", ",rank=3,targets=qv,full=.*/(embeddings/word/embedding|ffn/up/kernel)")
    full = {path for path, choice in plan.items() if isinstance(choice, lj.Full)}
    assert full == {"params/embeddings/word/embedding", *[f"params/layer_{i}/ffn/up/kernel" for i in range(2)]}
    low = lj.LoRA(rank=3, alpha=16.0)
    assert {path: plan[path] for path in plan.keys() - full} == {
        f"params/layer_{i}/attention/{name}/kernel": low for i in range(2) for name in ("query", "value")}  # fmt: skip
    assert plan == of_page(traced, full_page.rules(r".*/(word/embedding|up/kernel)", "qv", low))


def test_the_fingerprint_is_of_the_encoder_alone(files, tmp_path):
    c = parse(files)
    task = build.load_data(c).task
    one, two = (build.load_model(c, task, jax.random.key(seed)) for seed in (0, 1))
    assert one.fingerprint == two.fingerprint
    heads = [model.variables["params"]["classifier"]["kernel"] for model in (one, two)]
    assert not np.array_equal(*heads)
    other = parse((model_folder(tmp_path / "other", seed=1), files[1]))
    assert build.load_model(other, task, jax.random.key(0)).fingerprint != one.fingerprint


def test_model_settings(files):
    c = parse(files, "lora", "", "--config.dropout=-1", "--config.compute_dtype=bfloat16", "--config.scan_layers=true")
    net = build.load_model(c, build.load_data(c).task, jax.random.key(0)).net
    assert (net.config.hidden_dropout, net.config.dtype, net.config.scan_layers) == (0.1, jnp.bfloat16, True)
    assert build.load_model(parse(files), build.load_data(c).task, jax.random.key(0)).net.config.dtype == jnp.float32


def first_updates(tx, trainable):
    """Adam's first updates for gradients of 1: minus the learning rates."""
    with jax.numpy_dtype_promotion("standard"):  # optax raises Python floats to powers of int32 counters
        return jax.jit(tx.update)(jax.tree.map(jnp.ones_like, trainable), tx.init(trainable), trainable)[0]


def test_head_learning_rate(files):
    c = parse(files, "lora", ",targets=qv", "--config.head_lr=3e-3", "--config.lr=1e-3", "--config.warmup=0",
              "--config.weight_decay=0", "--config.schedule=constant")  # fmt: skip
    _, model, _, adapt = adapted(c)
    trainable, _ = jax.jit(adapt.init)(jax.random.key(0), model.variables)
    updates = first_updates(build.optimizer(c, adapt, model, 10), trainable)
    np.testing.assert_allclose(updates["params/classifier/kernel"].w, -3e-3, rtol=1e-5)
    np.testing.assert_allclose(updates["params/layer_0/attention/query/kernel"].A, -1e-3, rtol=1e-5)


def test_lora_plus_ratio(files):
    c = parse(files, "lora", ",targets=qv", "--config.lr=1e-3", "--config.warmup=0", "--config.weight_decay=0")
    with c.unlocked():
        c.optimizer = {"name": "lora_plus", "ratio": 16.0}
    _, model, _, adapt = adapted(c)
    trainable, _ = jax.jit(adapt.init)(jax.random.key(0), model.variables)
    updates = first_updates(build.optimizer(c, adapt, model, 10), trainable)
    site = updates["params/layer_0/attention/query/kernel"]
    np.testing.assert_allclose(site.A, -1e-3, rtol=1e-5)
    np.testing.assert_allclose(site.B, -16e-3, rtol=1e-5)
    np.testing.assert_allclose(updates["params/classifier/kernel"].w, -1e-3, rtol=1e-5)  # head_lr=0: lr


def test_steps_come_in_whole_calls(files):
    c = parse(files, "lora", "", "--config.epochs=2.5", "--config.steps_per_call=4")
    assert build.total_steps(c, 8) == 20
    assert build.total_steps(c, 7) == 16  # 17.5, to the nearest multiple of 4
    assert build.total_steps(parse(files, "lora", "", "--config.epochs=0.01"), 8) == 1
    for words in (["--config.epochs=0"], ["--config.steps=-1"]):
        with pytest.raises(config.ConfigError, match="leave nothing to train"):
            build.total_steps(parse(files, "lora", "", *words), 8)
    assert [build.every(*x) for x in ((0, 8, 4), (0, 7, 4), (10, 8, 4), (3, 8, 1))] == [8, 8, 12, 3]


def test_controllers(files):
    _, model, _, adapt = adapted(parse(files, "adalora", ",targets=qv"))
    trainable, _ = jax.jit(adapt.init)(jax.random.key(0), model.variables)
    state = jax.jit(build.controller(parse(files, "adalora"), adapt, 100).init)(trainable)
    assert isinstance(state, control.AdaLoRAState)
    assert int(state.budget) == 12 * 4  # rank 12 in each of 4 matrices
    assert build.controller(parse(files), adapt, 100).init(trainable) == ()


def test_the_papers_schedule_is_stretched_with_the_run(files):
    rte = config.load("configs/adalora.py:task=rte")
    assert rte.controller.of_steps == 78 * 50
    mnli = config.load("configs/adalora.py:task=mnli")  # 12,272 steps an epoch, 7 epochs; a sample has fewer
    assert mnli.controller.of_steps == 85904
    _, model, _, adapt = adapted(parse(files, "adalora", ",targets=qv"))
    assert build.controller(rte, adapt, 3900).settled == 3900 - 1800 + 1
    assert build.controller(mnli, adapt, 8590).settled == 8590 - 5000 + 1
    trainable, _ = jax.jit(adapt.init)(jax.random.key(0), model.variables)
    tenth = build.controller(rte, adapt, 390)  # t_initial 60, t_final 180, delta_t 1: the budget falls from step 61 on
    state = tenth.init(trainable)
    budgets = []
    for _ in range(212):
        _, state = jax.jit(tenth.update)(trainable, trainable, trainable, state)
        budgets.append(int(state.budget))
    assert budgets[:61] == [48] * 61
    assert budgets[62] < 48
    assert budgets[209] == 32 < budgets[100]
    assert tenth.report(state)["ranks_kept"] <= 32


@pytest.mark.parametrize(
    ("change", "call", "words"),
    [
        ({"args.targets": "all-linaer"}, "rules", ["unknown targets 'all-linaer'", "did you mean 'all-linear'?"]),
        ({"variant.name": "adlora"}, "variant",
         ["unknown variant 'adlora'", "did you mean 'adalora'?", " full,", " lora,"]),
        ({"variant.rnak": 4}, "variant", ["LoRA has no hyperparameter 'rnak'", "did you mean 'rank'?"]),
        ({"controller.name": "identiy"}, "controller", ["unknown controller 'identiy'", "did you mean 'identity'?"]),
        ({"optimizer.name": "adam"}, "optimizer", ["unknown optimizer 'adam'", "did you mean 'adamw'?"]),
        ({"args.task": "sst"}, "load_data", ["unknown task 'sst'", "did you mean 'sst2'?"]),
        ({"compute_dtype": "bf16"}, "compute_dtype", ["unknown compute_dtype 'bf16'", "bfloat16"]),
    ],
)
def test_errors_name_the_nearest(files, change, call, words):
    c = parse(files)
    with c.unlocked():
        for name, value in change.items():
            *parents, last = name.split(".")
            node = c
            for parent in parents:
                node = node[parent]
            node[last] = value
    model = build.Model(None, {}, ("params/classifier/kernel",), None, "")
    args = {"rules": (c, model), "controller": (c, None, 10), "optimizer": (c, None, model, 10)}.get(call, (c,))
    with pytest.raises(config.ConfigError) as error:
        getattr(build, call)(*args)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_rules_for_the_mesh_come_before_the_familys(files):
    c = parse(files)
    c.shard = {"b": {"paths": ".*/key/kernel", "axes": "-,tensor+fsdp"}, "a": {"paths": ".*/value/.*", "axes": "data"}}
    own, usual = build.sharding(c, "bert")
    assert own == ((".*/value/.*", ("data",)), (".*/key/kernel", (None, ("tensor", "fsdp"))))
    assert usual[0][0] == ".*/embeddings/word/embedding"
    c.shard = {"a": {"paths": ".*/key/kernel", "axis": "data"}}
    with pytest.raises(config.ConfigError, match=r"shard.a has axis, paths: a rule is \{'paths': a regex, 'axes'"):
        build.sharding(c, "bert")


def test_a_wrapper_shares_its_hyperparameters_with_what_it_wraps():
    def made(arg="", *words):
        return build.variant(config.parse([f"--config=configs/dora.py{arg}", *words]).config)

    assert made(":rank=4", "--config.variant.detach=false") == DoRA(lj.LoRA(4, alpha=8.0, dropout=0.05), detach=False)
    assert made(":of=adalora,rank=4") == DoRA(AdaLoRA(rank=4))
    assert made(":of=none") == DoRA(None)
    c = config.load("configs/dora.py")
    with c.unlocked():
        del c.variant["of"]  # LoRA if nothing is named
    assert build.variant(c).of == lj.LoRA(8, alpha=16.0, dropout=0.05)
    for name, value, words in (("of", "vrea", "unknown of 'vrea'"), ("rnak", 4, "no hyperparameter 'rnak'.*'rank'")):
        with c.unlocked():
            c.variant[name] = value
        with pytest.raises(config.ConfigError, match=words):
            build.variant(c)
        with c.unlocked():
            del c.variant[name]


def test_adapters_of_earlier_runs_are_summed_and_avoided(files, tmp_path):
    c = parse(files, "o_lora", ",rank=2,targets=qv", f"--config.earlier.folders={tmp_path / 'a,b' / 'adapter'}")
    _, model, _, adapt = adapted(c)
    trainable, frozen = jax.jit(adapt.init)(jax.random.key(0), model.variables)
    path = "params/layer_1/attention/value/kernel"
    rng = np.random.default_rng(0)
    loud = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), trainable)
    adapter.save(tmp_path / "a,b" / "adapter", adapt, loud, frozen, base=model.fingerprint)
    joined = build.after(c, adapt, model)
    old = loud[path]
    merged = joined.merge(trainable, frozen)["params"]["layer_1"]["attention"]["value"]["kernel"]
    np.testing.assert_allclose(merged, frozen.base[path] + 8.0 * old.A @ old.B, rtol=1e-4, atol=1e-4)
    want = sum(0.5 * np.abs(loud[p].A.T @ trainable[p].A).sum() for p in adapt.plan if "attention" in p)
    np.testing.assert_allclose(joined.penalty(trainable), want, rtol=1e-4)
    assert build.after(parse(files, "o_lora"), adapt, model) is adapt
    with pytest.raises(adapter.AdapterMismatch, match="this base has other"):
        build.after(c, adapt, model._replace(fingerprint="other"))


def test_targets_may_be_a_regex_and_must_match(files):
    _, _, _, adapt = adapted(parse(files, "lora", r",targets=.*/layer_1/ffn/up/kernel"))
    assert [p for p, v in adapt.plan.items() if isinstance(v, lj.LoRA)] == ["params/layer_1/ffn/up/kernel"]
    with pytest.raises(lj.RuleError, match="matches no path"):
        adapted(parse(files, "lora", r",targets=.*/layer_7/.*"))


def test_steps_stand_in_for_epochs_and_one_length_for_many(files):
    c = parse(files, "lora", "", "--config.shapes=0", "--config.steps=12", "--config.steps_per_call=5")
    _, _, batches, _ = adapted(c)
    assert batches["train"].lengths == batches["validation"].lengths == (16,)
    assert batches["train"].batch(0, 0)["input_ids"].shape == (8, 16)
    assert build.total_steps(c, 1000) == 10
    assert build.total_steps(parse(files, "lora", "", "--config.epochs=2"), 7) == 14


def test_another_head_on_the_same_encoder(files):
    c = parse(files)
    task = build.load_data(c).task
    one, other = (build.load_model(c, task, jax.random.key(seed)) for seed in (0, 1))
    found = build.with_head(one, jax.random.key(1))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, other.variables))
    assert not np.array_equal(found["params"]["classifier"]["kernel"], one.variables["params"]["classifier"]["kernel"])
    embeddings = [tree["params"]["embeddings"]["word"]["embedding"] for tree in (found, one.variables)]
    assert embeddings[0] is embeddings[1]


def test_the_head_alone(files):
    _, model, _, adapt = adapted(parse(files, "head"))
    assert set(adapt.plan) == set(model.fresh)


def test_the_fair_recipe_goes_before_a_methods_own():
    for name in ("full", "adalora", "vera", "sora"):
        c = config.load(f"configs/{name}.py:task=rte,recipe=fair")
        assert (c.batch, c.steps, c.max_length) == (16, 600, 96)
        assert (c.weight_decay, c.head_lr, c.head_dropout) == (0.0, 1e-3, 0.0)
    assert config.load("configs/sora.py:recipe=fair").clip == 0.1
    with pytest.raises(config.ConfigError, match="unknown recipe 'fare': did you mean 'fair'"):
        config.load("configs/lora.py:recipe=fare")


@pytest.mark.parametrize(("task", "calls"), [("sst2", 1), ("sst2", 8), ("reviews", 1), ("wnli", 1)])
def test_padding_by_default(task, calls):
    """GLUE's tasks: as few lengths as leave 5 % of the slots of training batches empty, or of calls where they share
    them; the evaluation, which has a longer text, has four of its own. The short ones: four for all."""
    rng = np.random.default_rng(0)

    def split(count, longest):
        lengths = np.append(rng.geometric(0.08, count - 1).clip(3, 50), longest)
        ids = np.zeros(lengths.sum(), np.int32)
        return data.Tokens(ids, ids, np.concatenate([[0], np.cumsum(lengths)]), np.zeros(count, np.int32), 0, 0)

    c = ConfigDict(config.load(f"configs/lora.py:task={task}").to_dict())
    c.steps_per_call = calls
    found = build.batches(c, {"train": split(20000, 50), "validation": split(1000, 60)})
    train, validation = found["train"], found["validation"]
    assert len(validation.lengths) == 4 and validation.lengths[-1] == 60
    if task != "sst2":
        assert train.lengths == validation.lengths and train.padding() > 0.1
        return
    assert train.lengths[-1] == 50 and train.padding() <= 0.05 and 6 < len(train.lengths) < 32
    fewer = data.bucket_lengths(train.tokens.lengths, len(train.lengths) - 1, c.batch * calls)
    assert calls > 1 or data.Batches(train.tokens, c.batch, lengths=fewer).padding() > 0.05
