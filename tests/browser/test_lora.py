"The rank and alpha explorer in a real JupyterLab: by keyboard, by mouse, and no error swallowed"
CELLS = ["from llmbench.play.lora import rank_explorer\nranks = rank_explorer()\nranks"]


def test_rank_explorer(lab):
    page = lab.open(CELLS).run_all()
    ranks = page.panel(0)
    with ranks.changes(): ranks.press("rank r", "ArrowRight", times=4)
    assert page.python("ranks.values['rank']") == "8"
    page.screenshot("play-lora")
    with ranks.changes(): ranks.drag("alpha", .95)
    with ranks.changes(): ranks.choose("update by", "Muon")
    with ranks.changes(): ranks.choose("map", "mlp.down")
    page.theme("dark")
    page.screenshot("play-lora-dark")
    assert page.python("ranks.error is None") == "True"
    assert page.errors() == []
