"Self-instruct with a real model, where it can be had"
import torch

from llmbench.box.hub import load_hub
from llmbench.model.generate import generate
from llmbench.tune.curate import Grow, Journal, grow, read_tasks
from llmbench.tune.formats import read_conversations


def speaker(folder, seed=0):
    "SmolLM2 as a function from text to text"
    model, template = load_hub(str(folder))
    chance = torch.Generator().manual_seed(seed)
    def ask(prompt):
        ids = template.render([dict(role="user", content=prompt)], prompt=True)[0]
        room = 4 if prompt.startswith("Does the task") else 120
        out = generate(model.inner, torch.tensor([ids]), room, temperature=.7, top_p=.9, eos_id=template.tokenizer.end_id, generator=chance)[0, len(ids):].tolist()
        return template.tokenizer.decode([i for i in out if i != template.tokenizer.end_id])
    return ask


def test_a_real_model_in_the_loop(smollm2, data, tmp_path):
    "Two rounds: whatever it says, every proposal has a verdict, and what is kept is training data"
    torch.set_num_threads(1)
    verdicts = list(grow(read_tasks(data/"self_instruct_seeds.jsonl"), speaker(smollm2), tmp_path/"grown.jsonl", Grow(want=1, rounds=2)))
    account, kept = Journal(tmp_path/"grown.jsonl").account(), [v for v in verdicts if "reason" not in v]
    assert account.balanced() and account.read == len(verdicts) >= 1 and account.kept == len(kept)
    assert all(v["alike"] < .7 and v["output"] for v in kept) and (not kept or len(read_conversations(tmp_path/"grown.jsonl")) == len(kept))
