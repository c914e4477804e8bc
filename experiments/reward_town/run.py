"""A reward model of the town's preferences: python experiments/reward_town/run.py [--seeds 3] [--folder runs/align] [--steps 100] [--rounds 2]

Truth decides before politeness; length does not count. Trained on pairs about half of the people, three of four prompts; measured on the held-out
prompts of the same people (nothing said about them in these words), and on people of whom no pair speaks. Writes results.json."""
import argparse
import json
import os
import time
from datetime import date
from itertools import product
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from llmbench.align.pairs import pair_rows
from llmbench.align.reward import Reward, RewardModel, answer_lengths, calibration_error, length_bias, pair_rewards, reward, split_pairs, tokenizer_key
from llmbench.bench.run import Run, run
from llmbench.model.transformer import Transformer
from llmbench.text.words import EXTRA, MANNERS, VALUES
from llmbench.text.world import TRAITS, World
from llmbench.tune.chat import ChatTemplate

HERE = Path(__file__).parent
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for 95 %, by number of seeds
KINDS = [dict(zip(TRAITS, bits)) for bits in product((False, True), repeat=3)]


def interval(values):
    "Mean and Student's 95 % interval over seeds, inside 0 and 1; of a single one itself"
    if len(values) == 1: return values[0], values[0], values[0]
    half = T95[len(values)]*np.std(values, ddof=1)/len(values)**.5
    return float(np.mean(values)), max(0., float(np.mean(values) - half)), min(1., float(np.mean(values) + half))


def many_pairs(world, split, rounds, seed, by):
    "As World.preferences, several for each question, with other wrong values and traits each time"
    random, pairs = Random(f"{seed} {split}"), []
    table = [(a, b) for a in KINDS for b in KINDS if [a[t] for t in by] > [b[t] for t in by]]
    def said(q, kind):
        value = q.answer if kind["correct"] else random.choice([v for v in VALUES[q.attribute][q.lang] if v != q.answer])
        parts = [MANNERS[q.lang][kind["polite"]], world.say(q, value).strip(), *([EXTRA[q.lang]] if kind["long"] else [])]
        return "".join((" " if q.lang == "en" else "") + part for part in parts)
    for q in world.questions("both", split):
        for better, worse in (random.choice(table) for _ in range(rounds)):
            pairs.append(dict(prompt=q.text, chosen=said(q, better), rejected=said(q, worse), truth=better["correct"] != worse["correct"]))
    return pairs


def one(seed, folder, how, rounds, by, start):
    "One town"
    place = Path(folder)/f"seed{seed}"
    if not (place/"sft"/"done.json").exists(): run(Run(name=f"town-{seed}", seed=seed), place, until="sft")
    template, world = ChatTemplate.load(place/"sft"/"model"), World(seed)
    model = RewardModel(Transformer.from_pretrained(place/start/"model"), tokenizer_key(template.tokenizer))
    train, prompts = split_pairs(many_pairs(world, "sft", rounds, seed, by), .25, seed)
    groups = {"prompts": prompts, "people": many_pairs(world, "heldout", 1, seed, by)}
    rows = {name: pair_rows(pairs, template, how.length)[0] for name, pairs in {"train": train, **groups}.items()}
    began = time.process_time()
    for step in reward(model, rows["train"], how, pad_id=template.tokenizer.pad_id, progress=False):
        if step.step % 100 == 99: print(f"seed {seed} step {step.step}: loss {step.loss:.3f}, accuracy {step.accuracy:.0%}", flush=True)
    row = dict(seed=seed, pairs=len(rows["train"]), held=len(prompts), seconds=time.process_time() - began)
    for name, pairs in groups.items():
        rewards, truth = pair_rewards(model, rows[name]), torch.tensor([p["truth"] for p in pairs])
        right, bias = (rewards[:, 0] > rewards[:, 1]).double(), length_bias(rewards, answer_lengths(rows[name]))
        row |= {f"{name} accuracy": right.mean().item(), f"{name} truth": right[truth].mean().item(), f"{name} manners": right[~truth].mean().item() if not truth.all() else 1.,
                f"{name} calibration error": calibration_error(rewards), f"{name} longer wins": bias["longer_wins"]}
    return row


def main(seeds, folder, how, rounds, by, start):
    rows = []
    for seed in range(seeds):
        rows.append(one(seed, folder, how, rounds, by, start))
        print(rows[-1], flush=True)
    summary = {name: interval([row[name] for row in rows]) for name in rows[0] if name.startswith(("prompts", "people"))}
    for name, (mean, low, high) in summary.items(): print(f"{name}: {mean:.1%} [{low:.1%}, {high:.1%}] over {seeds} seeds")
    (HERE/"results.json").write_text(json.dumps(dict(date=str(date.today()), config=vars(how), rounds=rounds, by=by, start=start, seeds=rows, summary=summary), indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6), help="how many towns (default: 3)")
    parser.add_argument("--folder", default="runs/align", help="where the chains of the seeds are, or are made (default: runs/align)")
    parser.add_argument("--steps", type=int, default=100, help="of training (default: 100)")
    parser.add_argument("--rounds", type=int, default=2, help="pairs for each question (default: 2)")
    parser.add_argument("--by", nargs="+", default=["correct", "polite"], choices=TRAITS, help="what decides, the first before the second (default: correct polite)")
    parser.add_argument("--start", default="sft", choices=["sft", "pretrain"], help="which model to begin with (default: sft)")
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW's rate (default: 1e-3)")
    parser.add_argument("--matrix-lr", type=float, default=5e-3, help="Muon's rate (default: 5e-3)")
    options = parser.parse_args()
    main(options.seeds, options.folder, Reward(steps=options.steps, lr=options.lr, matrix_lr=options.matrix_lr), options.rounds, options.by, options.start)
