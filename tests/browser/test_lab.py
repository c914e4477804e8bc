"`make lab`: the course opens on its first page, in a quiet JupyterLab, and leaves the project as it was"
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def state(): return {p: p.read_bytes() for p in (ROOT/".jupyter").rglob("*") if p.is_file()}


@pytest.fixture
def url(tmp_path, open_lab):
    "The address that `llmbench lab` prints, in a home of its own"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log, keep = tmp_path/"log", {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")}
    command = [str(Path(sys.executable).parent/"llmbench"), "lab", "--port", str(port), "--no-browser"]
    before = state()
    process = subprocess.Popen(command, cwd=ROOT, stdout=log.open("wb"), stderr=subprocess.STDOUT, start_new_session=True,
                               env={**keep, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path/"runtime")})
    try:
        end = time.time() + 60
        while not (found := re.search(r"http://(?:localhost|127\.0\.0\.1):\d+/\S*token=\w+", log.read_text())):
            assert process.poll() is None and time.time() < end, log.read_text()[-3000:]
            time.sleep(.2)
        yield found[0]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try: process.wait(15)
        except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)
    assert state() == before, "JupyterLab wrote into the project's settings"


def test_lab_opens_quietly_on_the_first_page(url, open_lab):
    context = open_lab.browser.new_context()
    tab = context.new_page()
    tab.goto(url)
    tab.locator(".jp-NotebookPanel-notebook .jp-Cell").first.wait_for(timeout=60_000)
    tab.wait_for_timeout(3000)
    assert tab.url.split("?")[0].endswith("start.ipynb"), tab.url
    assert tab.locator(".lm-TabBar-tab.lm-mod-current .lm-TabBar-tabLabel").all_inner_texts().count("start.ipynb") == 1
    assert tab.locator(".jp-Dialog, .Toastify__toast").count() == 0, "a question or a notice before the first page"
    folder = tab.evaluate("async () => (await (await fetch('/api/contents/')).json()).content.map(x => x.name)")
    settings = tab.evaluate("""async () => { const out = {};
        for (const id of ['notebook-extension:tracker', 'docmanager-extension:plugin', 'apputils-extension:notification']) {
            const s = await (await fetch('/lab/api/settings/@jupyterlab/' + id)).json(); out[id] = [s.schema.properties, s.raw]; }
        return out; }""")
    assert settings["notebook-extension:tracker"][0]["windowingMode"]["default"] == "none"
    assert settings["docmanager-extension:plugin"][0]["autosave"]["default"] is False
    assert settings["apputils-extension:notification"][0]["fetchNews"]["default"] == "false"
    assert "nbs" in folder, f"the project's folder is the root, not {folder}"
    context.close()
