"""Needles found by cache method, bits and context length; all caches get the same prompts.

    python benchmarks/kv_needles.py MODEL --calibration TEXT --text TEXT [--lengths 512 2048 8192] [--kv YAML ...]

Prints Markdown. A number is stated once in a text, at depths from its beginning to its end, and asked for at its end;
the table gives how many numbers greedy decoding repeats to the digit. Caches are made as in `kv_quality.py`.
"""

from __future__ import annotations

import argparse

from kv_quality import opened

from laconic.checkpoint.source import load_tokenizer, model_folder
from laconic.data.text import bos_prefix, evaluation_windows, read_documents
from laconic.evaluation.needle import TEMPLATES, NeedleOptions, find_needles

ROWS = [
    *(f"{{method: kv_per_token, k_bits: {b}, v_bits: {b}}}" for b in (4, 3, 2)),
    *(f"{{method: kivi, k_bits: {b}, v_bits: {b}, residual_length: 0}}" for b in (4, 3, 2)),
    *(f"{{method: kivi, k_bits: {k}, v_bits: {v}, residual_length: 0}}" for k, v in ((4, 2), (2, 4))),
    "{method: kivi, k_bits: 2, v_bits: 2}",
    *(f"{{method: kvquant, k_bits: {b}, v_bits: {b}}}" for b in (4, 3, 2)),
    *(f"{{method: kvquant, k_bits: {k}, v_bits: {v}}}" for k, v in ((4, 2), (2, 4))),
    *(f"{{method: kivi, k_bits: {k}, v_bits: {v}, residual_length: 0}}" for k, v in ((1, 4), (4, 1), (1, 1))),
    "{method: kvquant, k_bits: 1, v_bits: 4}",
]


def main() -> None:
    """Make every cache and count its needles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True, help="the haystack")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--prompt", default="needle", choices=TEMPLATES)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--calibration-length", type=int, default=512, help="tokens per calibration sample")
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--kv", action="append", metavar="YAML", help="a row in place of the table's")
    args = parser.parse_args()
    model, caches = opened(args, args.kv or ROWS)
    tokenizer = load_tokenizer(model_folder(args.model))
    windows = evaluation_windows(read_documents(args.text), tokenizer, length=max(args.lengths), limit=None)
    hay = windows[:, len(bos_prefix(tokenizer)) :].flatten().tolist()
    print("| cache | " + " | ".join(f"{n} tokens" for n in args.lengths) + " | total |")
    print("|---|" + "---:|" * (len(args.lengths) + 1))
    for name, new_cache in caches.items():
        cells = find_needles(
            model,
            tokenizer,
            hay,
            {name: new_cache},
            args.lengths,
            NeedleOptions(
                depths=args.depths,
                trials=args.trials,
                template=TEMPLATES[args.prompt],
                chunk=args.chunk,
                batch_size=args.batch_size,
            ),
        )[name]
        by_length = [[c for c in cells if c.length == n] for n in args.lengths]
        counts = [f"{sum(c.found for c in row)}/{sum(c.trials for c in row)}" for row in (*by_length, cells)]
        print(f"| {name} | " + " | ".join(counts) + " |", flush=True)


if __name__ == "__main__":
    main()
