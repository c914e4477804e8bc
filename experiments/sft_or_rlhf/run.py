"""SFT or RLHF, one experiment for each answer: python experiments/sft_or_rlhf/run.py [--seeds 3] [--folder runs] [--table]

Manners are to be taught: an answer shall begin politely, and stay right. Each seed is another town with its own tuned model (the default chain, trained first where it isn't there yet).
Demonstrations: somebody has written polite answers. SFT on them, or DPO on pairs (polite over rude) from a model that has never been either.
Judgements: nobody has; there are only logs in mixed moods (a fifth polite) and somebody who says which of two answers is better. SFT on the logs, SFT on the better answers, or DPO on the pairs.
Polite and exact answers to questions about people that tuning never saw. Writes results.json beside it; stopped, it goes on."""
import argparse
import copy
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from llmbench.align.dpo import DPO, dpo
from llmbench.align.pairs import pair_rows
from llmbench.bench.preferences import manners_of, moody
from llmbench.bench.run import Run, run
from llmbench.bench.score import document_rows
from llmbench.core import write_json
from llmbench.model.transformer import Transformer
from llmbench.text.world import World
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.sft import SFT, rows_of, sft
from llmbench.use.intervals import seed_interval

RESULTS = Path(__file__).parent/"results.json"
FIRST, MORE = 60, 30  # steps


def trial(tuned, template, world):
    "{way: manners} of one town"
    old, pad = document_rows(template.tokenizer, world.documents("both")), template.tokenizer.pad_id
    def taught(model, talks, steps):
        model, rows = copy.deepcopy(model), rows_of(talks, template, 128)[0]
        for _ in sft(model, rows, SFT(steps=steps, length=128, lr=2e-3, matrix_lr=.01), old, pad_id=pad, progress=False): pass
        return model
    def preferred(model, steps):
        model = copy.deepcopy(model)
        pairs = [p for p in world.preferences("both", by=("polite", "correct")) if p["chosen_traits"]["correct"] and p["rejected_traits"]["correct"]]
        for _ in dpo(model, pair_rows(pairs, template, 128)[0], DPO(steps=steps, length=128, lr=5e-5, matrix_lr=0.), pad_id=pad, progress=False): pass
        return model
    def talk(q, answer): return {"messages": [{"role": "user", "content": q.text}, {"role": "assistant", "content": answer}]}
    questions = world.questions("both", "sft")
    written = [talk(q, world.answer_with(q, True, True, False)) for q in questions]
    better = [{"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["chosen"]}]} for p in world.preferences("both", by=("polite", "correct"))
              if p["chosen_traits"]["correct"] and p["rejected_traits"]["correct"]]
    logs = moody(world, world.seed)
    mixed = taught(tuned, logs, FIRST)
    ways = {"tuned, before": lambda: tuned, "demonstrations: SFT": lambda: taught(tuned, written, FIRST), "demonstrations: DPO, never seen": lambda: preferred(tuned, FIRST),
            "logs, mixed moods": lambda: mixed, "judgements: SFT on the logs": lambda: taught(mixed, logs, MORE), "judgements: SFT on the better": lambda: taught(mixed, better, MORE),
            "judgements: DPO": lambda: preferred(mixed, MORE)}
    return {name: manners_of(make(), template, world) for name, make in ways.items()}


def table(results):
    print(f"{len(results)} towns; mean and half of Student's 95 % interval")
    for way in next(iter(results.values())):
        told = []
        for what in ("polite", "exact"):
            v = [r[way][what] for r in results.values()]
            told.append("{} {:6.1%} ± {:5.1%} (lowest {:.0%}, highest {:.0%})".format(what, *seed_interval(v), min(v), max(v)))
        print(f"{way:<32} " + "   ".join(told))


def main(seeds, folder):
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in range(seeds):
        if str(seed) in results: continue
        place = Path(folder)/f"town-{seed}"
        if not (place/"sft"/"model"/"config.json").exists(): run(Run(name=f"town-{seed}", seed=seed), place, until="sft")
        results[str(seed)] = trial(Transformer.from_pretrained(place/"sft"/"model"), ChatTemplate.load(place/"sft"/"model"), World(seed, 50))
        write_json(RESULTS, results)
        print(seed, {k: (round(v["polite"], 3), round(v["exact"], 3)) for k, v in results[str(seed)].items()}, flush=True)
    table(results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6), help="how many towns (default: 3)")
    parser.add_argument("--folder", default="runs", help="where the models stand or are trained (default: runs)")
    parser.add_argument("--table", action="store_true", help="print the results and stop")
    options = parser.parse_args()
    table(json.loads(RESULTS.read_text())) if options.table else main(options.seeds, options.folder)
