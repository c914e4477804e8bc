"""Curation in the town: python experiments/curate/run.py [--seeds 5] [--parts noise best mixtures harvest order wordings] [--table]

Everything starts at the base model on the shelf (data/town/base, which has read town 0 and never answered), so the seeds stand for other draws of rows, noise,
order and answers, not for other towns. Writes experiments/curate/results.json trial by trial; stopped, it goes on. --table prints what stands there."""
import argparse
import copy
import json
import math
import os
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from llmbench.bench.score import document_rows
from llmbench.core import write_json
from llmbench.play.model import town_folder, town_model
from llmbench.text.batch import pack, pad
from llmbench.text.world import World
from llmbench.train.loop import Fit, fit
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.mixture import class_weights, curriculum, joined, mixture, temperature_shares, weighted
from llmbench.tune.select import answer_losses, best_of, chance_of_k, expected_best, k_centre, sampler, spoil, tfidf
from llmbench.tune.sft import SFT, rows_of, sft
from llmbench.use.evals import ask
from llmbench.use.intervals import seed_interval as interval

RESULTS = Path(__file__).parent/"results.json"
SHARES = (.1, .25, .5, .75)                      # of the rows that are spoiled
KS = (1, 2, 4, 8, 16, 32, 64)


class Town:
    "The shelf model, its town, what it reads and what it is asked"
    def __init__(self):
        torch.set_num_threads(1)
        (self.base, self.tokenizer), self.world = town_model("base"), World(0, 50)
        self.template = ChatTemplate.load(town_folder()/"base")
        self.documents = document_rows(self.tokenizer, self.world.documents("both")[:1600])
        self.talks = self.world.conversations("both", "sft")
        self.asked = self.world.questions("both", "heldout")[::4]

    def rows(self, talks): return rows_of(talks, self.template, 64)[0]

    def taught(self, talks, steps=60, seed=0, start=None):
        "A copy of the base model (or of `start`), tuned with one third replay"
        model = copy.deepcopy(start or self.base)
        for _ in sft(model, self.rows(talks), SFT(steps=steps, seed=seed), self.documents, progress=False): pass
        return model

    def right(self, model, asked=None):
        "Share of held-out questions answered right, greedy"
        asked = asked or self.asked
        return sum(map(self.world.grade, asked, ask(model.eval(), self.template, [q.text for q in asked], 24, 128)))/len(asked)


