"""Four bits on the town: what rounding costs the shelf model, QLoRA against LoRA (three seeds, two rates), and four ways to merge
Run: python experiments/nf4/run.py            everything, into results.json (some eight core-minutes)
     python experiments/nf4/run.py --table    prints results.json"""
import argparse
import copy
import json
import time
from pathlib import Path

import torch

from llmbench.bench.stages import document_rows
from llmbench.core import write_json
from llmbench.model.transformer import Transformer
from llmbench.text.batch import pack, pad
from llmbench.text.bpe import BPE
from llmbench.text.world import World
from llmbench.train.loop import Fit, evaluate, fit
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.lora import add_lora, lora_layers
from llmbench.tune.nf4 import bits_per_parameter, dequantize, quantize
from llmbench.tune.qlora import footprint, merge_nf4, merged_weight, quantize_model, survival
from llmbench.tune.sft import SFT, batches, rows_of
from llmbench.use.evals import ask

HERE = Path(__file__).parent
SHELF, RESULTS = HERE.parent.parent/"data"/"town", HERE/"results.json"
CODES, BLOCKS, SEEDS = ("nf4", "int4", "fp4"), (32, 64, 256, 4096), 3
RATES = dict(gentle=(3e-4, 300), hot=(3e-3, 120))  # learning rate and steps
T95 = 4.303  # Student's t for 95 %, two degrees of freedom


class Town:
    "The shelf's models, held-out questions, documents and conversations"
    def __init__(self):
        self.world, self.bpe = World(0, 50), BPE.load(SHELF/"base")
        self.template = ChatTemplate(self.bpe)
        self.base, self.tuned = (Transformer.from_pretrained(SHELF/w).eval() for w in ("base", "tuned"))
        self.asked = [q for lang in ("en", "zh") for q in self.world.questions(lang, "heldout")[::2]]
        packed = pack(document_rows(self.bpe, self.world.documents("both")[::29]), 96)
        self.old = [packed.rows(slice(i, i + 32)) for i in range(0, len(packed), 32)]
        rows, _ = rows_of(self.world.conversations("both", "sft"), self.template, 96)
        self.rows = rows
        held, _ = rows_of(self.world.conversations("both", "heldout"), self.template, 96)
        self.held = [pad(held[i:i + 32]) for i in range(0, 128, 32)]

    def score(self, model):
        "Share of held-out questions answered right, nats a token of held-out answers and of the documents"
        with torch.no_grad(): answers = ask(model.eval(), self.template, [q.text for q in self.asked], 32, 64)
        return dict(accuracy=sum(self.world.grade(q, a) for q, a in zip(self.asked, answers))/len(self.asked), answer_loss=evaluate(model, self.held), old_loss=evaluate(model, self.old))


def rounded(model, block, code):
    "The same model with each linear weight rounded, in 32 bits so that it is fast; and the mean relative error"
    model, errors = copy.deepcopy(model), []
    for name, p in model.named_parameters():
        if p.ndim < 2 or name.startswith("embed"): continue
        new = dequantize(quantize(p, block, True, code))
        errors.append(float((new - p.detach()).norm()/p.detach().norm()))
        p.data.copy_(new)
    return model, sum(errors)/len(errors)


def plain(model):
    "A copy whose 4-bit layers are unpacked, for fast answers; adapters stay"
    model = copy.deepcopy(model)
    for path, m in list(model.named_modules()):
        if type(m).__name__ != "NF4Linear": continue
        linear = torch.nn.Linear(m.in_features, m.out_features, bias=False)
        linear.weight.data.copy_(dequantize(m.q))
        model.set_submodule(path, linear)
    return model


def joined(model, original=None, dtype=torch.float32):
    "Adapters added to the unpacked weights (or the original ones) in one matrix"
    return merge_nf4(copy.deepcopy(model), original, dtype=dtype)


