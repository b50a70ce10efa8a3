"""A library of adapters: versions, search, the cache on the device, one program for all, concurrency, refusals."""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from composing import PARAMS, TOKENS, model, trained

import lorajax as lj
from lorajax.io import adapter
from lorajax.library import AdapterLibrary
from lorajax.variants import DoRA, LoHa, LoRA

FORM = lj.adapt(trained(0, LoRA(rank=1)).adapt.sites,
                [("stack", LoRA(rank=6, alpha=12.0)), ("head", LoRA(rank=4, alpha=8.0)), ("bias", lj.Full())])
ONES = {
    "small": trained(1, [("head", LoRA(rank=1, alpha=2.0))]),
    "wide": trained(2, [("stack|head", LoRA(rank=3, rslora=True)), ("bias", lj.Full())]),
    "dora": trained(3, [("stack", DoRA(LoRA(rank=2)))]),
    "loha": trained(4, [("stack", LoHa(2))]),
}  # fmt: skip


@pytest.fixture
def library(tmp_path: Path) -> Any:
    made = AdapterLibrary(tmp_path / "adapters", FORM, PARAMS)
    for i, (name, one) in enumerate(ONES.items()):
        made.add(name, *one, metrics={"accuracy": 0.5 + 0.1 * i})
    yield made
    made.close()


def test_one_program_serves_all_of_them(library: Any) -> None:
    """Other variants, ranks, scales and targets: the program is traced once, and answers as each adapter alone."""
    traces = []

    @jax.jit
    def run(trainable: Any, frozen: Any, tokens: Any) -> Any:
        traces.append(1)
        return lj.lift(model)(FORM.bind(trainable, frozen), tokens)

    for name, one in ONES.items():
        want = model(one.adapt.merge(one.trainable, one.frozen), TOKENS)
        np.testing.assert_allclose(run(library.get(name), library.frozen, TOKENS), want, rtol=1e-3, atol=1e-4)
        assert np.abs(want - model(PARAMS, TOKENS)).max() > 0.01
    assert len(traces) == 1 and run._cache_size() == 1


def test_versions_search_and_removal(library: Any, tmp_path: Path) -> None:
    again = library.add("small", *ONES["small"], metrics={"accuracy": 0.95})
    assert again.id == "small@2" and library.find("small").version == 2 and library.find("small@1").version == 1
    assert [e.id for e in library.list()] == ["dora@1", "loha@1", "small@1", "small@2", "wide@1"]
    good = library.search(where=lambda e: e.metrics["accuracy"] > 0.65)
    assert [e.id for e in good] == ["dora@1", "loha@1", "small@2"]
    assert [e.name for e in library.search("*a*")] == ["dora", "loha", "small"]
    library.remove("small")
    assert library.find("small").version == 1
    second = AdapterLibrary([tmp_path / "more", tmp_path / "adapters"], FORM, PARAMS)
    assert second.add("small", *ONES["small"]).folder == tmp_path / "more/small/3"
    assert [e.id for e in second.list()] == ["dora@1", "loha@1", "small@1", "small@3", "wide@1"]
    with pytest.raises(ValueError, match=r"no adapter 'smal' in .*: the nearest is 'small@1'"):
        library.find("smal")
    with pytest.raises(ValueError, match=r"name='../x': letters, digits"):
        library.add("../x", *ONES["small"])


def test_metrics_are_what_a_file_gives_back(library: Any, tmp_path: Path) -> None:
    """Of JAX and NumPy too; and what JSON cannot hold leaves nothing behind."""
    metrics = {"accuracy": jnp.float32(0.5), "step": np.int64(3), "each": jnp.arange(2), "on": {"rte": np.float32(1)}}
    entry = library.add("measured", *ONES["small"], metrics=metrics)
    assert entry.metrics == {"accuracy": 0.5, "step": 3, "each": [0, 1], "on": {"rte": 1.0}}
    assert library.find("measured") == entry
    with pytest.raises(ValueError, match="metrics hold a set, which JSON cannot"):
        library.add("other", *ONES["small"], metrics={"tasks": {"rte"}})
    assert not list((tmp_path / "adapters").glob("other*"))


