"""The command line: runs to tables, CSV, figures, and a section of a document.

    python -m lorajax.report [FOLDER ...] [--metric=NAME] [--reference=METHOD] [--csv=FILE] [--plots=FOLDER]
                             [--into=README.md --section=NAME]

FOLDER: `runs` if none is given. into: the tables, with hardware and dates, take the place of what stands between
``<!-- results:NAME -->`` and ``<!-- /results:NAME -->``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lorajax.report import cells, into, markdown, read, setting, write_csv


def main(argv: Sequence[str]) -> None:
    flags = {"--csv": "", "--metric": "", "--reference": "", "--plots": "", "--into": "", "--section": ""}
    words, folders = list(argv), []
    if {"-h", "--help"} & set(words):
        return print((__doc__ or "").strip())
    while words:
        name, given, text = words.pop(0).partition("=")
        if name in flags:
            flags[name] = text if given else words.pop(0) if words else ""
            if not flags[name]:
                raise SystemExit(f"error: {name} has no value: write {name}=VALUE")
        elif name.startswith("-"):
            raise SystemExit(f"error: unexpected {name!r}: give folders of runs, and {', '.join(flags)}")
        else:
            folders.append(name)
    if bool(flags["--into"]) != bool(flags["--section"]):
        raise SystemExit("error: --into=README.md and --section=NAME go together: NAME is that of the markers")
    try:
        results = read(folders or ["runs"], flags["--metric"])
        text = markdown(cells(results), flags["--reference"])
        if flags["--csv"]:
            write_csv(results, flags["--csv"])
        if flags["--plots"]:
            from lorajax.report import figures

            for path in figures.save(results, flags["--plots"], flags["--reference"]):
                print(path)
        if flags["--into"]:
            into(flags["--into"], flags["--section"], f"{text}\n\nMeasured on: {setting(results)}.\n")
        print(text)
    except (ValueError, ModuleNotFoundError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
