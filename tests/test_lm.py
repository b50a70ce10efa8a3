"""The language-model experiment on a tiny model: losses by hand, runs end to end, one that is killed and goes on."""

import functools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core import jaxprs
from test_glue import environment, own_cache  # noqa: F401
from test_processes import start as start_processes

import lorajax as lj
from experiments import lm
from experiments.objective import likelihood, make_dpo, make_sft, tokens
from experiments.writing import make_writer, written
from lorajax import build, config, language
from lorajax.core.adapt import Adapt
from lorajax.data import Batches, mismatched, pack
from lorajax.io import adapter
from lorajax.io.hf import save_checkpoint
from lorajax.models import model_from_hf, params_to_hf
from lorajax.shard.mesh import MeshError
from lorajax.train.dpo import Policy

ROOT = Path(__file__).parents[1]


def words(workdir, recipe="e2e", arg="", *more):
    return [f"--config=configs/{recipe}.py:smoke{arg}", f"--workdir={workdir}", "--config.study=tiny", *more]


def folder(workdir):
    (found,) = Path(workdir).glob("tiny/*/seed=*")
    return found


def summary(workdir):
    return json.loads((folder(workdir) / "summary.json").read_text())


@functools.cache
def tiny():
    """The model of smoke runs, its weights, and a jitted forward pass on rows of 128 tokens."""
    model = language.load_model(config.parse(words(""), workdir="").config)
    return model, lj.sites(model.net.apply, model.variables, np.zeros((1, 4), np.int32)), jax.jit(model.net.apply)


class World:
    """The parts of a smoke run, before training."""

    def __init__(self, arg="", recipe="e2e", *more):
        self.c = config.parse(words("", recipe, arg, *more), workdir="").config
        self.model, self.sites, self.forward = tiny()
        self.found = language.load_data(self.c)
        self.adapt = lj.adapt(self.sites, build.rules(self.c, self.model))

    def rows(self, split="validation"):
        return language.examples(self.c, self.model, self.found.task, self.found.splits[split])

    def moved(self, adapt: Adapt):
        """Adapters away from zero, and the tree they are bound in."""
        trainable, frozen = jax.jit(adapt.init)(jax.random.key(0), self.model.variables)
        rng = np.random.default_rng(0)
        trainable = jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape).astype(x.dtype), trainable)
        return trainable, frozen, jax.jit(adapt.bind)(trainable, frozen)

    def logits(self, params, ids):
        """(len(ids), V) in float64."""
        row = np.zeros((1, 128), np.int32)
        row[0, : len(ids)] = ids
        return np.asarray(self.forward(params, row)[0, : len(ids)], np.float64)


def by_hand(world, params, pairs, smoothing=0.0):
    """Mean loss of the completions' tokens, text by text, and how many there are."""
    total, count = 0.0, 0
    for prompt, text in pairs:
        start, end = (world.model.tokenizer.encode(x).ids for x in (prompt, f" {text}{world.model.end}"))
        ids = [*start, *end]
        logits = world.logits(params, ids)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for at in range(len(start), len(ids)):
            total -= (1 - smoothing) * logs[at - 1, ids[at]] + smoothing * logs[at - 1].mean()
            count += 1
    return total / count, count


@pytest.mark.parametrize("variant", ["lora", "full"])
def test_the_loss_is_of_the_completions_alone(variant) -> None:
    """Against texts one by one: LoRA's in chunks under a frozen head, full fine-tuning's through a head that trains."""
    world = World(f",variant={variant}")
    trainable, frozen, bound = world.moved(world.adapt)
    merged = jax.jit(world.adapt.merge)(trainable, frozen)
    pairs = world.found.splits["validation"][:3]
    rows = language.examples(world.c, world.model, world.found.task, pairs)
    batch = Batches(rows, 4, shuffle=False, shapes=1).batch(0, 0)  # three texts of unlike lengths, and an empty row
    assert (batch["weight"].sum(1) == 0).sum() == 1
    for training, smoothing in ((False, 0.0), (True, 0.1)):
        loss = make_sft(world.c, world.model, world.adapt, training=training)
        value, _ = jax.jit(loss)(bound, batch, None)
        want, count = by_hand(world, merged, pairs, smoothing)
        assert batch["weight"].sum() == count
        assert float(value) == pytest.approx(want, rel=2e-5)
    np.testing.assert_array_equal(tokens(batch).sum(1), (batch["segments"] > 0).sum(1) * (batch["weight"].sum(1) > 0))


