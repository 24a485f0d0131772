"""Names of the files that an evaluation writes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import sha256

_MAX_LENGTH = 90  # A file name has at most 255 characters, and may contain two such parts and more.


def slug(words: Iterable[str], separator: str = "+") -> str:
    """Join words to a part of a file name, with spaces as underscores.

    If other characters are replaced, or the name is cut, a digest of the whole is appended, so that different words
    never give the same file name.

    Args:
        words: The words.
        separator: Text between two words.

    Returns:
        Letters, digits and `_.+-`: at most 90 of them, or 97 with the digest.
    """
    whole = separator.join(words)
    plain = re.sub(r"[^\w.+-]+", "_", whole)
    if plain == whole.replace(" ", "_") and len(plain) <= _MAX_LENGTH:
        return plain
    return f"{plain[:_MAX_LENGTH]}-{sha256(whole.encode()).hexdigest()[:6]}"
