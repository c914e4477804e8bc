"Package facts stand in one place, imports point downward, and nothing heavy is loaded by accident"
import ast
import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest

import llmbench

ROOT = Path(__file__).parent.parent.parent
ROWS = ["core", "text", "model", "train", "tune", "align", "use", "play", "bench", "box", "talk", "cli"]
BESIDE = ("theme", "show", "panel")  # stand beside the rows and know none of them but core
MODULES = sorted(p for p in (ROOT/"llmbench").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
FOREIGN = {"transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets"}


def part(path): return path.relative_to(ROOT/"llmbench").with_suffix("").parts[0]


def imports(path):
    "Every imported module, lazy imports included"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0: yield node.module
        elif isinstance(node, ast.ImportFrom):  # relative: `..core` in llmbench/text/batch.py is llmbench.core
            above = path.relative_to(ROOT).parts[:-node.level]
            for name in [node.module] if node.module else [alias.name for alias in node.names]: yield ".".join((*above, name))


def facts():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT/"settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def test_facts_agree():
    ini, installed = facts(), metadata.metadata("llmbench")
    assert llmbench.__version__ == ini["version"] == installed["Version"]
    assert installed["Requires-Python"].replace(" ", "") == f">={ini['min_python']}"
    assert installed["Summary"] == ini["description"]
    needed = {r.split(";")[0].strip().replace(" ", "") for r in metadata.requires("llmbench") if "extra ==" not in r}
    assert needed == set(ini["requirements"].split())


def test_constraints_cover_requirements():
    names = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT/"constraints.txt").read_text().splitlines() if "==" in line}
    wanted = {r.split(">")[0].split("<")[0].split("=")[0].lower() for r in (facts()["requirements"] + " " + facts()["dev_requirements"]).split()}
    assert wanted <= names, f"not pinned in constraints.txt: {sorted(wanted - names)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: ".".join(p.relative_to(ROOT/"llmbench").with_suffix("").parts))
def test_imports_point_downward(path):
    mine = part(path)
    for name in imports(path):
        if name.split(".")[0] == "llmbench":
            other = name.split(".")[1] if "." in name else "core"
            if mine in BESIDE: assert other in ("core", *BESIDE), f"{path.name} imports {name}"
            elif mine == "practice": pass
            elif other in ROWS: assert ROWS.index(other) <= ROWS.index(mine), f"{path.name} imports {name}, which stands above it"
            elif other in BESIDE: assert ROWS.index(mine) >= ROWS.index("play"), f"{path.name} imports {name}"
        if mine in ROWS[:ROWS.index("play")]: assert name.split(".")[0] not in FOREIGN, f"{path.name}: a from-scratch part imports {name}"
        if name.split(".")[0] == "ipywidgets": assert mine in ("play", "panel"), f"{path.name} imports ipywidgets"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: ".".join(p.relative_to(ROOT/"llmbench").with_suffix("").parts))
def test_modules_are_short_and_documented(path):
    tree = ast.parse(path.read_text())
    most = 300  # lines
    assert path.read_text().count("\n") <= most, f"{path}: over {most} lines; two stages in one?"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_nothing_unpickles():
    for path in MODULES:
        names = set(imports(path))
        assert not names & {"pickle", "dill", "joblib", "cloudpickle"}, f"{path} imports a pickler"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"): raise AssertionError(f"{path}:{node.lineno} may unpickle")


def test_importing_a_stage_costs_no_heavy_package():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES if part(p) not in ("play", "panel", "box", "practice")]
    heavy = sorted(FOREIGN | {"ipywidgets", "pandas", "pyarrow"})
    program = f"import sys, importlib; [importlib.import_module(m) for m in {modules!r}]; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", done.stdout
