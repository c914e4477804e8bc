"""A real JupyterLab in a real browser.

    def test_my_widget(lab):
        page = lab.open(ROOT/"nbs/1_text/12_bpe.ipynb")      # a copy: the project's own file is never touched
        # or: page = lab.open(["from llmbench.play.text import tokenizer_explorer", "tokenizer_explorer('a b')"])
        page.run_all()                                       # every cell; AssertionError with the traceback if one fails
        panel = page.panel()                                 # the first panel on the page; panel(1) is the second
        with panel.changes():                                # the picture (or markup) must be another one afterwards
            panel.press("push", "ArrowRight")                # the control by its description, by keyboard
        with panel.changes():
            panel.drag("push", 0.8)                          # by mouse, to 80 % of the slider's track
        panel.type("text", "云村")                            # into a text box;  panel.choose("model", "tiny") in a drop-down list
        panel.click("Run")                                   # a button by its label
        assert page.python("len(panel.records)") == "10"     # ask the notebook's kernel
        assert page.errors() == []                           # cells, Output widgets, panels' red boxes, callbacks in the kernel's log
        page.screenshot("bpe-light")                         # .cache/browser/bpe-light.png; look at it
        page.theme("dark"); page.screenshot("bpe-dark")

One server and one browser serve the whole session; each `open` gets its own tab and kernel, closed after the test.
Without a Chromium these tests are skipped; LLMBENCH_CHROMIUM names one that is not found by itself.
"""
import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SHOTS = ROOT/".cache"/"browser"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
FAILED = re.compile(r"^Traceback \(most recent call last\):\n(?:[ |].*\n)*.*", re.M)
PAINT = re.compile(r"\x1b\[[0-9;]*m")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    "One worker drives the browser: two JupyterLabs beside each other starve on two cores"
    for item in items:
        if item.path.parent == Path(__file__).parent: item.add_marker(pytest.mark.xdist_group("browser"))


