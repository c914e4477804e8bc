"""Manners and sums after the default chain, three towns: python experiments/preferences/run.py [--seeds 3] [--folder runs]

Each seed is a whole `llmbench run`; what was done before is not done again. Writes experiments/preferences/results.json."""
import argparse
import os
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

from llmbench.bench.run import Run, run
from llmbench.core import write_json

RESULTS = Path(__file__).parent/"results.json"
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for 95 %, by number of seeds


def row_of(records):
    "The figures of a run's preference stages"
    facts = {stage: record["facts"] for stage, record in records.items()}
    row = {"reward model, held-out pairs": facts["reward"]["accuracy"], "decided by truth": facts["reward"]["truth"], "decided by manners": facts["reward"]["manners"]}
    for when in ("before", "after"):
        row |= {f"DPO polite, {when}": facts["dpo"][when]["polite"], f"DPO exact, {when}": facts["dpo"][when]["exact"],
                f"PPO true reward, {when}": facts["ppo"][when]["truth"], f"PPO paid reward, {when}": facts["ppo"][when]["paid"],
                f"GRPO held-out sums, {when}": facts["grpo"][when]["held"], f"GRPO trained sums, {when}": facts["grpo"][when]["trained"]}
    return row | {"PPO nats per answer": facts["ppo"]["after"]["kl"], "PPO share of what was possible": (facts["ppo"]["after"]["truth"] - facts["ppo"]["before"]["truth"])/(facts["ppo"]["best"] - facts["ppo"]["before"]["truth"]),
                  "seconds of the reward stage": records["reward"]["seconds"], "seconds of all stages": sum(r["seconds"] for r in records.values())}


def main(seeds, folder):
    rows = []
    for seed in range(seeds):
        rows.append(dict(seed=seed, **row_of(run(Run(name=f"town-{seed}", seed=seed), Path(folder)/f"town-{seed}"))))
        print(rows[-1], flush=True)
    for name in rows[0]:
        values = [r[name] for r in rows]
        if name != "seed": print(f"{name:<32} {np.mean(values):8.3f} ± {T95.get(len(values), 0)*np.std(values, ddof=1)/len(values)**.5 if len(values) > 1 else 0:.3f}   ({min(values):.3f} to {max(values):.3f})")
    write_json(RESULTS, dict(date=str(date.today()), seeds=rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6), help="how many towns (default: 3)")
    parser.add_argument("--folder", default="runs", help="where the runs are written (default: runs)")
    options = parser.parse_args()
    main(options.seeds, options.folder)
