"""Slots, residents, the engine and its text, without a server: each text as if it were alone, whatever is beside it."""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving import alone, drawn, tokenizer_of_words

import lorajax as lj
from lorajax.io import adapter, peft
from lorajax.library import AdapterLibrary
from lorajax.models import adapter_names, model_from_hf
from lorajax.serve.engine import Busy, Engine, Request, Stopped
from lorajax.serve.residents import Refused, Residents
from lorajax.serve.shelf import Shelf
from lorajax.serve.text import Text
from lorajax.variants import IA3, DoRA, HydraLoRA, LoHa, LoRA

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "max_position_embeddings": 64}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], bool]] = {
    "gpt2, scanned": ({"model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2,
                       "n_positions": 64, "activation_function": "gelu_new"}, True),
    "mistral with a window": ({"model_type": "mistral", **SIZES, "num_key_value_heads": 1, "hidden_act": "silu",
                               "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window": 5}, False),
}  # fmt: skip
RULES: dict[str, Any] = {"plain": [("all-linear", LoRA(rank=2))], "dora": [("attention", DoRA(LoRA(rank=3)))]}
LENGTH, NEW = 32, 8
TEXTS: list[tuple[list[int], str | None, float, float, int]] = [
    ([3, 4, 5, 6, 7, 8, 9, 10, 11, 12], "plain", 0.0, 1.0, 0), ([13], "dora", 0.9, 0.7, 1),
    ([1, 2, 3, 4, 5, 6, 7, 8, 9] * 2, None, 0.0, 1.0, 0), ([7, 7, 7], "dora", 0.9, 0.7, 2**32 - 1),
    ([3, 4, 5, 6, 7, 8, 9, 10, 11, 12], "dora", 0.0, 1.0, 0), ([21, 22, 23, 24], "plain", 0.9, 0.7, 3),
]  # fmt: skip


class Tiny:
    """A model, its adapters, and an engine on them."""

    def __init__(self, name: str):
        settings, scan = MODELS[name]
        self.net: Any = model_from_hf(settings, scan_layers=scan)
        one = jnp.zeros((1, 2), jnp.int32)
        self.params = drawn(0, jax.jit(self.net.init)(jax.random.key(0), one), 0.4)
        self.sites = lj.sites(self.net.apply, self.params, one)
        self.adapters = {name: self.adapter(rules) for name, rules in RULES.items()}
        self.residents = Residents(self.sites, self.params, self.adapters.__getitem__, places=3, rank=3)
        self.engine = Engine(self.net, self.residents, slots=3, length=LENGTH, buckets=(16, LENGTH), queue=8)

    def adapter(self, rules: Any) -> tuple[Any, Any, Any]:
        adapt = lj.adapt(self.sites, rules)
        start, frozen = adapt.init(jax.random.key(1), self.params)
        return adapt, drawn(2, start, 0.2), frozen

    def alone(self) -> list[list[int]]:
        """Every text by the merged model, one at a time."""
        params = {name: adapt.merge(*rest) for name, (adapt, *rest) in self.adapters.items()} | {None: self.params}
        return [alone(self.net, params[name], ids, *how)[:NEW] for ids, name, *how in TEXTS]

    def ask(self, number: int, more: Any = lambda token: False) -> tuple[Request, list[int], list[Any]]:
        tokens: list[int] = []
        ends: list[Any] = []
        ids, name, temperature, top_p, seed = TEXTS[number]
        request = Request(ids, name, NEW, lambda token: tokens.append(token) or more(token), ends.append,
                          temperature=temperature, top_p=top_p, seed=seed)  # fmt: skip
        self.engine.submit(request)
        return request, tokens, ends

    def finish(self, asked: Any) -> None:
        while not all(ends for _, _, ends in asked):
            self.engine.turn()


@pytest.fixture(scope="module")
def mistral() -> Tiny:
    return Tiny("mistral with a window")


@pytest.fixture(scope="module")
def want(mistral: Tiny) -> list[list[int]]:
    return mistral.alone()


def test_a_scanned_gpt2_writes_what_each_writes_alone() -> None:
    """Six texts through three slots: other adapters, lengths and seeds beside them, and programs counted."""
    tiny = Tiny("gpt2, scanned")
    asked = [tiny.ask(number) for number in range(len(TEXTS))]
    tiny.finish(asked)
    assert [tokens for _, tokens, _ in asked] == tiny.alone()
    assert [ends for _, _, ends in asked] == [["length"]] * len(TEXTS)
    assert tiny.engine.compiled == {"prefill": 2, "decode": 1, "write": 1}
    c = tiny.engine.counts
    assert (c.tokens, c.rows, c.prompts) == (6 * NEW, 6 * NEW, 6) and c.steps < 6 * NEW / 2
    assert c.prompt_tokens == sum(len(ids) for ids, *_ in TEXTS)


