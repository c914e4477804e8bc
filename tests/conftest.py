"Fixtures: the real files beside the project, and the parity ledger"
import contextlib
import json
import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

with contextlib.suppress(ValueError): signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with Ctrl-C ignored

ROOT = Path(__file__).parent.parent
LEDGER = Path(os.environ.get("LLMBENCH_LEDGER", ROOT/".cache"/"parity.jsonl"))


class Data:
    "The real files, by name; a test that needs an absent one is skipped"
    folder = Path(os.environ.get("LLMBENCH_DATA", ROOT.parent/"shared"/"data"))

    def __truediv__(self, name):
        if not (self.folder/name).exists(): pytest.skip(f"real file {name} is not here: put it in {self.folder} or set LLMBENCH_DATA")
        return self.folder/name


@pytest.fixture(scope="session")
def data(): return Data()


def pytest_sessionstart(session):
    if hasattr(session.config, "workerinput"): return  # a worker of pytest-xdist: the controller has done it
    LEDGER.parent.mkdir(parents=True, exist_ok=True)  # rows are appended; tests/ledger.py takes the last of each


@pytest.fixture
def ledger(request):
    "Record one row of the parity table, then assert that the largest error is within the bar"
    def record(ours, library, error, bar):
        row = dict(ours=ours, library=library, error=float(error), bar=float(bar), test=request.node.nodeid)
        with LEDGER.open("a") as f: f.write(json.dumps(row) + "\n")
        assert error <= bar, f"{ours} against {library}: largest error {error}, allowed {bar}"
    return record


MARKS = '''
"Reward functions of the tests"
def vowels(samples): return [sum(c in "aeiou" for c in s.text)/(1 + len(s.text)) for s in samples]
def brief(samples): return [-len(s.ids)/8 for s in samples]
def same(samples): return [1.5 for s in samples]
def short(samples): return [1.]
def many(samples): return [1.]*(len(samples) + 1)
def breaks(samples): return [1/(len(s.text) - len(s.text)) for s in samples]
def nan(samples): return [float("nan") if i == 2 else 1. for i, s in enumerate(samples)]
def later(samples):
    import os, pathlib
    if pathlib.Path(os.environ["BREAKS_NOW"]).exists(): raise RuntimeError("the judge has left")
    return vowels(samples)
def second(samples):
    if any(s.prompt.task["prompt"].startswith("Who lives in house 3") for s in samples): raise RuntimeError("house 3 is haunted")
    return vowels(samples)
number = 7
'''


@pytest.fixture(scope="session")
def ppo_place(tmp_path_factory):
    "A tiny random Llama in Hugging Face's layout, prompts for it, and a module with reward functions"
    import torch

    from llmbench.model.transformer import Config, Transformer
    from llmbench.text.bpe import BPE
    from llmbench.tune.chat import ChatTemplate
    place = tmp_path_factory.mktemp("ppo")
    template = ChatTemplate(BPE.train(["Who lives in Oldtown? Ann does. She bakes bread. "]*3, 320))
    torch.manual_seed(2)
    model = Transformer(Config(vocab_size=template.tokenizer.vocab_size, d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=128, max_length=128))
    for p in model.parameters():
        if p.dim() > 1: torch.nn.init.normal_(p, std=.12)
    with torch.no_grad(): (model.embed if model.head is None else model.head).weight[template.tokenizer.end_id] *= 4  # now and then it is very likely: answers of all lengths
    model.save_pretrained(place/"tiny")
    template.save(place/"tiny")
    (place/"prompts.jsonl").write_text("".join(json.dumps(dict(prompt="Who lives in house %d%s?" % (i, " of the old town"*(i % 3)))) + "\n" for i in range(16)))
    (place/"town_marks.py").write_text(MARKS)
    return place


@pytest.fixture
def ppo_job(ppo_place, tmp_path, monkeypatch):
    "A small BoxPPO, to be changed by name; `ppo` may be a dict of changes"
    from dataclasses import replace

    from llmbench.align.ppo import PPO
    from llmbench.align.rollout import Sampling
    from llmbench.box.launch import Launch
    from llmbench.box.ppo import BoxPPO
    from llmbench.box.sft import Lora
    monkeypatch.chdir(ppo_place)
    monkeypatch.syspath_prepend(str(ppo_place))
    small = PPO(sampling=Sampling(prompts=8, new_tokens=8), steps=4, lr=3e-3, warmup=1, minibatch=6, missing_eos=0., save_every=2, stop_kl=0.)

    def make(**change):
        if isinstance(change.get("ppo"), dict): change["ppo"] = replace(small, **change["ppo"])
        how = dict(model=str(ppo_place/"tiny"), prompts=(str(ppo_place/"prompts.jsonl"),), reward="town_marks:vowels", folder=str(tmp_path), micro=4, lora=Lora(r=4, alpha=8.), ppo=small, launch=Launch(processes=1, cpu=True))
        return BoxPPO(**how | change)
    return make
