"""Greedy generation beside transformers: same weights, same prompts, same tokens, one run.

    python benchmarks/generate.py [--threads 1] [--repeats 7] [--cpu-time]

Prints tokens/s of each and their ratio (median of the ratios of neighbouring rounds, with the lowest and the highest)."""
import argparse
import os
import statistics
import tempfile
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from llmbench.model.generate import generate
from llmbench.model.transformer import Config, Transformer, parameter_count


def seconds(run, clock):
    start = clock()
    run()
    return clock() - start


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--prompt", type=int, default=16)
    p.add_argument("--new", type=int, default=64)
    p.add_argument("--cpu-time", action="store_true", help="count processor time, which busy neighbours disturb less; only with one thread")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    clock = time.process_time if a.cpu_time else time.perf_counter
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    config = Config(vocab_size=1024, d_model=128, n_layers=5, n_heads=4, n_kv_heads=2, d_hidden=344)
    ours = Transformer(config).eval()
    for w in ours.parameters():
        if w.dim() > 1: torch.nn.init.normal_(w, std=0.15)  # sharper logits than a fresh model's: no ties between the two
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    print(f"{parameter_count(config)/1e6:.2f} M parameters, {config.n_heads}/{config.n_kv_heads} heads, batch {a.batch}, "
          f"prompt {a.prompt}, {a.new} new tokens, {a.threads} thread(s), torch {torch.__version__}")
    ids = torch.randint(7, config.vocab_size, (a.batch, a.prompt), generator=torch.Generator().manual_seed(1))
    left = torch.arange(a.prompt) >= torch.arange(a.batch)[:, None] % (a.prompt - 1)  # 0 to prompt-2 tokens of padding
    for name, mask in (("no padding", None), ("left padding", left)):
        prompt = ids if mask is None else ids*mask
        def run_ours(mask=mask, prompt=prompt): return generate(ours, prompt, a.new, temperature=0, mask=mask)
        def run_theirs(mask=mask, prompt=prompt):
            told = torch.ones_like(prompt) if mask is None else mask.long()
            with torch.inference_mode():
                return theirs.generate(prompt, attention_mask=told, max_new_tokens=a.new, do_sample=False, eos_token_id=None, pad_token_id=0)
        same = (run_ours() == run_theirs()).float().mean().item()
        rounds = [(seconds(run_ours, clock), seconds(run_theirs, clock)) for _ in range(a.repeats)]
        ratios = sorted(t/o for o, t in rounds)
        speed = [a.batch*a.new/statistics.median(x) for x in zip(*rounds)]
        print(f"{name:12}: ours {speed[0]:7,.0f} tokens/s, transformers {speed[1]:7,.0f} tokens/s, "
              f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), equal tokens {same:.1%}")


if __name__ == "__main__": main()
