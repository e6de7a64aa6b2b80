"""Milliseconds of the loss over one chunk of logits on a GPU, by torch's formulation and by the kernel in several block sizes.

    python tests/bench_loss.py [--tokens 16384] [--vocab_size 50257] [--save]

With --save each becomes a row `loss over logits` of results/model.jsonl, which lesson 09 shows.
"""
import argparse
import math
from pathlib import Path

import torch

import daisy.gpt as gpt
from daisy.loader import IGNORE
from daisy.speed import append_row, current_commit, median_seconds, result_row

RESULTS = Path(__file__).parent.parent / "results" / "model.jsonl"


def without_maximum(logits, targets, cap, vocab_size, share):
    "The same by torch in two loops over a row instead of three: capped logits overflow no exponential."
    z = logits.float()
    shrink = cap * torch.rsqrt(z.square() + cap * cap)
    column = torch.arange(logits.size(1), device=logits.device, dtype=torch.int32)
    z = torch.where(column < vocab_size, shrink * z, -math.inf)
    log_sum = z.exp().sum(dim=1, keepdim=True).log()
    scored, hit = targets != IGNORE, column == targets.int().unsqueeze(1)
    losses = torch.where(scored, log_sum[:, 0] - torch.where(hit, z, 0.0).sum(dim=1), 0.0)
    slope = ((z - log_sum).exp() - hit.float()) * shrink ** 3 * (scored * share).unsqueeze(1)
    return losses, slope.to(logits.dtype)


def loss_row(how, ms, args, width, device, commit):
    "What lesson 09 reads: milliseconds, and the bytes of one read and one write of the bfloat16 logits in that time."
    command = f"python tests/bench_loss.py --tokens {args.tokens} --vocab_size {args.vocab_size} --save"
    return result_row("loss over logits", command, device, commit, how=how, tokens=args.tokens, vocab_size=args.vocab_size, ms=round(ms, 4),
                      gb_s=round(2 * 2 * args.tokens * width / ms / 1e6, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--vocab_size", type=int, default=50_257)
    parser.add_argument("--save", action="store_true", help="add the rows to results/model.jsonl")
    parser.add_argument("--commit", help="what the rows say of the code's commit, where git can't")
    args = parser.parse_args()
    commit = args.commit or current_commit()  # before the first row makes the tree differ from it
    device, width = torch.device("cuda"), math.ceil(args.vocab_size / 64) * 64
    logits = torch.randn(args.tokens, width, device=device).bfloat16()
    targets = torch.randint(0, args.vocab_size, (args.tokens,), device=device)
    targets[::7] = IGNORE
    share, cap = torch.tensor(1 / args.tokens, device=device), 15.0
    loss, slope = gpt._loss_and_slope(logits[:256], targets[:256], cap, args.vocab_size, share)

    def save(how, ms):
        if args.save: append_row(RESULTS, loss_row(how, ms, args, width, device, commit))

    def show(name, function):
        got, got_slope = function(logits[:256], targets[:256], cap, args.vocab_size, share)
        off = ((got_slope - slope).float().norm() / slope.float().norm()).item()
        ms = 1e3 * median_seconds(lambda: function(logits, targets, cap, args.vocab_size, share), device)
        print(f"{name:40} {ms:7.3f} ms   loss off by {abs(got.sum() / loss - 1):.1e}, slope by {off:.1e}", flush=True)
        save(name, ms)

    show("torch, compiled", torch.compile(gpt._loss_and_slope, fullgraph=True, dynamic=False))
    show("torch without maximum, compiled", torch.compile(without_maximum, fullgraph=True, dynamic=False))
    for block, warps in ((4096, 32), (8192, 32), (2048, 16), (4096, 16), (8192, 16), (4096, 8), (16384, 32)):
        gpt.LOSS_BLOCK, gpt.LOSS_WARPS = block, warps
        show(f"triton, block {block}, {warps} warps", gpt.fused_loss_and_slope)
    copy = torch.empty_like(logits)
    ms = 1e3 * median_seconds(lambda: copy.copy_(logits), device)
    print(f"{'one read and one write':40} {ms:7.3f} ms")
    save("one read and one write", ms)


if __name__ == "__main__":
    main()
