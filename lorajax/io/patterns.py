"""Regular expressions from somebody else's file, in time that their text cannot make exponential.

Python's `re` backtracks, so a pattern such as `(a+)+b` in an `adapter_config.json` would keep it busy for ever. One in
which it cannot have much to try is left to it. Of any other, a part at one position of the name is matched here once,
for all of its ends; that work is counted, and limited. Single characters, classes, escapes and anchors are `re`'s own,
so they mean what they mean to PEFT.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any, NamedTuple

from lorajax.io.tensors import AdapterError

STEPS = 20_000
"""Largest number of (part, position) pairs for one name; usual patterns take some hundreds."""
WAYS = 1e6
"""Largest number of ways to match a name of a hundred characters for which `re` is asked."""
_REPEAT = re.compile(r"([*+?]|\{(\d*)(,?)(\d*)\})[?+]?")
_GROUP = re.compile(r"\((\?:|\?P<\w+>|\?=|\?!|(?!\?))")
_ATOM = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\[^0-9]|[^()|*+?\\\[]", re.DOTALL)
_WIDTHLESS = ("^", "$", r"\A", r"\Z", r"\b", r"\B")


class _Node(NamedTuple):
    """kind: 'one' (a character), 'here' (an anchor), 'all' (in sequence), 'any' (alternatives), 'repeat', 'ahead' or
    'not'. at: its number in the pattern. parts: what it is made of. least, most: of a 'repeat', None = no limit."""

    kind: str
    at: int
    parts: tuple[_Node, ...] = ()
    atom: Any = None
    least: int = 0
    most: int | None = None


def matches(regex: str, text: str) -> bool:
    """Whether `re.match` finds `regex` at the start of `text`. Raises AdapterError as `match_ends` does."""
    return bool(match_ends(regex, text) if _ways(_parsed(regex)) > WAYS else re.match(regex, text))


def _ways(node: _Node) -> float:
    """A bound on what backtracking may try."""
    inside = [_ways(part) for part in node.parts]
    if node.kind == "repeat":
        return 1.0 + inside[0] if node.most == 1 else 100.0 if node.parts[0].kind == "one" else math.inf
    return sum(inside) if node.kind == "any" else math.prod(inside)


def match_ends(regex: str, text: str) -> frozenset[int]:
    """Where a match of `regex` that begins at the start of `text` may end; empty if there is none, so that its truth is
    that of `re.match`. What is greedy or lazy makes no difference to that.

    Raises AdapterError for what is no regular expression, for one with backreferences, flags, lookbehind or other rare
    syntax, and for one that takes more than STEPS.
    """
    tree = _parsed(regex)
    known: dict[tuple[int, int], frozenset[int]] = {}

    def ends(node: _Node, start: int) -> frozenset[int]:
        key = node.at, start
        if key not in known:
            if len(known) >= STEPS:
                raise AdapterError(f"{regex[:80]!r} takes more than {STEPS} steps on {text[:80]!r}: name the modules "
                                   f"in a list")  # fmt: skip
            known[key] = frozenset()
            known[key] = frozenset(found(node, start))
        return known[key]

    def after(node: _Node, starts: set[int] | frozenset[int]) -> set[int]:
        return {end for start in starts for end in ends(node, start)}

    def found(node: _Node, start: int) -> set[int] | frozenset[int]:
        if node.kind == "one":
            return {start + 1} if start < len(text) and node.atom.match(text, start, start + 1) else set()
        if node.kind == "here":
            return {start} if node.atom.match(text, start) else set()
        if node.kind in ("ahead", "not"):
            return {start} if bool(ends(node.parts[0], start)) == (node.kind == "ahead") else set()
        if node.kind == "any":
            return {end for part in node.parts for end in ends(part, start)}
        at: set[int] = {start}
        if node.kind == "all":
            for part in node.parts:
                at = after(part, at)
            return at
        (part,) = node.parts
        for _ in range(min(node.least, len(text) + 1)):  # by then it is empty, or the same from one time to the next
            at = after(part, at)
        new, times = set(at), len(text) + 1 if node.most is None else node.most - node.least
        for _ in range(min(times, len(text) + 1)):
            new = after(part, new) - at
            if not new:
                break
            at |= new
        return at

    try:
        return ends(tree, 0)
    except RecursionError as error:
        raise AdapterError(f"{regex[:80]!r} is no regular expression that is read: too deeply nested") from error


@functools.lru_cache(maxsize=1024)
def _parsed(regex: str) -> _Node:
    try:
        re.compile(regex)
        return _Parser(regex).pattern()
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"{regex[:80]!r} is no regular expression: {error}") from error


class _Parser:
    """Recursive descent over what `re.compile` has accepted."""

    def __init__(self, regex: str) -> None:
        self.regex, self.place, self.count = regex, 0, 0

    def pattern(self) -> _Node:
        node = self.alternatives()
        if self.place < len(self.regex):
            raise self.rare()
        return node

    def rare(self) -> AdapterError:
        return AdapterError(f"{self.regex[:80]!r} has {self.regex[self.place : self.place + 8]!r} at character "
                            f"{self.place}, which is not read from files: name the modules in a list")  # fmt: skip

    def node(self, kind: str, parts: tuple[_Node, ...] = (), **named: Any) -> _Node:
        self.count += 1
        return _Node(kind, self.count, parts, **named)

    def at(self, what: str) -> bool:
        return self.regex.startswith(what, self.place)

    def alternatives(self) -> _Node:
        found = [self.sequence()]
        while self.at("|"):
            self.place += 1
            found.append(self.sequence())
        return found[0] if len(found) == 1 else self.node("any", tuple(found))

    def sequence(self) -> _Node:
        found = []
        while self.place < len(self.regex) and not (self.at("|") or self.at(")")):
            part = self.single()
            while repeat := _REPEAT.match(self.regex, self.place):
                sign, least, comma, most = repeat.groups()
                if sign == "{}" or sign == "{,}" or (repeat.group().endswith("+") and repeat.group() != "+"):
                    raise self.rare()  # braces that are characters; possessive repeats
                self.place = repeat.end()
                low = {"*": 0, "+": 1, "?": 0}.get(sign, int(least or 0))
                high = {"*": None, "+": None, "?": 1}.get(sign, int(most) if most else None if comma else low)
                part = self.node("repeat", (part,), least=low, most=high)
            found.append(part)
        return found[0] if len(found) == 1 else self.node("all", tuple(found))

    def single(self) -> _Node:
        if group := _GROUP.match(self.regex, self.place):
            self.place = group.end()
            inside = self.alternatives()
            self.place += 1
            kind = {"?=": "ahead", "?!": "not"}.get(group.group(1))
            return self.node(kind, (inside,)) if kind else inside
        atom = _ATOM.match(self.regex, self.place)
        if atom is None:
            raise self.rare()
        self.place = atom.end()
        return self.node("here" if atom.group() in _WIDTHLESS else "one", atom=re.compile(atom.group()))
