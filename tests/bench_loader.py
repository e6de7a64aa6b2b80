"""Measure the loader, encoding and the training of a vocabulary, and append the rows to results/data.jsonl.

    python tests/bench_loader.py                       # everything, about five minutes and 10 GB of disk
    python tests/bench_loader.py loader encode         # some of: loader, open, memory, encode, bpe
    python tests/bench_loader.py memory --gb 1 --dry   # smaller, and written to the screen alone

Nothing else should run meanwhile: rates are medians of `--repeats` of wall time. Shards go to a temporary folder, are
in the system's cache when they are read, and are deleted afterwards.
"""
import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from daisy.corpus import python_docs
from daisy.shards import document_starts, read_shard, write_shard
from daisy.tokens import encode_documents, train_encoding

# `encode` starts processes that import this file again: what needs torch is imported where it is used, so that they start fast.

ROOT = Path(__file__).parent.parent
SHAPES = (32, 1024), (16, 2048), (1, 65_536)
SHARD_TOKENS, VOCAB_SIZE, EOS = 100_000_000, 50_257, 0
DOCUMENTS = {"short": 60, "long": 1000}  # mean length in tokens


def common() -> dict:
    import torch

    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
                 platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "date": str(date.today()), "machine": f"{model}, {os.cpu_count()} cores", "gpus": 0,
            "torch": torch.__version__}


def random_tokens(mean_length: int, seed: int = 0) -> np.ndarray:
    "A shard of uniform ids in documents of random lengths."
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCAB_SIZE, SHARD_TOKENS, dtype=np.uint16)
    tokens[rng.random(SHARD_TOKENS, dtype=np.float32) < 1 / mean_length] = EOS
    tokens[0] = EOS
    return tokens


def seconds(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def median_seconds(function, repeats: int) -> float:
    return statistics.median(seconds(function) for _ in range(repeats))


# the loader

def tokens_per_second(files, batch_size, seq_len, **options) -> float:
    "Over two shards, so that one change of shards is in it; from the first batch on."
    from daisy.loader import TokenLoader

    with_ranks = batch_size * seq_len * options.get("world_size", 1)
    loader = TokenLoader(files, batch_size, seq_len, eos_id=EOS, **options)
    next(loader)
    steps = 2 * SHARD_TOKENS // with_ranks
    rate = steps * with_ranks / seconds(lambda: [None for _ in itertools.islice(loader, steps)])
    loader.close()
    return rate


def bench_loader(folder, args):
    for documents, mean_length in DOCUMENTS.items():
        path = folder / f"{documents}.bin"
        write_shard(path, random_tokens(mean_length))
        cases = [*itertools.product(SHAPES, ("pack", "stream"), (False, True), (1,)), (SHAPES[0], "pack", True, 8)]
        for (batch_size, seq_len), mode, check, world_size in cases:
            rates = [tokens_per_second([path, path], batch_size, seq_len, mode=mode, world_size=world_size,
                                       vocab_size=VOCAB_SIZE if check else None) for _ in range(args.repeats)]
            yield {"name": "loader", "documents": documents, "mean_document_tokens": mean_length, "batch_rows": batch_size,
                   "max_seq_len": seq_len, "batch_tokens": batch_size * seq_len, "mode": mode, "world_size": world_size,
                   "vocab_check": check, "tok_s": round(statistics.median(rates)), "runs": len(rates)}


def bench_open(folder, args):
    "Where the time goes that a shard takes before its first row."
    from daisy.loader import plan_rows

    for documents, mean_length in DOCUMENTS.items():
        path = folder / f"open_{documents}.bin"
        write_shard(path, random_tokens(mean_length))
        starts = document_starts(read_shard(path), EOS)
        parts = {"vocab_check_s": lambda: read_shard(path, VOCAB_SIZE), "document_starts_s": lambda: document_starts(read_shard(path), EOS),
                 "plan_rows_s": lambda: plan_rows(SHARD_TOKENS, starts, 1024)}
        yield {"name": "open", "documents": documents, "mean_document_tokens": mean_length, "max_seq_len": 1024, "tokens": SHARD_TOKENS,
               **{part: round(median_seconds(function, args.repeats), 4) for part, function in parts.items()}, "runs": args.repeats}


def private_mb() -> float:
    "RssAnon: memory of this process alone, without mapped files."
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))


def read_all(files, batch_size, seq_len):
    "One epoch, in a process of its own: tokens a second, private memory after the 100th batch, at its highest and at the end."
    from daisy.loader import TokenLoader

    loader, seen_mb = TokenLoader(files, batch_size, seq_len, eos_id=EOS, vocab_size=VOCAB_SIZE), []
    begin = time.perf_counter()
    for steps, batch in enumerate(loader, 1):
        if steps % 100 == 0: seen_mb.append(private_mb())
        if batch.position["epoch"]: break
    elapsed = time.perf_counter() - begin
    loader.close()
    return {"tok_s": round(steps * batch_size * seq_len / elapsed), "rss_start_mb": round(seen_mb[0], 1),
            "rss_max_mb": round(max(seen_mb), 1), "rss_end_mb": round(seen_mb[-1], 1)}


