"Town to shop, briefly, three orders: reading and practice teach wares that were never practised, preference teaches manners, replay keeps the people"
import pytest
import torch

from llmbench.bench.domain import Domain, build_exam, course
from llmbench.play.model import town_folder, town_model
from llmbench.text.world import World
from llmbench.tune.chat import ChatTemplate


@pytest.mark.parametrize("seed", range(3))
def test_each_step_does_its_work(seed):
    torch.set_num_threads(1)
    world = World(0, 50)
    steps = {name: marks for name, marks, _ in course(town_model("tuned")[0], ChatTemplate.load(town_folder()/"tuned"), world, build_exam(world, "en"),
                                                      Domain(read=40, practise=40, please=16, batch=12, lang="en", every=10, seed=seed))}
    facts, polite, people = ([marks[k]["value"] for marks in steps.values()] for k in ("facts", "polite", "people"))
    assert facts[2] > facts[0] + .25
    assert polite[3] > polite[2] + .2
    assert people[3] > .6