def tune(town, seed, rate, four_bits):
    "One training of adapters, beside 32 or 4 bits; with all ways of merging for the latter"
    lr, steps = RATES[rate]
    model = copy.deepcopy(town.base)
    if four_bits: quantize_model(model)
    size = footprint(model)
    add_lora(model, 8, 16, generator=torch.Generator().manual_seed(seed))
    how, began = SFT(steps=steps, batch=16, length=96, seed=seed), time.process_time()
    last = list(fit(model, batches(town.rows, how, pad_id=town.bpe.pad_id), Fit(steps=steps, lr=lr, matrix_lr=0., warmup=10, decay=0., valid_every=10**9), progress=False))[-1]
    row = dict(seed=seed, rate=rate, four_bits=four_bits, seconds=time.process_time() - began, base_bytes=size, train_loss=last.loss)
    if not four_bits: return [row | dict(way="adapter beside 32 bits") | town.score(model)]
    deltas = {path: sum(layer.delta(n).detach() for n in layer.active) for path, layer in lora_layers(model).items()}
    start = {path: dequantize(layer.base.q) for path, layer in lora_layers(model).items()}
    exact = {path: merged_weight(layer) for path, layer in lora_layers(model).items()}
    source = {path: town.base.get_submodule(path).weight.detach() for path in deltas}
    made = {"adapter beside 4 bits": joined(model), "merged, bf16": joined(model, dtype=torch.bfloat16).float(), "merged, 4 bits again": plain(merge_nf4(copy.deepcopy(model), four_bits=True)),
            "onto the original, fp32": joined(model, town.base), "onto the original, 4 bits": plain(merge_nf4(copy.deepcopy(model), town.base, four_bits=True))}
    rows = []
    for way, merged in made.items():
        weights = {path: merged.get_submodule(path).weight.detach() for path in deltas}
        before = source if way.startswith("onto") else start
        kept = {path: survival(before[path], weights[path], d) for path, d in deltas.items()}
        rows.append(row | dict(way=way, survives=sum(kept.values())/len(kept), error=sum(float((weights[p] - exact[p]).norm()/exact[p].norm()) for p in deltas)/len(deltas),
                               update=sum(float(d.norm()/start[p].norm()) for p, d in deltas.items())/len(deltas)) | town.score(merged))
    return rows + [row | dict(way="4 bits, adapter off") | town.score(rounded(town.base, 64, "nf4")[0])]


def spread(values):
    "Mean and half of Student's 95 % interval over seeds"
    x = torch.tensor(values)
    return f"{x.mean():.4f} +- {T95*x.std()/len(x)**.5:.4f}" if len(x) > 1 else f"{x.item():.4f}"


def table():
    results = json.loads(RESULTS.read_text())
    print("shelf model (tuned), held-out questions, nats a token of held-out answers, of documents")
    for r in results["rounding"]: print(f"  {r['code']:5} block {r['block']:>4}  {r['bits']:6.3f} bits  relative error {r['error']:.4f}  accuracy {r['accuracy']:.1%}  answers {r['answer_loss']:.4f}  documents {r['old_loss']:.4f}")
    seeds = results["setting"]["seeds"]
    for rate, (lr, steps) in results["setting"]["rates"].items():
        print(f"tuning the base, {rate}: rate {lr}, {steps} steps; mean +- Student's 95 % over {seeds} seeds")
        here = [r for r in results["runs"] if r["rate"] == rate]
        for way in dict.fromkeys(r["way"] for r in here):
            runs = [r for r in here if r["way"] == way]
            print(f"  {way:26}" + "  ".join(f"{name} {spread([r[name] for r in runs])}" for name in ("accuracy", "answer_loss", "old_loss", "survives", "error", "update", "seconds") if name in runs[0]) + f"  base {runs[0]['base_bytes']:,} bytes")
        def difference(one, other, name, here=here): return spread([next(r[name] for r in here if r["seed"] == s and r["way"] == one) - next(r[name] for r in here if r["seed"] == s and r["way"] == other) for s in range(seeds)])
        for name in ("accuracy", "answer_loss", "old_loss", "seconds"): print(f"  QLoRA minus LoRA, {name}: {difference('adapter beside 4 bits', 'adapter beside 32 bits', name)}")
        for way in ("merged, 4 bits again", "onto the original, 4 bits"): print(f"  {way} minus kept: accuracy {difference(way, 'adapter beside 4 bits', 'accuracy')}, answer_loss {difference(way, 'adapter beside 4 bits', 'answer_loss')}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    if parser.parse_args().table: return table()
    torch.set_num_threads(1)
    town = Town()
    rounding = [dict(code="fp32", block=0, bits=32., error=0.) | town.score(town.tuned)]
    for code in CODES:
        for block in BLOCKS:
            model, error = rounded(town.tuned, block, code)
            rounding.append(dict(code=code, block=block, bits=bits_per_parameter(block, True), error=error) | town.score(model))
            print(json.dumps(rounding[-1]), flush=True)
    runs = []
    for seed in range(SEEDS):
        for rate in RATES:
            for four_bits in (False, True):
                runs += tune(town, seed, rate, four_bits)
                for r in runs[-6 if four_bits else -1:]: print(json.dumps(r), flush=True)
    write_json(RESULTS, dict(setting=dict(seeds=SEEDS, rates=RATES, batch=16, length=96, rank=8, alpha=16, questions=len(town.asked), chance="15 %"), rounding=rounding, runs=runs))
    table()


if __name__ == "__main__": main()
