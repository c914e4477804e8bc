"The widgets of preferences in a real JupyterLab: rankings typed, sliders moved, a reward model trained on clicks"
import time

CASES = ["from llmbench.play.align import dpo_explorer, kl_explorer, pair_labeller\nlabels = pair_labeller(('polite',), count=8, steps=12)\nlabels", "pushes = dpo_explorer()\npushes", "kls = kl_explorer()\nkls"]


def wait(condition, seconds=20):
    "Until `condition()` holds"
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, f"waited {seconds} s in vain"
        time.sleep(.2)


def test_preferences(lab):
    page = lab.open(CASES).run_all()
    labels, pushes, kls = (page.panel(i) for i in range(3))
    with pushes.changes(30): pushes.press("chosen (nats)", "ArrowRight", times=4)
    with kls.changes(30): kls.press("push (nats)", "ArrowRight", times=5)
    with kls.changes(30): kls.press("tokens", "Home")
    with labels.changes(30): labels.press("question", "ArrowRight")
    wait(lambda: page.python("labels.values['question']") == "2")
    assert page.python("labels.values['ranked'] == labels.labels.typed[1]") == "True"
    labels.type("best first", "D B A X")
    wait(lambda: page.python("labels.error is not None") == "True")
    labels.type("best first", "D > B = A > C")
    wait(lambda: page.python("labels.error is None") == "True")
    with labels.changes(90): labels.click("Run")
    wait(lambda: page.python("labels._busy()") == "False", 150)
    assert page.python("labels.found['pairs'] > 0") == "True"
    page.screenshot("play-align")
    page.theme("dark")
    page.screenshot("play-align-dark")
    assert page.errors() == []
