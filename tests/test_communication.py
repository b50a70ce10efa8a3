"""What moves between devices, read off the compiled program: counts of collectives by kind and size, no times.

A pre-norm Llama of one layer, rank 4 on every linear layer, loss and gradient of the adapters and an Adam step. Eight
devices; nothing is executed.
"""

import collections
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import lorajax as lj
from lorajax import quant
from lorajax.models import Llama, LlamaConfig
from lorajax.shard.mesh import make_mesh
from lorajax.shard.placement import Placement
from lorajax.shard.rules import FAMILIES
from lorajax.train.step import init_state, make_step

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
B, T, D, F, V, R = 32, 16, 64, 256, 512, 4


Collective = tuple[str, tuple[int, ...]]
"""(kind, elements of every array that it yields)"""


@functools.cache
def program(layers: int = 1, scan: bool = False, form: Any = None, tokens: int = T, **sizes: int) -> list[Collective]:
    """The collectives of a training step; those in the loop over scanned layers once. form: of the base's weights."""
    place = Placement(make_mesh(sizes), (), FAMILIES["llama"])
    net = Llama(LlamaConfig(vocab_size=V, hidden_size=D, num_layers=layers, num_heads=8, num_kv_heads=8,
                            head_dim=D // 8, intermediate_size=F, rows=place.rows(), scan_layers=scan))  # fmt: skip
    ids = jax.ShapeDtypeStruct((B, tokens), jnp.int32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), ids)
    sites = lj.sites(net.apply, shapes, ids)
    adapt = lj.adapt(sites, [("all-linear", lj.LoRA(rank=R))])
    if form is not None:
        adapt = adapt.on(jax.eval_shape(quant.plan(sites, [("all-linear", form)]).quantize, shapes))
    at = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    tx = optax.adam(1e-3)

    def loss(bound: Any, batch: Any, key: jax.Array) -> Any:
        logits = lj.lift(net.apply)(bound, batch["ids"])
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0]), {}

    state = jax.eval_shape(lambda k, t: init_state(k, t, tx), jax.random.key(0), adapt.shapes[0])
    where = place.state(adapt, state)
    step: Any = make_step(loss, adapt, tx, shardings=(where, place.whole))
    base = adapt.shapes[1].base
    frozen = lj.Frozen(place.gathering(jax.tree.map(at, base, place.base(base))), {}, {})
    batch = {"ids": jax.ShapeDtypeStruct((B, tokens), jnp.int32, sharding=place.rows())}
    text = step.lower(jax.tree.map(at, state, where), frozen, batch).compile().as_text()
    found = []
    for line in text.splitlines():
        if match := re.search(rf"= (.*?) ({KINDS})(-start)?\(", line):
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", match.group(1))
            kind = match.group(2) + (" of codes" if "u8" in {dtype for dtype, _ in arrays} else "")
            found.append((kind, tuple(math.prod(map(int, filter(None, a.split(",")))) for _, a in arrays)))
    return found


def arrays(found: list[Collective], kind: str) -> dict[int, int]:
    """How many arrays of each size, numbers left out, all collectives of a kind yield together."""
    return dict(collections.Counter(n for k, sizes in found if k == kind for n in sizes if n > 1))


def scalars(found: list[Collective]) -> int:
    """How many single numbers all collectives yield together."""
    return sum(n == 1 for _, sizes in found for n in sizes)


COLUMN, ROW = 5, 2  # query, key, value, gate, up; output, down
JOINED = [3, 2, 1]  # A's along D, those that read one input together: query, key, value; gate, up; output


def test_data_parallel_reduces_the_adapters_gradients_and_nothing_else() -> None:
    found = program(data=8)
    assert {kind for kind, _ in found} == {"all-reduce"}
    widths = [D * n for n in JOINED] + [D] * 5 + [F] * 3  # A and B of seven weights by the width of their longer side
    assert arrays(found, "all-reduce") == dict(collections.Counter(R * n for n in widths))
    assert scalars(found) == 1  # the loss: the gradients' norm and whether all is finite are every device's own


