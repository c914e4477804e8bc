"Run by torchrun in the tests: several jobs in one set of processes, since starting one takes longer than the jobs"
import json
import sys
from pathlib import Path

from llmbench.box import hub, sft, trainer
from llmbench.box.launch import die_with_parent

die_with_parent()
seen = {}
judge = trainer.check_sharded


def counted(model):
    from bitsandbytes.nn import Linear4bit
    from torch.distributed.tensor import DTensor
    judge(model)
    four = [m.weight for m in model.modules() if isinstance(m, Linear4bit)]
    seen["now"] = [len(four), sum(isinstance(p, DTensor) for p in four), sum(isinstance(p, DTensor) for p in model.parameters()), sum(1 for _ in model.parameters())]


trainer.check_sharded, right_step = counted, trainer.Exact.training_step
for path in sys.argv[1:]:
    config = sft.restored(sft.BoxSFT, json.loads(Path(path).read_text()))
    if wrong := config.name == "uint8":
        right = hub.four_bit_config

        def whole(four, dtype, right=right):
            import torch
            made = right(four, dtype)
            made.bnb_4bit_quant_storage = torch.uint8
            return made
        hub.four_bit_config = whole
    if config.name == "means": trainer.Exact.training_step = lambda self, model, inputs, total=None: right_step(self, model, inputs, None)
    try: sft.train(config, sft.check(config), progress=False)
    except RuntimeError as e:
        if not wrong: raise
        seen["now"] = str(e)
    finally:
        if wrong: hub.four_bit_config = right
        trainer.Exact.training_step = right_step
    seen[config.name] = seen.pop("now", None)
import torch

if torch.distributed.get_rank() == 0: Path(config.folder, "seen.json").write_text(json.dumps(seen))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