def test_texts_come_and_go_and_nothing_of_them_stays(mistral: Tiny, want: list[list[int]]) -> None:
    """Rows full of NaN before, and beside, change nothing; a text that ended early or was cancelled frees its slot."""
    engine = mistral.engine
    engine._layers = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), engine._layers)
    asked = [mistral.ask(number) for number in (0, 3)]
    engine.turn()
    free = engine._running.index(None)
    engine._layers = jax.tree.map(lambda x: x.at[free].set(jnp.nan), engine._layers)
    engine.turn()
    stopped = mistral.ask(2, lambda token: True)
    engine.turn()
    assert stopped[1:] == (want[2][:1], ["stop"])
    gone, late = mistral.ask(5), mistral.ask(4)
    engine.turn()
    engine.cancel(gone[0])
    mistral.finish([*asked, gone, late])
    assert gone[1] == want[5][: len(gone[1])] and len(gone[1]) < NEW and gone[2] == ["cancelled"]
    assert [asked[0][1], asked[1][1], late[1]] == [want[0], want[3], want[4]]
    assert engine.load == (0, 0) and not mistral.residents._users


def test_full_stopping_and_failing(mistral: Tiny, want: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(mistral.net, mistral.residents, slots=3, length=LENGTH, buckets=mistral.engine.buckets, queue=2)
    engine._prefill, engine._decode = mistral.engine._prefill, mistral.engine._decode
    for size, words in ((LENGTH, "32 tokens of prompt and max_tokens=8.*slots hold 32 together"), (0, "0 tokens")):
        with pytest.raises(ValueError, match=words):
            engine.submit(Request([1] * size, None, NEW, lambda token: False, lambda reason: None))
    real, mistral.engine = mistral.engine, engine
    try:
        bad = mistral.ask(0, lambda token: 1 / 0)  # its own mistake
        after = mistral.ask(2)
        with pytest.raises(Busy, match="2 requests are waiting"):
            mistral.ask(3)
        mistral.finish([bad, after])
        assert isinstance(bad[2][0], ZeroDivisionError) and after[1] == want[2]
        with monkeypatch.context() as m:  # the program's: what ran is told, what comes next is not touched
            m.setattr(engine, "_decode", lambda *_: 1 / 0)
            failed = mistral.ask(2)
            mistral.finish([failed])
        assert isinstance(failed[2][0], RuntimeError) and "ZeroDivisionError" in str(failed[2][0])
        last = mistral.ask(3)
        engine.stop()
        with pytest.raises(Stopped, match="takes nothing new"):
            mistral.ask(2)
        engine.run()
        assert last[1] == want[3] and last[2] == ["length"]
    finally:
        mistral.engine = real
    with pytest.raises(ValueError, match="4 slots may need as many adapters at once, and the device holds 3"):
        Engine(mistral.net, mistral.residents, slots=4)
    with pytest.raises(ValueError, match=r"buckets=\[4, 8\]: the longest has to be length=32"):
        Engine(mistral.net, mistral.residents, slots=1, length=32, buckets=(8, 4))


def test_the_least_recently_used_gives_way_but_not_while_it_is_used(mistral: Tiny) -> None:
    reads: list[str] = []

    def read(name: str) -> Any:
        reads.append(name)
        return mistral.adapters["dora"]

    residents = Residents(mistral.sites, mistral.params, read, memory=2 * mistral.residents.size + 1, rank=3)
    assert residents.places == 2 and residents.take(None) == -1
    places = [residents.take(name) for name in ("a", "b", "a")]
    assert places == [0, 1, 0] and residents.held == ("b", "a")
    residents.give_back("a")
    with pytest.raises(RuntimeError, match="all 2 places are taken"):
        residents.take("c")
    residents.give_back("b")
    assert residents.take("c") == 1 and residents.held == ("a", "c") and reads == ["a", "b", "c"]
    with pytest.raises(ValueError, match="10 bytes hold no adapter of .* bytes: raise it, or lower rank=16"):
        Residents(mistral.sites, mistral.params, read, memory=10)


def test_adapters_that_cannot_share_the_program_say_why(mistral: Tiny) -> None:
    for rules, words in (
        ([(".*/query/kernel", LoHa(2))], "LoHa has no low-rank factors.*as_lora"),
        ([(".*/query/kernel", HydraLoRA(2))], "HydraLoRA weighs its update per token"),
        ([(".*/query/kernel", LoRA(2, initializer="pissa", fold=True))], "starts from another weight than the base"),
        ([(".*/query/kernel", LoRA(2)), (".*norm/scale", lj.Full())], "it trains .*norm/scale in full.*merge it"),
        ([(".*/down/kernel", IA3("in"))], "IA3 scales the inputs"),
        ([("params/head/kernel", LoRA(2))], "it adapts params/head/kernel, and this server holds adapters of params/l"),
        ([(".*/query/kernel", LoRA(4))], "it has rank 4, and this server holds ranks up to 3: start it with --rank=4"),
    ):  # fmt: skip
        mistral.adapters["odd"] = mistral.adapter(rules)
        with pytest.raises(Refused, match=words):
            mistral.residents.take("odd")
    gone = mistral.ask(0)
    gone[0].adapter = "later"
    mistral.engine.cancel(gone[0])
    mistral.residents.ready("later")
    assert mistral.residents._reading["later"].exception()
    mistral.engine.turn()  # what was read for it, a mistake here, is nobody's
    mistral.adapters["later"] = mistral.adapters["plain"]
    assert mistral.residents.take("later") >= 0
    mistral.residents.give_back("later")
    first, second = (mistral.ask(number) for number in (0, 1))
    for request, _, _ in (first, second):
        request.adapter = "missing"
    mistral.finish([first, second])
    assert all(isinstance(ends[0], KeyError) for _, _, ends in (first, second))


def test_a_shelf_finds_what_is_there_and_refuses_another_base(mistral: Tiny, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, mistral.sites, mistral.params, adapter_names(mistral.net.config))
    plain, dora = mistral.adapters["plain"], mistral.adapters["dora"]
    adapter.save(tmp_path / "run", *plain, base=shelf.library.base)
    adapter.save(tmp_path / "own", *dora)
    peft.write(tmp_path / "peft", *dora, shelf.names)
    shutil.copytree(tmp_path / "peft", tmp_path / "half.part")  # a writer is at it
    shelf.library.add("kept", *plain)
    shelf.library.add("kept", *dora)
    other = jax.tree.map(lambda x: x + 1, mistral.params)
    theirs = AdapterLibrary(tmp_path, shelf.library.adapt, other)
    theirs.add("theirs", *plain)
    adapter.save(tmp_path / "strange", *plain, base=theirs.base)
    assert [found.name for found in shelf.list()] == ["kept", "own", "peft", "run", "strange"]  # no fingerprint is read
    for name, want in {"run": plain, "own": dora, "peft": dora, "kept": dora, "kept@1": plain}.items():
        _, have, _ = shelf.read(shelf.find(name))
        jax.tree.map(np.testing.assert_array_equal, dict(have), dict(want[1]))
    for name in ("theirs", "strange"):
        with pytest.raises(adapter.AdapterMismatch, match="was trained on a base with fingerprint lj1:"):
            shelf.read(shelf.find(name))
    for name in ("gone", "half.part", "kept@3", "../run", ".run", ""):
        with pytest.raises(ValueError, match=r"no adapter '.*'; there are: kept, own, peft, run, strange"):
            shelf.find(name)
    (shelf.library.add("worn", *plain).folder / "lorajax_library.json").write_text("{")
    assert "worn" not in [found.name for found in shelf.list()]
    with pytest.raises(adapter.AdapterError, match="worn/1/lorajax_library.json' is not JSON"):
        shelf.find("worn")
    was = shelf.find("run")
    shutil.rmtree(was.folder)
    with pytest.raises(FileNotFoundError, match="adapter 'run' was removed"):
        shelf.read(was)
    adapter.save(tmp_path / "run", *dora, base=shelf.library.base)
    for file in (tmp_path / "run").iterdir():
        os.utime(file, ns=(was.version, was.version))  # as a copy or an archive may leave it
    assert shelf.find("run") != was


def test_text_shows_whole_characters_and_no_stop_string() -> None:
    """Against the whole text, cut; and what was shown once is never taken back."""
    tokenizer, rng = tokenizer_of_words(), np.random.default_rng(0)
    prompt = tokenizer.encode("the warm").ids
    for i in range(60):
        if i % 2:
            ids = rng.integers(0, tokenizer.get_vocab_size(), 20).tolist()
        else:
            ids = tokenizer.encode("ünïcödé 🦊 jumps over the 狐 too").ids
        whole = tokenizer.decode(ids)
        a = int(rng.integers(len(whole) - 3))
        stops = [whole[a : a + int(rng.integers(1, 4))], "jumps up"][: i % 3]
        text = Text(tokenizer, prompt, stops)
        shown = []
        for token in ids:
            shown.append(text.push(token))
            if text.stopped:
                break
        shown.append(text.rest())
        cut = min([whole.find(stop) for stop in stops if stop in whole], default=len(whole))
        assert "".join(shown) == whole[:cut] and text.stopped == any(stop in whole for stop in stops), (i, stops)
        assert i % 2 or not any("\ufffd" in piece for piece in shown)
