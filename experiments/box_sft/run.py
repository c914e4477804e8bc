"""SmolLM2-135M-Instruct with a 4-bit base on a CPU, through `llmbench sft --box`: ten steps of 2 rows of 128 tokens
Run: python experiments/box_sft/run.py      (needs `llmbench assets get smollm2`; about a minute on one core; writes results.json)"""
import json
import tempfile
from pathlib import Path

from llmbench.box.hub import load_hub
from llmbench.box.launch import Launch
from llmbench.box.sft import BoxSFT, Lora, Optim, Rows, Save, check, train
from llmbench.core import write_json
from llmbench.text.world import World
from llmbench.train.checkpoint import read_steps
from llmbench.use.evals import ask

def run(home, name, rows, steps, lr):
    "Ten steps; every step takes the next two packed rows of 128 tokens"
    (home/f"{name}.jsonl").write_text("".join(json.dumps(dict(messages=c["messages"])) + "\n" for c in rows))
    config = BoxSFT("smollm2", (str(home/f"{name}.jsonl"),), "qlora", name, str(home), data=Rows(length=128, packed=True, valid=0.), lora=Lora(r=16, alpha=32.),
                    optim=Optim(steps=steps, batch=2, micro=2, lr=lr, warmup=1, schedule="constant"), save=Save(every=10**6, valid_every=0), launch=Launch(1, cpu=True))
    found = check(config)
    facts = train(config, found, progress=False)
    return [s.loss for s in read_steps(home/name/"sft")], facts


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        talks = World(0).conversations("en", "sft")
        asked = next(c for c in talks if "live" in c["messages"][0]["content"].lower())["messages"][0]["content"]
        losses, facts = run(home, "town", talks, 10, 2e-3)
        answers = {}
        for when, folder in (("before", "smollm2"), ("after", str(home/"town"/"sft"/"model"))):
            model, template = load_hub(folder, dtype="fp32", four_bit=True)
            answers[when] = ask(model.inner, template, [asked], 16)[0]
        result = dict(data="conversations of the embedded town (English, seed 0), packed rows of 128 tokens, 2 a step, other rows in every step", losses=losses, answer_tokens=facts["tokens"], parameters=facts["parameters"],
                      question=asked, seconds=facts["seconds"], command="python experiments/box_sft/run.py", **answers)
        write_json(Path(__file__).with_name("results.json"), result)
        print(json.dumps(result, indent=1, ensure_ascii=False))