def test_fsdp_gathers_each_base_weight_once_and_no_state() -> None:
    found = program(fsdp=8)
    weights = [D * D] * 4 + [D * F] * 3 + [D * V]  # the table is not gathered: its rows are looked up where they are
    factors = [D * n * R for n in JOINED[:2]] + [D * R] * ROW  # A of what reads the features, B of what makes them
    assert arrays(found, "all-gather") == dict(collections.Counter([*weights, *factors, B * T]))  # and the ids
    assert arrays(found, "all-reduce") == arrays(program(data=8), "all-reduce")
    assert max(n for kind, sizes in found if kind == "all-to-all" for n in sizes) <= B * T * D // 8
    assert scalars(found) <= 1 + 2 * 2  # factors of one shape that are split alike have one norm: A, and B


def test_fsdp_beside_tensor_parallel_gathers_each_devices_part_and_no_rows() -> None:
    """The table's rows are exchanged for its width: no device sees all rows, nor the whole of a weight."""
    long = 24  # else a weight's part has as many numbers as a device's activations
    found = program(tokens=long, data=2, fsdp=2, tensor=2)
    # The head's part forward and again backward; what is smaller are factors and the ids.
    parts = {n: count for n, count in arrays(found, "all-gather").items() if n > B * long}
    assert parts == {D * D // 2: 4, D * F // 2: 3, D * V // 2: 2}
    assert max(arrays(found, "all-to-all")) <= B * long * D // 8
    sums = arrays(found, "all-reduce")
    assert sums.pop(B * long * D // 4) == 6  # tensor parallel's own and the lookup's
    assert max(sums) <= B * long * R, sums


def test_fsdp_gathers_a_scanned_layer_at_a_time() -> None:
    """Forward and again backward, in the loop: never the stack of layers."""
    found = arrays(program(3, True, fsdp=8), "all-gather")
    assert found[D * D] == 2 * 4 and found[D * F] == 2 * 3 and found[D * V] >= 1, found
    assert max(n for n in found if n != D * V) == D * F, found


@pytest.mark.parametrize(("scan", "sizes"), [(True, {"fsdp": 8}), (False, {"fsdp": 2, "tensor": 4})],
                         ids=["scan", "tensor"])
def test_fsdp_gathers_codes_and_no_unpacked_weight(scan: bool, sizes: dict[str, int]) -> None:
    """Two codes in a byte; a float32 scale for 8 of them. What `tensor` cuts stays cut."""
    found = program(2 if scan else 1, scan, quant.NF4(block=8, double=False), **sizes)
    ways = sizes.get("tensor", 1)
    times = 2 if scan else 1  # forward, and again backward in the loop
    small, large = D * D // ways, D * F // ways
    assert arrays(found, "all-gather of codes") == {small // 2: 4 * times, large // 2: 3 * times}
    others = arrays(found, "all-gather")
    assert not {small, large} & others.keys() and {small // 8, large // 8} <= others.keys(), others


def test_tensor_parallel_adds_r_numbers_a_token_to_the_bases_own_reductions() -> None:
    found = program(tensor=8)
    assert {kind for kind, _ in found} == {"all-reduce"}  # no weight, factor or activation is gathered
    sums = arrays(found, "all-reduce")
    # The base's: out of attention and feed-forward, into them backward, the lookup, and the head backward.
    assert sums[B * T * D] == 6
    # x A of a row-sharded weight forward, dy B of a column-sharded one backward; the softmax's own is B T.
    assert sums[B * T * R] == COLUMN + ROW
    assert sums.keys() == {B * T * D, B * T * R, B * T}
    # Each of the former travels with the base's product.
    together = [sizes for kind, sizes in found if {B * T * R, B * T * D} <= set(sizes)]
    assert len(together) >= ROW
    assert scalars(found) <= 1 + 2 * 4  # B of D and of F columns, of query and of key and value, A of D and of F rows
