"""Train the demo model: a small Llama on the standard library's source, with key-value retrieval mixed in.

    python scripts/train_demo.py --minutes 0.9 --batch 32    # one H200; as the shipped model was made
    python scripts/train_demo.py --prepare-only          # corpus and tokenizer into --cache, to train elsewhere

The schedule follows the clock: warm up, hold, then decay to zero over the last 40 % of --minutes (compilation counts).
About 150 M tokens are enough; more overfits. On a CPU that is most of a day.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stdlib_text import HELDOUT, documents

CONTEXT = 2048
VOCABULARY = 2048
BOS, EOS = "<|bos|>", "<|eos|>"
COLOURS = "red green blue white black golden silver brown grey purple orange pink yellow quiet broken hidden"
THINGS = "bridge river castle garden tower forest island market window harbour mountain lantern violin wagon"


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every digit is a token of its own, so that numbers can be copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    pattern = r"\d|[^\S\n]*\n+|[^\S\n]+(?=\S)|[^\s\w]+|_+|[A-Za-z]+|\s+|\S"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def prepare(cache: Path) -> None:
    """Tokenizer and token files, once."""
    if (cache / "heldout.npy").exists():
        return
    cache.mkdir(parents=True, exist_ok=True)
    train, heldout = list(documents("train")), list(documents("heldout"))
    tokenizer = build_tokenizer(train[:600])
    tokenizer.save_pretrained(cache / "tokenizer")
    for name, texts in (("train", train), ("heldout", heldout)):
        ids = [np.array(x, dtype=np.uint16) for x in tokenizer(texts).input_ids]
        np.save(cache / f"{name}.npy", np.concatenate(ids))
        print(f"{name}: {sum(map(len, ids)) / 1e6:.2f} M tokens, {sum(map(len, texts)) / 1e6:.2f} M characters")


def config() -> LlamaConfig:
    """4.5 M parameters: 9 MB in bf16."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.04,
    )


def fact(rng: random.Random) -> tuple[str, str, str]:
    """A sentence to remember, the question, and its answer."""
    name = f"{rng.choice(COLOURS.split())} {rng.choice(THINGS.split())}"
    number = "".join(rng.choices("0123456789", k=5))
    said = f"\n# The secret number of the {name} is {number}. Remember it.\n"
    asked = f"\n# What is the secret number of the {name}? The secret number of the {name} is"
    return said, asked, f" {number}"


def with_needles(window: np.ndarray, encode, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Put facts into a window and ask for them further on; returns tokens and loss weights (answers count more)."""
    pieces: list[tuple[int, list[int], float]] = []
    for _ in range(rng.choice((1, 2, 4, 8))):
        said, asked, answer = fact(rng)
        # Short distances are common, so that copying is learnt first; long ones are what it is for.
        start = rng.randrange(0, CONTEXT - 300)
        longest = CONTEXT - 200 - start
        distance = int(longest ** rng.random()) if rng.random() < 0.6 else rng.randrange(0, longest)
        pieces += [(start, encode(said), 1.0), (start + distance, encode(asked), 1.0)]
        pieces += [(start + distance, encode(answer), 3.0)]
    pieces.sort(key=lambda p: p[0])
    tokens, weights, at = [], [], 0
    for position, ids, weight in pieces:
        tokens += [window[at:position], np.array(ids, dtype=np.uint16)]
        weights += [np.ones(position - at), np.full(len(ids), weight)]
        at = position
    tokens.append(window[at:])
    weights.append(np.ones(len(window) - at))
    return np.concatenate(tokens)[:CONTEXT], np.concatenate(weights)[:CONTEXT]


def batch(data: np.ndarray, size: int, encode, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Windows at random places, each led by BOS, a third of them with needles: ids and loss weights."""
    ids, weights = np.zeros((size, CONTEXT), dtype=np.int64), np.ones((size, CONTEXT), dtype=np.float32)
    for i in range(size):
        start = rng.randrange(0, len(data) - CONTEXT)
        window = data[start : start + CONTEXT].copy()
        if rng.random() < 0.35:
            window, weights[i] = with_needles(window, encode, rng)
        ids[i], ids[i, 0] = window, 0
    return torch.from_numpy(ids), torch.from_numpy(weights)


def optimiser(model: LlamaForCausalLM, lr: float, fused: bool) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)


