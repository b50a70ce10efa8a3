"""Plans from shapes: bytes and FLOPs by hand, and against what XLA says of the compiled step."""

from typing import Any

import pytest

from configs import plan as shapes
from experiments import plan
from lorajax import config
from lorajax.shard.machines import machine
from lorajax.shard.mesh import MeshError, sizes_of


def test_70b_is_planned_without_a_device(capsys: Any) -> None:
    plan.main(["--config=configs/plan.py:shape=70b,machine=v5p-64", "--config.mesh.tensor=4"])
    out = capsys.readouterr().out
    vocabulary, d, layers, heads, kv, head, f, _ = shapes.SHAPES["70b"]
    sides = [(d, heads * head), (d, kv * head), (d, kv * head), (heads * head, d), (d, f), (d, f), (f, d)]
    matrices = layers * sum(i * o for i, o in sides) + 2 * vocabulary * d
    assert f"{(matrices + d * (2 * layers + 1)) / 1e9:.2f} billion parameters" in out
    trained = 16 * layers * sum(i + o for i, o in sides)
    assert f"{trained / 1e6:.1f} million trained" in out
    (row,) = [line.split() for line in out.splitlines() if line.startswith("full ")]
    # fsdp 8 x tensor 4: all matrices are cut in 32, norms are whole.
    assert row[1] == plan.gib((matrices / 32 + d * (2 * layers + 1)) * 2)
    # A of a column-sharded weight is cut by fsdp and B by tensor, of a row-sharded one the other way round.
    column, rows = sides[:3] + sides[4:6], [sides[3], sides[6]]
    own = 16 * layers * (sum(i / 8 + o / 4 for i, o in column) + sum(i / 4 + o / 8 for i, o in rows)) * 4
    assert row[2] == row[3] == plan.gib(own)
    assert row[4] == plan.gib(2 * own)
    tokens, attention = 64 * 2048, 4 * 64 * 2048**2 * heads * head * layers
    once = 2 * tokens * (layers * sum(i * o for i, o in sides) + vocabulary * d)
    want = 3 * once + 4 * 2 * tokens * trained + 4 * attention  # forward twice, backward
    assert f"{want:.2e}" in row


@pytest.mark.parametrize("base", ["", "nf4"])
def test_what_xla_says_of_the_compiled_step(base: str) -> None:
    launch = config.parse(["--config=configs/plan.py:shape=tiny,machine=8xH100", "--config.batch=16",
                           "--config.max_length=16", "--config.mesh.tensor=2", "--config.param_dtype=float32",
                           "--config.compute_dtype=float32", f"--config.quant.format={base}",
                           "--config.quant.block=8"])  # fmt: skip
    c, sizes = launch.config, sizes_of(dict(launch.config.mesh), 8)
    adapt = plan.adapted(c, plan.settings(c), c.batch)
    state = plan.jax.eval_shape(plan.optax.adamw(1e-3).init, adapt.shapes[0])
    parts = plan.resident(adapt, sizes, *plan.build.sharding(c, "llama"), state)
    told = plan.compiled(c, plan.settings(c), sizes)
    mine = parts["base"] + parts["adapters"] + parts["optimizer"] + 16 * 16 * 4 // 4  # and the ids
    assert told.argument_size_in_bytes == pytest.approx(mine, abs=64)  # step counter and key
    if base:  # no block is cut in two
        too_long = config.parse(["--config=configs/plan.py:shape=tiny,machine=8xH100", "--config.quant.format=nf4"])
        with pytest.raises(MeshError, match="kernel: .*cut inside a block of 64: shard another dimension"):
            plan.resident(plan.adapted(too_long.config, plan.settings(too_long.config), 64), {"fsdp": 8},
                          *plan.build.sharding(c, "llama"), state)


