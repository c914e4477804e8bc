"Training goes wrong: what the message says, and what is left on the disk"
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from llmbench.core import UserError
from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import Batch, pad
from llmbench.train import checkpoint
from llmbench.train.checkpoint import latest, load_checkpoint, read_steps
from llmbench.train.loop import Fit, batch_loss, evaluate, fit, hold_interrupt, train_step
from llmbench.train.optim import make_optimizers

SHAPE = dict(vocab_size=20, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_hidden=24, max_length=16)


def model(**other):
    torch.manual_seed(0)
    return Transformer(Config(**SHAPE | other))


def batch_at(step, micro=0): return pad([([1 + (step + i) % 19, 1 + i, 3, 4 + micro], [1, 1, 1, 1]) for i in range(4)])


def train(folder=None, m=None, at=batch_at, valid=None, loss=None, **config):
    return [*fit(m or model(), at, Fit(**dict(steps=12, save_every=5, autocast="off") | config), valid, folder, loss, progress=False)]


@pytest.mark.parametrize("field,value", [("steps", 0), ("lr", -1), ("micro", 0), ("valid_every", 0), ("save_every", 0), ("clip", -.1), ("lr", float("nan")), ("lr", float("inf")),
                                         ("autocast", "fast"), ("patience", -1), ("warmup", -3)])
def test_config(field, value):
    with pytest.raises(UserError, match=f"Fit.{field}"): Fit(**{field: value})


def test_patience_without_validation():
    with pytest.raises(UserError, match="valid"): train(patience=2)


def test_all_masked_step():
    def empty(step, micro):
        b = batch_at(step, micro)
        return Batch(b.ids, b.mask*(step != 3), b.positions, b.segments)
    with pytest.raises(UserError, match=r"no token counts.*") as e: train(at=empty)
    assert "batch_at(3" in str(e.value)
    with pytest.raises(ValueError, match="no token counts"): evaluate(model(), [empty(3, 0)])
    m = model()
    with pytest.raises(ValueError, match="no token counts"): train_step(m, [empty(3, 0)], make_optimizers(m))
    def half(step, micro):
        b = batch_at(step, micro)
        return Batch(b.ids, b.mask*micro, b.positions, b.segments)
    assert len(train(at=half, micro=2)) == 12, "one empty micro-batch of two is no reason to stop"


def poisoned(rows, micro=1, at=7):
    "A loss that is NaN for some rows of one step"
    def loss(m, batch, total):
        value = batch_loss(m, batch, total)
        bad = (batch.ids[:, 0] == 1 + (at + rows[0]) % 19) if len(rows) == 1 else torch.ones(len(batch), dtype=torch.bool)
        return value*(float("nan") if bool((bad & (batch.ids[:, -1] == 4 + micro)).any()) and loss.step == at else 1.)
    def steps(step, micro):
        loss.step = step
        return batch_at(step, micro)
    return loss, steps


@pytest.mark.parametrize("rows,says", [([2], "rows 2"), ([0, 1, 2, 3], "rows 0, 1, 2, 3")])
def test_nan_names_step_and_rows(tmp_path, rows, says):
    loss, at = poisoned(rows)
    m = model()
    with pytest.raises(UserError) as e: train(tmp_path, m, at, loss=loss, micro=2)
    message = str(e.value)
    assert f"step 7, batch_at(7, 1) {says}:" in message and "batch_at(7, 0)" not in message
    assert "Only these rows" in message and "no weight was changed" in message
    assert str(tmp_path/"step-0000005") in message and latest(tmp_path).name == "step-0000005"
    again = model()
    assert load_checkpoint(tmp_path, again) == 5
    assert all(torch.isfinite(p).all() for p in [*again.parameters(), *m.parameters()])
    assert [r.step for r in read_steps(tmp_path)] == list(range(7))


def test_runaway_weights_get_other_advice():
    m = model()
    with torch.no_grad(): m.embed.weight.fill_(float("inf"))
    with pytest.raises(UserError, match="lower lr") as e: train(m=m)
    assert "Every row" in str(e.value) and "give fit a folder" in str(e.value)


def test_infinite_gradient_changes_nothing():
    m = model()
    before = [p.detach().clone() for p in m.parameters()]
    def loss(m, batch, total):
        value = batch_loss(m, batch, total)
        return value + (m.norm.weight.sum()*0).sqrt() # finite, with an infinite derivative
    with pytest.raises(UserError, match="gradient that overflowed"): train(m=m, loss=loss)
    assert all(torch.equal(a, b) for a, b in zip(m.parameters(), before))


