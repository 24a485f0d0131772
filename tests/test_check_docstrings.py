"""The lint of docstrings names what a public function does not describe, and passes what is exempt."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import check_docstrings

COMPLETE = '''
class Base:
    def apply(self, x: int) -> int:
        """Apply it.

        Args:
            x: A number.

        Returns:
            The result.
        """

class Child(Base):
    def apply(self, x: int) -> int:
        """Apply it twice."""

    @property
    def size(self) -> int:
        """Size."""

    def _private(self, x: int) -> int:
        """Do it."""

class Layer(torch.nn.Module):
    def forward(self, x): ...

def scale(*values: int, _hidden: int = 0, **options: int) -> int:
    """Return the scale.

    Args:
        *values: Numbers.
        **options: Options.
    """
    def nested(x): ...

def reset() -> int:
    """Reset it."""

def close(x: int) -> None:
    """Close it.

    Args:
        x: A number,
            in more than one line.
    """

def compress(source: str) -> None:
    """Compress a model."""

app.command()(compress)
'''
INCOMPLETE = '''
class Base:
    def apply(self, x: int) -> int:
        """Apply it."""

    @staticmethod
    def make(x: int, y: int) -> None:
        """Make it.

        Args:
            x: A number.
        """

    def bare(self, x): ...

if True:
    def scale(values: int, *, factor: int) -> Iterator[int]:
        """Return a scale."""
'''


def test_incomplete_docstrings_are_named(tmp_path: Path) -> None:
    package = tmp_path / "src" / "laconic"
    (package / "kv").mkdir(parents=True)
    (package / "kv" / "complete.py").write_text(COMPLETE)
    (package / "recipe.py").write_text(INCOMPLETE)
    assert list(check_docstrings.check(("kv",), package)) == []
    assert list(check_docstrings.check(("recipe",), package)) == [
        "src/laconic/recipe.py:3: Base.apply: `Args:` lacks x; no `Returns:`",
        "src/laconic/recipe.py:7: Base.make: `Args:` lacks y",
        "src/laconic/recipe.py:14: Base.bare: no docstring",
        "src/laconic/recipe.py:17: scale: `Args:` lacks values, factor",
    ]
