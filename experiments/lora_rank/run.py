"""Forgetting by rank: the town, tuned in full and by LoRA of rank 1 to 64, three seeds
Run: python experiments/lora_rank/run.py            everything, into results.json (some 20 core-minutes)
     python experiments/lora_rank/run.py --table    prints results.json
     python experiments/lora_rank/run.py --rates    how the learning rates were chosen (seed 0 alone)"""
import argparse
import copy
import json
import time
from pathlib import Path

import torch

from llmbench.bench.stages import document_rows
from llmbench.core import write_json
from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import draw, pack
from llmbench.text.bpe import BPE
from llmbench.text.world import World
from llmbench.train.loop import Fit, evaluate, fit
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.lora import LoRALinear, add_lora, merge_lora, trainable_parameters
from llmbench.tune.lora_layer import effective_rank, rank_for
from llmbench.tune.sft import SFT, batches, rows_of
from llmbench.use.evals import ask

HERE = Path(__file__).parent
SHELF, RESULTS = HERE.parent.parent/"data"/"town", HERE/"results.json"
RANKS, STEPS, RATES = (1, 2, 4, 8, 16, 32, 64), 120, dict(full=1e-3, lora=3e-3)


class Town:
    "Base model, documents, conversations and questions of one seed; seed 0 takes the model on the shelf, the others pre-train one like it"
    def __init__(self, seed):
        self.seed, self.world = seed, World(seed, 50)
        documents, talks = self.world.documents("both"), self.world.conversations("both", "sft")
        if seed == 0: self.bpe, self.base = BPE.load(SHELF/"base"), Transformer.from_pretrained(SHELF/"base")
        else:
            self.bpe = BPE.train(documents + [m["content"] for c in talks for m in c["messages"]], 600)
            torch.manual_seed(seed)
            self.base, packed = Transformer(Config(vocab_size=self.bpe.vocab_size)), pack(document_rows(self.bpe, documents), 96)
            for _ in fit(self.base, lambda step, micro: packed.rows(draw(len(packed), 21, step, seed)), Fit(valid_every=10**9), progress=False): pass
        self.template = ChatTemplate(self.bpe)
        self.rows, _ = rows_of(talks, self.template, 96)
        packed = pack(document_rows(self.bpe, documents[::29]), 96)
        self.old = [packed.rows(slice(i, i + 32)) for i in range(0, len(packed), 32)]
        self.asked = [q for lang in ("en", "zh") for q in self.world.questions(lang, "heldout")[::2]]

    def score(self, model):
        "Share of held-out questions answered right, and nats a token of the old documents"
        answers = ask(model, self.template, [q.text for q in self.asked], 32, 64)
        return dict(accuracy=sum(self.world.grade(q, a) for q, a in zip(self.asked, answers))/len(self.asked), old_loss=evaluate(model, self.old))

    def tuned(self, rank, lr, matrix_lr=0., steps=STEPS):
        "One training without replay; rank 0 is all weights"
        model = copy.deepcopy(self.base)
        torch.manual_seed(self.seed)
        if rank: add_lora(model, rank, 2*rank)
        trained, began = trainable_parameters(model)[0], time.process_time()
        how = SFT(steps=steps, batch=16, length=96, seed=self.seed)
        last = list(fit(model, batches(self.rows, how, pad_id=self.bpe.pad_id), Fit(steps=steps, lr=lr, matrix_lr=matrix_lr, warmup=10, decay=0., valid_every=10**9), progress=False))[-1]
        spent = time.process_time() - began
        if any(isinstance(m, LoRALinear) for m in model.modules()): model = merge_lora(model)
        return dict(rank=rank, lr=lr, matrix_lr=matrix_lr, trained=trained, seconds=spent, loss=last.loss, **self.score(model), **self.update(model))

    def update(self, model):
        "What the change of each map looks like, averaged over the 28 maps of Llama's layout"
        found = []
        for (name, new), old in zip(model.named_parameters(), self.base.parameters()):
            if new.ndim < 2 or name.startswith("embed"): continue
            c = self.base.config
            rows = dict(qkv=(c.d_model, *(c.n_kv_heads*c.head_width,)*2), gate_up=(c.d_hidden,)*2).get(name.split(".")[-2], (len(new),))
            found += [(effective_rank(d), rank_for(d), float(d.norm()/w.norm())) for d, w in zip((new - old).detach().split(rows), old.split(rows))]
        return dict(zip(("effective_rank", "rank_90", "relative_norm"), torch.tensor(found).mean(0).tolist()))


def table():
    results = json.loads(RESULTS.read_text())
    for seed, base in results["base"].items(): print(f"seed {seed} before: accuracy {base['accuracy']:.1%}, old loss {base['old_loss']:.3f}")
    groups = {}
    for r in results["runs"]: groups.setdefault(f"r = {r['rank']}" if r["rank"] else "full, Muon" if r["matrix_lr"] else "full", []).append(r)
    columns = dict(accuracy=".1%", old_loss=".3f", effective_rank=".1f", rank_90=".1f", relative_norm=".3f")
    for name, runs in groups.items():
        cells = [f"{c} {sum(r[c] for r in runs)/len(runs):{form}} ({', '.join(format(r[c], form) for r in runs)})" for c, form in columns.items()]
        print(f"{name:10}  trained {runs[0]['trained']:7,}  " + "  ".join(cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--rates", action="store_true")
    options = parser.parse_args()
    if options.table: return table()
    torch.set_num_threads(1)
    if options.rates:
        town = Town(0)
        for rank, lr in [(0, 3e-4), (0, 1e-3), (0, 3e-3), (8, 1e-3), (8, 3e-3), (8, 1e-2)]: print(json.dumps(town.tuned(rank, lr)), flush=True)
        return
    done = json.loads(RESULTS.read_text()) if RESULTS.exists() else dict(setting=dict(steps=STEPS, batch=16, length=96, rates=RATES, alpha="2r", people=50), base={}, runs=[])
    for seed in range(3):
        if sum(r["seed"] == seed for r in done["runs"]) == len(RANKS) + 2: continue
        done["runs"] = [r for r in done["runs"] if r["seed"] != seed]
        town = Town(seed)
        done["base"][str(seed)] = town.score(town.base)
        for rank, lr, matrix_lr in [(0, RATES["full"], 0.), (0, 2e-3, .01), *((r, RATES["lora"], 0.) for r in RANKS)]:
            done["runs"].append(dict(seed=seed, **town.tuned(rank, lr, matrix_lr)))
            print(json.dumps(done["runs"][-1]), flush=True)
        write_json(RESULTS, done)


if __name__ == "__main__": main()
