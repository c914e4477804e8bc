"""Full, frozen, bottleneck adapter, LoRA: accuracy, trained numbers, memory and time, three seeds
Run: python experiments/tune_part/run.py            into results.json (some 3 core-minutes)
     python experiments/tune_part/run.py --table    prints results.json; of each method the rate with the best accuracy"""
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from llmbench.core import write_json
from llmbench.model.transformer import Transformer
from llmbench.text.batch import pack
from llmbench.text.world import World
from llmbench.train.loop import Fit, evaluate, fit
from llmbench.tune.adapters import add_bottleneck, last_blocks, train_only, training_bytes
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.lora import add_lora, trainable_parameters
from llmbench.tune.sft import SFT, batches, rows_of
from llmbench.use.evals import ask

HERE = Path(__file__).parent
SHELF, RESULTS, STEPS = HERE.parent.parent/"data"/"town"/"base", HERE/"results.json", 60
WAYS = {"full": (lambda m: None, (3e-4,)), "last block": (lambda m: train_only(m, last_blocks(m, 1)), (1e-3, 3e-3)), "last two blocks": (lambda m: train_only(m, last_blocks(m, 2)), (1e-3,)),
        "bottleneck, width 8": (lambda m: add_bottleneck(m, 8), (3e-3, 1e-2)), "LoRA, r = 2": (lambda m: add_lora(m, 2, 4.), (1e-2,)), "LoRA, r = 16": (lambda m: add_lora(m, 16, 32.), (3e-3,))}


def table():
    found = {}
    for r in json.loads(RESULTS.read_text())["runs"]: found.setdefault((r["way"], r["lr"]), []).append(r)
    def mean(key, column): return statistics.mean(r[column] for r in found[key])
    for way in WAYS:
        key = max((k for k in found if k[0] == way), key=lambda k: mean(k, "accuracy"))
        print(f"{way:20} rate {key[1]:g}  accuracy {mean(key, 'accuracy'):.1%} ({', '.join(format(r['accuracy'], '.1%') for r in found[key])})  old loss {mean(key, 'old_loss'):.2f}  "
              f"trained {found[key][0]['trained']:7,}  gradients and AdamW {found[key][0]['bytes']/1e3:,.0f} kB  time {mean(key, 'time_ratio'):.2f} of full")


def main():
    if "--table" in sys.argv: return table()
    torch.set_num_threads(1)
    base, template, town = Transformer.from_pretrained(SHELF), ChatTemplate.load(SHELF), World(0, 50)
    bpe, rows = template.tokenizer, rows_of(town.conversations("both", "sft"), template, 64)[0]
    documents = [[bpe.bos_id, *bpe.encode(d), bpe.end_id] for d in town.documents("both")[::29]]
    packed, runs = pack([(ids, [1]*len(ids)) for ids in documents], 96), []
    old = [packed.rows(slice(i, i + 32)) for i in range(0, len(packed), 32)]
    asked = [q for lang in ("en", "zh") for q in town.questions(lang, "heldout")[::2]]
    for seed in range(3):
        for way, (prepare, rates) in WAYS.items():
            for lr in rates:
                model = copy.deepcopy(base)
                torch.manual_seed(seed)
                prepare(model)
                memory, spent, began = training_bytes(model), [], time.process_time()
                for _ in fit(model, batches(rows, SFT(batch=16, length=64, seed=seed), pad_id=bpe.pad_id), Fit(steps=STEPS, lr=lr, matrix_lr=0., warmup=10, decay=0., valid_every=10**9, autocast="off"), progress=False):
                    spent.append(time.process_time() - began)
                    began = time.process_time()
                answers = ask(model, template, [q.text for q in asked], 32, 64)
                runs.append(dict(seed=seed, way=way, lr=lr, trained=trainable_parameters(model)[0], bytes=memory.gradients + memory.optimizer, seconds=statistics.median(spent),
                                 accuracy=sum(town.grade(q, a) for q, a in zip(asked, answers))/len(asked), old_loss=evaluate(model, old)))
                full = statistics.median(r["seconds"] for r in runs if r["way"] == "full" and r["seed"] == seed)
                runs[-1]["time_ratio"] = runs[-1]["seconds"]/full
                print(json.dumps(runs[-1]), flush=True)
        write_json(RESULTS, dict(setting=dict(steps=STEPS, batch=16, length=64, base="data/town/base"), runs=runs))


if __name__ == "__main__": main()