@pytest.mark.parametrize(("shape", "rows", "length", "base", "remat", "told"), [
    ("1.2b", 8, 1024, "", "none", 11.75), ("1.2b", 8, 1024, "nf4", "none", 10.40),
    ("8b", 2, 2048, "", "full", 15.99), ("8b", 2, 2048, "nf4", "full", 6.37),
])  # fmt: skip
def test_what_xla_said_on_a_gpu(shape: str, rows: int, length: int, base: str, remat: str, told: float) -> None:
    """GiB of arguments and temporaries of `experiments.bench.quant` (README, "Quantised bases")."""
    c = config.parse([f"--config=configs/plan.py:shape={shape},machine=1xH100", "--config.model.vocab_size=32000",
                      "--config.model.tie_embeddings=false", f"--config.batch={rows}", "--config.attention=cudnn",
                      f"--config.max_length={length}", f"--config.quant.format={base}",
                      f"--config.scan_layers={str(remat == 'full').lower()}"]).config  # fmt: skip
    whole = plan.settings(c, remat=remat)
    adapt = plan.adapted(c, whole, rows)
    state = plan.jax.eval_shape(plan.optax.adamw(1e-3).init, adapt.shapes[0])
    parts = plan.resident(adapt, {"fsdp": 1}, *plan.build.sharding(c, "llama"), state)
    assert (sum(parts.values()) + plan.activations(c, whole, rows)) / 2**30 == pytest.approx(told, rel=0.05)


def test_a_mesh_smaller_than_the_machine_and_a_rank_above_a_part_of_a_weight(capsys: Any) -> None:
    """A device's part of the keys is (64, 16), below the rank, and the step takes as long as four devices need."""
    words = ["--config=configs/plan.py:shape=tiny,machine=8xH100,rank=32", "--config.mesh.tensor=4"]
    plan.main([*words, "--config.mesh.fsdp=1", "--config.batch=4096"])
    out = capsys.readouterr().out
    assert "GiB on each of 4 of the 8 devices of 8xH100" in out
    (row,) = [line.split() for line in out.splitlines() if line.startswith("none ")]
    assert float(row[-2]) == pytest.approx(float(row[-3]) / 4 / 989e12, rel=0.01, abs=6e-4)


def test_a_tied_head_costs_what_an_untied_one_does() -> None:
    def work(tied: str) -> tuple[float, int]:
        c = config.parse(["--config=configs/plan.py:shape=tiny,targets=qv", "--config.model.vocab_size=1024",
                          f"--config.model.tie_embeddings={tied}"]).config  # fmt: skip
        adapt, sizes = plan.adapted(c, plan.settings(c), c.batch), sizes_of({"fsdp": 8}, 8)
        return plan.step_flops(c, adapt, again=True), plan.gathered(adapt, sizes, *plan.build.sharding(c, "llama"))

    assert work("true") == work("false")


def test_what_does_not_fit_is_said(capsys: Any) -> None:
    plan.main(["--config=configs/plan.py:shape=70b,machine=8xH100", "--config.batch=8", "--config.max_length=512",
               "--config.mesh.fsdp=2", "--config.mesh.data=-1"])  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("too much") == 3
    assert "8xH100 is too small" in out
    assert "v5p-64" in out.splitlines()[-2]
    with pytest.raises(MeshError, match="no machine '8xH10': did you mean '8xH100'"):
        machine("8xH10")
    for more, words in (("mesh.tensor=16", "mesh.tensor=16 does not divide num_kv_heads=8: the nearest that does is 8"),
                        ("batch=60", "batch=60 does not divide among 32 devices along data x fsdp: .* is 64")):
        with pytest.raises(MeshError, match=words):
            plan.main(["--config=configs/plan.py:shape=70b,machine=v5p-64", f"--config.{more}"])
    with pytest.raises(config.ConfigError, match="no 'args.machine', so it is another script's.*configs/plan.py"):
        plan.main(["--config=configs/lora.py"])
    assert machine("v5p-64").devices == 32
    assert machine("v5e-16").devices == 16
