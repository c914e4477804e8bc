"A tiny random Llama in Hugging Face's layout, rows for the four preference stages, and their jobs"
import json
from dataclasses import replace

import torch

from llmbench.box.launch import Launch
from llmbench.box.prefer import Answers, BoxDPO, BoxGRPO, BoxKTO, BoxReward, Drawing
from llmbench.box.sft import Lora, Optim, Save
from llmbench.model.transformer import Config, Transformer
from llmbench.text.bpe import BPE
from llmbench.tune.chat import ChatTemplate


def said(role, text): return dict(role=role, content=text)


PAIRS = [dict(prompt=[said("user", f"Who lives in house {i}?")], chosen="Ann does, thank you."*(i % 2 + 1), rejected=f"Nobody {i*7}.") for i in range(40)]
LABELS = [dict(messages=[*p["prompt"], said("assistant", p["chosen"] if i % 2 else p["rejected"])], label=bool(i % 2)) for i, p in enumerate(PAIRS)]
ASKS = [dict(question=f"How many live in house {i}?", answer=f"They are {i}.") for i in range(20)]


def make_model(folder, seed=2, width=32, text="Who lives in Oldtown? Ann does. She bakes bread. "):
    template = ChatTemplate(BPE.train([text]*3, 320))
    torch.manual_seed(seed)
    Transformer(Config(vocab_size=template.tokenizer.vocab_size, d_model=width, n_layers=2, n_heads=2, n_kv_heads=1, d_hidden=48, max_length=256)).save_pretrained(folder)
    template.save(folder)
    return folder


def lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return (str(path),)


def make_jobs(home, **change):
    "Stage: job, eight steps each"
    make_model(home/"tiny")
    (home/"rule.py").write_text("def even(samples): return [sum(i % 2 == 0 for i in s.ids)/len(s.ids) for s in samples]\n")
    optim = Optim(steps=8, batch=8, micro=2, lr=1e-2, warmup=2, schedule="constant")
    common = dict(model=str(home/"tiny"), folder=str(home), data=Answers(128, .1), lora=Lora(r=8), optim=optim, save=Save(every=4, valid_every=4), launch=Launch(1, cpu=True)) | change
    slower = dict(optim=replace(common["optim"], lr=3e-3))  # at 1e-2 a reward adapter jumps about, and a rounding grows with it
    return dict(reward=BoxReward(pairs=lines(home/"pairs.jsonl", PAIRS), **common | slower), dpo=BoxDPO(pairs=lines(home/"pairs.jsonl", PAIRS), **common), kto=BoxKTO(chat=lines(home/"labels.jsonl", LABELS), **common),
                grpo=BoxGRPO(prompts=lines(home/"asks.jsonl", ASKS), reward=(f"{home/'rule.py'}:even", "ended"), draw=Drawing(4, 12, 1.2), **common | dict(optim=replace(optim, batch=16, micro=4))))
