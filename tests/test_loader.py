"""The loader beyond what its lesson shows: other people's shards, any change of ranks, many files, little memory."""
import contextlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daisy.loader import IGNORE, TokenLoader, _gather, _load_rows, _split, plan_rows, validation_batches
from daisy.shards import ShardError, document_starts, read_shard, write_shard

ROOT = Path(__file__).resolve().parents[1]
EOS = 0
linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")
lengths_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=25)


def one_line(error):
    message = str(error.value)
    assert message and "\n" not in message
    return message


def write_shards(folder, shards_of_lengths):
    "Shards of documents of these lengths; every token of all of them but END_OF_TEXT (0) is another number."
    files, first = [], 1
    for i, lengths in enumerate(shards_of_lengths):
        tokens = np.arange(first, first + sum(lengths))
        tokens[np.cumsum([0, *lengths[:-1]])] = EOS
        first += sum(lengths)
        files.append(Path(folder, f"train_{i:03d}.bin"))
        write_shard(files[-1], tokens)
    return files


def read(files, batch_size, seq_len, world_size, steps, **options):
    "(inputs, targets) of the rows of `steps` global micro-batches in order, and the position after them."
    rows, batches = [], []
    with contextlib.ExitStack() as stack:
        loaders = [stack.enter_context(contextlib.closing(TokenLoader(
            files, batch_size, seq_len, eos_id=EOS, rank=rank, world_size=world_size, **options))) for rank in range(world_size)]
        for _ in range(steps):
            batches = [next(one) for one in loaders]
            assert all(batch.position == batches[0].position for batch in batches)
            for batch in batches: rows += zip(batch.inputs.tolist(), batch.targets.tolist())
    return rows, batches[0].position


# the plan and the copy against the slowest version of each

def plan_token_by_token(tokens, seq_len):
    begins = sorted({0, *np.flatnonzero(np.asarray(tokens) == EOS).tolist()})
    length_at = np.repeat(np.diff([*begins, len(tokens)]), np.diff([*begins, len(tokens)])) if len(tokens) else []
    rows, offset = [], 0
    while offset + seq_len < len(tokens):
        if tokens[offset] == EOS or length_at[offset] > seq_len:
            rows.append(offset)
            offset += seq_len
        else:
            offset += 1
    return rows


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 3), max_size=120), quiet=st.booleans(), seq_len=st.integers(1, 30))
def test_the_plan_is_that_of_a_walk_token_by_token(tokens, quiet, seq_len):
    tokens = [token or 3 for token in tokens] if quiet else tokens  # quiet: the middle of one document
    tokens = np.array(tokens, dtype=np.uint16)
    assert plan_rows(len(tokens), document_starts(tokens, EOS), seq_len).tolist() == plan_token_by_token(tokens, seq_len)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(10, 60), st.integers(0, 5)), min_size=1, max_size=4), seq_len=st.integers(1, 9),
       seed=st.integers(0, 99))
def test_rows_gathered_at_once_are_rows_copied_one_by_one(sizes, seq_len, seed):
    rng = np.random.default_rng(seed)
    parts, rows = [], []
    for num_tokens, count in sizes:
        tokens = rng.integers(0, 65_536, num_tokens, dtype=np.uint16)
        offsets = rng.integers(0, num_tokens - seq_len, count)
        parts.append((np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1), offsets))
        rows += [(tokens, int(offset), seq_len) for offset in offsets]
    out = torch.empty(len(rows), seq_len + 1, dtype=torch.uint16)
    _gather(parts, out.numpy())
    batch = _split(out, {}, torch.device("cpu"))
    inputs, targets = _load_rows(rows, seq_len)
    assert torch.equal(batch.inputs, inputs) and torch.equal(batch.targets, targets)
    assert batch.inputs.dtype == torch.int64 and batch.inputs.is_contiguous() and batch.targets.is_contiguous()


# files that others wrote

def fineweb_bytes(ids):
    "The public format, byte by byte: 256 int32 (20240520, 1, count, zeros), then uint16, all little-endian."
    return struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253) + b"".join(struct.pack("<H", i) for i in ids)


def test_a_fineweb_shard_loads_as_it_is(tmp_path):
    ids = [50256, 464, 3290, 13, 50256, 40000, 65, 32767, 32768, 50255, 50256, 7, 8, 9, 10, 11, 12]
    data = fineweb_bytes(ids)
    assert data[:12].hex() == "88d8340101000000" "11000000" and len(data) == 1024 + 2 * 17 and data[1024:1028].hex() == "50c4d001"
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(data)
    assert read_shard(path, 50_257).tolist() == ids
    for mode, starts in (("stream", [0, 4, 8, 12]), ("pack", [0, 4, 8, 12])):
        with contextlib.closing(TokenLoader([path], 4, 4, eos_id=50_256, mode=mode, vocab_size=50_257)) as one:
            batch = next(one)
        assert batch.inputs.tolist() == [ids[start:start + 4] for start in starts]
        assert batch.targets.tolist() == [ids[start + 1:start + 5] for start in starts]
    batch, = validation_batches([path], 1, 16, vocab_size=50_257)
    assert batch.inputs[0].tolist() == ids[:-1] and batch.targets[0].tolist() == ids[1:]
    assert path.read_bytes() == data


