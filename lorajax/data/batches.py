"""Fixed-shape batches: length buckets, shuffling that depends on (seed, epoch) alone, any position in constant time.

Each batch holds ``batch_size`` examples, as in the papers, padded to one of a few lengths; so a jitted step compiles
once per length. An epoch is a plan, computed from the lengths alone: shuffle the rows, sort them by bucket (stable, so
they stay shuffled within a bucket), cut into batches, shuffle the batches. The shuffle of the rows has the run's seed,
that of the batches the epoch alone, so that runs which differ in their seed have the same padded length at every step
and can train side by side in one program (`lorajax.train.pack`). Only a batch that straddles two buckets
pays for the longer one. When the batch size does not divide the number of examples, the incomplete batch lies at the
short end, where its empty rows cost least, and comes last in the epoch.

Padding against number of lengths, in percent of all token slots (training splits, batches of 32, at most 128 tokens,
BERT's uncased WordPiece; qnli, mnli and qqp: samples of 11,803, 12,925 and 34,688 rows):

    shapes  cola  sst2  mrpc  rte   stsb  qnli  mnli  qqp   wnli  reviews
    4       19.1  29.6  13.2  13.2  23.2  17.2  21.9  21.0  19.3  21.2
    8        7.7  14.0   6.4   7.1  10.8   8.5  11.0   9.9  10.6  10.2
    12       3.8   8.3   4.1   4.8   7.0   5.4   7.1   6.2   8.3   6.4
    16       2.0   5.5   3.0   3.7   5.1   4.0   5.1   4.3   7.5   4.5
"""

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

Batch = dict[str, np.ndarray]


