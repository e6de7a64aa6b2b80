"""Measure `daisy-build-shards` on synthetic JSONL: rate, tokens, and the private memory of all its processes together.

    python tests/bench_build.py 0.5                       # GB of input; one row is added to results/data.jsonl
    python tests/bench_build.py 10 --folder /scratch      # needs about twice the input of disk there, and frees it

Documents are cut from the Python docs, most a few kB and some a hundred times longer; one in ten repeats an earlier one.
Nothing else should run meanwhile: it reports seconds.
"""
import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from daisy.corpus import python_docs

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from daisy.shards import main; sys.exit(main())"


def machine() -> str:
    "Processor and cores."
    name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
                platform.processor())
    return f"{name}, {os.cpu_count()} cores"


def write_jsonl(path: Path, num_bytes: int, seed: int = 0):
    "About `num_bytes` of JSON lines: slices of the Python docs, lengths log-normal with a median of 2 kB, 10% repeats."
    rng, text = random.Random(seed), json.dumps("\n".join(document.text for document in python_docs()))[1:-1]
    recent, written, number = [], 0, 0
    with open(path, "w", encoding="ascii", buffering=1 << 20) as file:
        while written < num_bytes:
            if recent and rng.random() < 0.1:
                line = rng.choice(recent)
            else:
                length = min(int(rng.lognormvariate(7.6, 1.2)), 400_000)
                start = rng.randrange(len(text) - length)
                # a number makes each one different; a cut may leave half an escape at either end
                body = text[start:start + length].partition(" ")[2].rpartition(" ")[0]
                line = f'{{"id": {number}, "text": "{number} {body}"}}\n'
                number += 1
                if len(recent) < 10_000: recent.append(line)
                elif number % 10 == 0: recent[rng.randrange(10_000)] = line
            file.write(line)
            written += len(line)


def rss_anon_mb(pid: int) -> dict[int, float]:
    "Private memory of the process `pid` and of all below it, in MB, by process."
    found, todo = {}, [pid]
    while todo:
        pid = todo.pop()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
        except OSError:  # it has just ended
            continue
        lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
        if lines: found[pid] = int(lines[0].split()[1]) * 1024 / 1e6
    return found


def build(source: Path, out_dir: Path, options: list[str]) -> dict:
    "Run the command; its seconds, the highest memory of all its processes at once, and when each stage began."
    begin, peak, curve, stages = time.perf_counter(), {}, [], {}
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(source), str(out_dir), "--quiet", *options],
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    staging = out_dir / ".building"
    while process.poll() is None:
        now, seconds = rss_anon_mb(process.pid), time.perf_counter() - begin
        if sum(now.values()) > sum(peak.values()): peak = now
        if not curve or seconds > curve[-1][0] * 1.02 + 0.2: curve.append([round(seconds, 1), round(sum(now.values()), 1)])
        if "read_s" not in stages and (staging / "state.json").exists(): stages["read_s"] = round(seconds, 1)
        if "encoded_s" not in stages and next(staging.glob("*.bin"), None): stages["encoded_s"] = round(seconds, 1)
        time.sleep(0.05)
    if process.returncode: sys.exit(process.returncode)
    return dict(seconds=round(time.perf_counter() - begin, 1), rss_anon_mb=round(sum(peak.values()), 1), **stages,
                rss_anon_each_mb=[round(mb, 1) for mb in peak.values()], rss_anon_curve_mb=curve)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gigabytes", type=float, help="of input")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--folder", help="where the input and the shards go, and are removed")
    parser.add_argument("--note", help="to be kept in the row, such as what else ran")
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source, out_dir = Path(folder, "synthetic.jsonl"), Path(folder, "shards")
        write_jsonl(source, int(args.gigabytes * 1e9))
        measured = build(source, out_dir, ["--vocab-size", str(args.vocab_size), "--processes", str(args.processes)])
        manifest, source_bytes = json.loads((out_dir / "manifest.json").read_text()), source.stat().st_size
        tokens = sum(manifest["tokens"].values())
    row = dict(
        name="build_shards", command=" ".join(["python tests/bench_build.py", *sys.argv[1:]]), commit=commit,
        date=str(date.today()), machine=machine(), gpus=0, torch=torch.__version__, python=platform.python_version(),
        what="JSONL to shards, encoding trained on a sample", processes=args.processes, vocab_size=args.vocab_size,
        source_bytes=source_bytes, documents=sum(manifest["documents"].values()), tokens=tokens,
        bytes_s=round(source_bytes / measured["seconds"]), tok_s=round(tokens / measured["seconds"]), **measured)
    if args.note: row["note"] = args.note
    with (ROOT / "results" / "data.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps({key: value for key, value in row.items() if key != "rss_anon_curve_mb"}, indent=1))


if __name__ == "__main__":
    main()
