"""The bar of the box lane: SmolLM2-135M with a 4-bit base on a CPU, from about 1.05 nats to under 0.6 in ten steps of one batch of 2 x 128 tokens, three seeds
Run: python experiments/box_sft/bar.py      (needs `llmbench assets get smollm2` and ../shared/data; some two minutes on one core; writes bar.json)"""
import json
import tempfile
from pathlib import Path

import torch

from llmbench.box.hub import FourBit, load_base, load_template, locate
from llmbench.box.launch import Launch
from llmbench.box.sft import BoxSFT, Lora, Optim, Rows, Save, check, train
from llmbench.box.trainer import held_out, quiet
from llmbench.core import write_json
from llmbench.train.checkpoint import read_steps
from llmbench.tune.chat import read_conversations
from llmbench.tune.sft import rows_of

DATA, LENGTH, LOOKED = Path(__file__).parents[3]/"shared"/"data"/"alpaca_en.json", 128, 64


def near(start):
    "Six of the first conversations, in three pairs: rows of 128 tokens with 60 answer tokens or more whose loss before training is nearest to `start`"
    place, talks = locate("smollm2"), read_conversations(DATA)[:LOOKED]
    template = load_template(place)
    rows = [rows_of([talk], template, LENGTH, "cut")[0] for talk in talks]
    full = [i for i, made in enumerate(rows) if made and len(made[0][0]) == LENGTH and sum(made[0][1]) >= 60]
    nats, counts = held_out(load_base(place, torch.float32, FourBit()).eval(), [rows[i][0] for i in full], 4)
    found = sorted(zip(abs(nats/counts - start), full))[:6]
    order = [i for _, i in found]
    return [[order[k], order[5 - k]] for k in range(3)], len(full), float(nats.sum()/counts.sum()), {i: float(n/c) for i, n, c in zip(full, nats, counts)}


def ten_steps(home, pair, seed):
    "The loss of each step: the same two rows every time, answers only"
    talks = read_conversations(DATA)
    (home/f"{seed}.jsonl").write_text("".join(json.dumps(dict(messages=talks[i]["messages"])) + "\n" for i in pair))
    config = BoxSFT("smollm2", (str(home/f"{seed}.jsonl"),), "qlora", f"bar{seed}", str(home), seed, data=Rows(length=LENGTH, keep="cut", valid=0.), lora=Lora(r=16, alpha=32.),
                    optim=Optim(steps=10, batch=2, micro=2, lr=1e-3, warmup=1, schedule="constant"), save=Save(every=10**6, valid_every=0), launch=Launch(1, cpu=True))
    facts = train(config, check(config), progress=False)
    return [s.loss for s in read_steps(home/f"bar{seed}"/"sft")], facts["seconds"]


if __name__ == "__main__":
    quiet()
    torch.set_num_threads(1)
    pairs, looked, mean, starts = near(1.05)
    runs = []
    with tempfile.TemporaryDirectory() as home:
        for seed, pair in enumerate(pairs):
            losses, seconds = ten_steps(Path(home), pair, seed)
            runs.append(dict(seed=seed, rows=pair, starts=[starts[i] for i in pair], losses=losses, seconds=seconds))
            print(seed, pair, [round(x, 2) for x in losses], flush=True)
    result = dict(data=f"alpaca_en.json, conversations by number; of the first {LOOKED} those {looked} that fill {LENGTH} tokens with 60 answer tokens or more (mean {mean:.2f} nats) the six nearest to 1.05", runs=runs, command="python experiments/box_sft/bar.py")
    write_json(Path(__file__).with_name("bar.json"), result)
