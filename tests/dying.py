"""A process of a pool that dies in the middle of a message; used by test_tokens.py and test_build_shards.py."""
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def dies_while_sending(_):
    "In place of a worker's task: half a message in the pipe, its lock held for ever, and gone."
    frame = sys._getframe()
    while "result_queue" not in frame.f_locals: frame = frame.f_back
    queue = frame.f_locals["result_queue"]
    queue._wlock.acquire()
    os.write(queue._writer.fileno(), struct.pack("!i", 1_000_000) + b"half")
    os.kill(os.getpid(), signal.SIGKILL)


def run_script(folder, body):
    "Run `body` as a main program in `folder`, where it can import the package and this module."
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    (folder / "script.py").write_text(f'import dying\nfrom daisy import shards, tokens\n\nif __name__ == "__main__":\n{lines}\n')
    return subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=200,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])})
