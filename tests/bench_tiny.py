"""Measure config/tiny.yml as a user would run it and append one line to results/tiny.jsonl.

    python tests/bench_tiny.py                         # the default, on whatever this machine has
    python tests/bench_tiny.py --name adamw optimizer=adamw hidden_matrix_params_lr=0.003
    python tests/bench_tiny.py --plot                  # only draw assets/tiny_loss.png from what is measured

Nothing else should run meanwhile: it reports seconds. Shards and checkpoints go to a temporary folder.
"""
import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from daisy.checkpoint import load_checkpoint
from daisy.config import load_config
from daisy.real_run import compressor_bits_per_byte, prepare_data, sample_main, validation_text
from daisy.shards import shard_files
from daisy.tokens import encoding_from_json

ROOT = Path(__file__).parent.parent
SAMPLE_STEPS = 5


def machine() -> str:
    "Processor, cores and, where there is one, GPU."
    name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
                platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}"


def import_seconds(module: str) -> float:
    "Wall time of a fresh interpreter that imports `module`, the best of three."
    def once():
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        return time.perf_counter() - start
    return min(once() for _ in range(3))


def run_once(folder: Path, overrides: list[str]) -> tuple[float, list[dict]]:
    "Train through run.sh with the default globs inside `folder`; seconds to the first logged step, and the log."
    command = [str(ROOT / "run.sh"), str(ROOT / "config" / "tiny.yml"), "keep_checkpoints=1000", *overrides]
    log, start, first_step_s = folder / "checkpoints" / "metrics.jsonl", time.perf_counter(), None
    process = subprocess.Popen(command, cwd=folder)
    while process.poll() is None:
        if first_step_s is None and log.exists() and '"loss"' in log.read_text():
            first_step_s = time.perf_counter() - start
        time.sleep(0.05)
    if process.returncode:
        sys.exit(process.returncode)
    return first_step_s, [json.loads(line) for line in log.read_text().splitlines()]


def samples(folder: Path, prompt: str) -> list[list]:
    "What checkpoints along the way write after `prompt`, as [step, text]."
    paths = sorted((folder / "checkpoints").glob("state_step_*.pt"), key=lambda path: int(path.stem.split("_")[-1]))
    chosen = [paths[round(i * (len(paths) - 1) / (SAMPLE_STEPS - 1))] for i in range(SAMPLE_STEPS)]
    texts = []
    for path in dict.fromkeys(chosen):
        with contextlib.redirect_stdout(io.StringIO()) as written:
            sample_main([str(path), "--raw", "--prompt", prompt, "--max_tokens", "60", "--seed", "1"])
        texts.append([int(path.stem.split("_")[-1]), written.getvalue().strip()])
    return texts


def plot():
    "The first measured run as a picture for the README."
    import matplotlib.pyplot as plt

    from daisy.lesson import PALETTE, use_style

    use_style()
    row = json.loads((ROOT / "results" / "tiny.jsonl").read_text().splitlines()[0])
    fig, ax = plt.subplots(figsize=(8, 3.6))
    ax.plot(*zip(*row["train_loss_by_step"]), color=PALETTE[0], alpha=0.4, lw=1, label="training")
    ax.plot(*zip(*row["val_loss_by_step"]), "o-", color=PALETTE[3], label="validation")
    nats_per_bpb = row["val_loss"] / row["val_bpb"]
    for name, style in (("gzip", ":"), ("xz", "--")):
        ax.axhline(row[f"{name}_bpb"] * nats_per_bpb, color="grey", ls=style, label=f"{name} -9, {row[f'{name}_bpb']:.2f} bits per byte")
    ax.set(xlabel="step", ylabel="loss (nats a token)", ylim=(2.5, 8),
           title=f"config/tiny.yml: {row['val_bpb']:.2f} bits per byte after {row['train_s']:.0f} s on {row['machine']}")
    ax.legend()
    (ROOT / "assets").mkdir(exist_ok=True)
    fig.savefig(ROOT / "assets" / "tiny_loss.png", dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="muon", help="the curve's name in plots")
    parser.add_argument("overrides", nargs="*", help="key=value, as for run.sh")
    parser.add_argument("--plot", action="store_true", help="draw assets/tiny_loss.png and measure nothing")
    args = parser.parse_args()
    if args.plot:
        return plot()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare_data(load_config(ROOT / "config" / "tiny.yml", [f"train_files={folder}/data/python_docs/train_*.bin"]))
        first_step_s, log = run_once(folder, args.overrides)
        config = load_config(ROOT / "config" / "tiny.yml", args.overrides)
        steps, vals = [row for row in log if "loss" in row], [row for row in log if "val_loss" in row]
        saved = load_checkpoint(folder / "checkpoints" / f"state_step_{vals[-1]['step']}.pt")
        text = validation_text(shard_files(str(folder / config.val_files)), encoding_from_json(saved["encoding"]), config.val_tokens)
        yardsticks = compressor_bits_per_byte(text)
        row = dict(
            name=args.name, command=" ".join(["./run.sh config/tiny.yml", *args.overrides]),
            commit=subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
            date=str(date.today()), machine=machine(), gpus=torch.cuda.device_count(), torch=torch.__version__,
            python=platform.python_version(), num_layers=config.num_layers, model_dim=config.model_dim, max_seq_len=config.max_seq_len,
            batch_tokens=config.global_batch_size * config.max_seq_len, params=sum(t.numel() for t in saved["model"].values()),
            steps=config.num_iterations, seed=config.seed, val_loss=vals[-1]["val_loss"], val_bpb=round(vals[-1]["val_bpb"], 4),
            gzip_bpb=round(yardsticks["gzip -9"], 4), xz_bpb=round(yardsticks["xz -9"], 4), train_s=vals[-1]["train_s"],
            tok_s=round(statistics.median(row["tok_s"] for row in steps)), first_step_s=round(first_step_s, 1),
            import_daisy_s=round(import_seconds("daisy"), 2), import_torch_s=round(import_seconds("torch"), 2),
            val_curve=[[row["train_s"], round(row["val_bpb"], 4)] for row in vals],
            val_loss_by_step=[[row["step"], round(row["val_loss"], 4)] for row in vals],
            train_loss_by_step=[[row["step"], round(row["loss"], 3)] for row in steps[::max(1, len(steps) // 200)]],
            samples=samples(folder, config.sample_prompt))
    with (ROOT / "results" / "tiny.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps({key: value for key, value in row.items() if not isinstance(value, list)}, indent=1))


if __name__ == "__main__":
    main()
