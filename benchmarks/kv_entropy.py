"""Entropy of a model's predictions through each cache: why perplexity and KL rank caches differently.

    python benchmarks/kv_entropy.py MODEL --calibration TEXT --text TEXT [--kv YAML ...]

Prints Markdown: for every cache the mean negative log-likelihood per token, its difference to the 16-bit cache with the
standard error, the entropy of the predictions, and the KL divergence, all in nats; and the 16-bit cache's likelihood
with logits divided by temperatures. An overconfident model improves with any error that makes it less confident.
"""

from __future__ import annotations

import math

import torch
from kv_quality import opened, options
from torch import Tensor

from laconic.checkpoint.source import load_tokenizer, model_folder
from laconic.data.text import evaluation_windows, read_documents
from laconic.evaluation.through_cache import PLAIN, chunks, step

ROWS = [
    "{method: kivi, k_bits: 3, v_bits: 3, residual_length: 0}",
    "{method: kvquant, k_bits: 3, v_bits: 3}",
    "{method: kvquant, k_bits: 3, v_bits: 8}",
    "{method: kvquant, k_bits: 8, v_bits: 3}",
]
TEMPERATURES = (0.96, 0.98, 1.0, 1.02, 1.04, 1.08)


@torch.no_grad()
def main() -> None:
    """Read the windows through all caches side by side."""
    parser = options(__doc__, length=1024, windows=5, samples=8)
    parser.set_defaults(calibration_length=512)
    args = parser.parse_args()
    model, caches = opened(args, args.kv or ROWS)
    tokenizer = load_tokenizer(model_folder(args.model))
    windows = evaluation_windows(read_documents(args.text), tokenizer, length=args.length, limit=args.windows)
    scores: dict[str, list[Tensor]] = {name: [] for name in caches}
    by_temperature = []
    for ids in windows.split(1):
        running, at = {name: make() for name, make in caches.items()}, 0
        for piece in chunks(ids, args.chunk):
            target = ids[0, at + 1 : at + 1 + piece.shape[1]]
            at += piece.shape[1]
            plain = None
            for name in caches:
                logits = step(model, piece, running[name])[0, : len(target)].float().cpu()
                logp = logits.log_softmax(-1)
                plain = logp if plain is None else plain
                kl = (plain.exp() * (plain - logp)).sum(-1)
                scores[name].append(torch.stack([_nll(logp, target), -(logp.exp() * logp).sum(-1), kl], -1))
                if name == PLAIN:
                    by_temperature.append(
                        torch.stack([_nll((logits / t).log_softmax(-1), target) for t in TEMPERATURES], -1)
                    )
    first = torch.cat(scores[PLAIN])
    print("| cache | nats per token | above 16 bit | entropy | KL |")
    print("|---|---:|---:|---:|---:|")
    for name, parts in scores.items():
        values = torch.cat(parts)
        difference = values[:, 0] - first[:, 0]
        error = float(difference.std()) / math.sqrt(len(difference))
        nll, entropy, kl = values.mean(0).tolist()
        print(f"| {name} | {nll:.4f} | {difference.mean():.4f} ± {error:.4f} | {entropy:.4f} | {kl:.4f} |")
    means = torch.cat(by_temperature).mean(0).tolist()
    print("\n16 bit by temperature: " + ", ".join(f"{t}: {m:.4f}" for t, m in zip(TEMPERATURES, means, strict=True)))


def _nll(logp: Tensor, target: Tensor) -> Tensor:
    """Return the negative log-likelihood of each token."""
    return -logp.gather(1, target[:, None])[:, 0]


if __name__ == "__main__":
    main()