def bench_memory(folder, args):
    tokens, files = random_tokens(DOCUMENTS["short"]), []
    for i in range(max(1, round(args.gb * 1e9 / (2 * SHARD_TOKENS)))):
        files.append(folder / f"train_{i:03d}.bin")
        write_shard(files[-1], np.roll(tokens, i * 12_345))
    del tokens
    with get_context("spawn").Pool(1) as pool:
        measured = pool.apply(read_all, (files, 16, 2048))
    for file in files: file.unlink()
    yield {"name": "memory", "documents": "short", "batch_rows": 16, "max_seq_len": 2048, "mode": "pack", "vocab_check": True,
           "shards": len(files), "bytes": len(files) * 2 * SHARD_TOKENS, **measured, "runs": 1}


# tokens

def cpu_seconds() -> float:
    "Of this process and of those that it has waited for: what other programs do on the machine doesn't count."
    return sum(os.times()[:4])


def tiktoken_rate(encoding, texts) -> float:
    "Bytes a second of tiktoken alone, in one process."
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    return num_bytes / seconds(lambda: [encoding.encode_ordinary(text) for text in texts])


def bench_encode(folder, args):
    texts = [document.text for document in python_docs()]
    encoding = train_encoding(texts, 4096, "python_docs")
    texts *= 32
    num_bytes, processes = sum(len(text.encode("utf-8")) for text in texts), os.cpu_count()

    def tiktoken():
        begin, cpu = time.perf_counter(), cpu_seconds()
        for text in texts: encoding.encode_ordinary(text)
        return time.perf_counter() - begin, cpu_seconds() - cpu

    def ours(num_processes):
        "Seconds to the first document, seconds from there to the last, seconds of all processors."
        begin, cpu = time.perf_counter(), cpu_seconds()
        documents = encode_documents(encoding, texts, num_processes)
        next(documents)
        first = time.perf_counter()
        for _ in documents: pass
        return first - begin, time.perf_counter() - first, cpu_seconds() - cpu

    def side_by_side():
        "The sum of what tiktoken does in as many processes that exchange nothing: the most that these cores can give."
        with get_context("spawn").Pool(processes) as pool:
            return sum(pool.starmap(tiktoken_rate, [(encoding, texts)] * processes, chunksize=1))

    runs = [(side_by_side(), *tiktoken(), sum(ours(1)[:2]), *ours(processes)) for _ in range(args.repeats)]
    apart_bytes_s, tiktoken_s, tiktoken_cpu_s, one_s, start_s, many_s, many_cpu_s = map(statistics.median, zip(*runs))
    yield {"name": "encode", "vocab_size": 4096, "bytes": num_bytes, "processes": processes,
           "tiktoken_bytes_s": round(num_bytes / tiktoken_s), "one_process_bytes_s": round(num_bytes / one_s),
           "bytes_s": round(num_bytes / many_s), "start_s": round(start_s, 2), "with_start_bytes_s": round(num_bytes / (start_s + many_s)),
           "of_cores_times_tiktoken": round(tiktoken_s / many_s / processes, 3), "tiktoken_side_by_side_bytes_s": round(apart_bytes_s),
           "tiktoken_cpu_s": round(tiktoken_cpu_s, 2), "cpu_s": round(many_cpu_s, 2), "runs": args.repeats}


def bench_bpe(folder, args):
    texts = [document.text for document in python_docs()]
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    train_s = median_seconds(lambda: train_encoding(texts, 4096, "python_docs"), args.repeats)
    yield {"name": "bpe", "vocab_size": 4096, "bytes": num_bytes, "train_s": round(train_s, 2), "runs": args.repeats}


def main():
    benches = {"loader": bench_loader, "open": bench_open, "memory": bench_memory, "encode": bench_encode, "bpe": bench_bpe}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*benches, []], help="which to run; all by default")
    parser.add_argument("--gb", type=float, default=10, help="of shards for `memory` (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is taken (%(default)s)")
    parser.add_argument("--folder", help="for temporary shards, on a disk that has room")
    parser.add_argument("--dry", action="store_true", help="write no results")
    args = parser.parse_args()
    command = " ".join(["python tests/bench_loader.py", *sys.argv[1:]])
    shared = common()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name in args.what or benches:
            for row in benches[name](Path(folder), args):
                line = json.dumps({"name": row["name"], "command": command, **shared, "load_average": round(os.getloadavg()[0], 1), **row})
                print(line, flush=True)
                if not args.dry:
                    with (ROOT / "results" / "data.jsonl").open("a") as file: file.write(line + "\n")


if __name__ == "__main__":
    main()
