"""From town to shop in three steps: python experiments/domain/run.py [--seeds 3] [--folder runs] [--table]

Each seed is another town with its own base and tuned model (the default chain, trained first where it isn't there yet). From both of them: continued pre-training on the
shop's documents, supervised tuning on half of the wares, preference tuning on manners (240, 160 and 30 steps); after each step the domain exam (other wares) and the general exam (people), English and Chinese.
Writes experiments/domain/results.json row by row; a stopped run goes on. --table prints what stands there."""
import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")


from llmbench.bench.domain import Domain, build_exam, course
from llmbench.bench.run import Run, run
from llmbench.core import write_json
from llmbench.model.transformer import Transformer
from llmbench.text.world import World
from llmbench.tune.chat import ChatTemplate
from llmbench.use.intervals import seed_interval as interval

RESULTS = Path(__file__).parent/"results.json"
SHELF = Path(__file__).parents[2]/"data"/"town"
COLUMNS = ("facts", "sums", "exact match", "polite", "place precision", "place recall", "place f1", "BLEU", "people", "loss")


def models(seed, folder):
    "Base and chat model of a town, and their template: the shelf's for town 0"
    if seed == 0: places = dict(base=SHELF/"base", chat=SHELF/"tuned")
    else:
        place = Path(folder)/f"town-{seed}"
        if not (place/"sft"/"model"/"config.json").exists(): run(Run(name=f"town-{seed}", seed=seed), place, until="sft")
        places = dict(base=place/"pretrain"/"model", chat=place/"sft"/"model")
    return {name: (Transformer.from_pretrained(p), ChatTemplate.load(p)) for name, p in places.items()}


def table(results):
    "One line a step: mean and interval over seeds; then what each step gained and cost"
    seeds = list(results.values())
    for start in seeds[0]:
        before = None
        for step in seeds[0][start]:
            told = {k: interval([s[start][step][k]["value"] for s in seeds]) for k in COLUMNS}
            print(f"{start:<5} {step:<9} " + "  ".join(f"{k} {m:.3f} ± {h:.3f}" for k, (m, h) in told.items()))
            if before:
                gaps = {k: interval([s[start][step][k]["value"] - s[start][before][k]["value"] for s in seeds]) for k in ("facts", "BLEU", "people", "loss")}
                print(" "*16 + "gained: " + "  ".join(f"{k} {m:+.3f} ± {h:.3f}" for k, (m, h) in gaps.items()))
            before = step
    some = seeds[0]["chat"]["start"]
    print(f"{len(seeds)} towns; chance: facts {some['facts']['chance']:.3f}, sums {some['sums']['chance']:.3f}, people {some['people']['chance']:.3f}; n: facts {some['facts']['n']}, places {some['place f1']['n']}, people {some['people']['n']}")


def main(seeds, folder):
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in range(seeds):
        if str(seed) in results: continue
        world, found = World(seed, 50), {}
        exam = build_exam(world)
        print(f"town {seed}: {len(exam.practice)} questions practised, {len(exam.test)} examined, {exam.judged} of them searched for, {exam.leaked} leaks", flush=True)
        for start, (model, template) in models(seed, folder).items():
            found[start] = {}
            for step, marks, _ in course(model, template, world, exam, Domain(read=240, practise=160, batch=32, seed=seed)):
                found[start][step] = marks
                print(f"town {seed}, {start}, {step}: " + ", ".join(f"{k} {marks[k]['value']:.3f}" for k in COLUMNS), flush=True)
        results[str(seed)] = found
        write_json(RESULTS, results)
    table(results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6), help="how many towns (default: 3)")
    parser.add_argument("--folder", default="runs", help="where the models stand or are trained (default: runs)")
    parser.add_argument("--table", action="store_true", help="print the results and stop")
    options = parser.parse_args()
    table(json.loads(RESULTS.read_text())) if options.table else main(options.seeds, options.folder)
