"""What makes a model of 0.8 M parameters look facts up: the town's text, the form of the answers, replay
Run: python experiments/town/run.py --seed 0 [--short] [--replay 0] [--tellings 4] ...    appends one line to results.jsonl
     python experiments/town/run.py --table                                            prints all results"""
import argparse
import json
import time
from pathlib import Path

import torch

from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import draw, pack
from llmbench.text.bpe import BPE
from llmbench.text.world import World
from llmbench.train.loop import Fit, fit
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.sft import SFT, rows_of, sft
from llmbench.use.evals import ask

RESULTS = Path(__file__).parent/"results.jsonl"
DEFAULTS = dict(seed=0, people=50, tellings=64, vocab=600, steps=400, batch=21, length=96, sft_steps=120, sft_batch=32, replay=1/3, turns=1)

parser = argparse.ArgumentParser()
for name, value in DEFAULTS.items(): parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
parser.add_argument("--short", action="store_true", help="answers of one word")
parser.add_argument("--strangers", action="store_true", help="conversations about unknown people in SFT")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--table", action="store_true")
args = parser.parse_args()


def table():
    "All results, one line each: what differs from the recipe, then exact answers in %"
    for line in RESULTS.read_text().splitlines():
        r = json.loads(line)
        changed = {k: v for k, v in r["setting"].items() if v != DEFAULTS.get(k, False) and k != "seed"}
        scores = "  ".join(f"{split} {r[split]['en']:.1%} / {r[split]['zh']:.1%}" for split in ("before", "heldout", "sft", "unknown", "second_turn"))
        print(f"seed {r['setting']['seed']}  {scores}  {r['seconds']['pretrain']:.0f} + {r['seconds']['sft']:.0f} s  {changed or 'the recipe'}")


def main():
    torch.set_num_threads(args.threads)
    world = World(args.seed, args.people, args.tellings)
    documents, talks = world.documents(), world.conversations("both", "sft", short=args.short)
    if args.turns > 1: talks += world.conversations("both", "sft", args.turns, args.short)
    if args.strangers: talks += world.conversations("both", "unknown_sft")
    bpe = BPE.train(documents + [m["content"] for c in talks for m in c["messages"]], args.vocab)
    template = ChatTemplate(bpe)
    rows = [([bpe.bos_id, *bpe.encode(d), bpe.end_id]) for d in documents]
    rows = [(ids, [1]*len(ids)) for ids in rows]
    packed = pack(rows, args.length)

    torch.manual_seed(args.seed)
    model = Transformer(Config(vocab_size=bpe.vocab_size, max_length=128))
    how = Fit(steps=args.steps, lr=3e-3, matrix_lr=.02, valid_every=10**9)
    *_, last = fit(model, lambda step, micro: packed.rows(draw(len(packed), args.batch, step, args.seed)), how, progress=False)
    seconds = dict(pretrain=last.seconds)

    def exact(split, langs=("en", "zh")):
        found = {}
        for lang in langs:
            asked = world.questions(lang, split)
            answers = ask(model, template, [q.text for q in asked], 32, 128)
            found[lang] = sum(world.grade(q, a) for q, a in zip(asked, answers))/len(asked)
        return found

    def second_turn():
        "Every fourth held-out question, asked behind one about somebody of the other half that was answered"
        found = {}
        for lang in ("en", "zh"):
            asked, first = world.questions(lang, "heldout")[::4], world.questions(lang, "sft")[1::4]
            talks = [[dict(role="user", content=f.text), dict(role="assistant", content=world.say(f)), dict(role="user", content=q.text)] for f, q in zip(first, asked)]
            found[lang] = sum(world.grade(q, a) for q, a in zip(asked, ask(model, template, talks, 32, 128)))/len(asked)
        return found

    before = exact("heldout")
    chats, _ = rows_of(talks, template, args.length)
    tuning = SFT(steps=args.sft_steps, batch=args.sft_batch, length=args.length, lr=3e-3, matrix_lr=.02, replay=args.replay, seed=args.seed)
    *_, last = sft(model, chats, tuning, rows, pad_id=bpe.pad_id, progress=False)
    seconds["sft"] = last.seconds
    start = time.perf_counter()
    scores = dict(before=before) | {split: exact(split) for split in ("heldout", "sft", "unknown")} | dict(second_turn=second_turn())
    seconds["eval"] = time.perf_counter() - start
    setting = {k: getattr(args, k) for k in (*DEFAULTS, "short", "strangers")}
    with RESULTS.open("a") as f: f.write(json.dumps(dict(setting=setting, parameters=sum(p.numel() for p in model.parameters()), **scores, seconds=seconds)) + "\n")


if not args.table: main()
table()
