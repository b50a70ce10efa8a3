"""Scores of generated texts against references, by sacrebleu and rouge-score (extra: text)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def text_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU, chrF and ROUGE-L of n texts, each against one reference or more; 0 to 1, higher is better in all.

    `bleu` (Papineni et al., 2002) and `chrf` (Popovic, 2015): of the whole set. BLEU sees lower-cased tokens of
    mteval-13a, as the E2E challenge's script does; chrF the texts as they are. `rouge_l` (Lin, 2004): F1 of the longest
    common subsequence with the best reference, mean over texts (the challenge's script weighs recall more, so its
    numbers are not comparable).

    Errors: ValueError without texts or for a text without reference; ImportError that names the extra.
    """
    try:
        import sacrebleu
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f"{error.name} scores generated texts: pip install 'lorajax[text]'") from error
    if not texts or len(texts) != len(references) or not all(references):
        raise ValueError(f"{len(texts)} texts and references for {sum(map(bool, references))} of them: each needs one")
    # sacrebleu takes the first references, the second, ...: None where a text has fewer
    longest = max(map(len, references))
    columns: Any = [[refs[i] if i < len(refs) else None for refs in references] for i in range(longest)]
    rouge = RougeScorer(["rougeL"])
    pairs = zip(texts, references, strict=True)
    best = [rouge.score_multi(list(refs), text)["rougeL"].fmeasure for text, refs in pairs]
    return {
        "bleu": sacrebleu.corpus_bleu(list(texts), columns, lowercase=True).score / 100.0,
        "chrf": sacrebleu.corpus_chrf(list(texts), columns).score / 100.0,
        "rouge_l": sum(best) / len(best),
    }
