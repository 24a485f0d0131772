"""Names of the files that an evaluation writes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import sha256

_LONGEST = 90  # of 255: a file's name may have two such parts, and more


def slug(words: Iterable[str], between: str = "+") -> str:
    """Words as a part of a file's name, spaces as underscores. Where more than that is lost, other signs or what is too
    long, a digest of the whole comes after, so that what differs never replaces another's file."""
    whole = between.join(words)
    plain = re.sub(r"[^\w.+-]+", "_", whole)
    if plain == whole.replace(" ", "_") and len(plain) <= _LONGEST:
        return plain
    return f"{plain[:_LONGEST]}-{sha256(whole.encode()).hexdigest()[:6]}"
