# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Comparing variants
#
# A table of methods is easy to make and hard to make honest. Train each method once, at the learning rate of its paper,
# and the differences that you see are those of the learning rates and of the seeds. This notebook loads a study, makes
# the table that lorajax makes of it, and shows where each of its numbers comes from.
#
# A study is a folder of runs, each with a `config.json` and a `summary.json`. Point `LORAJAX_STUDY` at one that
# `python -m experiments.sweep` left, such as `runs/fair_glue`. Without it the notebook makes a small study of its own:
# a two-layer network that has to follow a changed copy of itself, four ways to start LoRA, seven learning rates and
# four seeds, trained in a few seconds, all rates and seeds of a method in one program.

# %%
import itertools
import json
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import lorajax as lj
from lorajax import control, report
from lorajax.report import figures
from lorajax.train.pack import Parts, make_packed_step, pack
from lorajax.train.step import init_state
from lorajax.variants import DoRA

SMOKE = bool(os.environ.get("LORAJAX_SMOKE"))  # the form that the tests run
INK, ACCENT, PALE = "#34495e", "#c0392b", "#9fb3c8"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110, "font.size": 9})

# %% [markdown]
# ## A study in one cell
#
# `pack` stacks runs of one program: adapters, optimizer states and keys get a leading axis, the frozen base does not.
# What differs between the runs, here the learning rate, is an array that the program reads like any other number.

# %%
n, hidden, outputs, batch, steps = 24, 48, 8, 64, 30 if SMOKE else 150
rng = np.random.default_rng(0)
base = {"up": jnp.float32(rng.normal(size=(n, hidden)) / np.sqrt(n)),
        "down": jnp.float32(rng.normal(size=(hidden, outputs)) / np.sqrt(hidden))}
moved = {name: w + 0.6 * jnp.float32(rng.normal(size=(w.shape[0], 3)) @ rng.normal(size=(3, w.shape[1])))
         / np.sqrt(w.shape[0]) for name, w in base.items()}  # fmt: skip