def test_the_stream_is_read_as_one_slice_of_the_file_a_rank_and_step(tmp_path):
    "The way of the public training scripts: rank r of W takes the r-th stretch of B x T tokens, and one more as target."
    ids = np.random.default_rng(0).integers(0, 50_257, 2 * 3 * 4 * 8 + 1)
    (tmp_path / "a.bin").write_bytes(fineweb_bytes(ids.tolist()))
    for rank in range(3):
        with contextlib.closing(TokenLoader([tmp_path / "a.bin"], 4, 8, eos_id=50_256, mode="stream", rank=rank, world_size=3)) as one:
            for step in range(2):
                batch, start = next(one), (3 * step + rank) * 4 * 8
                assert batch.inputs.flatten().tolist() == ids[start:start + 32].tolist()
                assert batch.targets.flatten().tolist() == ids[start + 1:start + 33].tolist()


# ranks that come and go

@settings(max_examples=50, deadline=None)
@given(shard_lengths=st.lists(lengths_strategy, min_size=1, max_size=4), seq_len=st.integers(1, 9), begin_shard=st.integers(1, 6),
       runs=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
       mode=st.sampled_from(["pack", "stream"]), prefetch=st.sampled_from([0, 2]))
def test_a_run_may_stop_and_go_on_on_other_ranks_again_and_again(shard_lengths, seq_len, begin_shard, runs, mode, prefetch):
    with tempfile.TemporaryDirectory() as folder:
        files = write_shards(folder, [[10, 10], *shard_lengths])
        options, rows, position = {"mode": mode, "prefetch": prefetch}, [], None
        for batch_size, world_size, steps in runs:
            some, position = read(files, batch_size, seq_len, world_size, steps, begin_shard=begin_shard, position=position, **options)
            assert len(json.dumps(position)) < 120
            rows, position = rows + some, json.loads(json.dumps(position))
        whole, end = read(files, 1, seq_len, 1, len(rows), begin_shard=begin_shard, **options)
        assert rows == whole and position == end


@settings(max_examples=40, deadline=None)
@given(shard_lengths=st.lists(lengths_strategy, min_size=1, max_size=4), seq_len=st.integers(1, 9),
       batch_size=st.integers(1, 3), world_size=st.integers(1, 8))
