"""One training step (forward, loss, backward, AdamW) of our decoder beside transformers' Llama: same weights, same tokens, one run.

    OMP_WAIT_POLICY=passive python benchmarks/model.py [--repeats 9] [--sizes 1M 10M 30M] [--threads 1 2] [--types bf16 fp32]

Steps of the two models alternate, and medians are compared, so that a busy neighbour slows both; processor time, which does not count
waiting for a core, stands beside the wall clock. Both use torch.optim.AdamW(fused=True) and the same cross-entropy; transformers' Llama
runs its default attention (sdpa). bf16 is torch.autocast over fp32 weights. "Peak" is the best rate of a square matrix product of that type
and number of threads, measured in the same run; the share is 6 N FLOPs a token (N: all parameters) over it, attention not counted.
"""
import argparse
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import torch.nn.functional as F

from llmbench.model.checkpoint import config_fields, layout
from llmbench.model.transformer import Config, Transformer

SIZES = {"1M":  Config(vocab_size=600,  d_model=128, n_layers=5,  n_heads=4, n_kv_heads=2, d_hidden=344),
         "10M": Config(vocab_size=1024, d_model=384, n_layers=6,  n_heads=6, n_kv_heads=2, d_hidden=1024),
         "30M": Config(vocab_size=1024, d_model=512, n_layers=10, n_heads=8, n_kv_heads=4, d_hidden=1376)}
BATCH, LENGTH = 8, 256


def peer(config, ours):
    "transformers' Llama with our weights"
    from transformers import LlamaConfig, LlamaForCausalLM
    fields = config_fields(config)
    model = LlamaForCausalLM(LlamaConfig(**{k: fields[k] for k in fields.keys() - {"architectures", "model_type", "dtype"}}))
    state = ours.state_dict()
    left = model.load_state_dict({theirs: state[name][part] for theirs, _, name, part in layout(config)}, strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}, left
    return model


def stepper(model, kind):
    "A function that takes one whole training step and returns the loss"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            logits = model(ids)
            logits = getattr(logits, "logits", logits)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())
    return step


def matrix_peak(kind):
    "Best FLOP/s over a few sizes of a square matrix product"
    best = 0.
    for n in (512, 1024, 2048):
        a, b = (torch.randn(n, n, dtype=torch.bfloat16 if kind == "bf16" else torch.float32) for _ in range(2))
        for _ in range(9):
            start = time.perf_counter()
            a @ b
            best = max(best, 2*n**3/(time.perf_counter() - start))
    return best


def race(config, kind, repeats):
    "Median (wall, processor) seconds of a step, ours and theirs"
    torch.manual_seed(0)
    ours = Transformer(config)
    steps = stepper(ours, kind), stepper(peer(config, ours), kind)
    ids = torch.randint(config.vocab_size, (BATCH, LENGTH))
    taken, losses = ([], []), ([], [])
    for _ in range(repeats + 2):
        for step, took, loss in zip(steps, taken, losses):
            start = time.perf_counter(), time.process_time()
            loss.append(step(ids))
            took.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    assert abs(losses[0][0] - losses[1][0]) < (.02 if kind == "bf16" else 1e-4), losses
    assert abs(losses[0][-1] - losses[1][-1]) < (.02 if kind == "bf16" else 1e-3), losses
    return [tuple(statistics.median(column) for column in zip(*took[2:])) for took in taken]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--types", nargs="+", default=["bf16", "fp32"])
    args = parser.parse_args()
    if len(args.threads) > 1:  # each number of threads in a process of its own: products in bf16 remember the first number that they ran with
        for n in args.threads: subprocess.run([sys.executable, __file__, "--threads", str(n), "--repeats", str(args.repeats), "--sizes", *args.sizes, "--types", *args.types], check=True)
        return
    print("| parameters | type | threads | ours, ms | Llama, ms | faster by | by processor time | ours, tokens/s | peak, GFLOP/s | ours, share | Llama, share |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for threads in args.threads:
        torch.set_num_threads(threads)
        for kind in args.types:
            peak = matrix_peak(kind)
            for size in args.sizes:
                (a, busy_a), (b, busy_b) = race(SIZES[size], kind, args.repeats)
                flops = 6*sum(p.numel() for p in Transformer(SIZES[size]).parameters())*BATCH*LENGTH
                print(f"| {size} | {kind} | {threads} | {1e3*a:.0f} | {1e3*b:.0f} | **{b/a:.2f}** | {busy_b/busy_a:.2f} | {BATCH*LENGTH/a:,.0f} | {peak/1e9:.0f} "
                      f"| {flops/a/peak:.0%} | {flops/b/peak:.0%} |", flush=True)


if __name__ == "__main__": main()