def test_the_number_of_a_removed_version_is_not_given_again(library: Any, tmp_path: Path) -> None:
    """Another library that holds the removed one would go on answering with it."""
    library.add("small", *ONES["wide"])
    other = AdapterLibrary(tmp_path / "adapters", FORM, PARAMS)
    other.get("small@2")
    library.remove("small@2")
    assert library.add("small", *ONES["small"]).id == "small@3"
    new, old = other.get("small"), library.get("small@1")
    jax.tree.map(np.testing.assert_array_equal, new, old)
    library.remove("small")
    assert library.add("small", *ONES["small"]).id == "small@4" and library.find("small@1")
    with pytest.raises(ValueError, match="no adapter 'small@2'"):
        other.find("small@2")
    assert not list((tmp_path / "adapters/small").glob(".gone-*/*"))


def test_the_least_recently_used_gives_way_and_what_is_pinned_stays(tmp_path: Path) -> None:
    one = AdapterLibrary(tmp_path, FORM, PARAMS)
    for name in ("a", "b", "c"):
        one.add(name, *ONES["small"])
    assert one.size == 4 * (2 * (36 + 36) + 28 + 16 + 7)  # float32: two layers of rank 6, head of rank 4, bias
    small = AdapterLibrary(tmp_path, FORM, PARAMS, budget=2 * one.size + 1)
    first = small.get("a")
    assert small.get("a") is first  # held, not read again
    small.get("b")
    small.get("a")
    small.get("c")
    assert small.on_device == ("a@1", "c@1")
    small.pin("a")
    small.get("b")
    assert small.on_device == ("a@1", "b@1")
    small.pin("b")
    with pytest.raises(ValueError, match=r"no room for c@1: 2 pinned adapters of \d+ bytes fill the budget"):
        small.get("c")
    small.unpin("b")
    small.get("c")
    assert small.on_device == ("a@1", "c@1")
    one.add("a", *ONES["small"])
    small.unpin("a")  # the version that was pinned, not the newest
    small.get("b")
    assert small.on_device == ("c@1", "b@1")
    with pytest.raises(ValueError, match="budget=10 bytes do not hold one adapter of"):
        AdapterLibrary(tmp_path, FORM, PARAMS, budget=10)


