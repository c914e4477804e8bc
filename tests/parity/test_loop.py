"fit against a loop written by hand, transformers' Trainer, the full batch, and itself after kill -9"
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from llmbench.core import UserError
from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import Batch, pack, pad
from llmbench.train.checkpoint import latest, load_checkpoint, read_steps, save_checkpoint, tensors_of
from llmbench.train.loop import Fit, batch_loss, counted, evaluate, fit, train_step
from llmbench.train.optim import make_optimizers

SHAPE = Config(vocab_size=40, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=24, max_length=32)


def model(seed=0, config=SHAPE):
    torch.manual_seed(seed)
    return Transformer(config)


def rows(n=24, seed=0, longest=12):
    "Documents of uneven length with uneven masks"
    draw = random.Random(seed)
    lengths = [draw.randint(3, longest) for _ in range(n)]
    return [([draw.randrange(1, 40) for _ in range(k)], [1] + [draw.randint(0, 1) for _ in range(k - 2)] + [1]) for k in lengths]


DATA = pad(rows())


def batch_at(step, micro=0, size=4): return DATA.rows([(step*8 + micro*size + i) % len(DATA) for i in range(size)])


def whole(step, micro=0): return batch_at(step, 0, 8)


def largest(a, b): return max((x - y).abs().max().item() for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_by_hand(ledger):
    "AdamW, groups, schedule, clipping and the loss itself, written out"
    ours, theirs = model(), model()
    config = Fit(steps=12, lr=2e-3, matrix_lr=0, warmup=4, final=.1, decay=.2, beta2=.9, clip=.5, autocast="off")
    steps = [*fit(ours, batch_at, config, progress=False)]
    groups = [dict(params=[p for p in theirs.parameters() if p.ndim > 1], weight_decay=.2), dict(params=[p for p in theirs.parameters() if p.ndim < 2], weight_decay=0.)]
    optimizer, clipped = torch.optim.AdamW(groups, betas=(.9, .9)), 0
    for i, step in enumerate(steps):
        for g in optimizer.param_groups: g["lr"] = 2e-3*((i + 1)/4 if i < 4 else .1 + .9*(1 + math.cos(math.pi*(i - 3)/8))/2)
        b = batch_at(i)
        loss = F.cross_entropy(theirs(b.ids)[:, :-1].flatten(0, 1), b.ids.masked_fill(b.mask == 0, -100)[:, 1:].flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), .5).item()
        clipped += norm > .5
        optimizer.step()
        optimizer.zero_grad()
        assert step.loss == pytest.approx(loss.item(), abs=2e-6) and step.grad_norm == pytest.approx(norm, rel=1e-4)
        assert step.step == i and step.lr == pytest.approx(optimizer.param_groups[0]["lr"])
    assert 0 < clipped
    assert steps[-1].tokens == sum(batch_at(i).mask[:, 1:].sum() for i in range(12))
    ledger("fit, 12 steps of AdamW", "a loop written by hand", largest(ours, theirs), 1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_accumulation(packed, ledger):
    "Four micro-batches with uneven masks are the full batch; the mean of their means is not"
    batches = [pack(rows(6, i, 12), 16) if packed else pad(rows(2 + i, i, 5 + 2*i), 14) for i in range(4)]
    full = Batch(*(torch.cat([getattr(b, name) for b in batches]) for name in ("ids", "mask", "positions", "segments")))
    assert len({counted([b]) for b in batches}) == 4
    micro, once, naive = model(), model(), model()
    a = [*fit(micro, lambda step, i: batches[i], Fit(steps=3, micro=4, autocast="off"), progress=False)]
    b = [*fit(once, lambda step, i: full, Fit(steps=3, autocast="off"), progress=False)]
    list(fit(naive, lambda step, i: batches[i], Fit(steps=3, micro=4, autocast="off"), loss=lambda m, x, total: batch_loss(m, x)/4, progress=False))
    ledger(f"accumulation{', packed' if packed else ''}: loss", "the full batch", max(abs(x.loss - y.loss) for x, y in zip(a, b)), 1e-6)
    assert [x.tokens for x in a] == [x.tokens for x in b]
    gradients = []
    for m, parts in ((model(), batches), (model(), [full])):
        for x in parts: batch_loss(m, x, counted(parts)).backward()
        gradients.append([p.grad for p in m.parameters()])
    ledger(f"accumulation{', packed' if packed else ''}: gradient", "the full batch", max((x - y).abs().max().item() for x, y in zip(*gradients)), 1e-6)
    assert largest(naive, once) > 20*largest(micro, once), "a mean of means would have passed"


def test_trainer_of_transformers(tmp_path, ledger):
    "The same Llama, the same rows, accumulation over two micro-batches, clipping, decay groups: transformers' Trainer"
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
    shape = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=False)
    torch.manual_seed(0)
    theirs, ours = LlamaForCausalLM(shape), LlamaForCausalLM(shape)
    ours.load_state_dict(theirs.state_dict())
    items = [dict(input_ids=DATA.ids[i % 24], labels=DATA.ids[i % 24].masked_fill(DATA.mask[i % 24] == 0, -100)) for i in range(8*5)]
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=3e-3, lr_scheduler_type="constant",
        weight_decay=.2, adam_beta2=.9, max_grad_norm=.5, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True)
    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **named): return None
        def log(self, *args, **named): super().log(*args, **named)
    trainer = InOrder(theirs, args, train_dataset=items)
    trainer.train()
    def loss(m, batch, total):
        from llmbench.train.loss import next_token_loss
        return next_token_loss(m(batch.ids).logits, batch.ids, batch.mask, total)
    steps = [*fit(ours, batch_at, Fit(steps=5, lr=3e-3, matrix_lr=0, warmup=0, final=1., decay=.2, beta2=.9, clip=.5, micro=2, autocast="off"), loss=loss, progress=False)]
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert len(log) == 5
    ledger("fit, 5 steps x 2 micro-batches: weights", "transformers Trainer", largest(ours, theirs), 1e-5)
    ledger("fit, 5 steps x 2 micro-batches: gradient norm", "transformers Trainer", max(abs(s.grad_norm - row["grad_norm"]) for s, row in zip(steps, log)), 1e-4)


