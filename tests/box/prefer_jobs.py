"Run by torchrun in the tests: preference stages in one set of processes"
import json
import sys
from pathlib import Path

import torch

from llmbench.box import prefer, sft
from llmbench.box.launch import die_with_parent

die_with_parent()
kinds = {kind.stage: kind for kind in (prefer.BoxReward, prefer.BoxDPO, prefer.BoxKTO, prefer.BoxGRPO)}
for path in map(Path, sys.argv[1:]):
    config = sft.restored(kinds[path.stem.split("-")[0]], json.loads(path.read_text()))
    prefer.train(config, prefer.check(config), progress=False)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