def chromium():
    "A Chromium on this machine, or None"
    found = os.environ.get("LLMBENCH_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    mac = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
    return found or (str(mac) if mac.exists() else None)


class Panel:
    "One panel of a notebook, driven as a person would"
    def __init__(self, page, root): self.page, self.root = page, root

    def control(self, name):
        "The control with this description: a slider's handle, a text box, a drop-down list, a box to tick"
        row = self.root.locator(".widget-inline-hbox").filter(has=self.root.page.get_by_text(name, exact=True)).first
        return row.locator(".noUi-handle, input:not([type=hidden]), textarea, select").first

    def press(self, name, key, times=1):
        handle = self.control(name)
        handle.focus()
        for _ in range(times): handle.press(key)

    def drag(self, name, share):
        "Move a slider's handle with the mouse to this share of its track"
        handle = self.control(name)
        handle.hover()  # scrolls, and waits until it stands still and nothing is above it
        here, track = handle.bounding_box(), handle.locator("xpath=ancestor::*[contains(@class,'noUi-target')]").bounding_box()
        mouse, y = self.page.tab.mouse, here["y"] + here["height"]/2
        mouse.down()
        mouse.move(track["x"] + track["width"]*share, y, steps=6)
        mouse.up()

    def type(self, name, text):
        box = self.control(name)
        box.fill(text)
        box.press("Tab")

    def choose(self, name, option): self.control(name).select_option(option)
    def click(self, label): self.root.get_by_role("button", name=label).click()

    def content(self):
        "What the panel shows: the picture's address or the markup"
        return self.root.evaluate("e => [...e.querySelectorAll('img')].map(i => i.src).join() + [...e.querySelectorAll('.widget-html-content')].map(i => i.innerHTML).join()")

    def picture(self):
        "The bytes of the picture that is shown now"
        return bytes(self.root.evaluate("async e => [...new Uint8Array(await (await fetch(e.querySelector('img').src)).arrayBuffer())]"))

    def error(self):
        "The text of the red box, or None"
        box = self.root.locator(".llmbench-error")
        return box.first.inner_text() if box.count() else None

    @contextlib.contextmanager
    def changes(self, seconds=30):
        "What the panel shows must change within this time; then wait until it has settled"
        before, end = self.content(), time.time() + seconds
        yield
        while self.content() == before:
            assert time.time() < end, f"nothing changed within {seconds} s" + (f"; the panel says: {self.error()}" if self.error() else "")
            self.page.tab.wait_for_timeout(50)
        self.settle()

    def settle(self, seconds=30):
        "Wait until the kernel rests and the picture stays the same"
        end, before = time.time() + seconds, None
        while before != (before := self.content()) and time.time() < end:
            self.page.idle()
            self.page.tab.wait_for_timeout(200)


class Page:
    "One notebook, open in a tab"
    def __init__(self, lab, name):
        self.lab, self.name, self.read = lab, name, lab.log.stat().st_size
        self.context = lab.browser.new_context(viewport=dict(width=1280, height=1000), device_scale_factor=1)
        self.tab, self.thrown = self.context.new_page(), []
        self.tab.on("pageerror", lambda e: self.thrown.append(f"browser: {e}"))
        self.tab.goto(f"{lab.url}/lab/workspaces/{secrets.token_hex(4)}/tree/{name}?reset&token={lab.token}")
        self.tab.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'", timeout=60_000)

        self.js("""window.unheard = []; panel.sessionContext.iopubMessage.connect((_, m) => {
            const asked = m.parent_header.msg_type === 'execute_request', text = (m.content.traceback || [m.content.text || '']).join('\\n');
            if (!asked && (m.header.msg_type === 'error' || /Traceback \\(most recent/.test(text))) window.unheard.push(text);});""")
        self.js("if (!app.shell.leftCollapsed) await app.commands.execute('application:toggle-left-area');")

    def js(self, body): return self.tab.evaluate("async () => {const app = window.jupyterapp, panel = app.shell.currentWidget;" + body + "}")
    def idle(self): self.tab.wait_for_function("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'", timeout=120_000)

    def run_all(self, fail=True):
        "Run every cell, wait until the kernel rests; with `fail` an error in a cell is an AssertionError"
        self.js("await app.commands.execute('notebook:run-all-cells');")
        self.idle()
        self.tab.wait_for_timeout(300)
        if fail and (found := self.cell_errors()): raise AssertionError("\n\n".join(found))
        return self

    def python(self, code):
        "The repr of an expression in the notebook's kernel"
        reply = self.js(f"""const f = panel.sessionContext.session.kernel.requestExecute({{code: {json.dumps(f'print(repr({code}))')}, store_history: false}});
            const out = []; f.onIOPub = m => {{
                if (m.header.msg_type === 'stream') out.push(m.content.text);
                if (m.header.msg_type === 'error') out.push(m.content.traceback.join('\\n'));}};
            await f.done; return out.join('');""")
        return reply.strip()

    def cell_errors(self):
        "The tracebacks in the cells' outputs"
        found = self.js("""return [...panel.content.model.cells].flatMap(c => c.type === 'code' ? c.outputs.toJSON() : [])
            .filter(o => o.output_type === 'error').map(o => o.traceback.join('\\n'));""")
        return [PAINT.sub("", text) for text in found]

    def errors(self):
        "Everything that went wrong anywhere, also where runners do not look"
        outputs = self.python("[o['evalue'] for w in __import__('ipywidgets').widgets.widget._instances.values() for o in getattr(w, 'outputs', ()) "
                              "if isinstance(o, dict) and o.get('output_type') == 'error']")
        boxes = self.tab.locator(".llmbench-error").all_inner_texts()
        lost = [t for t in self.tab.locator(".jp-OutputArea-output").all_inner_texts() if t.startswith(("Error displaying widget", "Loading widget"))]
        with self.lab.log.open(errors="replace") as f:
            f.seek(self.read)
            logged = FAILED.findall(f.read())
        unheard = [PAINT.sub("", text) for text in self.tab.evaluate("() => window.unheard")]
        return self.cell_errors() + ([outputs] if outputs != "[]" else []) + boxes + lost + unheard + self.thrown + logged

    def panel(self, which=0):
        self.tab.locator(".llmbench-panel").nth(which).wait_for()
        return Panel(self, self.tab.locator(".llmbench-panel").nth(which))

    def theme(self, name):
        "light or dark"
        self.js(f"await app.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {name.title()}'}});")
        self.tab.wait_for_function(f"() => document.body.dataset.jpThemeLight === '{'true' if name == 'light' else 'false'}'")
        self.tab.wait_for_timeout(300)

    def screenshot(self, name, full=True):
        "A picture under .cache/browser: every cell with `full`, else what the window shows; returns its path"
        SHOTS.mkdir(parents=True, exist_ok=True)
        if full:
            bottom = self.tab.evaluate("() => {const o = document.querySelector('.jp-NotebookPanel-notebook .jp-WindowedPanel-outer'); o.scrollTop = 0;"
                                       "return Math.max(...[...o.querySelectorAll('.jp-Cell')].map(e => e.getBoundingClientRect().bottom));}")
            self.tab.set_viewport_size(dict(width=1280, height=min(int(bottom) + 60, 16_000)))
            self.tab.wait_for_timeout(400)
        self.tab.screenshot(path=str(SHOTS/f"{name}.png"))
        self.tab.set_viewport_size(dict(width=1280, height=1000))
        return SHOTS/f"{name}.png"

    def close(self):
        with contextlib.suppress(Exception): self.js("await panel.sessionContext.shutdown();")
        self.context.close()


class Lab:
    "A private JupyterLab server and a browser"
    def __init__(self, folder, browser):
        self.folder, self.browser, self.token, self.log, self.pages = folder, browser, secrets.token_hex(8), folder/"server.log", []
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{s.getsockname()[1]}"
        (folder/"work").mkdir()
        private = {f"JUPYTER_{kind}_DIR": str(folder/kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={folder/'work'}", "--ServerApp.ip=127.0.0.1",
                   f"--ServerApp.port={self.url.rsplit(':', 1)[1]}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={self.token}",
                   "--LabApp.expose_app_in_browser=True", f"--LabApp.workspaces_dir={folder/'spaces'}", f"--LabApp.user_settings_dir={folder/'settings'}"]
        self.process = subprocess.Popen(command, stdout=self.log.open("wb"), stderr=subprocess.STDOUT, cwd=folder,
                                        env={**os.environ, **private, "JUPYTER_CONFIG_PATH": str(ROOT/".jupyter"), "IPYTHONDIR": str(folder/"ipython")})
        self.wait()

    def wait(self, seconds=60):
        end = time.time() + seconds
        while True:
            try: return urllib.request.urlopen(f"{self.url}/api?token={self.token}", timeout=5).read()
            except OSError:
                assert self.process.poll() is None and time.time() < end, f"JupyterLab did not start:\n{self.log.read_text()[-3000:]}"
                time.sleep(.2)

    def open(self, notebook, keep=False):
        "A tab with a copy of a notebook (`keep`: with its outputs), or with a new one made of a list of cells"
        if isinstance(notebook, (str, Path)):
            cells, name = json.loads(Path(notebook).read_text())["cells"], Path(notebook).stem
        else:
            cells, name = [dict(cell_type="code", id=f"c{i}", metadata={}, source=s, outputs=[], execution_count=None) for i, s in enumerate(notebook)], "cells"
        for cell in cells:
            if cell["cell_type"] == "code" and not keep: cell["outputs"] = []
        kernel = dict(kernelspec=dict(display_name="Python 3", language="python", name="python3"))
        name = f"{name}-{len(self.pages)}.ipynb"
        (self.folder/"work"/name).write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))
        self.pages.append(Page(self, name))
        return self.pages[-1]

    def close(self):
        self.process.terminate()
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill()


@pytest.fixture(scope="session")
def open_lab(tmp_path_factory):
    "The session's JupyterLab; who opens a page here closes it"
    if chromium() is None: pytest.skip("no Chromium here: install Debian's `chromium` or set LLMBENCH_CHROMIUM to one")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=FLAGS)
        lab = Lab(tmp_path_factory.mktemp("lab"), browser)
        try: yield lab
        finally:
            lab.close()
            browser.close()


@pytest.fixture
def lab(open_lab):
    "The session's JupyterLab, whose new pages are closed after the test; see the top of this file"
    before = len(open_lab.pages)
    yield open_lab
    for page in open_lab.pages[before:]: page.close()