def test_a_head_that_trains_gets_its_gradient() -> None:
    """`full` differentiates through both sides of the tied table, the frozen head's loss through none of the logits."""
    world = World(",variant=full")
    batch = Batches(world.rows(), 2, shuffle=False, shapes=1).batch(0, 0)
    loss = make_sft(world.c, world.model, world.adapt, training=False)

    def plain(params):
        logits = world.model.net.apply(params, batch["input_ids"])
        each = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(batch["labels"])[..., None], -1)[..., 0]
        return jnp.sum(each * batch["weight"]) / jnp.sum(batch["weight"])

    mine = jax.grad(lambda params: loss(params, batch, None)[0])
    logits = (*batch["input_ids"].shape, world.model.net.config.vocab_size)
    scattered = [e for e in jaxprs.equations(jaxprs.trace(mine, world.model.variables))
                 if "scatter" in e.primitive.name and e.outvars[0].aval.shape == logits]  # fmt: skip
    assert not scattered  # a pass over the logits of its own, and another to set them to zero before it
    have = jax.jit(mine)(world.model.variables)
    want = jax.jit(jax.grad(plain))(world.model.variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), have, want)


def test_packed_rows_have_the_same_loss() -> None:
    world = World()
    rows = world.rows("train")
    _, _, bound = world.moved(world.adapt)

    def mean(c, rows):
        loss = jax.jit(make_sft(c, world.model, world.adapt, training=False))
        judge = lambda batch: (loss(bound, batch, None)[0], batch["weight"].sum())  # noqa: E731
        return likelihood(judge, Batches(rows, 4, shuffle=False, shapes=1))["perplexity"]

    packed = World("", "e2e", "--config.packing=true").c
    assert len(pack(rows, 256).lengths) == len(rows.lengths) / 2
    assert mean(packed, pack(rows, 256)) == pytest.approx(mean(world.c, rows), rel=1e-4)


def test_a_quantised_base() -> None:
    """The loss of packed weights is that of what they stand for, and that is not the base as it was."""
    world = World("", "e2e", "--config.quant.format=int8")
    dense = world.model.variables
    world.model, _ = build.quantized(world.c, world.adapt, world.model)
    trainable, frozen, bound = world.moved(world.adapt)
    merged, pairs = jax.jit(world.adapt.merge)(trainable, frozen), world.found.splits["validation"][:4]
    batch = Batches(language.examples(world.c, world.model, world.found.task, pairs), 4, shuffle=False, shapes=1)
    loss, _ = jax.jit(make_sft(world.c, world.model, world.adapt, training=False))(bound, batch.batch(0, 0), None)
    assert float(loss) == pytest.approx(by_hand(world, merged, pairs)[0], rel=2e-5)
    layer = "params", "layer_0", "ffn", "up", "kernel"
    change = np.abs(functools.reduce(lambda tree, name: tree[name], layer, merged)
                    - functools.reduce(lambda tree, name: tree[name], layer, dense)).max()  # fmt: skip
    assert 0 < change < 0.01


def test_dpo_compares_with_the_base_under_the_adapter() -> None:
    """Against eq. 7 of the paper with log-probabilities of texts one by one."""
    world = World("", "e2e", "--config.loss=dpo")
    trainable, frozen, bound = world.moved(world.adapt)
    merged = jax.jit(world.adapt.merge)(trainable, frozen)
    pairs = world.found.splits["validation"]
    batch = Batches(language.preferences(world.c, world.model, world.found.task, pairs), 8, shuffle=False,
                    shapes=1).batch(0, 0)  # fmt: skip
    loss, told = jax.jit(make_dpo(world.c, world.model, world.adapt))(Policy(bound, world.model.variables), batch, None)
    margins = []
    for prompt, *both in mismatched(pairs):
        sums = []
        for params in (merged, world.model.variables):
            found = [by_hand(world, params, [(prompt, text)]) for text in both]
            sums.append([-mean * count for mean, count in found])
        margins.append((sums[0][0] - sums[1][0]) - (sums[0][1] - sums[1][1]))
    want = np.mean(np.log1p(np.exp(-world.c.dpo.beta * np.asarray(margins))))
    assert float(loss) == pytest.approx(want, rel=1e-4)
    assert float(told["rewards/accuracies"]) == pytest.approx(np.mean(np.asarray(margins) > 0))


