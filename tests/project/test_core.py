"The floor: masked means, shifted log-probabilities, seeds, and files that are whole or not there"
import json
import math
import os
import random
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbench.core import (UserError, device, fingerprint, masked_mean, plain, read_json, seed_everything, seq_logps, token_logps, wide, write_json,
                           write_whole)

X = torch.tensor([[2., 1., 3., 9.], [5., 7., 9., 4.]])
M = torch.tensor([[1., 1., 1., 0.], [1., 0., 0., 0.]])


def test_masked_mean_by_hand():
    assert masked_mean(X, M).item() == 2.75                                  # (2+1+3+5)/4
    assert masked_mean(X, M, dim=1).tolist() == [2., 5.]
    assert masked_mean(X, M.flip(1), dim=-1).tolist() == pytest.approx([13/3, 4.])
    assert masked_mean(X, torch.tensor([[1], [0]])).item() == 15/4           # broadcasts
    assert masked_mean(X, torch.tensor([[.5, 0, 0, 0], [2, 0, 0, 0]])).item() == pytest.approx((.5*2 + 2*5)/2.5)
    assert masked_mean(torch.arange(6).view(2, 3), torch.tensor([[0, 1, 1], [0, 0, 1]])).item() == pytest.approx(8/3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([None, 0, 1, -1]))
def test_masked_mean_against_numpy(seed, dim):
    g = torch.Generator().manual_seed(seed)
    x, m = torch.randn(3, 5, generator=g), torch.randint(2, (3, 5), generator=g)
    m[0], m[:, 0] = 1, 1
    library = np.ma.masked_array(x.numpy(), mask=m.numpy() == 0).mean(dim)
    assert np.allclose(masked_mean(x, m, dim=dim).numpy(), np.ma.getdata(library), atol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_does_not_count_does_not_exist(poison):
    x = X.masked_fill(M == 0, poison).requires_grad_()
    mean = masked_mean(x, M)
    mean.backward()
    assert mean.item() == 2.75 and torch.equal(x.grad, M/4)


def test_nothing_counts_is_an_error():
    for mask, dim in ((0*M, None), (M*torch.tensor([[1.], [0.]]), 1), (torch.zeros(2, 4, dtype=torch.bool), None)):
        with pytest.raises(ValueError, match="no position counts"): masked_mean(X, mask, dim=dim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_taken_in_32_bits(dtype):
    x, m = torch.full((1, 3001), 2., dtype=dtype), torch.ones(1, 3001, dtype=dtype)
    x[0, 0] = 9.
    assert masked_mean(x, m).item() == pytest.approx(2 + 7/3001, rel=1e-6) and wide(x).dtype == torch.float32
    assert wide(X) is X and wide(X.double()).dtype == torch.float64
    logits = torch.linspace(-8, 8, 3*64*50).view(3, 64, 50).sin()*5
    ids = torch.arange(3*64).view(3, 64) % 50
    exact = token_logps(logits.to(dtype).double(), ids)
    assert (token_logps(logits.to(dtype), ids) - exact).abs().max() < 1e-5


G = torch.Generator().manual_seed(5)
LOGITS, IDS = torch.randn(2, 5, 7, generator=G)*3, torch.tensor([[6, 0, 3, 3, 1], [2, 5, 4, 0, 6]])


def loop(logits, ids):
    "The definition, one token at a time"
    return [[math.log(math.exp(row[t][after])/sum(map(math.exp, row[t]))) for t, after in enumerate(tokens[1:])] for row, tokens in zip(logits.tolist(), ids.tolist())]


def test_token_logps_is_the_definition(ledger):
    ours = token_logps(LOGITS, IDS)
    assert ours.shape == (2, 4) and torch.allclose(ours, torch.tensor(loop(LOGITS, IDS)), atol=1e-5)
    library = -F.cross_entropy(LOGITS[:, :-1].transpose(1, 2), IDS[:, 1:], reduction="none")
    ledger("log-probability of each token", "torch cross_entropy", (ours - library).abs().max(), 1e-6)


def test_token_logps_at_the_edge():
    logits = torch.tensor([[[0., -2000.], [1e4, 1e4], [0., 0.]]])
    assert token_logps(logits, torch.tensor([[1, 1, 0]])).tolist() == [[-2000., pytest.approx(-math.log(2), abs=2e-3)]]
    x = LOGITS.clone().requires_grad_()
    token_logps(x, IDS).sum().backward()
    library = LOGITS.clone().requires_grad_()
    (-F.cross_entropy(library[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")).backward()
    assert torch.allclose(x.grad, library.grad, atol=1e-6) and x.grad[:, -1].abs().max() == 0


def test_seq_logps_sums_what_counts():
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 1]])
    each = loop(LOGITS, IDS)
    assert seq_logps(LOGITS, IDS, mask).tolist() == pytest.approx([each[0][1] + each[0][2], each[1][2] + each[1][3]], abs=1e-5)
    assert torch.equal(seq_logps(LOGITS, IDS, mask.bool()), seq_logps(LOGITS, IDS, mask.float()))
    assert seq_logps(LOGITS, IDS, 0*mask).tolist() == [0., 0.]
    assert seq_logps(LOGITS, IDS, .5*mask).tolist() == pytest.approx((.5*seq_logps(LOGITS, IDS, mask)).tolist())


def test_seq_logps_survives_impossible_tokens_outside_the_answer():
    logits, mask = LOGITS.clone(), torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]])
    logits[0, 0, 0] = logits[0, 3, 1] = -float("inf")  # the tokens at 1 and 4, which do not count
    logits.requires_grad_()
    total = seq_logps(logits, IDS, mask)
    assert torch.allclose(total, seq_logps(LOGITS, IDS, mask)) and token_logps(logits, IDS)[0, 0] == -float("inf")
    total.sum().backward()
    assert logits.grad.isfinite().all()
    logits = LOGITS.clone()
    logits[1, 3, 6] = -float("inf")  # inside the answer it must show
    assert seq_logps(logits, IDS, mask).tolist()[1] == -float("inf")


