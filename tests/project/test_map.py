"The course map of README and front page names each notebook, as it is"
import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def course_map():
    found = importlib.util.spec_from_file_location("course_map", ROOT/"tests"/"course_map.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_map_is_fresh():
    for path, text in course_map().pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python tests/course_map.py"


def test_the_map_is_whole():
    rows = course_map().lines()
    there = {p.relative_to(ROOT/"nbs").as_posix() for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts} - {"start.ipynb", "questions.ipynb"}
    assert {row[2] for row in rows} == there and all(5 <= row[4] <= 60 for row in rows)