class Rows(Protocol):
    """Rows of token ids that batches are made of: `Tokens`, `Supervised` (packed or not), `Preferences`."""

    @property
    def pad_id(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens per row."""

    def batch(self, rows: np.ndarray, real: np.ndarray, length: int) -> Batch:
        """Arrays with a leading axis B from the rows (B,) int64, padded to `length` tokens; real: (B,) bool, False for
        the empty rows of a batch, which repeat a real one and must count nowhere."""


class Position(NamedTuple):
    """Where a stream stands: the batch that comes next. Plain integers, for JSON or a checkpoint."""

    epoch: int = 0
    batch: int = 0


class Batches:
    """The batches of one split, on one of several processes.

    A batch is a dict of arrays, with B = batch_size / process_count rows and a length L in ``lengths``; the source's
    ``batch`` says which. ``weight`` is 0 in an empty row, which repeats a real one, so that no attention row or mean is
    over nothing; losses and metrics must multiply by ``weight``.

    Every example is in exactly one batch per epoch. Process p holds rows [p B, (p + 1) B) of each global
    batch; steps and shapes are the same on all processes, and the global batches do not depend on their number.

    Args:
        tokens: the tokenised split, or another source.
        batch_size: examples per global batch.
        seed: any integer; used only when ``shuffle``.
        shuffle: False gives the same order in each epoch, short batches first: for evaluation.
        shapes: at most this many lengths, chosen by ``bucket_lengths``.
        lengths: the lengths themselves, instead of ``shapes``.
        together: so many batches share a call (``lorajax.data.feed.calls``) and are padded to the longest of them, so
            with several lengths an epoch is shuffled in groups of them that are of one length.
        process_index, process_count: ``jax.process_index()`` and ``jax.process_count()``.

    Raises:
        ValueError: no examples; ``batch_size`` not divisible by ``process_count``; ``lengths`` too short.
    """

    def __init__(
        self,
        tokens: Rows,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        shapes: int = 8,
        lengths: Sequence[int] | None = None,
        together: int = 1,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if len(tokens.lengths) == 0:
            raise ValueError("there are no examples to make batches of")
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(f"batch_size={batch_size} does not divide among {process_count} processes")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index={process_index} is not in 0..{process_count - 1}")
        longest = int(tokens.lengths.max())
        if lengths is not None and max(lengths, default=0) < longest:
            raise ValueError(f"lengths={list(lengths)} cannot hold an example of {longest} tokens; add {longest}")
        self.tokens = tokens
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.together = together
        self.lengths = tuple(sorted(lengths)) if lengths else bucket_lengths(tokens.lengths, shapes, batch_size)
        self.steps = -(-len(tokens.lengths) // batch_size)
        self._buckets = np.searchsorted(self.lengths, tokens.lengths)
        self._own: slice | np.ndarray = slice(
            batch_size // process_count * process_index, batch_size // process_count * (process_index + 1)
        )
        self._planned: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        """Steps per epoch."""
        return self.steps

    def part(self, own: Sequence[int] | np.ndarray) -> "Batches":
        """These batches with the rows at the positions `own` of each alone: a process' share of any pattern."""
        mine = copy.copy(self)
        mine._own = np.asarray(own)
        return mine

    def padding(self) -> float:
        """Fraction of an epoch's token slots (empty rows included) without a token, as calls pad them. With one batch
        in a call it is the same in every epoch."""
        padded, n = self._plan(0)[1], self.together
        slots = sum(min(n, self.steps - i) * int(padded[i : i + n].max()) for i in range(0, self.steps, n))
        return 1 - float(self.tokens.lengths.sum()) / (self.batch_size * slots)

    @property
    def longest(self) -> int:
        """The first step whose batch is padded to the greatest length: it needs the most memory."""
        return int(np.argmax(self._plan(0)[1]))

    def position(self, step: int) -> Position:
        """The position after ``step`` batches."""
        return Position(*divmod(step, self.steps))

    def rows(self, epoch: int, index: int) -> np.ndarray:
        """(B,) int64: this process' examples, by row of the split, in batch ``index``; -1 for an empty row."""
        if not 0 <= index < self.steps:
            raise IndexError(f"there is no batch {index} in an epoch of {self.steps}")
        return self._plan(epoch)[0][index, self._own]

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch ``index`` of an epoch, a pure function of its arguments. Raises IndexError beyond the epoch."""
        rows = self.rows(epoch, index)
        grid, padded = self._plan(epoch)
        real = rows >= 0
        return self.tokens.batch(np.where(real, rows, grid[index, 0]), real, int(padded[index]))

    def padded(self, epoch: int, index: int) -> int:
        """L of batch ``index`` of an epoch, without making it."""
        return int(self._plan(epoch)[1][index])

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """One pass, e.g. for evaluation."""
        return (self.batch(epoch, index) for index in range(self.steps))

    def stack(self, group: Sequence[Batch]) -> Batch:
        """One batch with a new leading axis; arrays of tokens are padded to the longest L, their last axis."""
        longest = max(batch["input_ids"].shape[-1] for batch in group)

        def padded(name: str, x: np.ndarray) -> np.ndarray:
            if x.ndim < 2 or x.shape[-1] == longest:
                return x
            value = self.tokens.pad_id if name == "input_ids" else 0
            return np.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, longest - x.shape[-1]),), constant_values=value)

        return {name: np.stack([padded(name, batch[name]) for batch in group]) for name in group[0]}

    def stream(self, epoch: int = 0, batch: int = 0) -> "Stream":
        """Batches without end from a position; seeking does no work on data."""
        return Stream(self, Position(epoch, batch))

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (steps, batch_size), -1 where empty, and padded length (steps,) of an epoch's batches, in order."""
        if self._planned is None or self._planned[0] != epoch:
            count = len(self._buckets)
            empty = self.steps * self.batch_size - count
            rows = permutation(count, self.seed, epoch, 0) if self.shuffle else np.arange(count)
            rows = rows[np.argsort(self._buckets[rows], kind="stable")]
            grid = np.concatenate([np.full(empty, -1), rows]).reshape(self.steps, self.batch_size)
            padded = np.asarray(self.lengths)[self._buckets[grid[:, -1]]]
            grid[0] = np.roll(grid[0], -empty)
            order = self._order(epoch, empty > 0)
            self._planned = (epoch, grid[order], padded[order])
        return self._planned[1:]

    def _order(self, epoch: int, incomplete: bool) -> np.ndarray:
        """(steps,) batches, which are numbered by length, in the epoch's order; an incomplete one, number 0, last."""
        n = self.together
        if not self.shuffle:
            return np.append(np.arange(incomplete, self.steps), np.arange(int(incomplete)))
        if n == 1 or len(self.lengths) == 1 or self.steps < 2 * n:
            order = permutation(self.steps - incomplete, epoch, 1) + incomplete
            return np.append(order, 0) if incomplete else order
        # Calls run on over the end of an epoch: what it shares with its neighbours are its shortest batches.
        first = -epoch * self.steps % n
        last = (self.steps - first) % n or n * incomplete
        groups = np.arange(first + last, self.steps).reshape(-1, n)
        groups = groups[permutation(len(groups), epoch, 1)]
        return np.concatenate([np.arange(last, last + first), groups.ravel(), np.arange(last)[::-1]])


class Stream(Iterator[Batch]):
    """Endless iterator over ``Batches``; ``position`` is the next batch, which is all there is to save and restore."""

    def __init__(self, batches: Batches, position: Position):
        if position.epoch < 0 or not 0 <= position.batch < batches.steps:
            raise ValueError(f"{position} is not in epochs of {batches.steps} batches; was the batch size changed?")
        self.batches = batches
        self.position = position

    def __next__(self) -> Batch:
        epoch, index = self.position
        batch = self.batches.batch(epoch, index)
        self.position = Position(epoch, index + 1) if index + 1 < self.batches.steps else Position(epoch + 1, 0)
        return batch


def bucket_lengths(lengths: np.ndarray, shapes: int, batch_size: int) -> tuple[int, ...]:
    """The at most ``shapes`` padded lengths that minimise the token slots of an epoch.

    Exact, by dynamic programming over the distinct lengths, with the batches that straddle two buckets and the empty
    rows counted as ``Batches`` lays them out: the batches padded to l, when the next shorter length is k, are those
    whose longest row is in (k, l]. O(shapes d^2) time for d distinct lengths.

    Args:
        lengths: (n,) tokens per example, n >= 1.

    Returns:
        ascending lengths; the last is the longest example's.
    """
    if shapes < 1:
        raise ValueError(f"shapes={shapes}: at least one length is needed")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: a batch has at least one example")
    candidates = np.unique(lengths)
    count = len(candidates)
    empty = -len(lengths) % batch_size
    # ended[j]: batches whose rows all are among the j shortest candidates
    ended = (np.searchsorted(np.sort(lengths), candidates, side="right") + empty) // batch_size
    ended = np.concatenate([[0], ended])
    # cost[i, j]: candidates i..j padded to candidate j
    cost = (candidates * (ended[None, 1:] - ended[:-1, None])).astype(np.float64)
    cost[np.tril_indices(count, -1)] = np.inf
    best = np.full(count + 1, np.inf)  # best[j]: cheapest cover of the j shortest candidates
    best[0] = 0
    choices = []
    for _ in range(min(shapes, count)):
        total = best[:-1, None] + cost
        choices.append(np.argmin(total, axis=0))
        best[1:] = np.min(total, axis=0)
    chosen, end = [], count
    for choice in reversed(choices):
        if end:
            chosen.append(int(candidates[end - 1]))
            end = int(choice[end - 1])
    return tuple(reversed(chosen))


def fewest_lengths(lengths: np.ndarray, shapes: int, batch_size: int, padding: float) -> tuple[int, ...]:
    """The fewest padded lengths, at most ``shapes``, that leave at most the share ``padding`` of the token slots of an
    epoch without a token; ``shapes`` of them where that cannot be, or for a padding of 0.

    lengths: (n,) tokens per example. batch_size: examples that are padded alike, those of all batches of a call.
    """
    chosen, low, high = bucket_lengths(lengths, shapes, batch_size), 1, shapes
    while padding and low < high:
        middle = (low + high) // 2
        fewer = bucket_lengths(lengths, middle, batch_size)
        if 1 - lengths.sum() / (batch_size * _padded(lengths, fewer, batch_size)) <= padding:
            chosen, high = fewer, middle
        else:
            low = middle + 1
    return chosen


def _padded(lengths: np.ndarray, to: tuple[int, ...], batch_size: int) -> float:
    """Sum of the padded lengths of an epoch's batches, as `Batches` lays them out."""
    longest = np.sort(lengths)[::-1][::batch_size]
    return float(np.asarray(to)[np.searchsorted(to, longest)].sum())


def permutation(count: int, *salt: int) -> np.ndarray:
    """(count,) int64 permutation from count and salt alone, by splitmix64: no library's random stream to change."""
    state = np.zeros(1, np.uint64)
    for value in salt:
        state = _mix(state ^ np.uint64(value % 2**64))
    return np.argsort(_mix(state + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)), kind="stable")


def _mix(state: np.ndarray) -> np.ndarray:
    """One step of splitmix64 (Steele, Lea and Flood, 2014), elementwise on uint64."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
