"""SmolLM2-135M-Instruct with a 4-bit base on a CPU: 20 steps each of DPO, GRPO (3 seeds), reward model, KTO, and GRPO on a mark that silence wins, through `box.prefer`
Run: python experiments/box_prefer/run.py      (needs `llmbench assets get smollm2`; about 12 minutes on one core; writes results.json after each run)"""
import json
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from llmbench.box.launch import Launch
from llmbench.box.prefer import Answers, BoxDPO, BoxGRPO, BoxKTO, BoxReward, Drawing, check, train
from llmbench.box.preferring import read_figures
from llmbench.box.sft import Lora, Optim, Save
from llmbench.core import read_json, write_json
from llmbench.text.world import World

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent/"box_ppo")]
from capitals import TRAIN
from marks import LONGEST

RESULTS = Path(__file__).with_name("results.json")


def lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return (str(path),)


def jobs(home):
    "Polite answers against curt ones, in the embedded town; capitals, named briefly, for GRPO"
    pairs = random.Random(0).sample(World(0).preferences("en", by=("polite",)), 96)
    labels = [dict(messages=[*(p["prompt"] if isinstance(p["prompt"], list) else [dict(role="user", content=p["prompt"])]), dict(role="assistant", content=p[side] if isinstance(p[side], str) else p[side][0]["content"])], label=side == "chosen")
              for i, p in enumerate(pairs) for side in [("chosen", "rejected")[i % 2]]]
    asks = [dict(prompt=row["prompt"], completion=row["capital"]) for row in TRAIN]
    common = dict(model="smollm2", method="qlora", folder=str(home), lora=Lora(r=16, alpha=32.), save=Save(every=10**6, valid_every=20), launch=Launch(1, cpu=True))
    slow = Optim(steps=20, batch=4, micro=2, lr=5e-4, warmup=2, schedule="constant")
    yield "dpo", BoxDPO(pairs=lines(home/"pairs.jsonl", pairs), data=Answers(160, .17), optim=slow, **common), (0, 1, 2)
    yield "grpo", BoxGRPO(prompts=lines(home/"asks.jsonl", asks), reward=("marks:right_and_brief",), data=Answers(80, 0.), draw=Drawing(8, LONGEST), optim=replace(slow, batch=16, micro=16), **common), (0, 1, 2)
    yield "reward", BoxReward(pairs=(str(home/"pairs.jsonl"),), data=Answers(160, .17), optim=slow, **common), (0,)
    yield "kto", BoxKTO(chat=lines(home/"labels.jsonl", labels), data=Answers(160, .17), optim=replace(slow, batch=8, micro=4), **common), (0,)
    words = [dict(prompt=f"Name a {x}. Reply with one word.") for x in "fruit colour city river country metal bird tree flower tool month number letter planet language drink".split()]
    yield "silence", BoxGRPO(prompts=lines(home/"words.jsonl", words), reward=("ended", "short:5"), data=Answers(80, 0.), draw=Drawing(8, 16), optim=replace(slow, batch=16, micro=16), **common), (0,)


if __name__ == "__main__":
    results = read_json(RESULTS) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as home:
        todo = [(seed, what, job) for what, job, seeds in jobs(Path(home)) for seed in seeds]
        for seed, what, job in sorted(todo, key=lambda x: x[0]): # one of each first
            name = f"{what}, seed {seed}"
            if name in results or sys.argv[1:] and what not in sys.argv[1:]: continue
            config = replace(job, seed=seed, name=f"{what}{seed}")
            facts = train(config, check(config), progress=False)
            folder = Path(home)/config.name/job.stage
            scores = read_json(folder/"scores.json") if (folder/"scores.json").exists() else []
            results[name] = dict(figures=read_figures(folder), scores=scores, steps=facts["steps"], flat_steps=facts["flat_steps"], seconds=facts["seconds"])
            write_json(RESULTS, results)
            print(name, json.dumps(results[name]["figures"][0]), json.dumps(results[name]["figures"][-1]), scores, facts["seconds"], flush=True)
