"PPO on SmolLM2-135M in four bits, on a CPU, 20 steps of 16 answers: does the mark rise on countries that were never asked? `python experiments/box_ppo/run.py [SEED ...]`"
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LLMBENCH_ASSETS", str(HERE.parent.parent/".cache"/"assets"))
sys.path.insert(0, str(HERE))

import torch
from capitals import HELD_OUT, LONGEST, TRAIN, right, right_and_brief

from llmbench.align.ppo import PPO, PolicyAndValue
from llmbench.align.rollout import Sampling
from llmbench.box.hub import FourBit, load_template, locate
from llmbench.box.launch import Launch
from llmbench.box.marks import read_prompts
from llmbench.box.policy import joined, roll_parts, shared_base
from llmbench.box.ppo import BoxPPO, do_ppo
from llmbench.box.sft import Lora
from llmbench.core import read_json, write_json

RUNS = HERE/"runs"


def asked(name, rows):
    path = RUNS/name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def measured(model, held, repeats=2):
    "Marks of sampled answers to the held-out questions, the same chance for every model"
    place = locate(model)
    template = load_template(place)
    prompts, _ = read_prompts((held,), template)
    policy = PolicyAndValue(shared_base(place, Lora(r=8, alpha=16.), torch.bfloat16, FourBit()))
    how = PPO(sampling=Sampling(prompts=len(prompts), new_tokens=LONGEST), seed=1000)
    roll = joined([part for step in range(repeats) for _, part in roll_parts(policy, prompts, right_and_brief, template.tokenizer, how, step, len(prompts))])
    marks = roll.rewards.view(repeats, -1).mean(0)  # of each country
    return dict(marks=marks.tolist(), right=sum(map(right, roll.samples))/len(roll), ended=float(roll.ended.float().mean()), tokens=float(roll.counts.sum(1).float().mean()), answers=[s.text for s in roll.samples[:6]])


def one(seed, held, train):
    began = time.process_time()
    ppo = PPO(sampling=Sampling(prompts=16, new_tokens=LONGEST), steps=20, lr=3e-4, warmup=2, epochs=2, minibatch=8, kl_coef=.02, missing_eos=0., save_every=10, seed=seed)
    job = BoxPPO(model="smollm2", prompts=(train,), reward="capitals:right_and_brief", method="qlora", name=f"seed{seed}", folder=str(RUNS), micro=16, weights="bf16", lora=Lora(r=8, alpha=16.), ppo=ppo, launch=Launch(processes=1, cpu=True))
    do_ppo(job)
    seconds, folder = time.process_time() - began, RUNS/f"seed{seed}"/"ppo"
    log = [json.loads(line) for line in (folder/"steps.jsonl").read_text().splitlines()]
    after = measured(str(folder/"model"), held)
    return dict(seed=seed, seconds=seconds, first=sum(r["reward"] for r in log[:5])/5, last=sum(r["reward"] for r in log[-5:])/5, kl=sum(r["kl"] for r in log[-5:])/5, log=[{k: r[k] for k in ("reward", "kl", "entropy", "length", "ended", "drift", "updates", "explained")} for r in log], after=after)


def main():
    train, held, path = asked("train.jsonl", TRAIN), asked("held.jsonl", HELD_OUT), HERE/"results.json"
    results = read_json(path) if path.exists() else dict(before=measured("smollm2", held), seeds=[])
    for seed in map(int, sys.argv[1:] or ("0", "1", "2")):
        results["seeds"] = [r for r in results["seeds"] if r["seed"] != seed] + [one(seed, held, train)]
        write_json(path, results)
    before = torch.tensor(results["before"]["marks"])
    rises = torch.stack([torch.tensor(r["after"]["marks"]) for r in results["seeds"]]) - before  # (seeds, countries)
    print(f"held-out mark before {before.mean():.3f}: right {results['before']['right']:.0%}, ended {results['before']['ended']:.0%}, {results['before']['tokens']:.1f} tokens")
    for r, rise in zip(results["seeds"], rises): print(f"seed {r['seed']}: {r['first']:.3f} to {r['last']:.3f} in training, {r['kl']:.2f} nats; held out {before.mean() + rise.mean():.3f}, right {r['after']['right']:.0%}, ended {r['after']['ended']:.0%}, {r['after']['tokens']:.1f} tokens; {r['seconds']:.0f} s of processor time")
    by_country = rises.mean(0)
    half = 2.201*by_country.std()/len(by_country)**.5  # t of 11 degrees of freedom
    print(f"rise {rises.mean():.3f} [{by_country.mean() - half:.3f}, {by_country.mean() + half:.3f}] over {rises.shape[1]} countries, {len(rises)} seeds: {[round(x, 3) for x in rises.mean(1).tolist()]}")


if __name__ == "__main__": main()
