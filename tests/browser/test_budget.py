"The memory widget in a real JupyterLab: by keyboard, by mouse and by list, light and dark"
CELLS = ["from llmbench.play.budget import budget_explorer\nneed = budget_explorer()\nneed"]


def test_budget_explorer(lab):
    page = lab.open(CELLS).run_all()
    need = page.panel(0)
    with need.changes(): need.press("batch (rows a card)", "ArrowRight", times=2)
    assert page.python("need.values['batch']") == "4.0"
    with need.changes(): need.drag("length (tokens)", 1.)
    assert page.python("need.values['length']") == "2048.0"
    with need.changes(): need.press("checkpointing", "Space")
    page.screenshot("play-budget")
    with need.changes(): need.choose("method", "full")
    with need.changes(): need.press("cards", "ArrowRight", times=4)
    with need.changes(): need.choose("sharding", "zero3")
    assert page.python("need.values['gpus']") == "16.0"
    with need.changes(): need.choose("model", "town")
    need.settle()
    page.theme("dark")
    with need.changes(): need.choose("model", "llama-3-70b")
    need.settle()
    page.screenshot("play-budget-dark")
    assert page.errors() == []


def test_a_panel_whose_draw_has_a_docstring(lab):
    "The image view of ipywidgets fails on a tooltip; a picture must be there"
    page = lab.open(["from llmbench.panel import Panel\nimport ipywidgets as w\ndef draw(figure, a):\n    'A line'\n    figure.subplots().plot([0, a])\nPanel(draw, a=w.IntSlider(3))"]).run_all()
    panel = page.panel(0)
    panel.settle()
    assert len(panel.picture()) > 1000
