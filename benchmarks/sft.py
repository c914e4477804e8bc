"""An SFT step beside TRL's SFTTrainer, as a ratio measured in one run:

    python benchmarks/sft.py [--steps 30] [--batch 16] [--bf16 none|ours|both]

The same rows, the same 1.0 M weights, loss on the answers only, AdamW on both sides, steps taken in turn, processor time of one thread. TRL has
its best settings: rows tokenized before, no gradient checkpointing, no logging to anywhere, and the type that is faster for it: compare `ours` and
`both`. Both losses of the first and of the last step are compared. A second row has ours packed (block-masked, as the chain does), by useful tokens."""
import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from llmbench.model.transformer import Config, Transformer, parameter_count
from llmbench.text.batch import draw
from llmbench.text.bpe import BPE
from llmbench.text.world import World
from llmbench.train.loop import batch_loss, train_step
from llmbench.train.optim import make_optimizers
from llmbench.tune.chat import ChatTemplate
from llmbench.tune.sft import SFT, batches, rows_of


def peer(folder, rows, batch, bf16):
    "TRL's trainer on the same rows, its optimizer made"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer
    config = SFTConfig(output_dir=str(Path(folder)/"out"), use_cpu=True, bf16=bf16, report_to=[], gradient_checkpointing=False, max_length=128, packing=False, completion_only_loss=True,
                       per_device_train_batch_size=batch, learning_rate=1e-4, lr_scheduler_type="constant", optim="adamw_torch", max_grad_norm=1., disable_tqdm=True, logging_strategy="no", save_strategy="no")
    data = Dataset.from_list([dict(input_ids=ids, completion_mask=mask) for ids, mask in rows])
    trainer = SFTTrainer(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config, train_dataset=data, processing_class=PreTrainedTokenizerFast.from_pretrained(folder))
    trainer.create_optimizer()
    trainer.ready = trainer.accelerator.prepare_model(trainer.model)  # as train() does: bf16 happens in here
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def main(steps, batch, bf16):
    torch.set_num_threads(1)
    world = World(0, 50)
    talks = [c for turns in (1, 2) for c in world.conversations("both", "sft", turns)]
    template = ChatTemplate(BPE.train(world.documents("both"), 600))
    rows, _ = rows_of(talks, template, 128)
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=template.tokenizer.vocab_size, d_model=144, d_hidden=388, max_length=128))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        template.save(folder)
        trainer = peer(folder, rows, batch, bf16 == "both")
        packed, times = Transformer.from_pretrained(folder), dict(ours=[], trl=[], packed=[])
        optimizers, more = (make_optimizers(m, 1e-4, 0., 0., .999) for m in (model, packed)) # TRL's memory of squared gradients
        how = SFT(batch=batch, length=128, replay=0., packed=False)
        batch_at, few = batches(rows, how, pad_id=template.tokenizer.pad_id), batches(rows, SFT(batch=batch//2, length=128, replay=0.), pad_id=template.tokenizer.pad_id)
        def narrow(b):
            wide = int((b.segments > 0).sum(1).max())
            return type(b)(*(getattr(b, name)[:, :wide] for name in ("ids", "mask", "positions", "segments")))
        def ours(step): return train_step(model.train(), [narrow(batch_at(step))], optimizers, 1., batch_loss, bf16 != "none")[0]
        def ours_packed(step): return train_step(packed.train(), [few(step)], more, 1., batch_loss, bf16 != "none")[0]
        def theirs(step):
            inputs = trainer.data_collator([trainer.train_dataset[i] for i in draw(len(rows), batch, step).tolist()])
            value = trainer.training_step(trainer.ready.train(), inputs, (inputs["labels"][:, 1:] != -100).sum())
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            return float(value)
        for step in range(steps + 3):
            for name, f in (("ours", ours), ("trl", theirs), ("packed", ours_packed))[::1 if step % 2 else -1]:
                start = time.process_time()
                value = f(step)
                times[name].append(time.process_time() - start)
                if step in (0, steps) and name != "packed": print(f"step {step} {name}: loss {value:.6f}")
    ratios = [b/a for a, b in list(zip(times["ours"], times["trl"]))[3:]]
    tokens = batch*sum(len(ids) for ids, _ in rows)/len(rows)
    full = sum(int((few(s).segments > 0).sum()) for s in range(20))/20
    ms = {name: statistics.median(t[3:])*1000 for name, t in times.items()}
    print(f"{parameter_count(model.config):,} parameters, {batch} rows a step (about {tokens:.0f} tokens), bf16: {bf16}, one thread, processor time")
    print(f"ours {ms['ours']:.1f} ms, TRL {ms['trl']:.1f} ms a step; ratio of a step: median {statistics.median(ratios):.2f}, quartiles {statistics.quantiles(ratios)[0]:.2f} to {statistics.quantiles(ratios)[2]:.2f}")
    print(f"ours packed, {full:.0f} useful tokens in {ms['packed']:.1f} ms: {full/ms['packed']*ms['trl']/tokens:.2f} times TRL's useful tokens a second (padded)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30, help="measured steps (default: 30)")
    parser.add_argument("--batch", type=int, default=16, help="rows a step (default: 16)")
    parser.add_argument("--bf16", choices=("none", "ours", "both"), default="ours", help="who computes in bf16 (default: ours, since 32 bits suit TRL better on a CPU)")
    options = parser.parse_args()
    main(options.steps, options.batch, options.bf16)