def test_loads_in_the_background_once(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    go, loads = threading.Event(), []
    load = library._load

    def slow(entry: Any) -> Any:
        loads.append(entry.id)
        assert go.wait(60)
        return load(entry)

    monkeypatch.setattr(library, "_load", slow)
    futures = [library.prefetch("wide") for _ in range(3)]
    assert not futures[0].done()
    go.set()
    assert library.get("wide") is futures[2].result()
    assert loads == ["wide@1"]


def test_another_base_and_another_form_are_refused(library: Any, tmp_path: Path) -> None:
    other = {**PARAMS, "head": PARAMS["head"] + 0.1}
    theirs = AdapterLibrary(tmp_path / "adapters", FORM, other)
    assert theirs.search() == [] and len(theirs.list()) == 4
    with pytest.raises(adapter.AdapterMismatch, match=r"small@1 was trained on a base with fingerprint lj1:.*lj1:"):
        theirs.get("small")
    narrow = AdapterLibrary(tmp_path / "adapters", lj.adapt(FORM.sites, [("head", LoRA(rank=2))]), PARAMS)
    with pytest.raises(adapter.AdapterMismatch, match=r"dora@1 adapts stack, and the common form"):
        narrow.get("dora")
    low = AdapterLibrary(tmp_path / "adapters", lj.adapt(FORM.sites, [("stack|head", LoRA(2)), ("bias", lj.Full())]),
                         PARAMS)
    with pytest.raises(adapter.AdapterMismatch, match=r"wide@1 has rank 3 at .* of this library 2: .*truncate"):
        low.get("wide")
    cut = AdapterLibrary(tmp_path / "adapters", low.adapt, PARAMS, truncate=True)
    a, b = (np.asarray(x) for x in cut.get("wide")["head"])
    want = ONES["wide"].adapt.plan["head"].scale * np.asarray(ONES["wide"].trainable["head"].A) @ np.asarray(
        ONES["wide"].trainable["head"].B)
    u, s, vt = np.linalg.svd(want)
    np.testing.assert_allclose(4 * a @ b, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)
    with pytest.raises(ValueError, match="stack has DoRA.*the common form of a library is LoRA"):
        AdapterLibrary(tmp_path, lj.adapt(FORM.sites, [("stack", DoRA(LoRA(2)))]), PARAMS)


def test_writers_and_readers_at_once_and_nothing_half_written(library: Any, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight writers of one name get eight versions; every entry that a reader ever sees can be loaded; a writer that
    dies leaves nothing to see."""
    stop, seen, wrong = threading.Event(), set(), []
    one = ONES["small"]

    def look(reader: AdapterLibrary) -> None:
        for entry in reader.list():
            if entry.name == "busy" and entry.id not in seen:
                try:
                    made = lj.adapt(FORM.sites, adapter.rules(entry.folder))
                    adapter.load(entry.folder, made, PARAMS, base=entry.base)
                    seen.add(entry.id)
                except Exception as error:
                    wrong.append(error)

    def read() -> None:
        reader = AdapterLibrary(tmp_path / "adapters", FORM, PARAMS)
        while not stop.is_set():
            look(reader)
        reader.close()

    def write() -> None:
        library.add("busy", *one)

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=write) for _ in range(8)]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    look(library)
    assert not wrong and seen == {f"busy@{i}" for i in range(1, 9)}

    real = adapter.write_tensors

    def dies(file: Any, *rest: Any) -> None:
        real(file, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter, "write_tensors", dies)
    with pytest.raises(KeyboardInterrupt):
        library.add("half", *one)
    assert not [e for e in library.list() if e.name == "half"]
    shutil.copytree(library.find("small").folder, tmp_path / "adapters/half/.part-0")  # a writer that was killed
    assert not [e for e in library.list() if e.name == "half"]
    monkeypatch.setattr(adapter, "write_tensors", real)
    shutil.copytree(library.find("small").folder, tmp_path / "adapters/half/.part-1")
    os.utime(tmp_path / "adapters/half/.part-1", (0, 0))  # long ago
    assert library.add("half", *one).version == 1
    assert {file.name for file in (tmp_path / "adapters/half").iterdir()} == {".part-0", "1"}


def test_a_damaged_file_is_an_error_that_can_be_repaired(library: Any) -> None:
    file = library.find("small").folder / "lorajax_adapter.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-4] + b"\0\0\0\1")
    with pytest.raises(adapter.AdapterError, match="sha256 differs"):
        library.get("small")
    file.write_bytes(good)
    jnp.asarray(library.get("small")["head"].A)


@pytest.mark.parametrize("record", ["{", "[]", "{}"])
def test_a_damaged_record_is_no_business_of_the_others(library: Any, record: str) -> None:
    broken = library.add("broken", *ONES["small"])
    (broken.folder / "lorajax_library.json").write_text(record)
    assert "broken@1" not in [entry.id for entry in library.list()]
    library.get("small")
    with pytest.raises(adapter.AdapterError, match="lorajax_library.json"):
        library.get("broken")
    assert library.add("broken", *ONES["small"]).version == 2
    library.get("broken")
    with pytest.raises(adapter.AdapterError, match="lorajax_library.json"):
        library.find("broken@1")
    with pytest.raises(ValueError, match="no adapter 'broken@3'"):
        library.find("broken@3")