def test_disk_full(tmp_path, monkeypatch):
    "While a file is being written: the checkpoint before it stays, nothing half-written does, and with space it goes on"
    save, calls = checkpoint.save_file, []
    def full(tensors, path):
        calls.append(path)
        if len(calls) == 5: # the second file of the second checkpoint
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left on device") as e: train(tmp_path)
    assert "step 10" in str(e.value) and "Free some space" in str(e.value) and str(tmp_path) in str(e.value)
    assert {p.name for p in tmp_path.iterdir()} == {"fit.json", "steps.jsonl", "step-0000005"}
    monkeypatch.undo()
    rest = train(tmp_path)
    assert rest[0].step == 5 and rest == [r for r in read_steps(tmp_path) if r.step >= 5]


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from test_loop import train
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
from llmbench.core import UserError
try: train(sys.argv[1])
except UserError as e: print(e)
"""


def test_file_too_large(tmp_path):
    "The operating system itself refuses, inside safetensors"
    pytest.importorskip("resource")
    here = os.path.dirname(__file__)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path/"run"), here], capture_output=True, text=True, timeout=120)
    assert "cannot save the checkpoint of step 5" in done.stdout, done.stderr
    assert {p.name for p in (tmp_path/"run").iterdir()} == {"fit.json", "steps.jsonl"}


def test_folder_is_a_file(tmp_path):
    (tmp_path/"run").write_text("mine")
    with pytest.raises(UserError, match="run"): train(tmp_path/"run")
    assert (tmp_path/"run").read_text() == "mine"


def test_log_cannot_be_written(tmp_path, monkeypatch):
    train(tmp_path, steps=12)
    (tmp_path/"other").mkdir()
    (tmp_path/"other"/"steps.jsonl").mkdir()
    with pytest.raises(UserError, match="steps.jsonl"): checkpoint.log_step(tmp_path/"other", read_steps(tmp_path)[0])


@pytest.mark.parametrize("change,says", [(dict(lr=1e-2), "lr was 0.003, is 0.01"), (dict(micro=2), "micro was 1, is 2"), (dict(m=dict(d_model=32)), "another model shape"),
                                         (dict(at=lambda step, micro=0: batch_at(step + 1, micro)), "another first batch")])
def test_another_run_is_refused(tmp_path, change, says):
    train(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    if "m" in change: change = dict(m=model(**change["m"]))
    with pytest.raises(UserError, match="another run") as e: train(tmp_path, **change)
    assert says in str(e.value) and "give a new folder" in str(e.value)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("damage", ["cut", "pickle", "missing", "state", "other"])
def test_damaged_checkpoint(tmp_path, damage):
    train(tmp_path, steps=5)
    place = latest(tmp_path)
    file = place/("state.json" if damage == "state" else "model.safetensors")
    if damage == "cut": file.write_bytes(file.read_bytes()[:-100])
    if damage == "pickle": torch.save(dict(model().state_dict()), file)
    if damage == "missing": file.unlink()
    if damage == "state": file.write_text('{"step": 5')
    m = model(n_layers=2) if damage == "other" else model()
    before = [p.detach().clone() for p in m.parameters()]
    with pytest.raises(UserError) as e: load_checkpoint(tmp_path, m, make_optimizers(m))
    assert str(place) in str(e.value)
    if damage in ("cut", "pickle", "missing", "other"): assert all(torch.equal(a, b) for a, b in zip(m.parameters(), before)), "a checkpoint that does not fit changes nothing"
    assert place.exists()


def test_torn_log_line(tmp_path):
    "A power cut in the middle of a line: it is dropped, and the run goes on without gap or double"
    for step in fit(model(), batch_at, Fit(steps=12, save_every=5, autocast="off"), folder=tmp_path, progress=False):
        if step.step == 6: break
    for old in tmp_path.glob("step-*"): assert old.name == "step-0000007"
    with open(tmp_path/"steps.jsonl", "a") as f: f.write('{"step": 7, "lo')
    assert [r.step for r in read_steps(tmp_path)] == list(range(7))
    train(tmp_path)
    assert [json.loads(line)["step"] for line in (tmp_path/"steps.jsonl").read_text().splitlines()] == list(range(12))


def test_leftovers_of_a_crash_are_ignored(tmp_path):
    (tmp_path/".part-0000005").mkdir()
    (tmp_path/".part-0000005"/"model.safetensors").write_bytes(b"half")
    assert load_checkpoint(tmp_path, model()) == 0
    train(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"fit.json", "steps.jsonl", "step-0000012"}


INTERRUPTED = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_loop import batch_at, model
from llmbench.train.loop import Fit, fit
def slow(step, micro):
    time.sleep(.02)
    return batch_at(step, micro)
try:
    for step in fit(model(), slow, Fit(steps=2000, save_every=5000, autocast="off"), folder=sys.argv[1], progress=False): pass
except KeyboardInterrupt as e:
    print(e)
    sys.exit(130)
"""


def test_ctrl_c(tmp_path):
    "The step is finished, all is saved, and the message says how to go on"
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(tmp_path), os.path.dirname(__file__)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not (tmp_path/"steps.jsonl").exists() or len((tmp_path/"steps.jsonl").read_bytes().splitlines()) < 9): time.sleep(.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    done = len(read_steps(tmp_path))
    assert f"stopped after step {done - 1}: the same call goes on from {tmp_path}" in out
    assert latest(tmp_path).name == f"step-{done:07}"


def test_interrupts_wait_for_the_step():
    with hold_interrupt() as pressed:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(.01)
        assert pressed
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(.01)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    seen = []
    def elsewhere():
        with hold_interrupt() as pressed: seen.append(pressed)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [[]], "outside the main thread it does nothing, and does not fail"


def test_interrupt_without_folder():
    def at(step, micro):
        if step == 2: os.kill(os.getpid(), signal.SIGINT)
        return batch_at(step, micro)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 2: without a folder nothing was saved"): train(at=at)


def test_frozen_model():
    m = model()
    for p in m.parameters(): p.requires_grad_(False)
    with pytest.raises(UserError, match="frozen"): train(m=m)