def test_evaluate():
    "Each token weighs the same, and the model comes back as it was"
    m = model()
    parts = [DATA.rows(slice(0, 20)), DATA.rows(slice(20, 24))]
    assert evaluate(m, parts) == pytest.approx(batch_loss(m, DATA).item(), abs=1e-6)
    assert evaluate(m, parts) != pytest.approx(sum(batch_loss(m, p).item() for p in parts)/2, abs=1e-4)
    assert m.training and not (m.eval() and evaluate(m, parts) and m.training)
    dropping = nn.Sequential(m, nn.Dropout(.5))
    assert evaluate(dropping, parts, lambda n, b, total: batch_loss(n[0], b, total)) == evaluate(dropping.train(), parts, lambda n, b, total: batch_loss(n[0], b, total))


def test_left_padding_and_packing():
    "Documents packed, padded left or right: one loss"
    m, documents = model(), rows(8, 3)
    right, left, packed = pad(documents), pad(documents, side="left"), pack(documents, 16)
    assert packed.segments.max() > 1
    values = [batch_loss(m, b).item() for b in (right, left, packed)]
    assert max(values) - min(values) < 1e-5


SCRIPT = """
import sys
import torch
from torch import nn
from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import pad
from llmbench.train.loop import Fit, batch_loss, fit
torch.set_num_threads(1)

class Dropping(nn.Module): # random numbers in training: resuming has to restore them
    def __init__(self):
        super().__init__()
        self.body = Transformer(Config(vocab_size=40, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=24, max_length=32))
    def forward(self, ids): return self.body(ids*(torch.rand(ids.shape) > .1) if self.training else ids)

def batch_at(step, micro):
    g = torch.Generator().manual_seed(1000*step + micro)
    return pad([((torch.arange(5 + micro) + start).remainder(39).add(1).tolist(), [1]*(5 + micro)) for start in torch.randint(39, (3,), generator=g).tolist()])

torch.manual_seed(0)
model = Dropping()
config = Fit(steps=120, micro=2, save_every=7, valid_every=10, patience=1000, autocast="on")
for step in fit(model, batch_at, config, [batch_at(-1, 0)], sys.argv[1], progress=False): pass
"""


def start(folder, tmp_path):
    (tmp_path/"train.py").write_text(SCRIPT)
    return subprocess.Popen([sys.executable, str(tmp_path/"train.py"), str(folder)], stderr=subprocess.PIPE, env=os.environ | dict(OMP_NUM_THREADS="1"))


def finish(process):
    error = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, error


def lines(folder): return len(p.read_bytes().splitlines()) if (p := folder/"steps.jsonl").exists() else 0


def without_time(folder): return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder/"steps.jsonl").read_text().splitlines()]


