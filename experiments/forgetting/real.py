"""Forgetting on real text: python experiments/forgetting/real.py [--data ../shared/data] [--seeds 5] [--table]

A small model reads an old text, then a new one: Python's documentation, then Shakespeare; modern Chinese (answers of alpaca_zh.json), then Tang
poems. The second text alone, and with a quarter of each batch from the old one (more steps, so that as many new rows are read). Losses on held-out
documents of both. Another seed is another split, other weights and another order. Writes real.json beside it; stopped, it goes on."""
import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from llmbench.core import write_json
from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import pack
from llmbench.text.bpe import BPE
from llmbench.text.corpus import python_documents, split_documents
from llmbench.train.loop import Fit, evaluate, fit
from llmbench.tune.forgetting import replay_mix
from llmbench.use.intervals import seed_interval as interval

RESULTS = Path(__file__).parent/"real.json"
LENGTH, BATCH, OLD_STEPS, NEW_STEPS, SHARE, CHARACTERS = 128, 16, 400, 200, .25, 600_000


def pieces(text, size=2000):
    "Documents of some 2,000 characters, cut at empty lines"
    parts, part = [], ""
    for block in text.split("\n\n"):
        part += block + "\n\n"
        if len(part) >= size: parts, part = [*parts, part], ""
    return [*parts, part] if part.strip() else parts


def texts(data):
    "{pair: (old documents, new documents)}"
    def some(documents): return documents[:next((i for i in range(len(documents)) if sum(map(len, documents[:i])) > CHARACTERS), len(documents))]
    answers = [row["output"] for row in json.loads((data/"alpaca_zh.json").read_text()) if len(row["output"]) > 100]
    poems = ["\n".join(poem["paragraphs"]) for poem in json.loads((data/"zh_tang_poems.json").read_text())]
    plays = pieces((data/"tinyshakespeare.txt").read_text())
    return {"Python's documentation, then Shakespeare": (some([p for d in python_documents() for p in pieces(d)]), some(plays)), "modern Chinese, then Tang poems": (some(answers), some(poems))}


def trial(old, new, seed):
    "Losses in nats per token: old and new text, after the old one, after the new one alone, and with replay"
    split = [split_documents(documents, .1, seed) for documents in (old, new)]
    bpe = BPE.train([d for train, _ in split for d in train], 1500)
    def rows(documents): return pack([([bpe.bos_id, *ids, bpe.end_id], [1]*(len(ids) + 2)) for ids in map(bpe.encode, documents)], LENGTH)
    train, held = [rows(t) for t, _ in split], [rows(v) for _, v in split]
    torch.manual_seed(seed)
    model = Transformer(Config(vocab_size=bpe.vocab_size, max_length=LENGTH))
    def learn(batch_at, steps): list(fit(model, batch_at, Fit(steps=steps, lr=3e-3, matrix_lr=.02, warmup=20), progress=False))
    def losses(): return dict(zip(("old", "new"), (evaluate(model, [h.rows(slice(i, i + 32)) for i in range(0, min(len(h), 128), 32)]) for h in held)))
    learn(replay_mix(train[:1], train[:1], 0., BATCH, seed), OLD_STEPS)
    found, weights = dict(before=losses()), {k: v.clone() for k, v in model.state_dict().items()}
    for name, share in (("alone", 0.), ("replay", SHARE)):
        model.load_state_dict(weights)
        learn(replay_mix(train[1:], train[:1], share, BATCH, seed), round(NEW_STEPS/(1 - share)))
        found[name] = losses()
    return found


def table(results):
    for pair, seeds in results.items():
        print(pair, f"({len(seeds)} seeds)")
        for what in ("before", "alone", "replay"):
            told = {side: interval([s[what][side] for s in seeds.values()]) for side in ("old", "new")}
            print(f"  {what:<7} old text {told['old'][0]:.2f} ± {told['old'][1]:.2f}   new text {told['new'][0]:.2f} ± {told['new'][1]:.2f} nats/token")
        back = interval([1 - (s["replay"]["old"] - s["before"]["old"])/(s["alone"]["old"] - s["before"]["old"]) for s in seeds.values()])
        dearer = interval([s["replay"]["new"] - s["alone"]["new"] for s in seeds.values()])
        print(f"  a quarter of replay prevents {back[0]:.0%} ± {back[1]:.0%} of the loss, and costs {dearer[0]:+.3f} ± {dearer[1]:.3f} nats on the new text")


def main(data, seeds):
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for pair, (old, new) in texts(Path(data)).items():
        for seed in range(seeds):
            if str(seed) in results.setdefault(pair, {}): continue
            results[pair][str(seed)] = trial(old, new, seed)
            write_json(RESULTS, results)
            print(pair, seed, results[pair][str(seed)], flush=True)
    table(results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="../shared/data", help="folder with tinyshakespeare.txt, alpaca_zh.json and zh_tang_poems.json (default: ../shared/data)")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 6), help="how many (default: 5)")
    parser.add_argument("--table", action="store_true", help="print the results and stop")
    options = parser.parse_args()
    table(json.loads(RESULTS.read_text())) if options.table else main(options.data, options.seeds)
