"""How far past its trained length does a copying machine copy, and what does each RoPE scaling give back?

    python experiments/rope/extrapolation.py [--seeds 5]

The model of nbs/2_model/20a_rope.ipynb (two layers of one head): a random string of 8 to 16 letters, said twice, so at most 32 tokens in
training. Printed: letters of the second half copied right, mean over seeds (lowest to highest), without any further training."""
import argparse
from dataclasses import replace

import torch
import torch.nn.functional as F

from llmbench.core import seed_everything
from llmbench.model.transformer import Config, Transformer

CONFIG, TRAINED = Config(vocab_size=32, d_model=64, n_layers=2, n_heads=1, n_kv_heads=1, d_hidden=128, max_length=256), 32
LLAMA3 = dict(rope_type="llama3", low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=TRAINED)
WAYS = {"as trained": None, "linear": dict(rope_type="linear"), "NTK": dict(rope_type="ntk"), "NTK, 4 x": dict(rope_type="ntk", times=4.), "Llama 3": LLAMA3}


def twice(n, half, generator):
    said = torch.randint(1, 32, (n, half), generator=generator)
    return torch.cat((said, said), 1)


def train(seed, steps):
    generator = seed_everything(seed)
    model = Transformer(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(.9, .95), weight_decay=.01, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups: group["lr"] = 3e-3*min(1, (step + 1)/50)*(1 - .9*step/steps)
        ids = twice(32, int(torch.randint(8, 17, (1,), generator=generator)), generator)
        half = ids.shape[1]//2
        optimizer.zero_grad()
        F.cross_entropy(model(ids)[:, half-1:-1].flatten(0, 1), ids[:, half:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
    return model


@torch.no_grad()
def copied(model, length, way):
    scaling = way and {k: v for k, v in way.items() if k != "times"} | dict(factor=max(1., length/TRAINED)*way.get("times", 1.))
    stretched = Transformer(replace(CONFIG, rope_scaling=scaling))
    stretched.load_state_dict(model.state_dict())
    ids, half = twice(128, length//2, torch.Generator().manual_seed(1)), length//2
    return (stretched(ids).argmax(-1)[:, half:-1] == ids[:, half+1:]).float().mean().item()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--steps", type=int, default=1000)
    a = p.parse_args()
    torch.set_num_threads(1)
    models, lengths = [train(seed, a.steps) for seed in range(a.seeds)], (16, 24, 32, 40, 48, 64, 96)
    print("length     " + "".join(f"{n:>18}" for n in lengths))
    for name, way in WAYS.items():
        scores = [[copied(m, n, way) for m in models] for n in lengths]
        print(f"{name:11}" + "".join(f"{f'{sum(s)/len(s):.0%} ({min(s):.0%} to {max(s):.0%})':>18}" for s in scores))


if __name__ == "__main__": main()
