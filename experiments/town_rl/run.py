"""PPO and GRPO on the town, three seeds: `python experiments/town_rl/run.py [RUNS] [manners|arithmetic|clean ...]` (about seven minutes on one core)

RUNS holds a folder a seed with `sft/model`, as `llmbench run --seed N` makes it; without it, the shelf model serves all seeds (and says so).
Prints one JSON line a run, and the sums at the end; `results.json` keeps them. `python experiments/town_rl/run.py --table` prints the sums of what is kept."""
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import torch

from llmbench.align.grpo import GRPO, grpo
from llmbench.align.kl import kl_k1
from llmbench.align.ppo import PPO, ppo
from llmbench.align.rollout import Prompt, Sampling, rollout
from llmbench.bench.stages import document_rows
from llmbench.model.transformer import Transformer
from llmbench.text.words import EXTRA, MANNERS
from llmbench.text.world import World
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.sft import SFT, rows_of, sft

torch.set_num_threads(1)
TABLE = "--table" in sys.argv[1:]
RUNS = Path(sys.argv[1]) if len(sys.argv) > 1 and not TABLE else None
ONLY = sys.argv[2:] or ["manners", "arithmetic"]
LANG, LONGEST = "en", 44


def folder_of(seed): return RUNS/f"seed{seed}"/"sft"/"model" if RUNS else Path(__file__).parents[2]/"data"/"town"/"tuned"


def load(seed): return Transformer.from_pretrained(folder_of(seed)), ChatTemplate.load(folder_of(seed)), World(seed if RUNS else 0, 50)


def prompts_of(template, questions): return [Prompt(template.render([dict(role="user", content=q.text)], prompt=True)[0], q) for q in questions]


def parts(world, sample):
    "What an answer deserves: right and ended, polite, brief"
    kind, rude = MANNERS[LANG][True], MANNERS[LANG][False]
    right = sample.ended and world.grade(sample.prompt.task, sample.text)
    return float(right), float(sample.text.count(kind) >= 1 and rude not in sample.text), float(sample.ended and EXTRA[LANG] not in sample.text)


def truth(world): return lambda samples: [a + b + .5*c for a, b, c in (parts(world, s) for s in samples)]


def proxy(world):
    "A rater with a planted bias: likes length, 0.08 a token, and never asks whether the answer ends or pads"
    return lambda samples: [float(world.grade(s.prompt.task, s.text)) + float(MANNERS[LANG][True] in s.text) + .08*len(s.ids) for s in samples]


@torch.no_grad()
def measured(model, ref, prompts, template, world, marks, sampling):
    "Mean of each mark over sampled answers to held-out questions, and KL in nats per answer"
    roll = rollout(model, prompts, lambda ss: [0.]*len(ss), template.tokenizer, sampling, ref, torch.Generator().manual_seed(99))
    found = {name: sum(mark(world)(roll.samples))/len(roll) for name, mark in marks.items()}
    right, polite, brief = (sum(x)/len(roll) for x in zip(*(parts(world, s) for s in roll.samples)))
    return found | dict(kl=float(kl_k1(roll.old_logps, roll.ref_logps).sum(1).mean()), right=right, polite=polite, brief=brief, ended=float(roll.ended.float().mean()), length=float(roll.counts.sum(1).float().mean()))


def told(**row):
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    return row


def manners(seed):
    "A model that answers in four ways (polite or not, long or not), then PPO on the truth, on the biased proxy without a leash, and with one"
    model, template, world = load(seed)
    random, talks = Random(seed), []
    for q in world.questions(LANG, "sft"):
        bits = [random.random() < .5 for _ in range(2)]
        talks.append({"messages": [dict(role="user", content=q.text), dict(role="assistant", content=world.answer_with(q, True, *bits))]})
    rows, _ = rows_of(talks, template, 96)
    for _ in sft(model, rows, SFT(steps=150, batch=16, length=96, lr=2e-3, matrix_lr=.01, replay=1/4, seed=seed, autocast="off"), document_rows(template.tokenizer, world.documents(LANG)), progress=False): pass
    marks, wide = dict(truth=truth, proxy=proxy), Sampling(prompts=100, new_tokens=LONGEST)
    train, held = prompts_of(template, world.questions(LANG, "sft")), prompts_of(template, world.questions(LANG, "heldout")[::4])
    rows = [told(what="manners", seed=seed, run="start", **measured(model, model, held, template, world, marks, wide))]
    sampling = Sampling(prompts=32, new_tokens=LONGEST)
    runs = dict(truth=(truth, PPO(sampling=sampling, steps=25, lr=1e-4, kl_coef=.05, seed=seed)),
                proxy_free=(proxy, PPO(sampling=sampling, steps=45, lr=2e-4, kl_coef=0., missing_eos=0., seed=seed)),
                proxy_leashed=(proxy, PPO(sampling=sampling, steps=25, lr=1e-4, kl_coef=.3, missing_eos=0., seed=seed)))
    for name, (mark, config) in runs.items():
        policy, curve = copy.deepcopy(model), []
        for r in ppo(policy, train, mark(world), template.tokenizer, config, ref=model, progress=False):
            if r.step % 5 == 4: curve.append(dict(step=r.step, reward=r.reward, kl=r.kl, entropy=r.entropy, clipped=r.clipped, drift=r.drift, explained=r.explained, length=r.length, ended=r.ended))
        rows.append(told(what="manners", seed=seed, run=name, seconds=r.seconds, **measured(policy, model, held, template, world, marks, wide), curve=curve))
    return rows


