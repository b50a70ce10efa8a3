"""Packing: several examples in one row, so that rows are nearly full. What keeps them apart is in the batch.

`positions` restart with each example and `segments` number them; a model that is handed both attends within an example
only (`lorajax.models.decoder.CausalLM`), and no example's last token is asked for the next one's first.

Slots without a token, in percent, with SmolLM2's tokenizer and template, batches of 8 rows: packed into rows of 1024
tokens, and one by one in `Batches` of at most 8 lengths:

    gsm8k (6,768 examples)   2.6   8.5
    dolly (2,667 examples)   2.0  16.8
"""

from __future__ import annotations

import numpy as np

from lorajax.data.batches import permutation
from lorajax.data.supervised import Supervised


def pack(examples: Supervised, length: int, *, seed: int = 0) -> Supervised:
    """Rows of at most `length` tokens, each of whole examples, first fit by falling length (FFD: Johnson 1973; at most
    11/9 of the fewest rows, plus one).

    The number of rows and their lengths follow from the examples' lengths alone; which of equally long examples goes
    where depends on `seed`; in what order rows come, on the seed and the epoch of `Batches`, whose `padding()` is the
    share of slots that hold no token: ``Batches(pack(examples, 1024), 8, shapes=1).padding()``.

    Raises ValueError if an example is longer than `length`.
    """
    longest = int(examples.lengths.max())
    if longest > length:
        raise ValueError(f"an example has {longest} tokens, more than a row of {length}: give supervise(max_length="
                         f"{length}) or longer rows")  # fmt: skip
    order = permutation(len(examples.rows), seed)
    order = order[np.argsort(-examples.lengths[order], kind="stable")]
    row = first_fit(examples.lengths[order], length)
    by_row = np.argsort(row, kind="stable")
    flat = examples.take(order[by_row])
    first = np.searchsorted(row[by_row], np.arange(row.max() + 1))
    return flat._replace(offsets=np.append(flat.offsets[first], flat.offsets[-1]), rows=flat.rows[first])


def first_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """(n,) int64: the row of each, in the given order, which is the first that still has room."""
    room = np.full(len(lengths), capacity, np.int64)
    chosen = np.zeros(len(lengths), np.int64)
    used = 0
    for i, length in enumerate(lengths.tolist()):
        at = int(np.argmax(room[: used + 1] >= length))
        chosen[i] = at
        room[at] -= length
        used = max(used, at + 1)
    return chosen
