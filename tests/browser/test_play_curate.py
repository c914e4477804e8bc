"The curation widgets in a real JupyterLab: by keyboard and mouse, and no error swallowed"

CELLS = ["from llmbench.play.curate import best_of_explorer, mixture_explorer\nbest = best_of_explorer()\nbest", "mixed = mixture_explorer()\nmixed"]


def test_best_of_and_mixture_explorers(lab):
    page = lab.open(CELLS).run_all()
    best, mixed = page.panel(0), page.panel(1)
    with best.changes(): best.drag("spread over questions", .8)
    with best.changes(): best.press("answers drawn (n)", "Home")
    assert page.python("best.values['n']") == "2"
    with best.changes(): best.press("mean chance", "ArrowRight", times=3)
    with mixed.changes(): mixed.press("temperature (10: infinite)", "End")
    assert page.python("round(mixed.redraw()['sums'][0], 2)") == "0.25"
    with mixed.changes(): mixed.type("sources", "英文 400, 中文 20")
    assert page.python("round(mixed.redraw()['中文'][0], 2)") == "0.5"
    page.screenshot("play-curate")
    page.theme("dark")
    page.screenshot("play-curate-dark")
    assert page.errors() == []
