"""What the tests of the launcher start: ``python -m tests.support.rank FOLDER WHAT``.

Each rank writes its process id into FOLDER; then it ends as WHAT says, ``2:1`` being rank 1's
status 2, ``hang`` none.
"""

import os
import sys
import threading
from pathlib import Path

from sapo_megatron.launcher import join, noting

if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[2]
    join()
    rank = int(os.environ["RANK"])
    with noting(folder, rank):
        (folder / f"{rank}.tmp").write_text(str(os.getpid()))
        (folder / f"{rank}.tmp").rename(folder / f"{rank}.pid")
        status, _, failing = what.partition(":")
        if what == "hang" or (failing and int(failing) != rank):
            threading.Event().wait()
        if status == "9":
            os.kill(os.getpid(), 9)
        if status == "raise":
            raise ValueError("of this\nrank")
        sys.exit(int(status))
