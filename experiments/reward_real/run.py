"""Reward models on real preferences: python experiments/reward_real/run.py [--seeds 3] [--steps 80] [--files gsm8k_solutions] [--length 256]

A small decoder without pre-training, on preference_en.json and preference_zh.json (people's and models' choices) and on pairs made of
gsm8k_model_solutions.jsonl (a right solution over a wrong one to the same question). Split by prompt; accuracy beside the rule "the longer
answer", and what the model pays for length. Writes results.json."""
import argparse
import json
import os
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from llmbench.align.pairs import pair_rows, ranking, ranking_pairs, read_preferences, split_pairs
from llmbench.align.reward import Reward, RewardModel, answer_lengths, calibration_error, length_bias, pair_rewards, reward
from llmbench.core import UserError, read_json
from llmbench.model.transformer import Config, Transformer
from llmbench.text.bpe import BPE
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.formats import read_rows

HERE = Path(__file__).parent
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for 95 %, by number of seeds


def interval(values):
    "Mean and Student's 95 % interval over seeds"
    half = T95[len(values)]*np.std(values, ddof=1)/len(values)**.5
    return float(np.mean(values)), float(np.mean(values) - half), float(np.mean(values) + half)


def solution_pairs(path):
    "A right solution over a wrong one, wherever the four models disagree; how many questions all of them got right or wrong"
    pairs, tied = [], 0
    for _, row in read_rows(path):
        tries = [v for v in row.values() if isinstance(v, dict)]
        try: decided = ranking_pairs(ranking([t["solution"] for t in tries], [t["is_correct"] for t in tries]))
        except UserError: tied += 1; continue
        pairs += [dict(prompt=row["question"], chosen=a, rejected=b) for a, b in decided]
    return pairs, tied


def one(name, pairs, seed, how):
    "Train and judge on one split"
    train, held = split_pairs(pairs, .2, seed)
    def said(p): return p["chosen"] if isinstance(p["chosen"], str) else p["chosen"][0]["content"]
    template = ChatTemplate(BPE.train([said(p) for p in train][:400], 1000))
    rows, account = pair_rows(train, template, how.length)
    probe, _ = pair_rows(held, template, how.length)
    torch.manual_seed(seed)
    model = RewardModel(Transformer(Config(vocab_size=template.tokenizer.vocab_size, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_hidden=172, max_length=how.length)))
    for _ in reward(model, rows, how, pad_id=template.tokenizer.pad_id, progress=False): pass
    rewards, lengths = pair_rewards(model, probe), answer_lengths(probe)
    bias = length_bias(rewards, lengths)
    return dict(file=name, seed=seed, length=how.length, pairs=len(rows), held=len(probe), skipped=sum(account.skipped.values()), accuracy=(rewards[:, 0] > rewards[:, 1]).float().mean().item(),
                longer=(lengths[:, 0] > lengths[:, 1]).float().mean().item(), calibration_error=calibration_error(rewards), **{f"length {k}": v for k, v in bias.items()})


def main(seeds, steps, data, files, length):
    solved, tied = solution_pairs(Path(data)/"gsm8k_model_solutions.jsonl")
    print(f"gsm8k: {len(solved)} pairs; {tied} questions decide nothing")
    sets = {"preference_en": read_preferences(Path(data)/"preference_en.json", slots={}), "preference_zh": read_preferences(Path(data)/"preference_zh.json", slots={}), "gsm8k_solutions": solved}
    path = HERE/"results.json"
    rows, summary = [r for r in (read_json(path)["seeds"] if path.exists() else []) if r["file"] not in files], {}  # other files' results stay
    for name, pairs in ((name, sets[name]) for name in files):
        for seed in range(seeds):
            rows.append(one(name, pairs, seed, Reward(steps=steps, batch=8, length=length, lr=2e-3, matrix_lr=.01, seed=seed)))
            print(rows[-1], flush=True)
    for name in dict.fromkeys(r["file"] for r in rows):
        mine = [r for r in rows if r["file"] == name]
        for figure in ("accuracy", "longer", "length longer_wins"): summary[f"{name} {figure}"] = interval([r[figure] for r in mine])
    for name, (mean, low, high) in summary.items(): print(f"{name}: {mean:.1%} [{low:.1%}, {high:.1%}] over {seeds} seeds")
    path.write_text(json.dumps(dict(date=str(date.today()), steps=steps, tied=tied, seeds=rows, summary=summary), indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 6), help="splits and initialisations (default: 3)")
    parser.add_argument("--steps", type=int, default=80, help="of training (default: 80)")
    parser.add_argument("--data", default="../shared/data", help="folder of the three files (default: ../shared/data)")
    parser.add_argument("--files", nargs="+", default=["gsm8k_solutions"], choices=["preference_en", "preference_zh", "gsm8k_solutions"], help="which (default: gsm8k_solutions; the others need a length of 1,024 and more)")
    parser.add_argument("--length", type=int, default=256, help="the most tokens of a row (default: 256)")
    options = parser.parse_args()
    main(options.seeds, options.steps, options.data, options.files, options.length)
