"""Is a larger vocabulary worth it on real Chinese? python experiments/vocab/run.py [--seeds 3] [--extra 1700] [--table]

A base model of our own is trained on general Chinese (alpaca_zh.json) with a tokenizer that cuts characters one by one, then taught medicine (sharegpt_medical_zh.jsonl):
with the old vocabulary (as many steps; as much text; with a quarter of general text replayed), and with new tokens learned on the training half of medicine.
Bits per byte, perplexity and tokens per character on held-out medicine and held-out general text. Files are read from ../shared/data or LLMBENCH_DATA;
results.json is written row by row, and a stopped run goes on."""
import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from llmbench.core import write_json
from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import draw, pack
from llmbench.text.bpe import BPE
from llmbench.text.corpus import split_documents
from llmbench.train.loop import Fit, fit
from llmbench.tune.forgetting import replay_mix
from llmbench.tune.vocab import WORDS, expand_bpe, expand_model, tokens_per_character, train_rows
from llmbench.use.evals import text_score
from llmbench.use.intervals import seed_interval

RESULTS = Path(__file__).parent/"results.json"
DATA = Path(os.environ.get("LLMBENCH_DATA", Path(__file__).parents[3]/"shared"/"data"))
LENGTH, BATCH, BASE, STEPS = 128, 12, 200, 60


def general():
    "Alpaca's instructions and answers, a document each"
    return ["\n".join(part for part in (r["instruction"], r.get("input", ""), r["output"]) if part) for r in json.loads((DATA/"alpaca_zh.json").read_text())]


def medical():
    "Questions of patients with their answers, a document each"
    return ["\n".join(turn["value"] for turn in json.loads(line)["conversations"]) for line in (DATA/"sharegpt_medical_zh.jsonl").read_text().splitlines() if line]


def rows_of(tokenizer, texts):
    "Packed rows, every token counts"
    return pack([([tokenizer.bos_id, *ids, tokenizer.end_id], [1]*(len(ids) + 2)) for ids in map(tokenizer.encode, texts)], LENGTH)


def told(model, tokenizer, held):
    "Both texts by both rulers"
    found = {}
    for name, texts in held.items():
        score = text_score(model.eval(), tokenizer.encode, texts, tokenizer.bos_id, LENGTH)
        found[name] = dict(bits=score.bits_per_byte, perplexity=score.perplexity, tokens=tokens_per_character(tokenizer, texts))
    return found


def trained(model, rows, old_rows, steps, seed, share=0., decay=.1):
    "The model after the lesson"
    for _ in fit(model, replay_mix([rows], [old_rows] if share else [], share, BATCH, seed), Fit(steps=steps, decay=decay, warmup=10), progress=False): pass
    return model


def one(seed, extra, say):
    "All variants of one seed: of the split, the base model and the order"
    parts = {name: split_documents(texts, .12, seed) for name, texts in (("general", general()), ("medical", medical()))}
    held = {name: [t for t in valid if len(t) > 60][:30] for name, (_, valid) in parts.items()}
    old = BPE.train(parts["general"][0], 2000)
    torch.manual_seed(seed)
    base, rows = Transformer(Config(vocab_size=old.vocab_size, d_model=96, n_layers=2, d_hidden=256, max_length=LENGTH)), rows_of(old, parts["general"][0])
    for _ in fit(base, lambda step, micro=0: rows.rows(draw(len(rows), BATCH, step, seed)), Fit(steps=BASE), progress=False): pass
    new = expand_bpe(old, parts["medical"][0], extra, WORDS)
    wide, small = rows_of(new, parts["medical"][0]), rows_of(old, parts["medical"][0])
    found = dict(before=told(base, old, held))
    say(seed, "before", found["before"])
    text = round(STEPS*len(small)/len(wide))
    plans = {"old vocabulary, as many steps": (STEPS, 0.), "old vocabulary, as much text": (text, 0.), "old vocabulary, a quarter replayed": (round(STEPS/.75), .25)}
    for name, (steps, share) in plans.items():
        model = Transformer(base.config)
        model.load_state_dict(base.state_dict())
        found[name] = told(trained(model, small, rows, steps, seed, share), old, held)
        say(seed, name, found[name])
    for name, how, train in (("pieces, everything trains", "pieces", "all"), ("random, everything trains", "random", "all")):
        model = expand_model(base, old, new, how, seed=seed)
        first, handles = told(model, new, held), train_rows(model, old.vocab_size, train)
        found[name] = told(trained(model, wide, rows, STEPS, seed, decay=0. if handles else .1), new, held) | dict(first=first)
        say(seed, name, found[name])
    return found


def table(results):
    "Means with Student's 95 % intervals over seeds"
    rows = list(results["seeds"].values())
    print(f"{len(rows)} seeds, {results['extra']} new tokens")
    for name in rows[0]:
        cells = []
        for text in ("medical", "general"):
            for what in ("bits", "perplexity", "tokens"):
                cells.append("{:6.3f} ± {:5.3f}".format(*seed_interval([r[name][text][what] for r in rows])))
        print(f"{name:<36} medical: bits/byte {cells[0]} perplexity {cells[1]} tokens/char {cells[2]}   general: {cells[3]}, {cells[4]}, {cells[5]}")
    for name in rows[0]:
        if first := [r[name]["first"] for r in rows if "first" in r[name]]: print(f"before any step, {name}: {np.mean([f['medical']['bits'] for f in first]):.3f} medical, {np.mean([f['general']['bits'] for f in first]):.3f} general")
    pairs = [("old vocabulary, as many steps", "pieces, everything trains"), ("old vocabulary, as much text", "pieces, everything trains"), ("before", "pieces, everything trains"), ("random, everything trains", "pieces, everything trains")]
    for a, b in pairs:
        gaps = [r[b]["medical"]["bits"] - r[a]["medical"]["bits"] for r in rows]
        print("{} less {}: {:+.3f} ± {:.3f} bits per byte of medicine".format(b, a, *seed_interval(gaps)))
    saved = [1 - r["pieces, everything trains"]["medical"]["tokens"]/r["before"]["medical"]["tokens"] for r in rows]
    print(f"tokens per character: {np.mean(saved):.1%} fewer (least {min(saved):.1%})")


def main(seeds, extra):
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else dict(extra=extra, seeds={})
    if results["extra"] != extra: results = dict(extra=extra, seeds={})
    def say(seed, name, scores): print(f"seed {seed}, {name}: " + ", ".join(f"{text} {s['bits']:.3f} bits/byte, {s['tokens']:.3f} tokens/char" for text, s in scores.items() if text in ("medical", "general")), flush=True)
    for seed in range(seeds):
        if str(seed) in results["seeds"]: continue
        results["seeds"][str(seed)] = one(seed, extra, say)
        write_json(RESULTS, results)
    table(results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6), help="how many splits and base models (default: 3)")
    parser.add_argument("--extra", type=int, default=1700, help="new tokens (default: 1700)")
    parser.add_argument("--table", action="store_true", help="print the results and stop")
    options = parser.parse_args()
    table(json.loads(RESULTS.read_text())) if options.table else main(options.seeds, options.extra)