def test_seeds():
    def draw(seed):
        g = seed_everything(seed)
        return random.random(), float(np.random.rand()), torch.rand(()).item(), torch.rand((), generator=g).item()
    assert draw(3) == draw(3) and all(a != b for a, b in zip(draw(3), draw(4)))
    assert draw(2**40 + 1) == draw(2**40 + 1) and draw(-1) == draw(-1)
    g = seed_everything(3)
    torch.rand(9)
    assert torch.rand((), generator=g).item() == draw(3)[3], "the generator's stream is its own"


def test_device():
    assert device("cpu") == torch.device("cpu") and device().type in ("cpu", "cuda", "mps")
    with pytest.raises((RuntimeError, AssertionError)): device("cuda:97")


def test_user_error_says_where_and_how():
    e = UserError("no field", where="a.jsonl line 3", mend="Add it")
    assert (str(e), e.what, e.where, e.mend) == ("a.jsonl line 3: no field. Add it", "no field", "a.jsonl line 3", "Add it")
    assert str(UserError("empty")) == "empty" and str(UserError("empty", mend="Fill it")) == "empty. Fill it"


def test_write_whole(tmp_path):
    path = write_whole(tmp_path/"a"/"b.txt", "云\ud83d\n")
    assert path.read_bytes() == "云\ud83d\n".encode("utf-8", "surrogatepass") and stat.S_IMODE(path.stat().st_mode) == 0o644
    write_whole(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and os.listdir(path.parent) == ["b.txt"]
    write_whole(tmp_path/("n"*250), "long names too")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_whole(tmp_path/"a.txt", "old")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        for place in ("fsync", "replace"):
            with monkeypatch.context() as m:
                m.setattr(os, place, lambda *a, e=error: (_ for _ in ()).throw(e))
                with pytest.raises((UserError, KeyboardInterrupt)) as caught: write_whole(path, "new")
            if isinstance(error, OSError): assert str(caught.value) == f"{path}: cannot write: No space left on device. Free some space or choose another folder"
            assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path/"state.json"
    program = ("import sys; from llmbench.core import write_json\n"
               f"for i in range(10**9):\n    write_json({str(path)!r}, dict(step=i, pad=[i]*20_000))\n    if i == 0: print('go', flush=True)")
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    writer.stdout.readline()
    for _ in range(40):
        state = read_json(path)
        assert state["pad"] == [state["step"]]*20_000
    writer.kill()
    writer.wait()
    state = read_json(path)
    assert state["pad"] == [state["step"]]*20_000


@pytest.mark.parametrize("where, reason", [("/proc/nope/a", "cannot write"), ("{tmp}", "cannot write"), ("{tmp}/file/a", "cannot write")])
def test_a_place_that_cannot_be_written(tmp_path, where, reason):
    (tmp_path/"file").write_text("x")
    with pytest.raises(UserError, match=reason): write_whole(where.format(tmp=tmp_path), "a")
    assert (tmp_path/"file").read_text() == "x" and os.listdir(tmp_path) == ["file"]


@dataclass
class Thing:
    folder: Path = Path("x/y")
    rates: list = field(default_factory=lambda: [.1, .2])


def test_json_round_trip(tmp_path):
    value = dict(town="云村", thing=Thing(), loss=torch.tensor(1.5), row=np.arange(3), count=np.int64(7), rate=np.float32(.5))
    path = write_json(tmp_path/"a.json", value)
    assert read_json(path) == dict(town="云村", thing=dict(folder="x/y", rates=[.1, .2]), loss=1.5, row=[0, 1, 2], count=7, rate=.5)
    assert "云村" in path.read_text("utf-8") and path.read_text().endswith("}\n")
    with pytest.raises(TypeError, match="cannot be written as JSON"): write_json(path, dict(bad={1, 2}))
    with pytest.raises(TypeError): plain(Thing)
    assert json.loads(path.read_text())["count"] == 7, "the old file stays"


@pytest.mark.parametrize("content, message", [
    (b'{"a": 1,\n "b', "line 2 column 2"), (b"", "line 1 column 1"), (b'{"a": "\xff"}', "not UTF-8 text"), (b"{'a': 1}", "line 1 column 2"), (None, "cannot read")])
def test_broken_json_is_located(tmp_path, content, message):
    path = tmp_path/"a.json"
    if content is not None: path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught: read_json(path)
    assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="cannot read"): read_json(tmp_path)


