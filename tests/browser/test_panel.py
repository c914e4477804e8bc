"Panels and pictures under a real keyboard and a real mouse, in both themes"
import io
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
SHOW = """
import time
import ipywidgets as W
from llmbench.panel import Panel
from llmbench.show import heat_map, loss_curves, probability_bars, token_ribbon
def power(figure, exponent, log):
    if exponent > 9: raise ValueError("the exponent <9.5> is too steep: 9 is the limit")
    xs = [x/50 for x in range(1, 51)]
    loss_curves({"trained": (xs, [x**exponent for x in xs])}, xlabel="x", ylabel="x to the power", log=log, figure=figure)
panel = Panel(power, exponent=W.FloatSlider(1., min=0, max=10, step=.5), log=W.Checkbox(False))
panel
"""
RIBBON = """
def ribbon(text, first): return token_ribbon(list(text), [int(i >= first) for i in range(len(text))])
view = Panel(ribbon, html=True, text=W.Text("云村 <b>"), first=W.IntSlider(2, min=0, max=8))
view
"""
LIVE = """
def steps(count, fail):
    for i in range(count):
        time.sleep(.02)
        if fail and i == 5: raise FloatingPointError("loss is not a number at step 5")
        yield i, 1/(i + 1)
def curve(figure, records, count, fail): loss_curves({"trained": tuple(zip(*records)) if records else ([], [])}, figure=figure)
live = Panel(curve, run=steps, count=W.IntSlider(2000, min=1, max=2000), fail=W.Checkbox(False))
live
"""


@pytest.fixture(scope="module")
def page(open_lab):
    page = open_lab.open([SHOW, RIBBON, LIVE]).run_all()
    yield page
    page.close()


def test_slider_by_key_and_by_mouse(page):
    panel = page.panel(0)
    before = panel.picture()
    with panel.changes(): panel.press("exponent", "ArrowRight", times=2)
    assert page.python("panel.values") == "{'exponent': 2.0, 'log': False}"
    with panel.changes(): panel.drag("exponent", .5)
    assert page.python("panel.values['exponent']") == "5.0"
    with panel.changes(): panel.press("log", "Space")
    assert page.python("panel.values['log']") == "True"
    after = panel.picture()
    sizes = [Image.open(io.BytesIO(data)).size for data in (before, after)]
    assert before != after and sizes[0] == sizes[1] == (921, 432)
    assert panel.root.locator("img").bounding_box()["width"] == pytest.approx(614, abs=1)
    assert page.errors() == []


def test_one_worker_drives_the_browser(request):
    "pytest 9.2 with xdist 3.8 drops groups in silence (pytest-xdist 1386): two JupyterLabs would starve each other"
    if getattr(request.config.option, "loadgroup", False): assert request.node.nodeid.endswith("@browser")


def test_text_box_and_markup(page):
    panel = page.panel(1)
    with panel.changes(): panel.type("text", "王 a<script>")
    assert panel.root.locator(".llmbench-ribbon > span").all_inner_texts() == list("王·a<script>")
    with panel.changes(): panel.press("first", "ArrowLeft")
    assert "10 of 11 tokens count" in panel.root.inner_text()
    assert page.errors() == []


def test_an_error_shows_where_it_happened(page):
    panel = page.panel(0)
    with panel.changes(): panel.drag("exponent", .3)  # wherever another test has left it
    with panel.changes(): panel.drag("exponent", .1)
    page.tab.wait_for_timeout(1500)
    good = panel.picture()
    panel.drag("exponent", 1.)
    panel.root.locator(".llmbench-error").wait_for()
    assert panel.error().startswith("ValueError: the exponent <9.5> is too steep") or "<9.5>" in panel.error()
    assert [text.split(":")[0] for text in page.errors()] == ["ValueError"]
    page.screenshot("error-light")
    page.theme("dark")
    page.screenshot("error-dark")
    page.theme("light")
    with panel.changes(): panel.drag("exponent", .1)
    page.tab.wait_for_timeout(1500)
    assert panel.error() is None and page.errors() == [] and panel.picture() == good


def test_a_run_is_watched_and_stopped(page):
    panel = page.panel(2)
    panel.click("Run")
    shown = panel.content()
    page.tab.wait_for_function("before => [...document.querySelectorAll('.llmbench-panel')][2].querySelector('img').src !== before.split(',')[0]", arg=shown)
    assert page.python("1 + 1") == "2"  # the kernel still answers
    assert page.python("live.controls['count'].disabled") == "True"
    panel.click("Stop")
    panel.root.get_by_role("button", name="Run").wait_for()
    count = int(page.python("len(live.records)"))
    assert 0 < count < 2000 and page.python("live.status.value").startswith("'stopped")
    page.tab.wait_for_timeout(300)
    assert page.python("len(live.records)") == str(count)
    panel.press("fail", "Space")
    panel.click("Run")
    panel.root.locator(".llmbench-error").wait_for()
    assert "not a number at step 5" in panel.error() and len(page.errors()) == 1


def test_errors_that_others_swallow_are_found(lab):
    page = lab.open(["import ipywidgets as W\nW.interactive(lambda x: 1/x, x=W.IntSlider(1, min=0, max=3))",
                     "s = W.IntSlider(1)\ns.observe(lambda change: [][change.new], names='value')\ns"]).run_all()
    assert page.errors() == []
    handles = page.tab.locator(".noUi-handle")
    handles.nth(0).press("ArrowLeft")
    page.tab.wait_for_timeout(500)
    assert any("division by zero" in text for text in page.errors())
    before = len(page.errors())
    handles.nth(1).press("ArrowRight")
    page.tab.wait_for_timeout(500)
    assert len(page.errors()) > before and any("IndexError" in text for text in page.errors())


@pytest.mark.parametrize("name", ["01_show", "02_panel"])
def test_notebook(lab, name):
    page = lab.open(ROOT/"nbs"/f"{name}.ipynb").run_all()
    if name == "02_panel":
        with page.panel().changes(): page.panel().press("lr", "ArrowRight")
    assert [text for text in page.errors() if "math domain" not in text and "expected a positive" not in text and "step 0" not in text] == []
