"""A rank of `test_bench_parallel.py` that does not do what it should: it is killed, or waits for ever."""

import os
import signal
import time

if __name__ == "__main__":
    if os.environ["SHARING_TROUBLE"] == "killed" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