def test_texts_are_those_of_the_model_without_cache() -> None:
    """Greedy, prompts of unlike lengths: the likeliest token each time, by the whole model on the growing text."""
    world = World("", "e2e", "--config.beams=1", "--config.generate=3", "--config.max_new=5")
    prompts, references = language.prompts(world.c, world.model, world.found.task, world.found.splits["train"])
    assert len(references) == 3 and len(set(prompts.lengths)) > 1
    trainable, frozen, bound = world.moved(world.adapt)
    merged = jax.jit(world.adapt.merge)(trainable, frozen)
    texts = written(jax.jit(lambda batch: make_writer(world.c, world.model)(bound, batch)), world.c, world.model,
                    prompts)  # fmt: skip
    for i, text in enumerate(texts):
        ids = prompts.ids[prompts.offsets[i] : prompts.offsets[i + 1]].tolist()
        new: list[int] = []
        while len(new) < 5 and world.model.end_id not in new:
            new.append(int(np.argmax(world.logits(merged, [*ids, *new])[-1])))
        assert text == world.model.tokenizer.decode([x for x in new if x != world.model.end_id]).strip()


def test_a_run_leaves_scores_texts_and_what_it_has_forgotten(tmp_path, capsys) -> None:
    argv = words(tmp_path, "e2e", "", "--config.lr=3e-2", "--config.beams=2", "--config.epochs=2",
                 "--config.baseline=false")  # fmt: skip
    lm.main(argv)
    run, told = folder(tmp_path), summary(tmp_path)
    assert set(told["scores"]) == {"log_likelihood", "perplexity", "bleu", "chrf", "rouge_l"}
    assert set(told["baselines"]["base"]) == {"log_likelihood", "perplexity"} and told["headline"] == "bleu"
    assert told["scores"]["perplexity"] < 0.8 * told["baselines"]["base"]["perplexity"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert told["scores"]["log_likelihood"] == max(row.get("eval/log_likelihood", -np.inf) for row in rows)
    texts = json.loads((run / "texts.json").read_text())
    world = World()
    assert [row["references"] for row in texts] == [
        [text for prompt, text in world.found.splits["test"] if prompt == row["prompt"]] for row in texts]

    # What was forgotten, from the folder alone: the adapter read back, the base, and the texts one by one.
    sites = world.sites
    adapt = lj.adapt(sites, adapter.rules(run / "adapter"))
    trainable, frozen = adapter.load(run / "adapter", adapt, world.model.variables, base=world.model.fingerprint)
    other = language.unrelated(world.c, world.model)
    batch = Batches(other, len(other.lengths), shuffle=False, shapes=1).batch(0, 0)
    for when, params in (("before", world.model.variables), ("after", jax.jit(adapt.merge)(trainable, frozen))):
        logs = [world.logits(params, row) for row in batch["input_ids"]]
        logs = np.stack([x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logs])
        each = np.take_along_axis(logs, batch["labels"][..., None], -1)[..., 0]
        want = -(each * batch["weight"]).sum() / batch["weight"].sum()
        assert told["forgetting"][when] == pytest.approx(want, rel=1e-4)
    assert told["forgetting"]["change"] == told["forgetting"]["after"] - told["forgetting"]["before"]

    lm.main(argv)
    assert "finished already" in capsys.readouterr().out


def test_a_missing_package_of_scores_is_said_before_the_training(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"pip install 'lorajax\[text\]'"):
        lm.main(words(tmp_path, "e2e", ""))
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.slow
def test_gsm8k_by_dpo_on_conversations(tmp_path) -> None:
    lm.main(words(tmp_path, "gsm8k", "", "--config.loss=dpo", "--config.lr=1e-2", "--config.baseline=false",
                  "--config.unrelated.text=none"))  # fmt: skip
    told = summary(tmp_path)
    assert {"exact_match", "last_number", "preference", "preference_accuracy"} <= told["scores"].keys()
    assert told["headline"] == "exact_match" and told["forgetting"] == {}
    prompt = json.loads((folder(tmp_path) / "texts.json").read_text())[0]["prompt"]
    assert prompt.startswith("<|im_start|>user\nAnn has ") and prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    metrics = [json.loads(line) for line in (folder(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["loss"] == pytest.approx(np.log(2), rel=1e-4)  # the policy begins as the reference
    assert metrics[-2]["rewards/margins"] != 0


def test_a_pair_of_which_a_text_is_cut_is_left_out() -> None:
    """Two answers that differ in their last number are the same where that is cut off."""
    world = World("", "gsm8k")
    pairs = [("short", "2\n#### 2"), ("long", "so " * 40 + "2\n#### 2")]
    assert len(language.examples(world.c, world.model, world.found.task, pairs).rows) == 2
    found = language.preferences(world.c, world.model, world.found.task, pairs)
    assert found.dropped == 1 and found.chosen.rows.tolist() == found.rejected.rows.tolist() == [0]


QUICK = ("--config.generate=-1", "--config.unrelated.text=none", "--config.save_every=2", "--config.packing=true")
DIES = """
# Runs experiments.lm and dies by SIGKILL behind its third step.
import os, signal, sys
from experiments import lm
add, seen = lm.Watch.add, []
def dies(*given):
    seen.append(given)
    if len(seen) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return add(*given)
lm.Watch.add = dies
lm.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path) -> None:
    lm.main(words(tmp_path / "whole", "e2e", "", *QUICK))
    command = [sys.executable, "-c", DIES, *words(tmp_path / "cut", "e2e", "", *QUICK)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment())
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder(tmp_path / "cut") / "summary.json").exists()
    lm.main(words(tmp_path / "cut", "e2e", "", *QUICK))
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/lorajax_adapter.json"):
        assert (folder(tmp_path / "whole") / name).read_bytes() == (folder(tmp_path / "cut") / name).read_bytes(), name


@pytest.mark.slow
def test_a_step_that_is_not_finite_ends_the_run(tmp_path) -> None:
    with pytest.raises(SystemExit, match="step 2 is not finite"):
        lm.main(words(tmp_path, "e2e", "", *QUICK, "--config.lr=1e30", "--config.warmup=0"))
    assert not (folder(tmp_path) / "summary.json").exists()


def gpt2_folder(path, end):
    """A GPT-2 with dropout in the hub's layout, its tokenizer without a padding token."""
    settings = {"model_type": "gpt2", "vocab_size": 258, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160,
                "activation_function": "gelu_new"}  # fmt: skip
    net = model_from_hf(settings)
    variables = jax.jit(net.init)(jax.random.key(0), np.zeros((1, 2), np.int32))
    save_checkpoint(path, settings | end, params_to_hf(net.config, variables))
    language.tiny_tokenizer().save(str(path / "tokenizer.json"))
    return path


@pytest.mark.slow
def test_gpt2_from_a_folder_with_its_dropout(tmp_path) -> None:
    model = gpt2_folder(tmp_path / "model", {"eos_token_id": 257})
    lm.main(words(tmp_path / "runs", "e2e", f",model={model}", "--config.lr=1e-2", "--config.dropout=-1",
                  "--config.variant.dropout=0", "--config.beams=1", "--config.baseline=false"))  # fmt: skip
    told = summary(tmp_path / "runs")
    assert told["scores"]["perplexity"] < told["baselines"]["base"]["perplexity"]
    adapter_config = json.loads((folder(tmp_path / "runs") / "adapter" / "adapter_config.json").read_text())
    assert [name.rpartition(".")[2] for name in adapter_config["target_modules"]] == ["c_attn"] * 2  # q, v as one


def test_a_folder_names_its_end_of_text(tmp_path) -> None:
    c = World("", "e2e").c
    with c.unlocked():
        for end, said in (({"eos_token_id": [257, 0]}, None), ({}, "names no end-of-text token: neither eos_token in")):
            c.args.model = str(gpt2_folder(tmp_path / str(len(end)), end))
            if said is None:
                model = language.load_model(c)
                assert (model.end, model.end_id, model.begin, model.template) == ("<|im_end|>", 257, "", None)
                continue
            with pytest.raises(config.ConfigError, match=said):
                language.load_model(c)
            (Path(c.args.model) / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_start|>",
                                                                                  "chat_template": "x"}))  # fmt: skip
            assert language.load_model(c).end == "<|im_start|>"
            (Path(c.args.model) / "chat_template.jinja").write_text("{% for %}")
            with pytest.raises(ValueError, match="the chat template is not Jinja"):
                language.load_model(c)


@pytest.mark.slow
def test_a_mesh_changes_no_number(tmp_path) -> None:
    """SFT, its evaluation, its texts and what it forgets on eight devices, and in two processes, are those of one."""
    more = ("--config.lr=1e-2", "--config.batch=8", "--config.generate_batch=8", "--config.beams=2")
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    lm.main(words(tmp_path / "one", "e2e", "", *more))
    lm.main(words(tmp_path / "spread", "e2e", "", *more, *mesh))
    apart = words(tmp_path / "apart", "e2e", "", *more, "--config.mesh.data=2", "--config.mesh.fsdp=2")
    codes, outs = start_processes(2, *apart, program=("-m", "experiments.lm"))
    assert codes == [0, 0], outs
    one = summary(tmp_path / "one")
    for other in ("spread", "apart"):
        assert folder(tmp_path / "one").parent.name == folder(tmp_path / other).parent.name
        found = summary(tmp_path / other)
        for part, keys in (("scores", one["scores"]), ("forgetting", ("before", "after"))):
            for key in keys:
                assert found[part][key] == pytest.approx(one[part][key], rel=1e-4, abs=1e-5), (other, key)
        texts = [(folder(tmp_path / name) / "texts.json").read_text() for name in ("one", other)]
        assert texts[0] == texts[1], other


def test_every_method_is_a_variant_of_a_recipe() -> None:
    """All of configs/ but those with paths of their own that a Llama has not (biases, a table called `word`, a new
    head), and VB-LoRA, whose vectors are longer than this model is wide."""
    world = World()
    counted, recipes = {}, set()
    for name in sorted({path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "base", "vb_lora"}):
        try:
            c = config.load(f"configs/e2e.py:smoke,variant={name}")
        except config.ConfigError as error:
            assert "is a recipe, not a method" in str(error)
            recipes.add(name)
            continue
        try:
            adapt = lj.adapt(world.sites, build.rules(c, world.model))
        except lj.RuleError as error:
            assert re.search("matches no path|no rule adapts anything", str(error)), name
            continue
        build.optimizer(c, adapt, world.model, 100)
        build.controller(c, adapt, 100)
        counted[name] = adapt.count()
    assert {"e2e", "gsm8k"} <= recipes and len(counted) > 40
    assert counted["full"] == sum(x.size for x in jax.tree.leaves(world.model.variables)) > counted["lora"]


@pytest.mark.parametrize(
    ("recipe", "arg", "more", "said"),
    [
        ("e2e", ",variant=lorra", (), "unknown variant 'lorra': did you mean 'lora'"),
        ("e2e", ",task=e2", (), "unknown task 'e2': did you mean 'e2e'"),
        ("e2e", "", ("--config.unrelated.text=doly",), "unknown text 'doly': did you mean 'dolly'"),
        ("e2e", "", ("--config.loss=dpi",), "unknown loss 'dpi': did you mean 'dpo'"),
        ("e2e", "", ("--config.quant.format=nf5",), "unknown quant.format 'nf5': did you mean 'nf4'"),
        ("e2e", ",variant=relora", ("--config.loss=dpo",), "merges: take another variant, or loss=sft"),
        ("e2e", "", ("--config.loss=dpo", "--config.packing=true"), "pairs, which are not packed: leave packing out"),
        ("e2e", "", ("--config.head_lr=1e-3",), "unknown key --config.head_lr"),
        ("e2e", ",variant=ia3,rank=2", (), "variant='ia3' has no rank: leave it out"),
    ],
)
def test_mistakes_are_told(tmp_path, recipe, arg, more, said) -> None:
    with pytest.raises(config.ConfigError) as error:
        lm.main(words(tmp_path, recipe, arg, *more))
    assert said in str(error.value)


def test_a_methods_own_schedule_and_clipping_stay() -> None:
    """What belongs to the method, whatever the recipe says; the recipe's for the others."""
    for arg, want in (("relora", ("restarts", 1.0)), ("sora", ("cosine", 0.1)), ("dora", ("cosine", 1.0))):
        c = config.load(f"configs/gsm8k.py:variant={arg}")
        assert (c.schedule, c.clip) == want


def test_long_prompts_are_left_out_and_what_fits_no_mesh_is_told_first(tmp_path, monkeypatch) -> None:
    world = World(",task=dolly", "gsm8k")
    pairs = [("short", "a"), ("long " * 40, "b"), ("short", "c")]
    prompts, references = language.prompts(world.c, world.model, world.found.task, pairs)
    assert references == [["a", "c"]] and (len(prompts.lengths), prompts.dropped) == (1, 1)
    model = gpt2_folder(tmp_path / "model", {"eos_token_id": 257})
    with pytest.raises(ValueError, match="this model has 160 positions"):
        lm.main(words(tmp_path / "runs", "e2e", f",model={model}", "--config.max_new=150"))
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(language, "prompts", None)  # not reached
    mesh = ("--config.mesh.data=4", "--config.generate_batch=6")
    with pytest.raises(MeshError, match="a batch of 6 rows does not divide among data 4"):
        lm.main(words(tmp_path, "e2e", "", *mesh))
    with pytest.raises(MeshError, match="a batch of 10 rows does not divide among data 4"):
        lm.main(words(tmp_path, "e2e", "", *mesh, "--config.eval_batch=10"))


def test_a_conversation_needs_a_template() -> None:
    world = World("", "gsm8k")
    with pytest.raises(config.ConfigError, match="'gsm8k' is a conversation, and this model has no chat template"):
        language.examples(world.c, world.model._replace(template=None), world.found.task, [("a", "b")])
