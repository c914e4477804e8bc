"""Character-level Shakespeare beside nanoGPT's CPU recipe, on the same machine in one run:

    python benchmarks/shakespeare.py [TEXT] [--threads 2] [--share 1.0]

The peer is the recipe of nanoGPT's README for a CPU (4 layers, 4 heads, width 128, block 64, batch 12, 2,000 iterations; AdamW 1e-3 falling to 1e-4,
warm-up 100, beta2 0.99, weight decay 0.1, clip 1, no dropout, fp32), written here from its description: a GPT-2 with LayerNorm, GELU and learned
positions. Ours is `llmbench.model.transformer` of the same size, trained by `llmbench.train.loop.fit`: batch 32, Muon for the matrices, AdamW for
the rest, bf16 where it pays. Both see the first 90 % of the text and windows of at most 64 characters.

Three trainings: the peer's; ours with few steps, to reach the peer's final loss; ours with as many steps as fit into the peer's time.
Time: wall clock from the first to the last step, without imports, and for the peer without its own evaluations. Loss: nats per character in fp32 over the
whole last 10 % of the text, in consecutive windows of 64, so that each character but the first is predicted once, from 1 to 64 before it: the same
characters for both. `--share` shortens all three for a trial."""
import argparse
import math
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
HERE = Path(__file__).parent.parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text", nargs="?", default=HERE.parent/"shared"/"data"/"tinyshakespeare.txt", type=Path, help="a UTF-8 text")
parser.add_argument("--threads", type=int, default=2, help="of torch, for both")
parser.add_argument("--share", type=float, default=1., help="of all steps: below 1 for a trial")
parser.add_argument("--short", type=int, default=200, help="our steps for the peer's final loss")
parser.add_argument("--seed", type=int, default=1337, help="of weights and windows")
args = parser.parse_args()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from llmbench.model.transformer import Config, Transformer  # noqa: E402
from llmbench.text.batch import windows  # noqa: E402
from llmbench.train.loop import Fit, fit  # noqa: E402

BLOCK, WIDTH, LAYERS, HEADS = 64, 128, 4, 4


class GPTBlock(nn.Module):
    "GPT-2's, as nanoGPT has it without biases"
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.proj = nn.Linear(WIDTH, 3*WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4*WIDTH, bias=False), nn.Linear(4*WIDTH, WIDTH, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, HEADS, C//HEADS).transpose(1, 2) for y in self.qkv(self.ln_1(x)).split(C, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class GPT(nn.Module):
    "The peer's model"
    def __init__(self, vocabulary):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.blocks, self.ln_f = nn.ModuleList(GPTBlock() for _ in range(LAYERS)), nn.LayerNorm(WIDTH, bias=False)
        for name, p in self.named_parameters():
            if p.ndim > 1: nn.init.normal_(p, std=.02/math.sqrt(2*LAYERS) if "proj" in name or "down" in name else .02)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe.weight[:ids.shape[1]]
        for block in self.blocks: x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


def train_peer(train, vocabulary, steps):
    "nanoGPT's loop"
    torch.manual_seed(args.seed)
    model = GPT(vocabulary)
    groups = [dict(params=[p for p in model.parameters() if p.ndim > 1], weight_decay=.1), dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.)]
    optimizer, start = torch.optim.AdamW(groups, lr=1e-3, betas=(.9, .99)), time.perf_counter()
    for step in range(steps):
        done = (step - 100)/max(1, steps - 100)
        for g in optimizer.param_groups: g["lr"] = 1e-3*(step + 1)/101 if step < 100 else 1e-4 + .5*(1 + math.cos(math.pi*done))*9e-4
        at = torch.randint(len(train) - BLOCK, (12, 1)) + torch.arange(BLOCK)
        logits = model(train[at])
        loss = F.cross_entropy(logits.flatten(0, 1), train[at + 1].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model, time.perf_counter() - start


def train_ours(train, vocabulary, steps, lr=3e-3, matrix_lr=.02, warmup=50):
    "Ours; a short training wants larger steps"
    torch.manual_seed(args.seed)
    model = Transformer(Config(vocab_size=vocabulary, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, n_kv_heads=HEADS, d_hidden=344, max_length=BLOCK))
    config = Fit(steps=steps, lr=lr, matrix_lr=matrix_lr, warmup=warmup, final=0., decay=.1, valid_every=10**9, save_every=10**9)
    start = time.perf_counter()
    for _ in fit(model, lambda step, micro: windows(train, BLOCK, 32, step, args.seed), config, progress=False): pass
    return model, time.perf_counter() - start


@torch.no_grad()
def loss_of(logits, held):
    "Nats per character of consecutive windows"
    count = (len(held) - 1)//BLOCK
    x, y = held[:count*BLOCK].view(-1, BLOCK), held[1:count*BLOCK + 1].view(-1, BLOCK)
    parts = [F.cross_entropy(logits(a).flatten(0, 1), b.flatten(), reduction="sum").item() for a, b in zip(x.split(256), y.split(256))]
    return sum(parts)/y.numel()


def main():
    torch.set_num_threads(args.threads)
    text = args.text.read_text(encoding="utf-8")
    letters = sorted(set(text))
    number = {c: i for i, c in enumerate(letters)}
    ids = torch.tensor([number[c] for c in text])
    train, held = ids[:int(.9*len(ids))], ids[int(.9*len(ids)):]
    train_ours(train, len(letters), 3) # so that ours does not pay for choosing bf16
    rows = []
    def note(name, model, seconds, steps):
        model.eval()
        rows.append((steps, seconds, loss_of(model, held)))
        print(f"{name:22} {sum(p.numel() for p in model.parameters()):>8,} parameters {steps:>6,} steps {seconds:>7.1f} s {1000*seconds/steps:>6.1f} ms/step   validation loss {rows[-1][-1]:.4f}", flush=True)
    steps = round(2000*args.share)
    note("nanoGPT's CPU recipe", *train_peer(train, len(letters), steps), steps)
    steps = round(args.short*args.share)
    note("ours, few steps", *train_ours(train, len(letters), steps, 6e-3, .03, 20), steps)
    (_, peer_seconds, peer_loss), (_, short_seconds, short_loss) = rows
    steps = int(.97*peer_seconds/short_seconds*steps)
    note("ours, the same time", *train_ours(train, len(letters), steps), steps)
    print(f"\nfew steps: {short_loss:.4f} (peer {peer_loss:.4f}, bar 1.8857) in 1/{peer_seconds/short_seconds:.1f} of the peer's time (bar 1/8)")
    print(f"the same time: {rows[-1][-1]:.4f} (bar 1.58) in {rows[-1][1]/peer_seconds:.2f} of the peer's time (bar 1)")


if __name__ == "__main__": main()
