"Panels under a real mouse and keyboard"
CELLS = ["""
import time
import ipywidgets as W
from llmbench.panel import Panel
from llmbench.show import heat_map, loss_curves, probability_bars, token_ribbon
def power(figure, exponent, log):
    xs = [x/50 for x in range(1, 51)]
    if exponent > 9: raise ValueError("the exponent <9.5> is too steep: 9 is the limit")
    return loss_curves({"trained": (xs, [x**exponent for x in xs])}, xlabel="x", ylabel="x to the power", log=log, figure=figure)
panel = Panel(power, exponent=W.FloatSlider(1., min=0, max=10, step=.5), log=W.Checkbox(False))
panel
""", """
def ribbon(text, first): return token_ribbon(list(text), [int(i >= first) for i in range(len(text))])
view = Panel(ribbon, html=True, text=W.Text("云村 <b>"), first=W.IntSlider(2, min=0, max=8))
view
""", """
def steps(count, fail):
    for i in range(count):
        time.sleep(.02)
        if fail and i == 5: raise RuntimeError("loss is NaN at step 5")
        yield i, 1/(i+1)
def curve(figure, records, count, fail):
    return loss_curves({"trained": tuple(zip(*records)) if records else ([], [])}, figure=figure)
live = Panel(curve, run=steps, count=W.IntSlider(200, min=1, max=1000), fail=W.Checkbox(False))
live
""", "heat_map([[1, float('nan')], [.3, .7]], ['Ana', '云村'], ['Ana', '云村'], 'weight')",
"probability_bars(['Rome', '云村', '\\n'], [.7, .3, 0], kept=[1, 1, 0], before=[.5, .2, .3])",
"token_ribbon(['<|user|>', 'Hi', '!', '<|end|>', '<|assistant|>', 'Hel', 'lo', '\\n', b'\\xe4\\xba', '🤖', '<|end|>'], [0]*5+[1]*6, ids=range(11), values=[None]*5+[-.1, -2.31, -.5, -3., -1., -.01])",
"loss_curves({'trained': ([0, 1, 2], [3, 2, 1.5]), 'validation': ([0, 1, 2], [3, 2.2, 1.9])})"]


def test_all(lab):
    page = lab.open(CELLS)
    page.run_all()
    panel = page.panel()
    with panel.changes(): panel.press("exponent", "ArrowRight")
    assert page.python("panel.values") == "{'exponent': 1.5, 'log': False}"
    with panel.changes(): panel.drag("exponent", .5)
    assert page.python("panel.values['exponent']") == "5.0"
    print(page.python("open('/tmp/showp/lab.png','wb').write(panel.picture.value)"))
    assert page.errors() == []
    page.screenshot("light")
    page.theme("dark")
    page.screenshot("dark")
