"""Microseconds of parts of a decode step on a GPU: attention of single tokens, as torch's form compiled and by the kernel in several
sizes, each call after the other in one CUDA graph; and the choice of the k largest logits.

    python tests/bench_one_token.py [--batch 1 64] [--places 768] [--length 640]
"""
import argparse

import torch

import daisy.attention as attention
from daisy.generate import record
from daisy.masks import MaskSpec
from daisy.rope import rope_tables
from daisy.speed import median_seconds

CUDA = torch.device("cuda")


def replayed_us(work, calls=16):
    "Microseconds of one of `calls` calls that a CUDA graph holds, as a step holds its layers'; each works on rings of its own."
    for i in range(calls): work(i)
    torch.cuda.synchronize()
    replay = record(lambda: [work(i) for i in range(calls)])
    return 1e6 * median_seconds(replay, CUDA) / calls


def layers(batch, places, length, heads, head_dim, count=16):
    "Caches of `count` layers, and what a layer is given for a token a row."
    draw = lambda *shape: torch.randn(*shape, device=CUDA).bfloat16()
    lengths = torch.full((batch,), length, device=CUDA)
    piece = attention.Piece(lengths[:, None], torch.zeros_like(lengths)[:, None], lengths, None, None, False)
    arrived = torch.zeros(batch, heads, dtype=torch.int32, device=CUDA)
    caches = [attention.LayerCache(draw(batch, places, heads, head_dim), draw(batch, places, heads, head_dim), MaskSpec(places), piece, places,
                                   arrived) for _ in range(count)]
    rope = tuple(table.to(CUDA)[piece.positions] for table in rope_tables(length + 1, head_dim))
    return caches, draw(batch, 1, 3 * heads * head_dim), rope


def by_torch(qkv, rope, cache):
    q, k, v = qkv.view(len(qkv), 1, 3 * cache.keys.size(2), -1).chunk(3, dim=2)
    q, k = (attention.apply_rope(attention.rms_norm(x), *rope) for x in (q, k))
    return cache.attend(q, k, v, 0.12)


def largest_by_groups(logits, k, size=64):
    "The k largest of logits (B, V): they lie in the k groups whose own largest are the largest."
    padded = torch.nn.functional.pad(logits, (0, -logits.size(1) % size), value=-torch.inf).unflatten(1, (-1, size))
    groups = padded.amax(dim=-1).topk(k, sorted=False).indices  # (B, k)
    values, at = padded.gather(1, groups[:, :, None].expand(-1, -1, size)).flatten(1).topk(k, sorted=False)
    return values, groups.gather(1, at // size) * size + at % size


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--places", type=int, default=768)
    parser.add_argument("--length", type=int, default=640)
    args = parser.parse_args()
    print(torch.cuda.get_device_name())
    for batch in args.batch:
        caches, qkv, rope = layers(batch, args.places, args.length, heads=8, head_dim=128)
        gigabytes = 2 * batch * (args.length + 1) * 8 * 128 * 2 / 1e9

        def show(name, work):
            us = replayed_us(work)
            print(f"batch {batch:3}, {name:44} {us:8.2f} us, {gigabytes / us * 1e6:6.0f} GB/s", flush=True)

        compiled = torch.compile(by_torch, fullgraph=True, dynamic=False)
        show("torch, compiled", lambda i: compiled(qkv, rope, caches[i]))
        expected = by_torch(qkv, rope, caches[0])
        for places, warps in ((16, 1), (16, 2), (32, 1), (32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8)):
            attention.FEW_PLACES = attention.MANY_PLACES = places
            attention.ONE_TOKEN_WARPS = warps
            work = lambda i: caches[i].attend_new_token(qkv, None, None, None, rope, True, 0.12)
            off = ((work(0) - expected).float().norm() / expected.float().norm()).item()
            show(f"kernel, {places} places, {warps} warps, off by {off:.0e}", work)
        logits = torch.randn(batch, 50_257, device=CUDA)
        for name, top in (("topk", lambda: logits.topk(50, sorted=False)), ("topk by groups", lambda: largest_by_groups(logits, 50))):
            print(f"batch {batch:3}, the 50 largest logits by {name:20} {replayed_us(lambda i: top()):8.2f} us", flush=True)
        assert torch.equal(largest_by_groups(logits, 50)[0].sort().values, logits.topk(50).values.flip(1))


if __name__ == "__main__":
    main()
