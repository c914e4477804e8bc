"Copy the parity table of the last full test run into experiments/parity.json and README.md: python tests/ledger.py"
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"


def table(rows):
    "Markdown, worst first within a library"
    def told(x): return "0" if x == 0 else f"{x:.0e}" if x < .01 else f"{x:g}"
    lines = ["| ours | library | largest error | allowed |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {r['ours']} | {r['library']} | {told(r['error'])} | {told(r['bar'])} |" for r in rows])


def main():
    source = ROOT/".cache"/"parity.jsonl"
    if not source.exists(): sys.exit("ledger: run make test first; it writes .cache/parity.jsonl")
    last = {(row["ours"], row["library"]): {k: row[k] for k in ("ours", "library", "error", "bar")} for row in map(json.loads, source.read_text().splitlines())}
    rows = [last[key] for key in sorted(last)]
    (ROOT/"experiments"/"parity.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    readme = (ROOT/"README.md").read_text()
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    (ROOT/"README.md").write_text(before + BEGIN + "\n" + table(rows) + "\n" + END + after)
    print(f"ledger: {len(rows)} rows")


if __name__ == "__main__": main()
