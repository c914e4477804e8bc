"The course's widgets in a real JupyterLab: by keyboard, by mouse, and no error swallowed"
import time
from pathlib import Path

NBS = Path(__file__).parent.parent.parent/"nbs"

CASES = ["from llmbench.play.text import tokenizer_explorer, merge_explorer\npanel = tokenizer_explorer()\npanel", "panel2 = merge_explorer()\npanel2"]
MODEL = ["from llmbench.play.model import attention_explorer, rope_explorer, sampling_explorer\nattention = attention_explorer()\nattention",
         "turns = rope_explorer()\nturns", "sampler = sampling_explorer()\nsampler"]
TUNE = ["from llmbench.play.tune import chat_panel, mask_explorer\nmasks = mask_explorer()\nmasks", "talk = chat_panel()\ntalk"]
TRAIN = ["from llmbench.play.train import learning_rate_explorer\nlive = learning_rate_explorer()\nlive"]


def wait(condition, seconds=60):
    "Until `condition()` holds"
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, f"waited {seconds} s in vain"
        time.sleep(.2)


def test_tokenizer_explorer(lab):
    page = lab.open(CASES).run_all()
    panel = page.panel(0)
    before = panel.content()
    with panel.changes(): panel.choose("sample", "中文")
    assert "林月" in page.python("panel.values['text']")
    with panel.changes(): panel.drag("merges", 0.)
    assert page.python("panel.values['merges']") == "0"
    with panel.changes(): panel.press("merges", "ArrowRight", times=3)
    with panel.changes(): panel.type("text", "🐈 says 你好")
    assert panel.content() != before
    merge = page.panel(1)
    with merge.changes(): merge.drag("step", 0.)
    with merge.changes(): merge.press("step", "ArrowRight", times=2)
    page.screenshot("play-text")
    page.theme("dark")
    page.screenshot("play-text-dark")
    assert page.errors() == []


def test_attention_rope_and_sampling_explorers(lab):
    page = lab.open(MODEL).run_all()
    attention, turns, sampler = (page.panel(i) for i in range(3))
    with attention.changes(): attention.press("layer", "ArrowRight")
    with attention.changes(): attention.drag("head", 1.)
    with attention.changes(): attention.type("text", " 林月住在")
    with turns.changes(): turns.drag("log10 of base", 1.)
    with turns.changes(): turns.press("linear scaling", "ArrowRight", times=4)
    with sampler.changes(): sampler.drag("temperature", 1.)
    with sampler.changes(): sampler.press("top-k (0: off)", "ArrowRight", times=3)
    wait(lambda: page.python("sampler.values['top_k']") == "3")
    page.screenshot("play-model")
    page.theme("dark")
    page.screenshot("play-model-dark")
    assert page.errors() == []


def test_mask_explorer_and_chat(lab):
    page = lab.open(TUNE).run_all()
    masks, talk = page.panel(0), page.panel(1)
    with masks.changes(): masks.drag("length (tokens)", .08)
    with masks.changes(): masks.press("count everything (no mask)", "Space")
    masks.type("row", '{"instruction": "Say hi"}')
    wait(lambda: page.python("masks.error is not None") == "True")
    assert "output" in page.python("str(masks.error)")
    masks.type("row", '{"instruction": "Say hi", "output": "hi"}')
    wait(lambda: page.python("masks.error is None") == "True")
    with talk.changes(): talk.click("Run")
    wait(lambda: page.python("talk._busy()") == "False", 30)
    assert page.python("bool(talk.records)") == "True"
    page.screenshot("play-tune")
    assert page.errors() == []


def test_live_training(lab):
    page = lab.open(TRAIN).run_all()
    live = page.panel(0)
    live.press("steps", "Home")
    with live.changes(20): live.click("Run")
    wait(lambda: page.python("live._busy()") == "False", 60)
    assert page.python("len(live.records)") == "20"
    page.screenshot("play-train")
    assert page.errors() == []


def play_panel(page):
    "The first panel below the notebook's heading *Play*"
    return page.panel(page.tab.evaluate("""() => {
        const all = [...document.querySelectorAll('.llmbench-panel, .jp-RenderedMarkdown h2')], at = all.findIndex(e => e.tagName === 'H2' && e.textContent.replace('¶', '').trim() === 'Play');
        if (at < 0) throw new Error('no heading Play');
        return document.querySelectorAll('.llmbench-panel').length - all.slice(at).filter(e => e.tagName !== 'H2').length; }"""))