def test_killed_run_equals_uninterrupted_run(tmp_path, ledger):
    "kill -9 at two random moments; weights, best weights, optimizers, random numbers and log come out bit for bit"
    through, killed, draw = tmp_path/"through", tmp_path/"killed", random.Random()
    quiet = start(through, tmp_path)
    for target in sorted(draw.sample(range(10, 110), 2)):
        process = start(killed, tmp_path)
        while lines(killed) < target and process.poll() is None: time.sleep(draw.random()*.01)
        assert process.poll() is None, process.communicate()[1].decode() or "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        state = json.loads((latest(killed)/"state.json").read_text()) if latest(killed) else dict(step=0)
        assert state["step"] >= target//7*7 - 7
    finish(start(killed, tmp_path))
    finish(quiet)
    a, b = latest(through), latest(killed)
    assert a.name == b.name == "step-0000120"
    assert {p.name for p in killed.iterdir()} == {"fit.json", "steps.jsonl", a.name}, "nothing is left lying about"
    for name in ("model", "optimizers", "random"):
        x, y = load_file(a/f"{name}.safetensors"), load_file(b/f"{name}.safetensors")
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name
    assert without_time(through) == without_time(killed)
    assert [r["step"] for r in without_time(killed)] == list(range(120))
    seconds = [r.seconds for r in read_steps(killed)]
    assert seconds == sorted(seconds), "time goes on, too"
    ledger("killed twice and resumed: weights", "uninterrupted run", 0 if (a/"model.safetensors").read_bytes() == (b/"model.safetensors").read_bytes() else 1, 0)


@pytest.mark.parametrize("stop", [1, 9, 10, 23])
def test_left_and_called_again(stop, tmp_path):
    "Leaving the for loop is as good a stop as any; so is a step that has just been saved"
    config = Fit(steps=24, save_every=10, valid_every=4, patience=3)
    a, b = model(), model()
    through = [*fit(a, batch_at, config, [DATA], progress=False)]
    first = []
    for step in fit(b, batch_at, config, [DATA], tmp_path, progress=False):
        first.append(step)
        if len(first) == stop: break
    c = model(seed=9)
    rest = [*fit(c, batch_at, config, [DATA], tmp_path, progress=False)]
    assert [(s.step, s.loss, s.valid_loss, s.tokens, s.grad_norm) for s in first + rest] == [(s.step, s.loss, s.valid_loss, s.tokens, s.grad_norm) for s in through]
    assert largest(a, c) == 0
    d = model(seed=8)
    assert [*fit(d, batch_at, config, [DATA], tmp_path, progress=False)] == [], "what is done is done"
    assert largest(a, d) == 0 and d.blocks[0].attention.qkv.weight.data_ptr() != a.blocks[0].attention.qkv.weight.data_ptr()


def test_checkpoint_round_trip(tmp_path):
    "Tied weights are stored once; a later save replaces an earlier one, also of the same step"
    a = model()
    optimizers = make_optimizers(a)
    for i in range(3): train_step(a, [batch_at(i)], optimizers)
    first = save_checkpoint(tmp_path, a, optimizers, 3, note="kept")
    assert set(load_file(first/"model.safetensors")) == set(tensors_of(a)) == {n for n, _ in a.named_parameters()}
    assert json.loads((first/"state.json").read_text()) == dict(step=3, note="kept")
    train_step(a, [batch_at(3)], optimizers)
    again = save_checkpoint(tmp_path, a, optimizers, 3)
    assert again != first and [*tmp_path.iterdir()] == [again]
    b = model(seed=1)
    theirs = make_optimizers(b)
    drawn = torch.rand(3)
    save_checkpoint(tmp_path, a, optimizers, 4)
    after = torch.rand(3)
    torch.rand(7)
    assert load_checkpoint(tmp_path, b, theirs) == 4
    assert torch.equal(torch.rand(3), after) and not torch.equal(drawn, after)
    for m, o in ((a, optimizers), (b, theirs)): train_step(m, [batch_at(5)], o)
    assert largest(a, b) == 0
    with pytest.raises(UserError, match="more than 1 optimizers"): load_checkpoint(tmp_path, b, theirs[:1])
    untied = Transformer(Config(vocab_size=40, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=24, tied=False))
    untied.head.weight = untied.embed.weight
    assert "head.weight" not in tensors_of(untied) or "embed.weight" not in tensors_of(untied)
    save_checkpoint(Path(tmp_path)/"tied", untied, [], 1)
    assert load_checkpoint(Path(tmp_path)/"tied", untied) == 1
