"Expansion on the town's own model: fewer tokens, no more bits, three seeds; the mean of pieces begins better than chance"
import pytest
import torch

from llmbench.model.transformer import Transformer
from llmbench.play.model import town_folder
from llmbench.text.batch import draw, pack
from llmbench.text.bpe import BPE
from llmbench.text.world import World
from llmbench.train.loop import Fit, fit
from llmbench.tune.vocab import WORDS, expand_bpe, expand_model, tokens_per_character
from llmbench.use.evals import text_score


@pytest.mark.parametrize("seed", range(3))
def test_fewer_tokens_and_no_more_bits(seed):
    torch.set_num_threads(1)
    base, old = Transformer.from_pretrained(town_folder()/"base"), BPE.load(town_folder()/"base")
    shop = World(seed, 50).documents("zh", "shop")
    train, held = shop[:-24], shop[-24:]
    new = expand_bpe(old, train, 120, WORDS)
    def bits(model, tokenizer): return text_score(model.eval(), tokenizer.encode, held, tokenizer.bos_id, 96).bits_per_byte
    def taught(model, tokenizer):
        rows = pack([([tokenizer.bos_id, *ids, tokenizer.end_id], [1]*(len(ids) + 2)) for ids in map(tokenizer.encode, train)], 96)
        for _ in fit(model, lambda step, micro=0: rows.rows(draw(len(rows), 8, step, seed)), Fit(steps=16, warmup=4), progress=False): pass
        return bits(model, tokenizer)
    before, after = bits(base, old), taught(expand_model(base, old, new), new)
    control, gamble = taught(Transformer.from_pretrained(town_folder()/"base"), old), taught(expand_model(base, old, new, "random", seed=seed), new)
    assert tokens_per_character(new, held) < .5*tokens_per_character(old, held)
    assert after < .5*before and after < control and after < gamble
