"Each question of the curriculum is answered in two languages and proven by a cell that can fail"
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT/"nbs"/"questions.ipynb"
DEMANDED = [f"E{n}" for n in (3, 4, 5, 6, 7, 8, 10)]
ALL = [f"E{n}" for n in range(1, 16)]
CLAIM = re.compile(r"^\s*(?:for .*: )?(?:assert\b|test_(?:eq|close|fail)\()", re.M)


def source(cell): return "".join(cell["source"])


def sections(cells):
    "{heading: (text, code)} of each second-level heading, up to the next"
    found, name = {}, None
    for cell in cells:
        text = source(cell)
        if cell["cell_type"] == "markdown" and (heading := re.match(r"## ([\w-]+)", text)): name = heading[1]
        if name: found.setdefault(name, ("", []))
        if name and cell["cell_type"] == "markdown": found[name] = (found[name][0] + "\n" + text, found[name][1])
        if name and cell["cell_type"] == "code": found[name][1].append(text)
    return found


def missing(name, parts):
    "What an answer lacks, in words"
    if name not in parts: return [f"{name}: no section"]
    text, code = parts[name]
    english, _, chinese = text.partition("**中文回答**")
    answer = re.search(r"\*\*Answer\.\*\* (.*)", english, re.S)
    wanted = {"an English answer": answer and len(re.findall(r"[A-Za-z]{2,}", answer[1])) >= 80, "a Chinese answer": len(re.findall(r"[\u4e00-\u9fff]", chinese)) >= 120,
              "when it does not hold": "When it does not hold" in english and "不成立" in chinese, "a notebook where it is taught": re.search(r"\]\(\d_\w+/\w+\.ipynb\)", text),
              "a cell with an assertion": any(CLAIM.search(c) for c in code)}
    return [f"{name}: {what}" for what, there in wanted.items() if not there]


@pytest.fixture(scope="module")
def page(): return json.loads(PAGE.read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("name", ALL)
def test_answered_in_two_languages_and_proven(page, name):
    assert not missing(name, sections(page))


def test_all_that_was_demanded_is_asked(): assert set(DEMANDED) <= set(ALL)


@pytest.mark.parametrize("name", DEMANDED)
def test_an_answer_without_proof_or_language_is_noticed(page, name):
    def without(change): return missing(name, sections([c | {"source": [change(source(c), c["cell_type"])]} for c in page]))
    assert f"{name}: a cell with an assertion" in without(lambda s, kind: CLAIM.sub("pass #", s) if kind == "code" else s)
    assert f"{name}: a Chinese answer" in without(lambda s, kind: re.sub(r"[\u4e00-\u9fff]", "", s) if kind == "markdown" else s)
    assert f"{name}: an English answer" in without(lambda s, kind: s.replace("**Answer.**", ""))


def test_links_lead_somewhere(page):
    for cell in page:
        if cell["cell_type"] == "markdown":
            for target in re.findall(r"\]\(([^)#][^)]*)\)", source(cell)): assert (PAGE.parent/target).exists(), f"{target} does not exist"


def test_each_figure_names_the_command_that_makes_it(page):
    for name, (text, code) in sections(page).items():
        for experiment in {e for c in code for e in re.findall(r'stored\("(\w+)"', c)}:
            assert (ROOT/"experiments"/experiment/"run.py").exists()
            assert f"python experiments/{experiment}/run.py" in text, f"{name} quotes {experiment} and does not say how to make it"


def test_recap_has_a_row_for_each_question(page):
    recap = sections(page)["Recap"][0]
    for name in ALL:
        row = next((line for line in recap.splitlines() if re.match(rf"\| \[?{name}\b", line)), None)
        assert row and row.count("|") == 5 and "`" in row and ".ipynb)" in row, f"no row for {name}"


def test_front_pages_lead_here():
    assert "](nbs/questions.ipynb)" in (ROOT/"README.md").read_text(encoding="utf-8").split("<!-- map: begin -->")[0]
    assert any("](questions.ipynb)" in source(c) and "问答" in source(c) for c in json.loads((ROOT/"nbs"/"start.ipynb").read_text(encoding="utf-8"))["cells"])
