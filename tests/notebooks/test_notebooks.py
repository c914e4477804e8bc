"Each notebook from top to bottom in a process of its own, offline, with nothing left behind"
import os
import subprocess
import sys
from pathlib import Path

import pytest

NBS = Path(__file__).parent.parent.parent/"nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in str(p))
PROGRAM = "import sys; from nbdev.test import test_nb; ok, seconds = test_nb(sys.argv[1]); print(f'{seconds:.1f} s'); sys.exit(not ok)"


def listing(folder): return {p for p in folder.rglob("*") if "__pycache__" not in str(p) and ".ipynb_checkpoints" not in str(p)}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(notebook):
    before = listing(notebook.parent)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(notebook)], cwd=notebook.parent, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "MPLBACKEND": "agg"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    left = listing(notebook.parent) - before
    assert not left, f"the notebook left files behind: {sorted(left)}"


def test_there_are_notebooks(): assert len(NOTEBOOKS) >= 3, f"only {len(NOTEBOOKS)} notebooks under {NBS}"
