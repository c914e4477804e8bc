"Fixtures: the real files beside the project, and the parity ledger"
import contextlib
import json
import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

with contextlib.suppress(ValueError): signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with Ctrl-C ignored

ROOT = Path(__file__).parent.parent
LEDGER = Path(os.environ.get("LLMBENCH_LEDGER", ROOT/".cache"/"parity.jsonl"))


class Data:
    "The real files, by name; a test that needs an absent one is skipped"
    folder = Path(os.environ.get("LLMBENCH_DATA", ROOT.parent/"shared"/"data"))

    def __truediv__(self, name):
        if not (self.folder/name).exists(): pytest.skip(f"real file {name} is not here: put it in {self.folder} or set LLMBENCH_DATA")
        return self.folder/name


@pytest.fixture(scope="session")
def data(): return Data()


def pytest_sessionstart(session):
    if hasattr(session.config, "workerinput"): return  # a worker of pytest-xdist: the controller has done it
    LEDGER.parent.mkdir(parents=True, exist_ok=True)  # rows are appended; tests/ledger.py takes the last of each


@pytest.fixture
def ledger(request):
    "Record one row of the parity table, then assert that the largest error is within the bar"
    def record(ours, library, error, bar):
        row = dict(ours=ours, library=library, error=float(error), bar=float(bar), test=request.node.nodeid)
        with LEDGER.open("a") as f: f.write(json.dumps(row) + "\n")
        assert error <= bar, f"{ours} against {library}: largest error {error}, allowed {bar}"
    return record
