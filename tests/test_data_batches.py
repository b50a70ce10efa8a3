"""Tokens and batches: shapes, masks, every example once, determinism, resuming, processes, padding."""

import itertools
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from lorajax.data import (
    Batches,
    Examples,
    Position,
    Tokens,
    bucket_lengths,
    fewest_lengths,
    load_tokenizer,
    tokenize,
)
from lorajax.data.feed import calls, widths

WORDS = "the quick brown fox jumps over lazy dogs while seven wizards watch".split()


@pytest.fixture(scope="module")
def tokenizer():
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer()
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trained.train_from_iterator(
        [" ".join(WORDS)] * 9, trainers.WordPieceTrainer(special_tokens=special, vocab_size=200)
    )
    pieces = [(token, trained.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    trained.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=pieces
    )
    return trained


def made_up(count, longest=40, seed=0):
    """Tokens whose ids say which example they are of: example i is i + 1 repeated, pad is 0."""
    lengths = np.random.RandomState(seed).geometric(0.1, count).clip(2, longest)
    labels = np.arange(count, dtype=np.int32)
    ids = np.repeat(labels + 1, lengths).astype(np.int32)
    return Tokens(ids, np.ones_like(ids), np.concatenate([[0], np.cumsum(lengths)]), labels, 0, 0)


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], strict=True)


def test_tokenize(tokenizer):
    tokens = tokenize(Examples((["The fox", "seven lazy wizards"],), np.array([1, 0], np.int32)), tokenizer)
    words = [tokenizer.id_to_token(i) for i in tokens.ids]
    assert words == "[CLS] the fox [SEP] [CLS] seven lazy wizards [SEP]".split()
    assert tokens.offsets.tolist() == [0, 4, 9] and tokens.lengths.tolist() == [4, 5]
    assert tokens.types.tolist() == [0] * 9 and tokens.truncated == 0 and tokens.pad_id == 0
    assert tokens.ids.dtype == tokens.types.dtype == np.int32


def test_tokenize_pairs_cuts_the_longer_text(tokenizer):
    pair = Examples((["fox", "the fox"], ["over the lazy dogs", "jumps"]), np.array([0.5, 1.0], np.float32))
    tokens = tokenize(pair, tokenizer, max_length=7)
    words = [tokenizer.id_to_token(i) for i in tokens.ids]
    assert words == "[CLS] fox [SEP] over the lazy [SEP] [CLS] the fox [SEP] jumps [SEP]".split()
    assert tokens.types.tolist() == [0, 0, 0, 1, 1, 1, 1] + [0, 0, 0, 0, 1, 1]
    assert tokens.truncated == 1 and tokens.labels.dtype == np.float32
    assert tokenizer.truncation is None and tokenizer.padding is None, "the caller's tokenizer was changed"
    with pytest.raises(ValueError, match="max_length=3 leaves no room for text: 3 special tokens"):
        tokenize(pair, tokenizer, max_length=3)


def test_settings_in_the_tokenizer_file_do_not_matter(tokenizer, tmp_path):
    examples = Examples((["the fox", "seven lazy wizards watch"],), np.array([1, 0], np.int32))
    plain = tokenize(examples, tokenizer)
    padded = Tokenizer.from_str(tokenizer.to_str())
    padded.enable_padding(length=64, pad_id=0, pad_token="[PAD]")
    padded.enable_truncation(3)
    padded.save(str(tmp_path / "tokenizer.json"))
    again = tokenize(examples, load_tokenizer(tmp_path))
    for left, right in zip(plain, again, strict=True):
        np.testing.assert_array_equal(left, right)


