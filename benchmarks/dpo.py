"""A DPO step beside TRL's DPOTrainer, as a ratio measured in one run:

    python benchmarks/dpo.py [--steps 30] [--batch 8] [--bf16 none|ours|both]

The same rows, the same 1.0 M weights, AdamW on both sides, steps taken in turn, processor time of one thread. TRL has its best settings: the
reference's log-probabilities precomputed, no gradient checkpointing, no logging to anywhere, and the type that is faster for it: compare
`ours` and `both`. Both losses of the first step are compared."""
import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from llmbench.align.dpo import DPO, preference_loss, reference_logps
from llmbench.align.pairs import pair_batches, pair_rows, stack_pairs
from llmbench.model.transformer import Config, Transformer, parameter_count
from llmbench.text.batch import draw
from llmbench.text.bpe import BPE
from llmbench.text.world import World
from llmbench.train.loop import train_step
from llmbench.train.optim import make_optimizers
from llmbench.tune.chat import ChatTemplate


def peer(folder, pairs, batch, bf16):
    "TRL's trainer on the same pairs, its optimizer made"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer
    def said(role, text): return [dict(role=role, content=text)]
    rows = [dict(prompt=said("user", p["prompt"]), chosen=said("assistant", p["chosen"]), rejected=said("assistant", p["rejected"])) for p in pairs]
    config = DPOConfig(output_dir=str(Path(folder)/"out"), use_cpu=True, bf16=bf16, report_to=[], gradient_checkpointing=False, precompute_ref_log_probs=True, max_length=128,
                       per_device_train_batch_size=batch, learning_rate=1e-4, lr_scheduler_type="constant", optim="adamw_torch", max_grad_norm=1., disable_tqdm=True)
    trainer = DPOTrainer(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), args=config, train_dataset=Dataset.from_list(rows), processing_class=PreTrainedTokenizerFast.from_pretrained(folder))
    trainer.get_train_dataloader()  # precomputes the reference
    trainer.create_optimizer()
    trainer.ready = trainer.accelerator.prepare_model(trainer.model)  # as train() does: bf16 happens in here
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def main(steps, batch, bf16):
    torch.set_num_threads(1)
    world = World(0, 50)
    pairs = world.preferences("both")[:400]
    template = ChatTemplate(BPE.train(world.documents("both") + [p["chosen"] for p in pairs], 600))
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=template.tokenizer.vocab_size, d_model=144, d_hidden=388, max_length=128))
    rows, _ = pair_rows(pairs, template, 128)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        template.save(folder)
        trainer = peer(folder, pairs, batch, bf16 == "both")
        ref = reference_logps(model, rows, template.tokenizer.pad_id)
        batch_at = pair_batches(stack_pairs(rows, template.tokenizer.pad_id, ref), batch)
        data, how, times = trainer.train_dataset, DPO(lr=1e-4, matrix_lr=0.), dict(ours=[], trl=[])
        optimizers = make_optimizers(model, 1e-4, 0., 0.)
        def loss(m, p, total): return preference_loss(m, p, how)[0].sum()/total
        def ours(step): return train_step(model.train(), [batch_at(step)], optimizers, 1., loss, bf16 != "none")[0]
        def theirs(step):
            inputs = trainer.data_collator([data[i] for i in draw(len(rows), batch, step).tolist()])
            value = trainer.training_step(trainer.ready.train(), inputs)
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            return float(value)
        for step in range(steps + 3):
            for name, f in (("ours", ours), ("trl", theirs)) if step % 2 else (("trl", theirs), ("ours", ours)):
                start = time.process_time()
                value = f(step)
                times[name].append(time.process_time() - start)
                if step in (0, steps): print(f"step {step} {name}: loss {value:.6f}")
    ratios = [b/a for a, b in list(zip(times["ours"], times["trl"]))[3:]]
    tokens = sum(len(ids) for row in rows for ids, _ in row)/len(rows)*batch
    ms = {name: statistics.median(t[3:])*1000 for name, t in times.items()}
    print(f"{parameter_count(model.config):,} parameters, {batch} pairs a step (about {tokens:.0f} tokens), bf16: {bf16}, one thread, processor time")
    print(f"ours {ms['ours']:.1f} ms, TRL {ms['trl']:.1f} ms a step; ratio of a step: median {statistics.median(ratios):.2f}, quartiles {statistics.quantiles(ratios)[0]:.2f} to {statistics.quantiles(ratios)[2]:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30, help="measured steps (default: 30)")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step (default: 8)")
    parser.add_argument("--bf16", choices=("none", "ours", "both"), default="ours", help="who computes in bf16 (default: ours, since 32 bits suit TRL better on a CPU)")
    options = parser.parse_args()
    main(options.steps, options.batch, options.bf16)