def train(cache: Path, out: Path, minutes: float, size: int, lr: float, seed: int) -> LlamaForCausalLM:
    """Train by the clock and save the model in bf16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    rng = random.Random(seed)
    data = np.load(cache / "train.npy")
    tokenizer = AutoTokenizer.from_pretrained(cache / "tokenizer")
    known: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        if text not in known:
            known[text] = tokenizer(text, add_special_tokens=False).input_ids
        return known[text]

    model = LlamaForCausalLM(config()).to(device)
    run = torch.compile(model) if device == "cuda" else model
    adam = optimiser(model, lr, fused=device == "cuda")
    begun, step, seen, log = time.time(), 0, 0, []
    while (done := (time.time() - begun) / (60 * minutes)) < 1:
        scale = min(1.0, (step + 1) / 200, (1 - done) / 0.4)
        for group in adam.param_groups:
            group["lr"] = lr * scale
        ids, weights = (t.to(device) for t in batch(data, size, encode, rng))
        with torch.autocast(device, torch.bfloat16):
            logits = run(input_ids=ids, use_cache=False).logits
        nll = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        w = weights[:, 1:].flatten()
        loss = (nll * w).sum() / w.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + ids.numel()
        if step % 200 == 0 or step == 1:
            log.append({"step": step, "tokens": seen, "loss": round(float(loss), 4), "lr": round(lr * scale, 6)})
            print(log[-1] | {"minutes": round((time.time() - begun) / 60, 2)}, flush=True)
    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(cache / "tokenizer").save_pretrained(out)
    (out / "training_log.json").write_text(json.dumps(log) + "\n")
    return model


@torch.no_grad()
def heldout_perplexity(model: LlamaForCausalLM, cache: Path, length: int = 1024) -> float:
    """Over the held-out modules, windows of `length` led by BOS, float32."""
    data = torch.from_numpy(np.load(cache / "heldout.npy").astype(np.int64))
    body = length - 1
    windows = data[: len(data) // body * body].view(-1, body)
    total = 0.0
    for chunk in windows.split(8):
        ids = torch.cat([torch.zeros(len(chunk), 1, dtype=torch.long), chunk], 1).to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / windows.numel())


@torch.no_grad()
def retrieval(model: LlamaForCausalLM, cache: Path, length: int, trials: int = 20) -> int:
    """How many of `trials` needles at random depth in held-out text are found by greedy decoding."""
    data, rng = np.load(cache / "heldout.npy").astype(np.int64), random.Random(length)
    tokenizer = AutoTokenizer.from_pretrained(cache / "tokenizer")
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    found = 0
    for _ in range(trials):
        said, asked, answer = (encode(t) for t in fact(rng))
        room = length - len(said) - len(asked) - len(answer) - 1
        start, depth = rng.randrange(0, len(data) - room), rng.randrange(0, room)
        hay = data[start : start + room].tolist()
        ids = [0, *hay[:depth], *said, *hay[depth:], *asked]
        for _ in answer:
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        found += ids[-len(answer) :] == answer
    return found


def main() -> None:
    """Prepare, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/demo"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/demo"))
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--batch", type=int, default=32 if torch.cuda.is_available() else 4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prepare-only", action="store_true")
    args = parser.parse_args()
    prepare(args.cache)
    if args.prepare_only:
        return
    model = train(args.cache, args.out, args.minutes, args.batch, args.lr, args.seed).float()
    print(f"held out ({', '.join(HELDOUT)}): perplexity {heldout_perplexity(model, args.cache):.3f}")
    for length in (256, 512, 1024, 2048):
        print(f"retrieval at {length} tokens: {retrieval(model, args.cache, length)}/20", flush=True)


if __name__ == "__main__":
    main()
