"""A whole GRPO step beside TRL's: sampling, marks, loss, backward, optimizer; same weights, prompts and sizes, taken in turn.

    python benchmarks/grpo.py [--steps 12] [--rows 32] [--group 8] [--new 32] [--bf16 none|ours|both]

Prints milliseconds of processor time of each, one thread, and the ratio (median of neighbouring steps, with the lowest and the highest).
TRL at its best settings here: 32 bits (bf16 makes it slower on this CPU), one update a rollout (so no second scoring), no reference, no checkpointing of activations, no logging of answers."""
import argparse
import os
import statistics
import tempfile
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from llmbench.align.grpo import GRPO, grpo
from llmbench.align.rollout import Prompt, Sampling
from llmbench.model.transformer import Config, Transformer, parameter_count
from llmbench.text.bpe import BPE
from llmbench.text.world import World
from llmbench.tune.chat import ChatTemplate


def options():
    p = argparse.ArgumentParser()
    for name, value in dict(steps=12, rows=32, group=8, new=32, threads=1).items(): p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--bf16", choices=("none", "ours", "both"), default="ours", help="whose scoring and updates run in bf16; sampling stays in 32 bits in ours")
    return p.parse_args()


def main():
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    o, town = options(), World(0, 20)
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    bpe = BPE.train(town.documents("en"), 600)
    shape = Config(vocab_size=bpe.vocab_size, d_model=144, n_layers=4, n_heads=4, n_kv_heads=2, d_hidden=384, max_length=128)
    folder, model = tempfile.mkdtemp(), Transformer(shape)
    model.save_pretrained(folder)
    ChatTemplate(bpe).save(folder)
    questions = [q.text for q in town.questions("en", "sft")]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    prompts = [Prompt(tokenizer(q)["input_ids"], q) for q in questions]
    ours = grpo(model, prompts, lambda samples: [float(s.text.count("e")) for s in samples], bpe, GRPO(sampling=Sampling(prompts=o.rows//o.group, group=o.group, new_tokens=o.new), steps=10**6, lr=1e-6, warmup=0, autocast="off" if o.bf16 == "none" else "on"), progress=False)
    times, tokens = [], []

    class Turn(TrainerCallback):
        "Behind each of TRL's steps, one of ours"
        last = None
        def on_step_end(self, args, state, control, **kw):
            now = time.process_time()
            record = next(ours)
            after = time.process_time()
            if self.last is not None:
                times.append((now - self.last, after - now))
                tokens.append((theirs_tokens[-1], record.length*o.rows))
            self.last = after

    theirs_tokens = []
    def reward(completions, completion_ids, **kw):
        theirs_tokens.append(sum(map(len, completion_ids)))
        return [float(c.count("e")) for c in completions]
    config = GRPOConfig(output_dir=folder + "/out", use_cpu=True, bf16=o.bf16 == "both", report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True, per_device_train_batch_size=o.rows, num_generations=o.group, max_completion_length=o.new,
                        max_steps=o.steps + 3, learning_rate=1e-6, lr_scheduler_type="constant", temperature=1., beta=0., gradient_checkpointing=False, dataloader_num_workers=0)
    trainer = GRPOTrainer(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), reward, config, Dataset.from_list([dict(prompt=q) for q in questions]), processing_class=tokenizer, callbacks=[Turn()])
    trainer.train()
    times, tokens = times[2:], tokens[2:]
    ratios = [a/b for a, b in times]
    print(f"{parameter_count(shape):,} parameters, {o.rows} answers of at most {o.new} tokens in groups of {o.group}, {o.threads} thread, bf16: {o.bf16}, {len(times)} steps in turn")
    for name, i in (("TRL", 0), ("ours", 1)): print(f"{name:>5}: {1e3*statistics.median(t[i] for t in times):.0f} ms a step, {statistics.median(n[i] for n in tokens):.0f} tokens sampled in it")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__": main()
