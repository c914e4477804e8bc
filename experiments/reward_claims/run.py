"""Does a reward model that first reads true and false sentences come to know facts? python experiments/reward_claims/run.py [--seeds 3] [--folder runs]

Three judges for each town, all made of the chain's moody model and all given the same labelled pairs in the end: one that reads claims about
everybody, one that reads claims about the people of the labelled pairs only, one that reads none. Examined on pairs about the other people, of
whom no labelled pair speaks; 1,000 is the chain's number of steps. Writes results.json, mean and half of Student's 95 % interval over the towns; a town that is there already is not done again."""
import argparse
import os
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from llmbench.align.claims import learn_claims, town_claims
from llmbench.align.pairs import pair_rows
from llmbench.align.reward import RewardModel, pair_rewards, reward
from llmbench.bench.preferences import Preferences, book_pairs
from llmbench.bench.run import Run, run
from llmbench.core import read_json, write_json
from llmbench.model.transformer import Transformer
from llmbench.text.world import World
from llmbench.tune.chat import ChatTemplate
from llmbench.use.intervals import seed_interval

RESULTS = Path(__file__).parent/"results.json"
HOW = Preferences()


def examine(model, held, truth):
    "Share of held-out pairs that are right: all, decided by truth, decided by manners"
    rewards = pair_rewards(model, held)
    right = (rewards[:, 0] > rewards[:, 1]).double()
    return {"all pairs": right.mean().item(), "truth": right[truth].mean().item(), "manners": right[~truth].mean().item()}


def one(seed, folder):
    "One town: the row of results"
    start = Path(folder)/f"town-{seed}"/"manners"/"model"
    if not start.exists(): run(Run(name=f"town-{seed}", seed=seed), start.parent.parent, until="manners")
    row, world, template = dict(seed=seed), World(seed), ChatTemplate.load(start)
    pairs = {split: world.preferences("both", split=split) for split in ("sft", "heldout")}
    train, held = (pair_rows(some, template, HOW.reward.length)[0] for some in pairs.values())
    truth = torch.tensor([p["chosen_traits"]["correct"] != p["rejected_traits"]["correct"] for p in pairs["heldout"]])
    half = range(len(world.people)//2)
    for name, people in (("claims about all", None), ("claims about half", half), ("pairs only", ())):
        model, began = RewardModel(Transformer.from_pretrained(start)), time.process_time()
        names = {world.people[i][lang] for i in (range(len(world.people)) if people is None else people) for lang in ("en", "zh")}
        if people != ():
            rows = town_claims(world, template, HOW.book.steps*HOW.book.batch, people)
            for step in learn_claims(model, rows, HOW.book, pad_id=template.tokenizer.pad_id, progress=False):
                if people is None and (step.step + 1) % 50 == 0: row.setdefault("curve", []).append([step.step + 1, step.loss, examine(model, held, truth)["truth"]])
        read = pair_rows([p for p in book_pairs(world) if p["prompt"] in names], template, HOW.reward.length)[0]
        for _ in reward(model, train + read, HOW.reward, pad_id=template.tokenizer.pad_id, progress=False): pass
        row |= {f"{name}, {kind}": share for kind, share in examine(model, held, truth).items()} | {f"{name}, seconds": time.process_time() - began}
        print(seed, name, {k.split(", ")[1]: round(v, 3) for k, v in row.items() if k.startswith(name)}, flush=True)
    return row


def known():
    "Rows that are there already, by town"
    return {row["seed"]: row for row in (read_json(RESULTS)["seeds"] if RESULTS.exists() else [])}


def main(seeds, folder):
    for seed in seeds:
        if seed in known(): continue
        rows = {seed: one(seed, folder)} | known()  # somebody else may have written meanwhile
        done = [rows[s] for s in sorted(rows)]
        summary = {name: seed_interval([row[name] for row in done]) for name in done[0] if ", " in name} if len(done) > 1 else {}
        write_json(RESULTS, dict(date=str(date.today()), book=asdict(HOW.book), reward=asdict(HOW.reward), seeds=done, summary=summary))
    for name, (mean, half) in (read_json(RESULTS)["summary"] if RESULTS.exists() else {}).items(): print(f"{name}: {mean:.3f} ± {half:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which towns (default: 0 1 2)")
    parser.add_argument("--folder", default="runs", help="where the chains of the towns are, or are made (default: runs)")
    options = parser.parse_args()
    main(options.seeds, options.folder)