def test_two_notebooks_play_sections(lab):
    "The widget where the reader finds it: in the whole notebook, run from the top, moved, without an error anywhere"
    page = lab.open(NBS/"6_use"/"60a_intervals.ipynb").run_all()
    exams = play_panel(page)
    before = exams.picture()
    with exams.changes(): exams.drag("true share", 1.)
    with exams.changes(): exams.choose("recipe", "textbook")
    assert page.python("panel.values['recipe']") == "'textbook'" and exams.picture() != before
    missed = int(page.python("panel.figure.axes[0].get_title().split(': ')[1].split()[0]").strip("'"))
    assert missed > 50, "at a true share of 99.5 % nearly every exam of 20 is perfect, and the textbook's interval a point"
    page.screenshot("play-intervals", full=False)
    page.theme("dark")
    page.screenshot("play-intervals-dark", full=False)
    assert page.errors() == []

    page = lab.open(NBS/"8_bench"/"80_run.ipynb").run_all()
    plan = play_panel(page)
    with plan.changes(): plan.press("pre-training steps", "ArrowRight")
    wait(lambda: plan.content().count("to do") == 9)
    with plan.changes(): plan.drag("seed", 1.)
    assert page.python("panel.values['seed']") == "9" and plan.content().count("to do") == 11
    page.theme("light")
    page.screenshot("play-plan", full=False)
    page.theme("dark")
    page.screenshot("play-plan-dark", full=False)
    ink, paper = (page.tab.evaluate(f"() => getComputedStyle(document.querySelector('.llmbench-panel td')).{what}") for what in ("color", "backgroundColor"))
    assert sum(map(int, ink[4:-1].split(",")[:3])) > 3*140, f"letters of {ink} on a dark page ({paper})"


RL = ["from llmbench.play.rl import clip_explorer, gae_explorer, live_rl, overoptimisation_explorer\nclip = clip_explorer()\nclip", "credit = gae_explorer()\ncredit",
      "live = live_rl()\nlive", "over = overoptimisation_explorer()\nover"]


def test_reinforcement_learning(lab):
    page = lab.open(RL).run_all()
    clip, credit, live, over = (page.panel(i) for i in range(4))
    with clip.changes(): clip.drag("ratio", .9)
    with clip.changes(): clip.press("advantage", "ArrowLeft", times=6)
    with credit.changes(): credit.drag("λ", .1)
    with over.changes(): over.drag("β", .2)
    live.press("steps", "Home")
    with live.changes(20): live.click("Run")
    wait(lambda: page.python("live._busy()") == "False", 60)
    assert page.python("len(live.records)") == "10"
    page.screenshot("play-rl")
    page.theme("dark")
    page.screenshot("play-rl-dark")
def test_forgetting_lab(lab):
    page = lab.open(["from llmbench.play.forgetting import forgetting_lab\nforget = forgetting_lab()\nforget"]).run_all()
    panel = page.panel(0)
    panel.drag("steps", 0.)
    wait(lambda: page.python("forget.values['steps']") == "12")
    with panel.changes(): panel.click("Run")
    wait(lambda: page.python("forget._busy()") == "False", 60)
    assert page.python("len(forget.records)") == "4"
    panel.press("replay (% of each batch)", "ArrowRight", times=25)
    with panel.changes(): panel.click("Run")
    wait(lambda: page.python("forget._busy()") == "False", 60)
    page.screenshot("play-forgetting")
    page.theme("dark")
    page.screenshot("play-forgetting-dark")
    assert page.errors() == []


LABELS = ["from llmbench.play.align import pair_labeller\nlabeller = pair_labeller(('polite',), count=8, steps=12)\nlabeller"]


def test_pair_labeller(lab):
    "Rankings stay with their questions whichever way one moves between them; Run trains on what was typed"
    page = lab.open(LABELS).run_all()
    panel = page.panel(0)
    first = page.python("labeller.labels.typed[0]").strip("'")
    with panel.changes(): panel.press("question", "ArrowRight")
    wait(lambda: page.python("labeller.values['ranked'] == labeller.labels.typed[1]") == "True")
    with panel.changes(): panel.type("best first", "D > A > C > B")
    wait(lambda: page.python("labeller.labels.typed[1]") == "'D > A > C > B'")
    with panel.changes(): panel.press("question", "ArrowLeft")
    wait(lambda: page.python("labeller.values['ranked']").strip("'") == first)
    assert page.python("labeller.labels.typed[1]") == "'D > A > C > B'", "the ranking of question 2 was lost"
    panel.type("best first", "A > A")
    wait(lambda: page.python("labeller.error is not None") == "True")
    panel.type("best first", first)
    wait(lambda: page.python("labeller.error is None") == "True")
    with panel.changes(60): panel.click("Run")
    wait(lambda: page.python("labeller._busy()") == "False", 90)
    assert page.python("len(labeller.records)") == "12" and "kept back pairs" in panel.content()
    page.screenshot("play-labeller", full=False)
    assert page.errors() == []
