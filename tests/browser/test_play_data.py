"The data widgets in a real JupyterLab: by keyboard and mouse, and no error swallowed"

CELLS = ["from llmbench.play.data import cleaning_viewer, minhash_explorer\nviewer = cleaning_viewer()\nviewer", "explorer = minhash_explorer()\nexplorer"]


def test_cleaning_viewer_and_minhash_explorer(lab):
    page = lab.open(CELLS).run_all()
    viewer, explorer = page.panel(0), page.panel(1)
    with viewer.changes(): viewer.choose("sample", "中文")
    assert "林月" in page.python("viewer.values['text']") and "电话" in viewer.content()
    page.screenshot("play-data-zh")
    with viewer.changes(): viewer.choose("rules (Ctrl-click)", ["html"])
    assert page.python("viewer.values['rules']") == "('html',)"
    with viewer.changes(): viewer.type("text", "<b>Mira</b> bakes &amp; sings")
    with viewer.changes(): viewer.press("shortest (words)", "Home")
    with explorer.changes(): explorer.drag("bands", 0.)
    with explorer.changes(): explorer.press("rows", "ArrowRight", times=3)
    with explorer.changes(): explorer.type("text b", "Oban Kell mends clocks and says that a clock that sings is a clock that is late.")
    assert page.python("explorer.values['rows']") == "9"
    page.screenshot("play-data")
    page.theme("dark")
    page.screenshot("play-data-dark")
    assert page.errors() == []
