"Run by torchrun in the tests: several PPO jobs in one set of processes, since starting one takes longer than the jobs; what a job says wrong is noted by rank"
import json
import os
import sys
from pathlib import Path

from llmbench.box import ppo
from llmbench.box.launch import die_with_parent
from llmbench.box.sft import restored
from llmbench.core import UserError

die_with_parent()
for path in sys.argv[1:]:
    config = restored(ppo.BoxPPO, json.loads(Path(path).read_text()))
    try: ppo.train(config, ppo.check(config), progress=False)
    except UserError as e: Path(f"{path}.{os.environ['RANK']}").write_text(str(e))
import torch

torch.distributed.barrier()
torch.distributed.destroy_process_group()