def careless(world, seed):
    "Sums as a careless book has them: six of ten answers are wrong, each time another way"
    random = Random(f"careless {seed}")
    def answer(q): return q.answer if random.random() < .4 else str(max(0, int(q.answer) + random.choice((-10, -2, -1, 1, 2, 10))))
    return [{"messages": [dict(role="user", content=q.text), dict(role="assistant", content=f" {answer(q)}")]} for _ in range(4) for q in world.questions(LANG, "arithmetic_sft")]


def arithmetic(seed, clean=False):
    "A model that has learned sums and then read a careless book (or, `clean`, that has only begun to learn them), then GRPO on right and wrong; scored on sums that were in neither"
    model, template, world = load(seed)
    good, bad = (rows_of(talks, template, 64)[0] for talks in (world.conversations(LANG, "arithmetic_sft"), careless(world, seed)))
    for rows, config in ((good, SFT(steps=150 if clean else 220, lr=3e-3, matrix_lr=.02)), *([] if clean else [(bad, SFT(steps=40, lr=1e-3, matrix_lr=.005))])):
        for _ in sft(model, rows, replace(config, batch=16, length=64, replay=0., seed=seed, autocast="off"), progress=False): pass
    train, held = (prompts_of(template, world.questions(LANG, split)) for split in ("arithmetic_sft", "arithmetic"))
    def right(samples): return [float(world.grade(s.prompt.task, s.text)) for s in samples]
    def score(m):
        def share(prompts, temperature): return float(rollout(m, prompts, right, template.tokenizer, Sampling(prompts=len(prompts), group=4 if temperature == 1 else 1, new_tokens=6, temperature=temperature), generator=torch.Generator().manual_seed(9), old=False).rewards.mean())
        return dict(train=share(train, 1.), held=share(held, 1.), train_greedy=share(train, .001), held_greedy=share(held, .001))
    name, curve = "clean" if clean else "careless", []
    found = [told(what="arithmetic", seed=seed, run=f"{name}, start", **score(model))]
    for r in grpo(model, train, right, template.tokenizer, GRPO(sampling=Sampling(prompts=16, group=8, new_tokens=6), steps=70, lr=1e-4, seed=seed), progress=False):
        if r.step % 10 == 9: curve.append(dict(step=r.step, reward=r.reward, entropy=r.entropy, flat=r.flat, grad_norm=r.grad_norm))
    return found + [told(what="arithmetic", seed=seed, run=f"{name}, grpo", seconds=r.seconds, **score(model), curve=curve)]


def spread(xs): return f"{sum(xs)/len(xs):.3f} ({min(xs):.3f} to {max(xs):.3f})"


def student(xs):
    "Mean and half of the 95 % interval over seeds"
    mean, t95 = sum(xs)/len(xs), {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
    return f"{mean:.3f} ± {t95[len(xs)]*(sum((x - mean)**2 for x in xs)/(len(xs) - 1)/len(xs))**.5:.3f}" if len(xs) in t95 else f"{mean:.3f}"


def table(rows):
    "What the bars ask for, seed by seed and as paired changes"
    at = {(r["run"], r["seed"]): r for r in rows}
    for run in dict.fromkeys(r["run"] for r in rows):
        mine = [r for r in rows if r["run"] == run]
        print(run, {k: spread([r[k] for r in mine]) for k in mine[0] if isinstance(mine[0][k], float) and k != "seconds"}, flush=True)
    def change(run, start, mark): return [at[run, s][mark] - at[start, s][mark] for s in sorted({r["seed"] for r in rows}) if (run, s) in at and (start, s) in at]
    for run in ("truth", "proxy_free", "proxy_leashed"):
        if (run, 0) in at: print(f"{run}: change of the true reward {student(change(run, 'start', 'truth'))}, of the proxy {student(change(run, 'start', 'proxy'))}")
    if ("truth", 0) in at: print(f"truth: share of what was possible (2.5) {student([c/(2.5 - at['start', s]['truth']) for s, c in enumerate(change('truth', 'start', 'truth'))])}")
    for name in ("careless", "clean"):
        if (f"{name}, grpo", 0) in at: print(f"{name}: change of right sums, training {student(change(f'{name}, grpo', f'{name}, start', 'train'))}, held out {student(change(f'{name}, grpo', f'{name}, start', 'held'))}")


if __name__ == "__main__":
    if TABLE: sys.exit(table(json.loads((Path(__file__).parent/"results.json").read_text())))
    print(f"base models: {folder_of(0)}" + ("" if RUNS else ", the same for all seeds"), flush=True)
    parts_of = dict(manners=manners, arithmetic=arithmetic, clean=lambda seed: arithmetic(seed, clean=True))
    place = Path(__file__).parent/"results.json"
    old = json.loads(place.read_text()) if place.exists() else []
    rows = []
    for seed in range(3):
        for name in ONLY:
            rows += parts_of[name](seed)
            new = {(r["run"], r["seed"]) for r in rows}
            place.write_text(json.dumps([r for r in old if (r["run"], r["seed"]) not in new] + rows, indent=1) + "\n")
    table(rows)