def network(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


x_test = jnp.float32(rng.normal(size=(512, n)))
y_test = network(moved, x_test)
sites = lj.sites(network, base, x_test)
METHODS = {
    "lora": lj.LoRA(rank=4, alpha=4.0),
    "dora": DoRA(of=lj.LoRA(rank=4, alpha=4.0)),
    "pissa": lj.LoRA(rank=4, alpha=4.0, initializer="pissa"),
    "olora": lj.LoRA(rank=4, alpha=4.0, initializer="olora"),
}
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
if SMOKE:
    METHODS, RATES = {name: METHODS[name] for name in ("lora", "olora")}, RATES[1::2]


def loss(bound, batch, key):
    return jnp.mean(jnp.square(lj.lift(network)(bound, batch["x"]) - batch["y"])), {}


def train(method):
    adapt = lj.adapt(sites, [(".*", METHODS[method])])

    def parts(values):  # of one run, from numbers that the program reads
        return Parts(loss, adapt, optax.adam(values["lr"]), control.identity())

    runs, init = list(itertools.product(RATES, range(4))), jax.jit(adapt.init)
    members = []
    for lr, seed in runs:
        trainable, frozen = init(jax.random.key(seed), base)
        frozen = frozen._replace(base=base)
        members.append((init_state(jax.random.key(seed), trainable, optax.adam(lr)), frozen, {"lr": lr}))
    packed = pack(members)
    order = np.stack([np.random.default_rng(seed).normal(size=(steps, batch, n)) for _, seed in runs])
    data = jnp.float32(order)
    step = make_packed_step(parts, steps_per_call=steps)
    packed, _ = step(packed, {"x": data, "y": network(moved, data)}, jnp.ones(len(runs), bool))
    outputs = jax.vmap(lambda t: network(adapt.merge(t, members[0][1]), x_test))(packed.state.trainable)
    explained = 1 - jnp.mean(jnp.square(outputs - y_test), (1, 2)) / jnp.var(y_test)
    trained = sum(a.size for a in jax.tree.leaves(members[0][0].trainable))
    return [(lr, seed, float(score), trained) for (lr, seed), score in zip(runs, explained, strict=True)]


def make_study(folder):
    for method in METHODS:
        for lr, seed, score, trained in train(method):
            there = folder / f"{method},lr={lr:g}" / f"seed={seed}"
            there.mkdir(parents=True)
            (there / "config.json").write_text(json.dumps({"config": {"lr": lr, "seed": seed}}))
            (there / "summary.json").write_text(json.dumps({
                "task": "toy", "headline": "R2", "scores": {"R2": score}, "name": f"{method},lr={lr:g}", "seconds": 0,
                "said": {"lr": lr}, "trainable_parameters": trained, "device": jax.devices()[0].device_kind}))
    return folder


study = os.environ.get("LORAJAX_STUDY") or make_study(Path(tempfile.mkdtemp()))

# %% [markdown]
# ## The tidy table
#
# One row a run. Everything below is made of this, and `report.write_csv` writes it for any other tool.

# %%
results = report.read(study)
print(len(results), "runs;", report.setting(results))
for run in results[:4]:
    print(f"{run.task:<6} {run.method:<8} lr {run.lr:<8g} seed {run.seed}  score {run.score:.3f}  "
          f"{run.parameters} parameters")

# %% [markdown]
# ## Every method wants a rate of its own
#
# The colour is what a method loses against its own best rate, the dot is that rate, the red line is LoRA's. Starts that
# are large, such as OLoRA's orthonormal factors, cannot take LoRA's rate; the literature puts PiSSA's best at a tenth
# and OLoRA's at an eighteenth of LoRA's (arXiv 2602.04998). Where it is in this study you see here.

# %%
figures.rates(results, results[0].method if "lora" not in {r.method for r in results} else "lora")

# %% [markdown]
# ## A rate chosen where it is not scored
#
# If the rate is chosen by the scores that are then reported, a method with more rates, or with more noise, wins by
# luck. So the seeds are cut in two halves: the rate that is best on one half is scored on the other, and the halves
# swap. `cells` does that; the difference to choosing on all seeds is what leaked.

# %%
table = report.cells(results)
for cell in table:
    own = [r for r in results if (r.task, r.method) == (cell.task, cell.method)]
    leaking = max(np.mean(list(seeds.values())) for seeds in report.by_rate(own).values())
    print(f"{cell.method:<8} {cell.task:<6} honest {100 * cell.mean:6.2f}   chosen on what is reported "
          f"{100 * leaking:6.2f}   rates {dict(cell.rates)}")  # fmt: skip

# %%
reference = "lora" if any(cell.method == "lora" for cell in table) else table[0].method
figures.comparison(table, reference)

# %% [markdown]
# ## What one rate for all would have shown
#
# The same runs, read the usual way: everyone at LoRA's best rate. Where a method's own best rate is far from LoRA's,
# the two dots are far apart, and the order of the red ones is an order of rates, not of methods.

# %%
best = next(cell for cell in table if cell.method == reference).rate
names = list(dict.fromkeys(cell.method for cell in table))
task = table[0].task
at_one = {name: [r.score for r in results if (r.method, r.task, r.lr) == (name, task, best)] for name in names}
own = {cell.method: list(cell.scores.values()) for cell in table if cell.task == task}
figure, ax = plt.subplots(figsize=(5.6, 0.9 + 0.4 * len(names)), layout="constrained")
for i, name in enumerate(names[::-1]):
    if at_one[name]:
        ax.plot(100 * np.mean(at_one[name]), i, "o", color=ACCENT, markersize=7,
                label="all at one rate" if i == 0 else "")
    ax.plot(100 * np.mean(own[name]), i, "o", color=INK, markersize=7, label="each at its own" if i == 0 else "")
ax.set_yticks(range(len(names)), names[::-1])
ax.set(xlabel=f"{task}: mean score, %", title=f"one rate ({best:g}) for all, or a rate for each")
ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))

# %% [markdown]
# ## The table
#
# Mean and deviation over seeds with the rate chosen most often, what each method costs, and how it stands against the
# reference: mean rank over tasks, mean difference of paired seeds, a paired t-test, and the same p with the false
# discoveries among all methods controlled. `python -m lorajax.report FOLDER --into README.md --section NAME` puts it
# between the markers of a document, with hardware and date.

# %%
print(report.markdown(table, reference))
