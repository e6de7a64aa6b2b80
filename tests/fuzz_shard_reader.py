"""Fuzz target for the shard reader: whatever a file holds, it is read as it stands or refused by a ShardError.

    python tests/fuzz_shard_reader.py --seconds 60            # with mutations of this file's own
    python tests/fuzz_shard_reader.py --atheris -runs=100000  # pip install atheris: guided by coverage, libFuzzer's options

The test-suite runs it for a few seconds (tests/test_build_shards.py).
"""
import os
import random
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from daisy import shards
from daisy.shards import HEADER_BYTES, MAGIC, MASKED_VERSION, VERSION, ShardError

FOLDER = tempfile.TemporaryDirectory()
PATH = Path(FOLDER.name) / "fuzzed.bin"


def test_one_input(data: bytes):
    "The target. Anything but a ShardError of one line is a defect, and so are tokens that don't stand in the file."
    PATH.write_bytes(data)
    for vocab_size in (None, 1, 50_257):
        try:
            tokens = shards.read_shard(PATH, vocab_size)
        except ShardError as error:
            assert "\n" not in str(error) and PATH.name in str(error), error
            continue
        magic, version, num_tokens = struct.unpack("<3i", data[:12])
        assert (magic, num_tokens) == (MAGIC, len(tokens)) and version in (VERSION, MASKED_VERSION) and len(tokens) == shards.shard_length(PATH) > 0
        bits = (len(tokens) + 7) // 8 * (version == MASKED_VERSION)
        assert tokens.tobytes() == data[HEADER_BYTES:HEADER_BYTES + 2 * len(tokens)] and not tokens.flags.writeable
        assert len(data) == HEADER_BYTES + 2 * len(tokens) + bits
        try:
            mask = shards.read_mask(PATH)
            assert (mask is None) == (bits == 0) and shards.scored_tokens(mask, 0, len(tokens)).any()
        except ShardError as error:
            assert "\n" not in str(error) and PATH.name in str(error), error
        assert vocab_size is None or tokens.max() < vocab_size
        assert len(shards.document_starts(tokens, 0)) == np.count_nonzero(tokens == 0)


def mutated(rng: random.Random) -> bytes:
    "A good shard with some of its bytes changed, its counts shifted, its ends cut or stretched, or no shard at all."
    if rng.random() < 0.05: return rng.randbytes(rng.choice([0, 1, 11, 12, 1023, 1024, 1025, 1500]))
    num_tokens = rng.randrange(0, 40)
    version = rng.choice([VERSION, MASKED_VERSION])
    ints = [MAGIC, version, num_tokens]
    if rng.random() < 0.5: ints[rng.randrange(3)] = rng.choice([rng.randrange(-2**31, 2**31), num_tokens + rng.randint(-2, 2), 0, 2**31 - 1, -1])
    data = bytearray(struct.pack("<3i", *ints).ljust(HEADER_BYTES, b"\0") + rng.randbytes(2 * num_tokens + (num_tokens + 7) // 8 * (version == MASKED_VERSION)))
    for _ in range(rng.choice([0, 0, 1, 3])): data[rng.randrange(len(data))] = rng.randrange(256)
    cut = rng.choice([0, 0, 0, 1, 2, 3, rng.randrange(len(data) + 1)])
    return bytes(data[:len(data) - cut]) + rng.randbytes(rng.choice([0, 0, 0, 1, 2]))


def fuzz(seconds: float, seed: int) -> int:
    "Mutate for `seconds`; returns how many inputs were tried. A failing one is named by its seed and number."
    rng, tried, end = random.Random(seed), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutated(rng)
        try:
            test_one_input(data)
        except Exception as error:
            raise AssertionError(f"seed {seed}, input {tried}, {data[:16].hex()}… of {len(data)} bytes: {error!r}") from error
        tried += 1
    return tried


def main():
    if "--atheris" in sys.argv:
        import atheris
        sys.argv.remove("--atheris")
        for name in ("shard_length", "read_shard", "document_starts"):
            setattr(shards, name, atheris.instrument_func(getattr(shards, name)))
        seeds = Path(FOLDER.name, "seeds")  # from which libFuzzer mutates
        seeds.mkdir()
        for i in range(20): (seeds / str(i)).write_bytes(mutated(random.Random(i)))
        atheris.Setup([*sys.argv, str(seeds)], test_one_input)
        atheris.Fuzz()
    seconds = float(sys.argv[sys.argv.index("--seconds") + 1]) if "--seconds" in sys.argv else 10.0
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"{fuzz(seconds, seed):,} inputs with seed {seed}, each read or refused")


if __name__ == "__main__":
    main()
