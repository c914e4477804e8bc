"Processes that die, hang or raise: a clear message, quickly, and nobody left running"
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmbench.core import UserError
from llmbench.model.transformer import Config, Transformer
from llmbench.train.parallel import WorkerFailed, launch, one_dies, regrouped, sum_of_ranks, tensor_parallel

ROOT = Path(__file__).parent.parent.parent


def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] not in "ZX"
    except OSError: return False


@pytest.mark.parametrize("how, words", [("kill", ["rank 1 was killed by SIGKILL", "memory"]), ("raise", ["rank 1 failed: ValueError: rank 1 met a bad row", "Traceback"])])
def test_a_dead_worker_ends_all(how, words):
    start = time.monotonic()
    with pytest.raises(WorkerFailed) as e: launch(one_dies, 2, how)
    for word in words: assert word in str(e.value)
    assert time.monotonic() - start < 50, "the survivor's time-out was waited for"


def test_a_hanging_worker_ends_all():
    with pytest.raises(WorkerFailed, match="had not finished after 6 s"): launch(one_dies, 2, "hang", seconds=6.)


def test_bad_arguments():
    for ranks in (0, -1, 1.5, True):
        with pytest.raises(UserError, match="ranks"): launch(sum_of_ranks, ranks)
    with pytest.raises(UserError, match=".py file"): launch(lambda rank: rank, 2)
    with pytest.raises(UserError, match="cannot be shared"): regrouped((6, 3, 3), 2)


class Mesh:
    def __init__(self, n): self.n = n
    def size(self): return self.n


@pytest.mark.parametrize("changes, n, word", [({}, 4, "n_kv_heads=2"), ({}, 3, "n_heads=4"), (dict(n_experts=2), 2, "experts")])
def test_what_cannot_be_cut(changes, n, word):
    with pytest.raises(UserError, match=word): tensor_parallel(Transformer(Config(vocab_size=50, d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, d_hidden=16, **changes)), Mesh(n))


def test_no_orphans_when_the_parent_is_killed(tmp_path):
    "Parent killed with SIGKILL in the middle: its processes end too"
    script = tmp_path/"work_of_a_child.py"
    script.write_text("import os, sys, time\nfrom pathlib import Path\nfrom llmbench.train.parallel import launch\n"
                      "def work(rank, folder):\n    Path(folder, f'pid{rank}').write_text(str(os.getpid()))\n    time.sleep(300)\n"
                      "if __name__ == '__main__':\n    import work_of_a_child\n    launch(work_of_a_child.work, 2, sys.argv[1], seconds=200.)\n")
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}, stderr=subprocess.DEVNULL)
    end = time.time() + 60
    while not all((tmp_path/f"pid{r}").exists() and (tmp_path/f"pid{r}").read_text() for r in (0, 1)):
        assert time.time() < end and parent.poll() is None, "the processes did not start"
        time.sleep(.1)
    pids = [int((tmp_path/f"pid{r}").read_text()) for r in (0, 1)]
    assert all(map(alive, pids))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    end = time.time() + 15
    while any(map(alive, pids)):
        assert time.time() < end, "orphans"
        time.sleep(.1)
