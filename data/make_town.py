"""Rebuild data/town, the small trained models that notebooks and widgets load: python data/make_town.py [--check]

Runs the default chain (`llmbench run`, two to five minutes on two cores), keeps the base and the tuned model in bf16 with tokenizer and
template, and writes data/SHA256SUMS. With --check only compares the files with their sums. Text and questions need no file: the same seed
gives the same bytes on every machine (`llmbench.text.world`, tested)."""
import argparse
import hashlib
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOWN, SUMS = ROOT/"data"/"town", ROOT/"data"/"SHA256SUMS"


def sums(): return {p.relative_to(ROOT/"data").as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(TOWN.rglob("*")) if p.is_file()}


def check():
    "Exit with an error when a file is missing, new or different"
    wanted = dict(reversed(line.split("  ", 1)) for line in SUMS.read_text().splitlines())
    found = sums()
    off = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
    if off: sys.exit("data: these files differ from data/SHA256SUMS: " + ", ".join(off) + ". Rebuild with: python data/make_town.py")
    print(f"data: {len(found)} files as recorded")


def build(run_folder):
    "Train, round to bf16, write sums"
    import torch
    from safetensors.torch import load_file, save_file

    from llmbench.bench.run import Run, run
    from llmbench.text.bpe import BPE
    from llmbench.tune.chat import ChatTemplate
    run(Run(), run_folder)
    shutil.rmtree(TOWN, ignore_errors=True)
    for name, stage in (("base", "pretrain"), ("tuned", "sft")):
        source, target = Path(run_folder)/stage/"model", TOWN/name
        ChatTemplate(BPE.load(source)).save(target)
        shutil.copy(source/"config.json", target/"config.json")
        save_file({k: v.to(torch.bfloat16) for k, v in load_file(source/"model.safetensors").items()}, target/"model.safetensors", metadata=dict(format="pt"))
    SUMS.write_text("".join(f"{digest}  {name}\n" for name, digest in sums().items()))
    print(f"data: wrote {TOWN}, {sum(p.stat().st_size for p in TOWN.rglob('*') if p.is_file())/1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare the files with their sums")
    parser.add_argument("--run", default=str(ROOT/"runs"/"town"), help="folder of the run to take the models from; trained there when it is not finished (default: runs/town)")
    options = parser.parse_args()
    check() if options.check else build(options.run)
