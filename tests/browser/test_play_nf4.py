"The widgets on four bits in a real JupyterLab: by keyboard and mouse, in both themes, and no error swallowed"
CELLS = ["from llmbench.play.nf4 import merge_explorer, nf4_explorer\nvalues = nf4_explorer()\nvalues", "merging = merge_explorer()\nmerging"]


def test_nf4_and_merge_explorers(lab):
    page = lab.open(CELLS).run_all()
    values, merging = page.panel(0), page.panel(1)
    with values.changes(): values.choose("weights", "flat")
    with values.changes(): values.choose("code", "int4")
    with values.changes(): values.press("block", "ArrowRight")
    with values.changes(): values.drag("outlier (sd)", .5)
    with values.changes(): values.press("scales in 8 bits", "Space")
    assert page.python("(values.values['source'], values.values['code'], values.values['block'], values.values['double'])") == "('flat', 'int4', 128, True)"
    assert page.python("values.values['outlier']") == "50"
    with merging.changes(): merging.drag("log10 of size", .1)
    with merging.changes(): merging.press("rank", "ArrowRight", times=3)
    with merging.changes(): merging.choose("code", "fp4")
    assert page.python("merging.values['rank']") == "11"
    page.screenshot("play-nf4")
    page.theme("dark")
    page.screenshot("play-nf4-dark")
    assert page.errors() == []
