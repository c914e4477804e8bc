"""What the box lane adds to plain TRL, in processor time, of the whole job and of each step: the same model, rows, order and steps, in turns in one process
Run: python benchmarks/box.py [--model FOLDER] [--steps 30] [--rounds 5]      (without a folder: a random Llama of 5 M parameters)"""
import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers import trainer as theirs
from trl import SFTConfig, SFTTrainer

from llmbench.box.launch import Launch, resolved
from llmbench.box.sft import BoxSFT, Optim, Rows, Save, build_model, check, dataset, train
from llmbench.box.trainer import Order, quiet
from llmbench.model.transformer import Config, Transformer
from llmbench.text.bpe import BPE
from llmbench.text.world import World
from llmbench.train.checkpoint import read_steps
from llmbench.tune.chat import ChatTemplate

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="")
parser.add_argument("--method", default="lora")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--rounds", type=int, default=5)
args = parser.parse_args()
quiet()
torch.set_num_threads(1)


class Plain(SFTTrainer):
    "TRL as it is, in the same order of rows"
    def _get_train_sampler(self, train_dataset=None): return Order(len(self.train_dataset), 4, args.steps, 0)


ticks = []


class Clock(TrainerCallback):
    "Processor time at the beginning of each step: from one to the next lie rows, forward, backward, optimizer and log"
    def on_step_begin(self, args, state, control, **_): ticks.append(time.process_time())


theirs.DEFAULT_CALLBACKS.append(Clock)  # every trainer gets it, TRL's and ours


def quartiles(x): return statistics.quantiles(x, n=4)


with tempfile.TemporaryDirectory() as home:
    home = Path(home)
    world = World(0)
    (home/"talks.jsonl").write_text("".join(json.dumps(dict(messages=c["messages"])) + "\n" for c in world.conversations("en", "sft")))
    if not args.model:
        template = ChatTemplate(BPE.train(world.documents("en"), 2000))
        torch.manual_seed(0)
        Transformer(Config(vocab_size=template.tokenizer.vocab_size, d_model=256, n_layers=6, n_heads=4, n_kv_heads=2, d_hidden=688, max_length=256)).save_pretrained(home/"model")
        template.save(home/"model")
    job = BoxSFT(args.model or str(home/"model"), (str(home/"talks.jsonl"),), args.method, folder=str(home), data=Rows(length=128, valid=0.), optim=Optim(steps=args.steps, batch=4, micro=4, warmup=2, schedule="constant"),
                 save=Save(every=10**6, valid_every=0), launch=Launch(1, cpu=True))
    spent, steps, losses = dict(plain=[], box=[]), dict(plain=[], box=[]), {}
    for turn in range(args.rounds + 1):  # the first round warms up
        for way in ("plain", "box") if turn % 2 else ("box", "plain"):
            mine = replace(job, name=f"{way}{turn}")
            found = check(mine)
            ticks.clear()
            start = time.process_time()
            if way == "box":
                train(mine, found, progress=False)
                losses[way] = [s.loss for s in read_steps(home/mine.name/"sft")]
            else:
                how = SFTConfig(output_dir=str(home/mine.name), max_steps=args.steps, per_device_train_batch_size=4, learning_rate=job.optim.lr, lr_scheduler_type="constant_with_warmup", warmup_steps=2, use_cpu=True, bf16=False,
                                report_to="none", disable_tqdm=True, logging_steps=1, max_length=128, activation_checkpointing=False, save_strategy="steps", save_steps=10**6)
                trainer = Plain(build_model(mine, found["place"], None, resolved(job.launch)), how, train_dataset=dataset(found["rows"]), processing_class=found["template"].inner)
                trainer.remove_callback(PrinterCallback)
                trainer.train()
                trainer.save_model(str(home/mine.name/"model"))
                losses[way] = [r["loss"] for r in trainer.state.log_history if "loss" in r]
            if turn: spent[way].append(time.process_time() - start)
            if turn: steps[way] += [1000*(b - a) for a, b in zip(ticks[1:], ticks[2:])]  # without the first, which warms up
            shutil.rmtree(home/mine.name, ignore_errors=True)
    apart = max(abs(a - b) for a, b in zip(losses["plain"], losses["box"]))
    mine, plain = (statistics.median(spent[k]) for k in ("box", "plain"))
    ratios = sorted(b/p for b, p in zip(spent["box"], spent["plain"]))
    print(f"{args.method}, {args.steps} steps of 4 rows: plain TRL {plain:.2f} s of processor time, box {mine:.2f} s, ratio {mine/plain:.3f} (rounds {ratios[0]:.3f} to {ratios[-1]:.3f}); losses differ by {apart:.1e}")
    own, trl = quartiles(steps["box"]), quartiles(steps["plain"])
    print(f"a step: plain TRL {trl[1]:.1f} ms [{trl[0]:.1f}, {trl[2]:.1f}], box {own[1]:.1f} ms [{own[0]:.1f}, {own[2]:.1f}], ratio of the medians {own[1]/trl[1]:.3f}; {len(steps['box'])} steps each, median and quartiles")
