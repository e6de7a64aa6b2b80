"""Train small GPTs of several widths at several learning rates of their matrices; append rows to results/optimizers.jsonl.

    python tests/bench_lr_transfer.py                      # Muon and AdamW, three widths, two seeds: about an hour on one core
    python tests/bench_lr_transfer.py --variants muon --widths 64 --seeds 0

Only the rate of the hidden matrices varies; the rest of the model keeps the rates below. Losses don't depend on what
else runs on the machine, so this needs no quiet.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

from daisy.gpt import GPT, GPTConfig
from daisy.loader import TokenLoader, validation_batches
from daisy.optim import build_optimizers
from daisy.schedules import Schedule, set_hyperparameters
from daisy.shards import build_corpus_shards, shard_files
from daisy.tokens import load_encoding
from daisy.trainer import evaluate

ROOT = Path(__file__).parent.parent
RATES = {"muon": (0.01, 0.02, 0.04, 0.08, 0.16), "adamw": (0.002, 0.004, 0.008, 0.016, 0.032)}
OTHERS = dict(embed_params_lr=0.3, value_embed_lr=0.15, scalar_params_lr=0.015, head_params_lr=0.008)
VOCAB, LAYERS, ROWS, SEQ_LEN, STEPS, VAL_TOKENS = 512, 4, 16, 128, 120, 16_384


def run_once(folder: Path, eos_id: int, variant: str, width: int, lr: float, seed: int) -> tuple[GPT, float]:
    "The trained model and its validation loss in nats a token."
    torch.manual_seed(seed)
    model = GPT(GPTConfig(VOCAB, num_layers=LAYERS, num_heads=width // 32, head_dim=32, model_dim=width, max_seq_len=SEQ_LEN,
                          eos_token_id=eos_id), seed=seed)
    optimizers = build_optimizers(model, optimizer=variant, hidden_matrix_params_lr=lr, **OTHERS)
    schedule = Schedule(STEPS, momentum_warmup_steps=50)
    train = shard_files(f"{folder}/train_*.bin")
    loader = TokenLoader(train, ROWS, SEQ_LEN, eos_id=eos_id, prefetch=0)
    for _ in range(seed * STEPS): next(loader)                       # every seed reads other rows
    for step in range(STEPS):
        set_hyperparameters(optimizers, schedule, step)
        batch = next(loader)
        model(batch.inputs, batch.targets).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    batches = validation_batches(shard_files(f"{folder}/val_*.bin"), ROWS, SEQ_LEN, max_tokens=VAL_TOKENS)
    return model, evaluate(model, batches, torch.device("cpu")).loss


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=["muon", "adamw"], choices=sorted(RATES))
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256], help="model_dim, in multiples of 32")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        build_corpus_shards("python_docs", folder, vocab_size=VOCAB, progress=False)
        eos_id = load_encoding(Path(folder) / "encoding.json").eot_token
        for seed in args.seeds:
            for width in args.widths:
                for variant, lr in ((variant, lr) for variant in args.variants for lr in RATES[variant]):
                    model, loss = run_once(Path(folder), eos_id, variant, width, lr, seed)
                    row = dict(name="lr_transfer", command=" ".join(["python", "tests/bench_lr_transfer.py", *sys.argv[1:]]), commit=commit,
                               date=str(date.today()), machine="CPU, float32", gpus=0, torch=torch.__version__, num_layers=LAYERS,
                               model_dim=width, max_seq_len=SEQ_LEN, batch_tokens=ROWS * SEQ_LEN, steps=STEPS, vocab_size=VOCAB,
                               params=sum(p.numel() for p in model.parameters()),
                               matrix_params=sum(p.numel() for n, p in model.named_parameters() if n.startswith("blocks") and "gate" not in n),
                               variant=variant, seed=seed, lr=lr, val_loss=round(loss, 4), val_tokens=VAL_TOKENS)
                    with (ROOT / "results" / "optimizers.jsonl").open("a") as file: file.write(json.dumps(row) + "\n")
                    print(f"{variant} width {width} seed {seed} lr {lr}: {loss:.3f}", flush=True)


if __name__ == "__main__":
    main()
