"""Start a run in forks of this process, which has imported everything once, and kill each at another moment; used by test_real_run.py.

    python tests/kills.py CONFIG FOLDER NUMBER SEED
"""
import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

from daisy.real_run import train_main


def fork(config, folder):
    "A child that trains; what it says goes nowhere."
    if child := os.fork(): return child
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        os._exit(train_main([config, f"checkpoint_dir={folder}"]))


def ended(child) -> int | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def kill_at(moment, child, folder, is_saving) -> bool:
    "SIGKILL after `moment` seconds, or in the next save after them; False if the run was over before."
    began = time.monotonic()
    while (over := ended(child)) is None:
        if time.monotonic() - began >= moment and (not is_saving or any(Path(folder).glob("*.tmp"))):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.0002)
    assert over == 0, over
    return False


def main(config, folder, number, seed):
    draw, kills, saving, whole = random.Random(int(seed)), 0, 0, None
    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(fork(config, f"{folder}/undisturbed"), 0)[1]) == 0
    whole = time.monotonic() - began
    run = 0
    while kills < int(number):
        run += 1
        for _ in range(3):  # of one run, as often as it lives; then it may end
            is_saving = kills % 2 == 1
            if kill_at(draw.uniform(0, 0.8 * whole), child := fork(config, f"{folder}/{run}"), f"{folder}/{run}", is_saving):
                kills, saving = kills + 1, saving + is_saving
        with contextlib.suppress(ChildProcessError):
            assert os.waitstatus_to_exitcode(os.waitpid(fork(config, f"{folder}/{run}"), 0)[1]) == 0
    print(kills, saving, run)


main(*sys.argv[1:])
