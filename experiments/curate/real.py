"""SmolLM2-135M grows tasks from the 175 of the paper: python experiments/curate/real.py SEEDS [--want 12] [--out FILE]

Needs the asset (llmbench assets get smollm2) and a file of seed tasks. Prints the account and the grown tasks; OUT goes on where it stopped."""
import argparse
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from llmbench.box.assets import get
from llmbench.box.hub import load_hub
from llmbench.model.generate import generate
from llmbench.tune.curate import Grow, Journal, grow, read_tasks


def main(seeds, want, out):
    torch.set_num_threads(1)
    (model, template), chance, start = load_hub(str(get("smollm2", progress=False))), torch.Generator().manual_seed(0), time.process_time()
    def ask(prompt):
        ids = template.render([dict(role="user", content=prompt)], prompt=True)[0]
        room = 4 if prompt.startswith("Does the task") else 120
        new = generate(model.inner, torch.tensor([ids]), room, temperature=.7, top_p=.9, eos_id=template.tokenizer.end_id, generator=chance)[0, len(ids):].tolist()
        return template.tokenizer.decode([i for i in new if i != template.tokenizer.end_id])
    for row in grow(read_tasks(seeds), ask, out, Grow(want=want, patience=20)):
        print(f"- {row['reason']}: {row['instruction'][:90]}" if "reason" in row else f"+ {row['instruction']}\n    input: {row['input'][:90]!r}\n    output: {row['output'][:90]!r}", flush=True)
    print(f"\n{Journal(out).account()}\nprocessor time {time.process_time() - start:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("seeds", help="self-instruct seeds, e.g. self_instruct_seeds.jsonl")
    parser.add_argument("--want", type=int, default=12, help="tasks to grow (default: 12)")
    parser.add_argument("--out", default="runs/smollm2-grown.jsonl", help="the grown tasks (default: runs/smollm2-grown.jsonl)")
    options = parser.parse_args()
    main(options.seeds, options.want, options.out)