def test_json_with_a_byte_order_mark(tmp_path):
    (tmp_path/"a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path/"a.json") == {"a": 1}


def test_fingerprint():
    assert fingerprint(dict(a=1, b=2.5)) == fingerprint(dict(b=2.5, a=1)) == "848db82e1478946f", "another value runs every stage of every run anew"
    seen = [fingerprint(x) for x in (dict(a=1), dict(a=2), dict(a="1"), dict(b=1), [1], 1, "1", None, True, Thing(), Thing(rates=[.1]))]
    assert len(set(seen)) == len(seen) and all(len(x) == 16 and int(x, 16) >= 0 for x in seen)
    assert fingerprint(1, 2) != fingerprint(2, 1) and fingerprint("云") != fingerprint("村")
    assert fingerprint(Path("a/b")) == fingerprint("a/b") and fingerprint(Thing()) == fingerprint(dict(folder="x/y", rates=[.1, .2]))
    for unstable in (print, object(), {1, 2}):
        with pytest.raises(TypeError): fingerprint(unstable)


def test_fingerprint_is_the_same_in_another_process():
    program = "from llmbench.core import fingerprint; print(fingerprint(dict(z=[1, 2.5, None], a='云')))"
    done = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": s}).stdout.strip() for s in "01"]
    assert done[0] == done[1] == fingerprint(dict(a="云", z=[1, 2.5, None]))