def test_pad_token(tmp_path):
    words = {"<fill>": 0, "a": 1, "?": 2}
    Tokenizer(models.WordLevel(words, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    examples = Examples((["a"],), np.array([0], np.int32))
    with pytest.raises(ValueError, match=r"names no padding token.*<pad>.*enable_padding"):
        tokenize(examples, load_tokenizer(tmp_path))
    for token in ("a", {"content": "a"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": token}))
        assert tokenize(examples, load_tokenizer(tmp_path)).pad_id == 1


def test_missing_tokenizer_says_what_is_there(tmp_path):
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json \(vocab.txt\).*save_pretrained"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_tokenizer(tmp_path / "gone")


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count, batch_size", [(1, 4), (4, 4), (5, 4), (203, 8), (208, 8), (3, 1)])
def test_every_example_once_in_fixed_shapes(count, batch_size, shuffle):
    tokens = made_up(count)
    batches = Batches(tokens, batch_size, shapes=4, shuffle=shuffle)
    assert len(batches) == -(-count // batch_size) and len(batches.lengths) <= 4
    for epoch in range(3):
        seen = []
        for index, batch in enumerate(batches.epoch(epoch)):
            length = batch["input_ids"].shape[1]
            assert length in batches.lengths
            rows = batches.rows(epoch, index)
            np.testing.assert_array_equal(batch["weight"], (rows >= 0).astype(np.float32), strict=True)
            for name in ("input_ids", "attention_mask", "token_type_ids"):
                assert batch[name].shape == (batch_size, length) and batch[name].dtype == np.int32
            for slot, row in enumerate(rows):
                source = row if row >= 0 else batch["label"][slot]  # an empty row is a copy of a real one
                assert source in rows and batch["label"][slot] == source
                n = tokens.lengths[source]
                assert batch["attention_mask"][slot].tolist() == [1] * n + [0] * (length - n)
                assert batch["input_ids"][slot].tolist() == [source + 1] * n + [0] * (length - n)
                assert batch["token_type_ids"][slot].tolist() == batch["attention_mask"][slot].tolist()
            seen += batch["label"][batch["weight"] > 0].tolist()
            assert batch["weight"].all() or index == len(batches) - 1, "only the last batch has empty rows"
        assert sorted(seen) == list(range(count))


def test_depends_on_seed_and_epoch_alone():
    def order(seed, epoch, **options):
        return np.concatenate([b["label"] for b in Batches(made_up(64), 8, seed=seed, **options).epoch(epoch)]).tolist()

    one = Batches(made_up(64), 8, seed=1)
    ahead = [batch["label"] for batch in one.epoch(5)]  # going elsewhere first changes nothing
    assert len(ahead) == 8 and [b["label"].tolist() for b in one.epoch(2)] == [
        b["label"].tolist() for b in Batches(made_up(64), 8, seed=1).epoch(2)
    ]
    orders = {(seed, epoch): tuple(order(seed, epoch)) for seed in (0, 1, -1, 2**40) for epoch in range(3)}
    assert len(set(orders.values())) == len(orders)
    assert order(0, 0, shuffle=False) == order(7, 3, shuffle=False)


def test_shuffle_is_pinned():
    """splitmix64 re-derived with Python integers: no library's random stream can change a run."""

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    assert mix(0) == 0xE220A8397B1DCDAF  # first output of the reference implementation for seed 0

    def permutation(count, *salt):
        state = 0
        for value in salt:
            state = mix(state ^ value % 2**64)
        return sorted(range(count), key=lambda i: mix((state + i * 0x9E3779B97F4A7C15) % 2**64))

    lengths = np.full(12, 3)
    labels = np.arange(12, dtype=np.int32)
    tokens = Tokens(np.ones(36, np.int32), np.ones(36, np.int32), np.arange(13) * 3, labels, 0, 0)
    assert bucket_lengths(lengths, 4, 3) == (3,)
    rows = permutation(12, -5, 9, 0)
    expected = [rows[3 * i : 3 * i + 3] for i in permutation(4, 9, 1)]
    assert [b["label"].tolist() for b in Batches(tokens, 3, seed=-5).epoch(9)] == expected


def test_runs_of_all_seeds_have_the_same_length_at_every_step():
    seeds = [Batches(made_up(100), 8, seed=seed, shapes=3) for seed in range(4)]
    for epoch in range(2):
        shapes = [[b["input_ids"].shape for b in batches.epoch(epoch)] for batches in seeds]
        assert shapes[0] == shapes[1] == shapes[2] == shapes[3]
    assert len(set(shapes[0])) == 3
    labels = {tuple(batches.batch(0, 0)["label"]) for batches in seeds}
    assert len(labels) == 4


def test_shuffle_is_uniform():
    """Each example is equally often first of four (one bucket, batches of one); 5 standard deviations of the count."""
    tokens = Tokens(np.ones(8, np.int32), np.ones(8, np.int32), np.arange(5) * 2, np.arange(4, dtype=np.int32), 0, 0)
    firsts = np.bincount([Batches(tokens, 1, seed=s).batch(0, 0)["label"][0] for s in range(4000)], minlength=4)
    assert np.abs(firsts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75), firsts


def test_mixes_examples_across_epochs():
    """Batch mates differ between epochs, also though lengths stay."""
    batches = Batches(made_up(64), 8, shapes=2)
    mates = [{frozenset(b["label"].tolist()) for b in batches.epoch(epoch)} for epoch in range(2)]
    assert len(mates[0] & mates[1]) <= 1


@pytest.mark.parametrize("done", [0, 1, 6, 7, 8, 20])
def test_resumes_where_it_stopped(done):
    def stream():
        return Batches(made_up(50), 8, seed=3)

    whole = list(itertools.islice(stream().stream(), 25))
    first = stream().stream()
    for _ in range(done):
        next(first)
    saved = json.loads(json.dumps(first.position))
    assert Position(*saved) == stream().position(done) == Position(*divmod(done, 7))
    rest = list(itertools.islice(stream().stream(*saved), 25 - done))
    for left, right in zip(whole[done:], rest, strict=True):
        same(left, right)


def test_seeking_touches_no_text():
    """Position 10^12 costs what position 0 costs: no batch before it is made."""
    batches = Batches(made_up(50), 8)
    same(next(batches.stream(10**12, 6)), batches.batch(10**12, 6))
    with pytest.raises(ValueError, match=r"Position\(epoch=0, batch=7\) is not in epochs of 7 batches.*batch size"):
        batches.stream(0, 7)
    with pytest.raises(IndexError, match="no batch 7 in an epoch of 7"):
        batches.batch(0, 7)


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_partition_the_global_batch(process_count):
    tokens = made_up(50)
    whole = Batches(tokens, 8, seed=2)
    parts = [Batches(tokens, 8, seed=2, process_index=i, process_count=process_count) for i in range(process_count)]
    assert {len(part) for part in parts} == {7} and {part.lengths for part in parts} == {whole.lengths}
    for index in range(7):
        pieces = [part.batch(1, index) for part in parts]
        same({name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}, whole.batch(1, index))


def test_wrong_arguments():
    tokens = made_up(9)
    with pytest.raises(ValueError, match="batch_size=8 does not divide among 3 processes"):
        Batches(tokens, 8, process_count=3)
    with pytest.raises(ValueError, match=r"process_index=2 is not in 0\.\.1"):
        Batches(tokens, 8, process_index=2, process_count=2)
    longest = tokens.lengths.max()
    with pytest.raises(ValueError, match=rf"lengths=\[3\] cannot hold an example of {longest} tokens; add {longest}"):
        Batches(tokens, 8, lengths=[3])
    with pytest.raises(ValueError, match="shapes=0"):
        Batches(tokens, 8, shapes=0)
    with pytest.raises(ValueError, match="no examples"):
        Batches(made_up(9)._replace(labels=np.zeros(0, np.int32), offsets=np.zeros(1, np.int64)), 8)


def test_given_lengths():
    batches = Batches(made_up(50), 8, lengths=[64, 16, 8])
    assert batches.lengths == (8, 16, 64)
    assert {b["input_ids"].shape[1] for b in batches.epoch()} <= {8, 16, 64}


@pytest.mark.parametrize("count, batch_size", [(50, 8), (64, 8), (7, 16), (300, 32)])
@pytest.mark.parametrize("shapes", [1, 2, 3])
def test_bucket_lengths_are_optimal(count, batch_size, shapes):
    """Against all choices of lengths, each laid out and counted from its batches."""
    tokens = made_up(count, longest=12)
    distinct = sorted(set(tokens.lengths.tolist()))

    def slots(lengths):
        return sum(b["input_ids"].size for b in Batches(tokens, batch_size, lengths=lengths).epoch())

    choices = (c for k in range(1, shapes + 1) for c in itertools.combinations(distinct, k) if c[-1] == distinct[-1])
    best = min(slots(choice) for choice in choices)
    chosen = Batches(tokens, batch_size, shapes=shapes)
    assert slots(chosen.lengths) == best and len(chosen.lengths) <= shapes
    for epoch in range(2):
        size = sum(b["attention_mask"].size for b in chosen.epoch(epoch))
        real = sum(int((b["attention_mask"] * b["weight"][:, None]).sum()) for b in chosen.epoch(epoch))
        assert size == best and chosen.padding() == pytest.approx(1 - real / size, rel=1e-12)


@pytest.mark.parametrize("count, batch_size, together", [(203, 8, 4), (208, 8, 4), (64, 8, 4), (331, 4, 8), (40, 8, 4)])
def test_batches_that_share_a_call_have_one_length(count, batch_size, together):
    """All but those around the ends of a bucket and of an epoch, over which calls run on; each example once."""
    batches = Batches(made_up(count), batch_size, shapes=3, together=together)
    epochs, steps = 6, len(batches)
    lengths, seen = [], []
    for epoch in range(epochs):
        for index, batch in enumerate(batches.epoch(epoch)):
            lengths.append(batch["input_ids"].shape[1])
            seen += batch["label"][batch["weight"] > 0].tolist()
            assert batch["weight"].all() or index == steps - 1, "only the last batch has empty rows"
    assert sorted(seen) == sorted([*range(count)] * epochs)
    calls = [lengths[i : i + together] for i in range(0, epochs * steps, together)]
    mixed = sum(len(set(call)) > 1 for call in calls)
    assert mixed <= epochs * (len(batches.lengths) - 1) + epochs
    alone = Batches(made_up(count), batch_size, lengths=batches.lengths)
    shuffled = [b["input_ids"].shape[1] for epoch in range(epochs) for b in alone.epoch(epoch)]
    loose = sum(max(shuffled[i : i + together]) for i in range(0, epochs * steps, together))
    assert sum(map(max, calls)) < loose or (steps < 2 * together and sum(map(max, calls)) == loose)
    first = [max(lengths[i : min(i + together, steps)]) * min(together, steps - i) for i in range(0, steps, together)]
    assert batches.padding() == pytest.approx(1 - made_up(count).lengths.sum() / (batch_size * sum(first)))
    orders = {tuple(lengths[e * steps : (e + 1) * steps]) for e in range(epochs)}
    assert len(orders) > 1 or steps < 2 * together + 2, "groups are shuffled"


def test_the_order_is_the_same_for_one_length_or_one_batch_a_call():
    one = [b["label"].tolist() for b in Batches(made_up(64), 8, shapes=1).epoch(1)]
    assert one == [b["label"].tolist() for b in Batches(made_up(64), 8, shapes=1, together=4).epoch(1)]


@pytest.mark.parametrize("padding", [0.3, 0.1, 0.05])
def test_fewest_lengths(padding):
    """As few as any choice that leaves so little padding, counted from batches."""
    tokens = made_up(400, longest=24)

    def waste(shapes):
        return Batches(tokens, 16, shapes=shapes).padding()

    found = fewest_lengths(tokens.lengths, 24, 16, padding)
    assert Batches(tokens, 16, lengths=found).padding() <= padding
    assert len(found) == next(s for s in range(1, 25) if waste(s) <= padding)
    assert found == bucket_lengths(tokens.lengths, len(found), 16)
    assert fewest_lengths(tokens.lengths, 3, 16, 0.0) == bucket_lengths(tokens.lengths, 3, 16)
    assert fewest_lengths(tokens.lengths, 2, 16, 1e-6) == bucket_lengths(tokens.lengths, 2, 16)


@pytest.mark.parametrize("together", [1, 4])
def test_the_widths_of_a_run_are_known_before_its_batches(together):
    batches = Batches(made_up(99), 8, shapes=5, together=together)
    steps, made, seen = range(0, 2 * len(batches), together), calls(batches, steps_per_call=together), {}
    for step in steps:
        seen.setdefault(made(step)["input_ids"].shape[-1], step)
    assert widths(batches, steps, together) == seen and len(seen) > 2
