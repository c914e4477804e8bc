"""The forgetting laboratory over five towns: python experiments/forgetting/run.py [--seeds 5] [--folder runs] [--longer] [--table]

Each seed is another town with its own base and tuned model (the default chain, trained first where it isn't there yet) and the same lesson,
the shop, 240 steps. Writes experiments/forgetting/results.json row by row; stopped, it goes on. --longer teaches
360 steps, alone and with replay, into longer.json. --table prints what stands there."""
import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

from llmbench.bench.forget import REMEDIES, Lesson, laboratory
from llmbench.bench.run import Run, run
from llmbench.core import write_json
from llmbench.model.transformer import Transformer
from llmbench.text.world import World
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.forgetting import restored
from llmbench.use.intervals import seed_interval as interval

HERE = Path(__file__).parent
SETTINGS = { # longer? -> file, lesson, remedies
    False: (HERE/"results.json", Lesson(steps=240), REMEDIES),
    True:  (HERE/"longer.json", Lesson(steps=360), tuple(r for r in REMEDIES if r.name in ("the lesson alone", "replay 5%", "replay 10%", "replay 25%")))}


def table(results):
    "One line a remedy: old and new accuracy, old loss, KL, share of the loss that was prevented"
    seeds = list(results.values())
    for what in ("old", "new"): print(f"before, {what}: {np.mean([s['before'][what] for s in seeds]):.1%}")
    for i, row in enumerate(seeds[0]["rows"]):
        rows = [s["rows"][i] for s in seeds if len(s["rows"]) > i]
        told = {k: interval([r[k] for r in rows]) for k in ("old", "new", "old_loss", "kl")}
        price = interval([s["rows"][0]["new"] - s["rows"][i]["new"] for s in seeds if len(s["rows"]) > i])
        back = interval([restored(s["before"]["old"], s["rows"][0]["old"], s["rows"][i]["old"]) for s in seeds if len(s["rows"]) > i])
        print(f"{row['remedy']['name']:<18} old {told['old'][0]:6.1%} ± {told['old'][1]:5.1%}   new {told['new'][0]:6.1%} ± {told['new'][1]:5.1%}   old loss {told['old_loss'][0]:5.2f} ± {told['old_loss'][1]:4.2f}   "
              f"KL {told['kl'][0]:5.2f}   restored {back[0]:5.0%} ± {back[1]:3.0%}   price {100*price[0]:+5.1f} ± {100*price[1]:.1f} points of the new   ({len(rows)} seeds)")


def main(seeds, folder, longer):
    file, lesson, remedies = SETTINGS[longer]
    results = json.loads(file.read_text()) if file.exists() else {}
    for seed in range(seeds):
        place = Path(folder)/f"town-{seed}"
        run(Run(name=f"town-{seed}", seed=seed), place, until="sft")
        tuned, base = (Transformer.from_pretrained(place/stage/"model") for stage in ("sft", "pretrain"))
        results[str(seed)] = laboratory(tuned, base, ChatTemplate.load(place/"sft"/"model"), World(seed), remedies, lesson, place/file.name)
        write_json(file, results)
    table(results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 6), help="how many towns (default: 5)")
    parser.add_argument("--folder", default="runs", help="where the models stand or are trained (default: runs)")
    parser.add_argument("--longer", action="store_true", help="360 steps instead of 240; the lesson alone and with 5, 10, 25 %% of replay")
    parser.add_argument("--table", action="store_true", help="print the results and stop")
    options = parser.parse_args()
    table(json.loads(SETTINGS[options.longer][0].read_text())) if options.table else main(options.seeds, options.folder, options.longer)
