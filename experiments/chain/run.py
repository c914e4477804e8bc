"""Held-out questions about the town before and after `llmbench run`, several seeds: python experiments/chain/run.py [--seeds 3]

Each seed is another town, another initialisation and another order of the data. Writes experiments/chain/results.json."""
import argparse
import json
import os
import platform
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from llmbench.bench.run import Run, run

HERE = Path(__file__).parent
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # Student's t for 95 %, by number of seeds


def interval(values):
    "Mean and Student's 95 % interval over seeds, inside 0 and 1"
    half = T95[len(values)]*np.std(values, ddof=1)/len(values)**.5
    return float(np.mean(values)), max(0., float(np.mean(values) - half)), min(1., float(np.mean(values) + half))


def main(seeds, folder):
    rows = []
    for seed in range(seeds):
        records = run(Run(name=f"town-{seed}", seed=seed), Path(folder)/f"town-{seed}")
        scores = {(s["model"], s["task"]): s for s in records["eval"]["facts"]["scores"]}
        row = dict(seed=seed, seconds=sum(r["seconds"] for r in records.values()))
        for lang in ("en", "zh"):
            for model in ("before", "after"): row[f"{model} {lang}"] = scores[model, f"heldout {lang}"]["accuracy"]
            row[f"chance {lang}"] = scores["after", f"heldout {lang}"]["chance"]
        rows.append(row)
        print(row)
    summary = {name: interval([row[name] for row in rows]) for name in rows[0] if name not in ("seed", "seconds")}
    for name, (mean, low, high) in summary.items(): print(f"{name}: {mean:.1%} [{low:.1%}, {high:.1%}] over {seeds} seeds")
    results = dict(date=str(date.today()), machine=f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}", threads=torch.get_num_threads(), seeds=rows, summary=summary)
    (HERE/"results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 11), help="how many towns (default: 3)")
    parser.add_argument("--folder", default="runs", help="where the runs are written (default: runs)")
    options = parser.parse_args()
    main(options.seeds, options.folder)
