"""Results of an artifact: a measure taken again replaces the old one, a measure of something else does not."""

from __future__ import annotations

from pathlib import Path

from laconic import Artifact


def test_a_result_of_something_else_is_kept(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path)
    first = {"text": "a/test.txt", "baseline": "m", "dtype": "float32", "perplexity": 1.0}
    assert artifact.save_result("eval-test-8", first).name == "eval-test-8.json"
    assert artifact.save_result("eval-test-8", first | {"perplexity": 2.0}).name == "eval-test-8.json"
    assert artifact.save_result("eval-test-8", first | {"text": "b/test.txt"}).name == "eval-test-8-2.json"
    assert artifact.save_result("eval-test-8", first | {"dtype": "bfloat16"}).name == "eval-test-8-3.json"
    assert artifact.save_result("eval-test-8", first | {"text": "b/test.txt"}).name == "eval-test-8-2.json"
    assert artifact.results["eval-test-8"]["perplexity"] == 2.0
