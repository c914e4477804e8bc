"""Where PPO, GRPO, RLOO and DPO land on the plane of reward and KL, and whether any of ten seeds diverges: `python experiments/frontier/run.py` (about four minutes on one core)

The language of `align.frontier` has 341 answers, so KL and reward are exact. Prints a line a run, then the sums; `results.json` keeps all."""
import json
import warnings
from pathlib import Path

import torch

from llmbench.align.frontier import dpo_on_game, frontier, frontier_at, learner, new_game, train_on_game, worth
from llmbench.align.grpo import GRPO

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message=".*got the same mark.*")
SEEDS, BETAS = range(10), (.5, .2)
game = new_game()
start = worth(game.ref_logps, game)


def gained(at, by="truth"): return (at[by] - start[by])/(frontier_at(game, at["kl"], by)[by] - start[by])


def told(**row):
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    return row


def summed(name, mine):
    def of(key): return f"{sum(r[key] for r in mine)/len(mine):.3f} ({min(r[key] for r in mine):.3f} to {max(r[key] for r in mine):.3f})"
    print(f"{name}: {len(mine)} seeds, truth {of('truth')}, KL {of('kl')}, share of the frontier's gain {of('gained')}, of its reward {of('reward_share')}, diverged {sum(r['diverged'] for r in mine)}", flush=True)


rows = []
for method in ("ppo", "grpo", "rloo", "grpo_scaled"):
    for beta in BETAS:
        for seed in SEEDS if method in ("ppo", "grpo") else range(3):
            config = learner(method.split("_")[0], beta, seed=seed)
            if method == "grpo_scaled": config = GRPO(**{**vars(config), "scale": True})
            curve = list(train_on_game(game, config, every=10))
            at = curve[-1]
            rows.append(told(method=method, beta=beta, seed=seed, kl=at["kl"], truth=at["truth"], gained=gained(at), reward_share=at["truth"]/frontier_at(game, at["kl"])["truth"],
                             worst_kl=max(c["kl"] for c in curve), lowest=min(c["truth"] for c in curve[3:]), diverged=bool(not all(abs(c["kl"]) < 20 for c in curve) or at["truth"] < start["truth"])))
for beta in BETAS:
    for seed in range(3):
        at = dpo_on_game(game, beta, seed=seed)
        rows.append(told(method="dpo", beta=beta, seed=seed, kl=at["kl"], truth=at["truth"], gained=gained(at), reward_share=at["truth"]/frontier_at(game, at["kl"])["truth"], diverged=False))
for beta in (0., .5, 1.):
    for seed in range(3):
        curve = list(train_on_game(game, learner("ppo", beta, steps=100, seed=seed), by="proxy", every=10))
        at = curve[-1]
        rows.append(told(method="ppo on the proxy", beta=beta, seed=seed, kl=at["kl"], truth=at["truth"], proxy=at["proxy"], peak=max(c["truth"] for c in curve), gained=gained(at), reward_share=0., diverged=False))

optimum = {beta: frontier(game, "truth", [beta])[0] for beta in BETAS}
print("start", start, "optimum", optimum)
for method in dict.fromkeys(r["method"] for r in rows):
    for beta in dict.fromkeys(r["beta"] for r in rows if r["method"] == method): summed(f"{method}, beta {beta}", [r for r in rows if (r["method"], r["beta"]) == (method, beta)])
(Path(__file__).parent/"results.json").write_text(json.dumps(dict(start=start, optimum={str(b): o for b, o in optimum.items()}, rows=rows), indent=1) + "\n")
