"""Write the course map, one line a notebook, into README.md and nbs/start.ipynb: python tests/course_map.py

Title and subtitle come from each notebook's first cell; the minutes are for reading: 150 words or three code cells a minute, rounded to five."""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NBS = ROOT/"nbs"
BEGIN, END = "<!-- map: begin -->", "<!-- map: end -->"
PARTS = {"": "Ground", "1_text": "1 Text", "2_model": "2 Model", "3_train": "3 Training", "4_tune": "4 Tuning", "5_align": "5 Preferences", "6_use": "6 Use",
         "7_play": "7 Play", "8_bench": "8 Running it", "9_box": "9 Big models", "99": "Command line"}


def source(cell): return "".join(cell["source"])


def line(path):
    "(part, title, file, subtitle, minutes) of a notebook"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [source(c) for c in cells if c["cell_type"] == "markdown"]
    title, subtitle = (re.search(pattern, texts[0], re.M) for pattern in (r"^# (.+)$", r"^> (.+)$"))
    assert title and subtitle, f"{path}: the first text cell needs '# title' and '> subtitle'"
    shown = [c for c in cells if c["cell_type"] == "code" and not source(c).startswith("#| hide")]
    minutes = sum(len(re.findall(r"\w+", re.sub(r"[\u3400-\u9fff]", "", t))) for t in texts)/150 + len(shown)/3
    part = PARTS["99" if path.name.startswith(("98", "99")) else "" if path.parent == NBS else path.parent.name]
    return part, title[1], path.relative_to(NBS).as_posix(), subtitle[1], max(5, 5*round(minutes/5))


def lines():
    "All notebooks but the front page, in the order of the course"
    paths = [p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and p.name not in ("start.ipynb", "questions.ipynb")]
    order = list(PARTS.values())
    return sorted((line(p) for p in paths), key=lambda row: (order.index(row[0]), row[2]))


def table(prefix):
    "Markdown; each part is named once"
    rows, last = ["| part | notebook | what it is about | minutes |", "|---|---|---|---|"], None
    for part, title, file, subtitle, minutes in lines():
        rows.append(f"| {part if part != last else ''} | [{title}]({prefix}{file}) | {subtitle.replace('|', chr(92) + '|') if chr(92) not in subtitle else subtitle} | {minutes} |")
        last = part
    return "\n".join(rows)


def pages():
    "{path: text as it should be}"
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    start = json.loads((NBS/"start.ipynb").read_text(encoding="utf-8"))
    cell = next(c for c in start["cells"] if c["cell_type"] == "markdown" and "| part | notebook |" in source(c))
    text = re.sub(r"\| part \| notebook \|.*?\n(?=\n|\Z)", lambda found: table("") + "\n", source(cell) + "\n", count=1, flags=re.S).rstrip("\n")
    cell["source"] = text.splitlines(True)
    return {ROOT/"README.md": before + BEGIN + "\n" + table("nbs/") + "\n" + END + after,
            NBS/"start.ipynb": json.dumps(start, ensure_ascii=False, indent=1, sort_keys=True) + "\n"}


def main():
    for path, text in pages().items(): path.write_text(text, encoding="utf-8")
    print(f"course map: {len(lines())} notebooks")


if __name__ == "__main__": sys.exit(main())
