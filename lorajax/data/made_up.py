"""Made-up data for runs of seconds that need no file: pairs of prompt and text in the form of each text task."""

from __future__ import annotations

from itertools import product

Pairs = list[tuple[str, str]]
NAMES, FOODS, AREAS = ("Alimentum", "Aromi", "Blue Spice"), ("English", "Indian", "Thai"), ("city centre", "riverside")


def made_up(task: str) -> dict[str, Pairs]:
    """Split -> (prompt, text), the same each time. KeyError for a task that has none."""
    pairs = _PAIRS[task]()
    third = len(pairs) // 3
    return {"train": pairs[third:], "validation": pairs[: third // 2], "test": pairs[third // 2 : third]}


def _e2e() -> Pairs:
    """Restaurants, two texts for each meaning."""
    rows = [f"name : {n} | food : {f} | area : {a} ||" for n, f, a in product(NAMES, FOODS, AREAS)]
    texts = [(f"{n} serves {f} food by the {a}.", f"By the {a}, {n} has {f} food.")
             for n, f, a in product(NAMES, FOODS, AREAS)]  # fmt: skip
    return [(row, text) for row, both in zip(rows, texts, strict=True) for text in both]


def _gsm8k() -> Pairs:
    """Sums, in GSM8K's form."""
    sums = [(a, b, a + b) for a, b in product(range(1, 7), range(1, 4))]
    return [(f"Ann has {a} pens and buys {b}. How many has she?", f"{a} + {b} = <<{a}+{b}={c}>>{c}\n#### {c}")
            for a, b, c in sums]  # fmt: skip


def _dolly() -> Pairs:
    """Instructions with one answer."""
    return [(f"Say {word} {times} times.", " ".join([word] * times)) for word, times in
            product(("yes", "no", "now", "red", "sun", "sea"), (1, 2, 3))]  # fmt: skip


_PAIRS = {"e2e": _e2e, "gsm8k": _gsm8k, "dolly": _dolly}
