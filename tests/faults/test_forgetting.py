"What the forgetting laboratory refuses, and in which words"
import pytest
import torch

from llmbench.bench.forget import ForgetCommand, Remedy, do_forget, prepared
from llmbench.cli import main
from llmbench.core import UserError, write_json
from llmbench.model.transformer import Config, Transformer
from llmbench.text.batch import Batch
from llmbench.tune.forgetting import average, forgetting, replay_mix, restored

ROWS = Batch(*(torch.ones(3, 4, dtype=torch.long) for _ in range(4)))


@pytest.mark.parametrize("share, old, words", [(-.1, [ROWS], "no share"), (1., [ROWS], "no share"), (float("nan"), [ROWS], "no share"), (.2, [], "20% of nothing")])
def test_mix(share, old, words):
    with pytest.raises(UserError, match=words): replay_mix([ROWS], old, share)


def test_measures():
    with pytest.raises(UserError, match="no score for sums"): forgetting(dict(sums=.5), dict(poems=.5))
    with pytest.raises(UserError, match="lost nothing"): restored(.5, .5, .4)
    with pytest.raises(UserError, match="differ in names or shapes"): average(dict(w=torch.ones(2)), dict(w=torch.ones(3)))


def test_frozen_blocks():
    model = Transformer(Config(d_model=8, n_layers=2, n_heads=1, n_kv_heads=1, d_hidden=8))
    with pytest.raises(UserError, match="3 of 2 blocks"): prepared(model, Remedy(frozen=3))


def test_command(tmp_path, capsys):
    assert main(["forget", "--folder", str(tmp_path), "--name", "nobody"]) == 2
    assert "llmbench run --name nobody" in capsys.readouterr().err
    (tmp_path/"own"/"sft"/"model").mkdir(parents=True)
    (tmp_path/"own"/"sft"/"model"/"config.json").write_text("{}")
    write_json(tmp_path/"own"/"config.json", dict(source=dict(text=["poems.txt"], chat=[], people=50), seed=0))
    assert main(["forget", "--folder", str(tmp_path), "--name", "own"]) == 2
    assert "no exact answers" in capsys.readouterr().err
    with pytest.raises(UserError, match="no remedy 'prayer'.*replay 5%"): do_forget(ForgetCommand(remedies=("prayer",)))
