"""Politeness by DPO, exact answers kept: python experiments/dpo_town/run.py [--seeds 3] [--folder runs/align]

Each seed is another town, initialisation and order. The chain's tuned model is tuned a little further on answers in mixed manners (one in five
polite), so that it says the polite form now and then: DPO cannot raise what is never said. Then DPO on pairs that differ in manner alone.
Measured on people who are in no conversation and in no pair, greedily: exact answers, and answers that begin politely. Writes results.json."""
import argparse
import json
import os
import time
from datetime import date
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

from llmbench.align.dpo import DPO, dpo
from llmbench.align.pairs import pair_rows
from llmbench.bench.run import Run, run
from llmbench.bench.stages import document_rows, read_lines
from llmbench.model.transformer import Transformer
from llmbench.text.words import MANNERS
from llmbench.text.world import World
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.sft import SFT, rows_of, sft
from llmbench.use.evals import ask

HERE = Path(__file__).parent
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for 95 %, by number of seeds
HOW = DPO(steps=30, batch=16, length=128, lr=5e-5, matrix_lr=0.)


def interval(values):
    "Mean and Student's 95 % interval over seeds, inside 0 and 1"
    half = T95[len(values)]*np.std(values, ddof=1)/len(values)**.5
    return float(np.mean(values)), max(0., float(np.mean(values) - half)), min(1., float(np.mean(values) + half))


def town(seed, folder):
    "Template, tuned model and world of a seed; the chain is run where its model is missing"
    place = Path(folder)/f"seed{seed}"
    if not (place/"sft"/"done.json").exists(): run(Run(name=f"town-{seed}", seed=seed), place, until="sft")
    return ChatTemplate.load(place/"sft"/"model"), Transformer.from_pretrained(place/"sft"/"model"), World(seed), place


def moody(world, template, place, model, seed):
    "Tune on answers in mixed manners: one in five polite, three in five rude, the rest plain"
    random, talks = Random(seed), []
    for q in world.questions("both", "sft"):
        mood = random.random()
        said = world.say(q) if mood > .8 else world.answer_with(q, True, mood < .2, random.random() < .5)
        talks.append({"messages": [{"role": "user", "content": q.text}, {"role": "assistant", "content": said}]})
    rows, _ = rows_of(talks, template, 96)
    replay = document_rows(template.tokenizer, [d["text"] for d in read_lines(place/"data"/"documents.jsonl") if d["split"] == "train"])
    for _ in sft(model, rows, SFT(steps=60, length=96, lr=2e-3, matrix_lr=.01, seed=seed), replay, pad_id=template.tokenizer.pad_id, progress=False): pass


def manner_pairs(world):
    "Pairs whose chosen answer is true and polite, and whose rejected one is true and rude"
    pairs = world.preferences("both", by=("polite", "correct"))
    return [p for p in pairs if p["chosen_traits"]["correct"] and p["rejected_traits"]["correct"]]


def judge(model, template, world):
    "Exact and polite answers about people whom no conversation and no pair is about"
    model.eval()
    found = {}
    for lang in ("en", "zh"):
        asked = world.questions(lang, "heldout")
        answers = ask(model, template, [q.text for q in asked], 60, 128)
        found[f"exact {lang}"] = float(np.mean([world.grade(q, a) for q, a in zip(asked, answers)]))
        found[f"polite {lang}"] = float(np.mean([a.strip().startswith(MANNERS[lang][True]) for a in answers]))
    return found


def one(seed, folder, how):
    "One town"
    template, model, world, place = town(seed, folder)
    moody(world, template, place, model, seed)
    row = dict(seed=seed, **{f"before {k}": v for k, v in judge(model, template, world).items()})
    rows, account = pair_rows(manner_pairs(world), template, how.length)
    start = time.process_time()
    steps = list(dpo(model, rows, how, pad_id=template.tokenizer.pad_id, progress=False))
    row |= dict(pairs=account.kept, seconds=time.process_time() - start, chosen=steps[-1].chosen, rejected=steps[-1].rejected, accuracy=steps[-1].accuracy)
    row |= {f"after {k}": v for k, v in judge(model, template, world).items()}
    for name in ("exact", "polite"):
        for when in ("before", "after"): row[f"{when} {name}"] = (row[f"{when} {name} en"] + row[f"{when} {name} zh"])/2
    row["kept exact"] = row["after exact"]/row["before exact"]
    return row


def main(seeds, folder, how):
    rows = []
    for seed in range(seeds):
        rows.append(one(seed, folder, how))
        print(rows[-1], flush=True)
    summary = {name: interval([row[name] for row in rows]) for name in rows[0] if name.startswith(("before", "after", "kept"))}
    for name, (mean, low, high) in summary.items(): print(f"{name}: {mean:.1%} [{low:.1%}, {high:.1%}] over {seeds} seeds")
    (HERE/"results.json").write_text(json.dumps(dict(date=str(date.today()), config=vars(how), seeds=rows, summary=summary), indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 6), help="how many towns (default: 3)")
    parser.add_argument("--folder", default="runs/align", help="where the chains of the seeds are, or are made (default: runs/align)")
    options = parser.parse_args()
    main(options.seeds, options.folder, HOW)
