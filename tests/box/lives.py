"Run by torchrun in the tests: processes that end as they are told, without loading a library"
import os
import signal
import sys
import time
from pathlib import Path

from llmbench.box.launch import die_with_parent

die_with_parent()
rank, end = os.environ["RANK"], dict(pair.split("=") for pair in sys.argv[2:])
Path(sys.argv[1], rank).write_text(str(os.getpid()))
while len(list(Path(sys.argv[1]).iterdir())) < int(os.environ["WORLD_SIZE"]): time.sleep(.02)  # nobody ends before all are there
print(f"here is {rank} of {os.environ['WORLD_SIZE']}", flush=True)
how = end.get(rank, "sleep")
if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
elif how == "raise": raise RuntimeError("the dog ate it")
elif how == "sleep": time.sleep(60)
else: sys.exit(int(how))
