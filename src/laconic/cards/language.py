"""Language detection by the optional package py3langid (97 languages; the package includes its model)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

# A piece is long enough for detection, and the pieces are enough to know a share to a few percent.
PIECES, CHARACTERS = 256, 600


def language_mix(texts: Sequence[str]) -> dict[str, float] | None:
    """Estimate the languages of a set of texts.

    The detector classifies one piece, at most 600 characters from the middle, of at most 256 texts at even distances.
    It has no class for source code, and returns some language for it, mostly English.

    Args:
        texts: The texts.

    Returns:
        Share of the pieces by language (ISO 639-1), largest first; None without py3langid or without text.
    """
    try:
        from py3langid import classify
    except ImportError:
        return None
    step = max(1, -(-len(texts) // PIECES))
    counts: Counter[str] = Counter()
    for text in texts[::step]:
        middle = max(0, (len(text) - CHARACTERS) // 2)
        if piece := text[middle : middle + CHARACTERS].strip():
            counts[str(classify(piece)[0])] += 1
    total = sum(counts.values())
    return {language: n / total for language, n in counts.most_common()} if total else None