def noise(town, seed):
    "Clean 10 % against 100 % of which a share is spoiled; and a tenth picked by the base model's loss"
    tenth = Random(f"tenth {seed}").sample(range(len(town.talks)), len(town.talks)//10)
    yield "clean 10%", lambda: dict(right=town.right(town.taught([town.talks[i] for i in tenth], seed=seed)))
    yield "clean 100%", lambda: dict(right=town.right(town.taught(town.talks, seed=seed)))
    for share in SHARES: yield f"spoiled {share:.0%} of 100%", lambda share=share: dict(right=town.right(town.taught(spoil(town.talks, share, seed)[0], seed=seed)))
    dirty, what = spoil(town.talks, .5, seed)
    def picked(chosen): return dict(right=town.right(town.taught([dirty[i] for i in chosen], seed=seed)), clean=sum(not what[i] for i in chosen)/len(chosen))
    yield "spoiled 50%, 10% by lot", lambda: picked(tenth)
    by_loss = answer_losses(town.base, town.rows(dirty)).argsort().tolist()
    yield "spoiled 50%, 10% of least loss", lambda: picked(by_loss[:len(tenth)])
    half = by_loss[:len(by_loss)//2]
    yield "spoiled 50%, half of least loss", lambda: picked(half)
    yield "spoiled 50%, 10% spread over it", lambda: picked([half[i] for i in k_centre(tfidf([dirty[i]["messages"][0]["content"] for i in half]), len(tenth))[0]])


def student(town, seed):
    "Thirty steps on forty conversations: right now and then"
    return town.taught(Random(f"student {seed}").sample(town.talks, 40), 30, seed)


def best(town, seed):
    "Best-of-K: theory from 64 answers to each question, measurement on 64 fresh ones, in groups of K"
    def trial():
        answer, asked = sampler(student(town, seed), town.template, 1., 24, seed), town.asked[::2]
        def marked():
            said = answer([q.text for q in asked for _ in range(64)])
            return torch.tensor([float(town.world.grade(asked[i//64], text)) for i, text in enumerate(said)]).view(len(asked), 64)
        first, fresh = marked(), marked()
        gap = {k: np.array([expected_best(row, k) for row in first.tolist()]) - fresh.view(len(asked), -1, k).amax(-1).mean(-1).numpy() for k in KS}
        return dict(theory=[float(np.mean([expected_best(row, k) for row in first.tolist()])) for k in KS],
                    measured=[float(fresh.view(len(asked), -1, k).amax(-1).mean()) for k in KS], error=[float(g.std(ddof=1)/len(g)**.5) for g in gap.values()],
                    mean_p=[chance_of_k(float(first.mean()), k) for k in KS], questions=len(asked))
    yield "best of K", trial


def mixtures(town, seed):
    "Task x mixture: English (400 rows), Chinese (20), refusing strangers (20); each alone, by temperature, and by weights"
    world, lot = town.world, Random(f"mixtures {seed}")
    sources = dict(en=world.conversations("en", "sft"), zh=lot.sample(world.conversations("zh", "sft"), 20), refuse=lot.sample(world.conversations("en", "unknown_sft"), 20))
    tasks = dict(en=world.questions("en", "heldout")[::4], zh=world.questions("zh", "heldout")[::4], refuse=world.questions("en", "unknown")[::4])
    sizes, documents = [len(s) for s in sources.values()], pack(town.documents, 64)
    rows = [town.rows(s) for s in sources.values()]
    labels = [name for name, r in zip(sources, rows) for _ in r]
    def trained(pools, shares):
        model = copy.deepcopy(town.base)
        how = Fit(steps=60, lr=2e-3, matrix_lr=.01, warmup=10)
        for _ in fit(model, mixture([*pools, documents], [*(2*s/3 for s in shares), 1/3], 32, seed), how, progress=False): pass
        return {name: town.right(model, asked) for name, asked in tasks.items()}
    pools = [pack(r, 64) for r in rows]
    for i, name in enumerate(sources): yield f"{name} alone", lambda i=i: trained([pools[i]], [1.])
    for T in (1., 3., math.inf): yield f"T = {T:g}", lambda T=T: trained(pools, temperature_shares(sizes, T))
    yield "T = 1, class weights", lambda: trained([pack(weighted([x for r in rows for x in r], class_weights(labels)), 64)], [1.])


def harvest(town, seed):
    "Rejection sampling and distillation, against as many further steps on the forty conversations"
    practice = town.world.questions("both", "sft")[::2]
    few = Random(f"student {seed}").sample(town.talks, 40)
    texts = [q.text for q in practice]
    def trial(kind):
        before = student(town, seed)
        if kind == "forty again": return dict(before=town.right(before), after=town.right(town.taught(few, 60, seed + 1, before)))
        if kind.startswith("teacher"): talks, account = best_of(sampler(town_model("tuned")[0], town.template, 0., 24), texts, lambda i, text: 0.)
        else: talks, account = best_of(sampler(before, town.template, 1., 24, seed), texts, lambda i, text: town.world.grade(practice[i], text) if kind == "marked" else 1., 4 if kind == "marked" else 1, 1.)
        for t in talks if "stripped" in kind else []: t["messages"][1]["content"] = t["messages"][1]["content"].strip()
        return dict(before=town.right(before), after=town.right(town.taught(talks, 60, seed + 1, before)), **account)
    for kind in ("forty again", "marked", "unmarked", "teacher", "teacher, first space stripped"): yield kind, lambda kind=kind: trial(kind)


def order(town, seed):
    "From easy to hard, from hard to easy, by lot: 30 and 60 steps on all clean conversations"
    rows = town.rows(town.talks)
    pool, documents, losses = pad(rows, 64), pack(town.documents, 64), answer_losses(town.base, rows)
    def trained(steps, difficulty, start):
        model, picks = copy.deepcopy(town.base), curriculum(pool, difficulty, steps//2, 21, start, seed)
        def batch_at(step, micro=0): return joined([picks(step), mixture([documents], [1.], 11, seed)(step)])
        for _ in fit(model, batch_at, Fit(steps=steps, lr=2e-3, matrix_lr=.01, warmup=10), progress=False): pass
        return dict(right=town.right(model))
    for steps in (30, 60):
        for name, difficulty, start in (("by lot", losses, 1.), ("easy first", losses, .1), ("hard first", -losses, .1)):
            yield f"{name}, {steps} steps", lambda steps=steps, d=difficulty, s=start: trained(steps, d, s)


def wordings(town, seed):
    "Augmentation by paraphrase: the same 40 facts asked in one wording or in three; tested in the fourth, which neither has seen"
    way = [q for q in range(len(town.talks)) if q % 4 == 0]
    facts = Random(f"facts {seed}").sample(way, 40)
    fourth = town.world.questions("both", "heldout")[3::4][::2]
    for name, ways in (("one wording", 1), ("three wordings", 3)):
        yield name, lambda ways=ways: dict(right=town.right(town.taught([town.talks[i + w] for i in facts for w in range(ways)], seed=seed), fourth))


PARTS = dict(noise=noise, best=best, mixtures=mixtures, harvest=harvest, order=order, wordings=wordings)


def table(results):
    "Means over seeds with their intervals"
    for part, seeds in results.items():
        print(f"\n{part} ({len(seeds)} seeds): {PARTS[part].__doc__}")
        trials = [name for name in next(iter(seeds.values())) if all(name in s for s in seeds.values())]
        for name in trials:
            rows = [s[name] for s in seeds.values()]
            if part == "best":
                for j, k in enumerate(KS):
                    told = {key: np.mean([r[key][j] for r in rows]) for key in ("theory", "measured", "mean_p", "error")}
                    worst = max(abs(r["theory"][j] - r["measured"][j])/max(r["error"][j], 1e-9) for r in rows)
                    print(f"  K = {k:<3} theory {told['theory']:.3f}  measured {told['measured']:.3f}  (1 - (1 - mean p)^K {told['mean_p']:.3f}; standard error of the gap {told['error']:.3f}, worst gap {worst:.1f} of them)")
            else: print(f"  {name:<32}" + "   ".join(f"{key} {m:.3f} ± {h:.3f}" for key in rows[0] for m, h in [interval([r[key] for r in rows])]))
        if part == "noise":
            for share in SHARES:
                m, h = interval([s["clean 10%"]["right"] - s[f"spoiled {share:.0%} of 100%"]["right"] for s in seeds.values()])
                print(f"  clean 10 % less 100 % with {share:.0%} spoiled: {100*m:+.1f} ± {100*h:.1f} points")
        if part == "mixtures":
            for name in ("T = 3", "T = inf", "T = 1, class weights"):
                told = {task: interval([s[name][task] - s["T = 1"][task] for s in seeds.values()]) for task in ("zh", "en")}
                print(f"  {name} less T = 1: " + ", ".join(f"{task} {100*m:+.1f} ± {100*h:.1f} points" for task, (m, h) in told.items()))


def main(parts, seeds):
    results, town = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}, Town()
    for part in parts:
        for seed in range(seeds if part == "noise" else min(seeds, 3)):
            done = results.setdefault(part, {}).setdefault(str(seed), {})
            for name, trial in PARTS[part](town, seed):
                if name not in done:
                    done[name] = trial()
                    write_json(RESULTS, results)
                    print(part, seed, name, {k: v for k, v in done[name].items() if not isinstance(v, list)}, flush=True)
    table(results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 6), help="seeds of the noise part; the others take at most 3 (default: 5)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="what to measure (default: all)")
    parser.add_argument("--table", action="store_true", help="print the results and stop")
    options = parser.parse_args()
    table(json.loads(RESULTS.read_text())) if options.table else main(options.parts, options.seeds)
