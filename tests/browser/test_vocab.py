"The vocabulary explorer in a real JupyterLab: by keyboard, by mouse, and no error swallowed"
CELLS = ["from llmbench.play.vocab import vocabulary_explorer\nwords = vocabulary_explorer()\nwords"]


def test_vocabulary_explorer(lab):
    page = lab.open(CELLS).run_all()
    words = page.panel(0)
    before = words.content()
    with words.changes(): words.press("new tokens", "ArrowRight", times=2)
    assert page.python("words.values['extra']") == "80"
    with words.changes(): words.drag("new tokens", 1.)
    with words.changes(): words.press("tokens may span Chinese characters", "Space")
    assert page.python("words.values['spans']") == "False" and words.content() != before
    page.screenshot("play-vocab")
    page.theme("dark")
    page.screenshot("play-vocab-dark")
    assert page.python("words.error is None") == "True"
    assert page.errors() == []