def test_in_one_epoch_each_token_of_a_row_is_at_one_rank(shard_lengths, seq_len, batch_size, world_size):
    with tempfile.TemporaryDirectory() as folder:
        files = write_shards(folder, [[10, 10], *shard_lengths])
        planned = []
        for file in files:
            tokens = read_shard(file).tolist()
            planned += [tokens[row:row + seq_len] for row in plan_rows(len(tokens), document_starts(np.array(tokens), EOS), seq_len)]
        rows, _ = read(files, batch_size, seq_len, world_size, -(-len(planned) // (batch_size * world_size)))
        seen = [token for inputs, _ in rows[:len(planned)] for token in inputs if token != EOS]
        assert len(seen) == len(set(seen)) and [inputs for inputs, _ in rows[:len(planned)]] == planned


@pytest.mark.parametrize("position", [
    {"epoch": "1", "shard": 0, "token": 0, "file": "train_000.bin"}, {"epoch": 0, "shard": None, "token": 0, "file": "train_000.bin"},
    {"epoch": 0, "shard": 0, "token": 1.5, "file": "train_000.bin"}, {"epoch": 0, "shard": 0, "token": 0}, [0, 0, 0], "train_000.bin"])
def test_what_is_no_position_is_refused(tmp_path, position):
    files = write_shards(tmp_path, [[20]])
    with pytest.raises(ShardError, match="isn't a loader's position") as error:
        TokenLoader(files, 1, 8, eos_id=EOS, position=position)
    one_line(error)


# shards that are small, broken or gone

@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_batch_is_filled_from_shards_shorter_than_itself(tmp_path, prefetch):
    files = write_shards(tmp_path, [[9], [3, 2], [9], [1], [9, 9]])  # 1, 0, 1, 0 and 2 rows of 8
    rows, position = read(files, 4, 8, 1, 2, prefetch=prefetch)
    firsts = [read_shard(file)[:8].tolist() for file in files]
    assert [inputs for inputs, _ in rows[:3]] == [firsts[0], firsts[2], firsts[4]] and rows[:4] == rows[4:]
    assert (position["epoch"], position["shard"]) == (2, 0)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("spoil, reason", [
    (lambda path: path.unlink(), "No such file"),
    (lambda path: path.write_bytes(b""), "an empty file"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "odd number of bytes"),
    (lambda path: write_shard(path, [0, 1, 60_000]), "id 60,000, at token 2, is beyond the vocabulary of 50,000"),
])
def test_a_later_shard_that_cannot_be_read_is_named_when_its_turn_comes(tmp_path, spoil, reason, prefetch):
    files = write_shards(tmp_path, [[9] * 4, [9] * 3, [9] * 5])
    spoil(files[2])
    rows = 0
    with contextlib.closing(TokenLoader(files, 1, 8, eos_id=EOS, vocab_size=50_000, prefetch=prefetch)) as one:
        with pytest.raises(ShardError, match=reason) as error:
            for _ in one: rows += 1
    assert "train_002.bin" in one_line(error) and rows == 4 + 3


def test_no_shard_is_long_enough(tmp_path):
    files = write_shards(tmp_path, [[5], [8], [3, 3]])
    with pytest.raises(ShardError, match="none of 3 shards has 9 tokens for one row") as error:
        TokenLoader(files, 2, 8, eos_id=EOS)
    one_line(error)


# many files, little memory

WATCHED = """
import os, sys, json
from collections import Counter
import numpy as np
from daisy.loader import TokenLoader
opened = Counter()
sys.addaudithook(lambda event, args: event == "open" and str(args[0]).endswith(".bin") and opened.update([str(args[0])]))
files = [f"{sys.argv[1]}/train_{i:04d}.bin" for i in range(int(sys.argv[2]))]

def state():
    maps = open("/proc/self/maps").read()
    anonymous = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return len(os.listdir("/proc/self/fd")), sum(line.endswith(".bin") for line in maps.splitlines()), anonymous

loader = TokenLoader(files, *map(int, sys.argv[3:5]), eos_id=0, vocab_size=50_257)
batch, states = next(loader), [state()]
started = len(opened)
for number, batch in enumerate(loader):
    if batch.position["epoch"] == 1: break
    if number % 20 == 0: states.append(state())
loader.close()
print(json.dumps({"started": started, "files": len(opened), "most": max(opened.values()), "states": states, "end": state()}))
"""


def watch(folder, num_files, batch_size, seq_len):
    ran = subprocess.run([sys.executable, "-c", WATCHED, *map(str, (folder, num_files, batch_size, seq_len))], cwd=ROOT, timeout=120,
                         capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


@linux
def test_a_pass_over_a_thousand_shards_opens_each_when_needed(tmp_path):
    write_shard(tmp_path / "train_0000.bin", [0, *[5] * 80] * 4)
    for i in range(1, 1000): os.link(tmp_path / "train_0000.bin", tmp_path / f"train_{i:04d}.bin")
    seen = watch(tmp_path, 1000, 4, 80)
    assert seen["started"] <= 4, "a start reads the first shard, what the first batches ahead need, and one more"
    assert seen["files"] == 1000
    assert seen["most"] <= 2 * 2, "a shard is opened for its header and for its mapping; the first ones again for the next epoch"
    fds, maps, _ = map(max, zip(*seen["states"]))
    assert fds <= seen["states"][0][0] + 4 and maps <= 5, "a shard that was read is let go"
    assert seen["end"][1] == 0 and seen["end"][0] <= seen["states"][0][0]


@linux
def test_memory_does_not_grow_with_the_data(tmp_path):
    rng = np.random.default_rng(0)
    write_shard(tmp_path / "train_0000.bin", np.where(rng.random(1_000_000) < 1 / 50, 0, 50_256))  # short documents
    for i in range(1, 60): os.link(tmp_path / "train_0000.bin", tmp_path / f"train_{i:04d}.bin")
    anonymous_kb = [anonymous for _, _, anonymous in watch(tmp_path, 60, 8, 1024)["states"]]
    grown = max(anonymous_kb[len(anonymous_kb) // 2:]) - max(anonymous_kb[:len(anonymous_kb) // 2])
    assert grown < 4_000, f"{grown} kB more in the second half of 120 MB of shards"


# on a GPU

@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", [0, 2])
def test_ids_of_16_bits_arrive_whole_on_a_gpu(tmp_path, prefetch):
    write_shard(tmp_path / "a.bin", np.r_[0, 1:65_536, 0, 65_535, 32_768, 32_767])
    with contextlib.closing(TokenLoader([tmp_path / "a.bin"], 8, 4096, eos_id=0, device="cuda", prefetch=prefetch)) as one, \
            contextlib.closing(TokenLoader([tmp_path / "a.bin"], 8, 4096, eos_id=0)) as other:
        for _ in range(6):
            batch, expected = next(one), next(other)
            assert batch.inputs.device.type == "cuda" and batch.inputs.dtype == torch.int64
            assert batch.inputs.is_contiguous() and batch.targets.is_contiguous()
            assert torch.equal(batch.inputs.cpu(), expected.inputs) and torch.equal(batch.targets.cpu(), expected.targets)
            assert batch.position == expected.position and (batch.targets != IGNORE).all()
