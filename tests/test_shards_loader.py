"""Shards and the loader beyond what their lessons show: any bytes, any ranks, full disks, missing rights, the command."""
import contextlib
import errno
import gc
import itertools
import json
import os
import pwd
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daisy import loader, shards
from daisy.corpus import Document
from daisy.loader import IGNORE, TokenLoader, plan_rows, validation_batches
from daisy.shards import (HEADER_BYTES, MAGIC, MASKED_VERSION, VERSION, ShardError, build_corpus_shards, build_shards,
                          document_starts, main, read_mask, read_shard, shard_files, shard_length, write_shard)
from daisy.tokens import train_encoding

ROOT = Path(__file__).resolve().parents[1]
EOS = 0
quick = settings(max_examples=60, deadline=None)


def one_line(error):
    "The message of a ShardError, which must be a single line."
    message = str(error.value)
    assert message and "\n" not in message
    return message


def header(magic=MAGIC, version=VERSION, num_tokens=0):
    return struct.pack("<3i", magic, version, num_tokens).ljust(HEADER_BYTES, b"\0")


def python(code, *arguments, **options):
    "Run `code` in a fresh interpreter that sees this daisy."
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                          cwd=ROOT, timeout=120, **options)


@contextlib.contextmanager
def without_rights():
    "A folder that others may enter, and this process as a user without special rights."
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        if os.geteuid():
            yield folder, contextlib.nullcontext
            return

        @contextlib.contextmanager
        def nobody():
            os.seteuid(pwd.getpwnam("nobody").pw_uid)
            try:
                yield
            finally:
                os.seteuid(0)

        yield folder, nobody


# ---- files ----

@quick
@given(ids=st.lists(st.integers(0, 65_535), min_size=1, max_size=300))
def test_round_trip(ids):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.bin")
        write_shard(path, ids)
        assert read_shard(path).tolist() == ids and shard_length(path) == len(ids)
        assert path.stat().st_size == HEADER_BYTES + 2 * len(ids)
        assert os.listdir(folder) == ["x.bin"]
        assert read_shard(path, max(ids) + 1).tolist() == ids
        with pytest.raises(ShardError, match="beyond the vocabulary"):
            read_shard(path, max(ids))


@quick
@given(data=st.one_of(
    st.binary(max_size=1200),
    st.builds(lambda count, body: header(num_tokens=count) + body, st.integers(-2**31, 2**31 - 1), st.binary(max_size=9)),
    st.builds(lambda ints, body: struct.pack("<3i", *ints).ljust(HEADER_BYTES, b"\1") + body,
              st.tuples(*[st.sampled_from([MAGIC, VERSION, 0, 1, 2, 3, -1])] * 3), st.binary(max_size=9))))
def test_any_bytes_are_read_or_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fuzzed.bin")
        path.write_bytes(data)
        try:
            tokens = read_shard(path, vocab_size=65_536)
        except ShardError as error:
            assert "fuzzed.bin" in str(error) and "\n" not in str(error)
        else:
            bits = (len(tokens) + 7) // 8 if data[4] == MASKED_VERSION else 0  # a bit a token may follow, see test_sft.py
            assert data[HEADER_BYTES:HEADER_BYTES + 2 * len(tokens)] == tokens.tobytes() and len(tokens) > 0
            assert len(data) == HEADER_BYTES + 2 * len(tokens) + bits
            try:
                mask = read_mask(path)
            except ShardError as error:
                assert "fuzzed.bin" in str(error) and "\n" not in str(error)
            else:
                assert (mask is None) == (bits == 0)


@pytest.mark.parametrize("cut", [*range(0, 12), 500, HEADER_BYTES - 1, *range(HEADER_BYTES, HEADER_BYTES + 12)])
def test_a_shard_cut_anywhere_is_refused(tmp_path, cut):
    path = tmp_path / "x.bin"
    write_shard(path, [1, 2, 3, 4, 5, 6])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ShardError) as error:
        read_shard(path)
    assert str(path) in one_line(error)


def test_a_shard_is_read_only(tmp_path):
    write_shard(tmp_path / "x.bin", [1, 2, 3])
    with pytest.raises(ValueError):
        read_shard(tmp_path / "x.bin")[0] = 9


@pytest.mark.parametrize("tokens", [[], [-1], [65_536], [0.5], [[1, 2]], 7, np.zeros(0, dtype=np.uint16)])
def test_what_is_no_row_of_ids_is_not_written(tmp_path, tokens):
    with pytest.raises(ShardError) as error:
        write_shard(tmp_path / "x.bin", tokens)
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_and_a_file_in_its_place(tmp_path):
    with pytest.raises(ShardError, match="No such file"):
        write_shard(tmp_path / "missing" / "x.bin", [1])
    (tmp_path / "file").write_text("I am no folder")
    with pytest.raises(ShardError, match="Not a directory"):
        write_shard(tmp_path / "file" / "x.bin", [1])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_rights():
    with without_rights() as (folder, nobody):
        write_shard(folder / "x.bin", [1, 2, 3])
        (folder / "x.bin").chmod(0)
        folder.chmod(0o555)
        with nobody():
            with pytest.raises(ShardError, match="Permission denied") as error:
                read_shard(folder / "x.bin")
            one_line(error)
            with pytest.raises(ShardError, match="Permission denied"):
                write_shard(folder / "y.bin", [1])
            with pytest.raises(ShardError, match="Permission denied"):
                build(folder / "built")
        folder.chmod(0)
        with nobody():
            for refused in (lambda: write_shard(folder / "z.bin", [1]), lambda: read_shard(folder / "x.bin"),
                            lambda: build(folder), lambda: build(folder / "built")):
                with pytest.raises(ShardError, match="Permission denied"):
                    refused()
        folder.chmod(0o755)
        assert [path.name for path in folder.iterdir()] == ["x.bin"]


def test_a_full_disk_leaves_the_old_shard(tmp_path):
    path = tmp_path / "x.bin"
    write_shard(path, [1, 2, 3])
    for call in ("os.fsync", "os.replace"):
        with mock.patch(call, side_effect=OSError(errno.ENOSPC, "No space left on device")):
            with pytest.raises(ShardError, match="No space left") as error:
                write_shard(path, [4, 5])
        one_line(error)
    assert read_shard(path).tolist() == [1, 2, 3] and os.listdir(tmp_path) == ["x.bin"]


def test_shard_files(tmp_path):
    for name in ("train_10.bin", "train_9.bin", "train_100.bin", "val_0.bin"):
        (tmp_path / name).touch()
    (tmp_path / "train_11.bin").mkdir()
    assert [path.name for path in shard_files(tmp_path / "train_*.bin")] == ["train_9.bin", "train_10.bin", "train_100.bin"]
    for pattern in (tmp_path / "test_*.bin", tmp_path / "nowhere" / "*.bin", tmp_path, ""):
        with pytest.raises(ShardError, match="daisy-build-shards") as error:
            shard_files(pattern)
        assert str(pattern) in one_line(error)


# ---- building ----

DOCUMENTS = [Document(f"{i}", f"Document number {i}. " * (1 + i % 7)) for i in range(40)]
ENCODING = train_encoding([document.text for document in DOCUMENTS], 270, "test")


def build(folder, documents=DOCUMENTS, **options):
    return build_shards(documents, ENCODING, folder, progress=False, **{"val_fraction": 0.3, **options})


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("shard_tokens", [40, 100, 10**8])
def test_every_document_is_in_the_shards_once(tmp_path, shard_tokens):
    manifest = build(tmp_path, DOCUMENTS + DOCUMENTS[:5], shard_tokens=shard_tokens)
    found = []
    for split in ("train", "val"):
        files = shard_files(tmp_path / f"{split}_*.bin")
        assert all(shard_length(file) <= shard_tokens for file in files)
        tokens = np.concatenate([read_shard(file, ENCODING.n_vocab) for file in files])
        assert len(tokens) == manifest["tokens"][split]
        starts = document_starts(tokens, ENCODING.eot_token)
        assert starts[0] == 0 and len(starts) == manifest["documents"][split]
        texts = [ENCODING.decode(part[1:]) for part in np.split(tokens, starts[1:])]
        assert sum(len(text.encode()) for text in texts) == manifest["bytes"][split]
        found += texts
    assert sorted(found) == sorted(document.text for document in DOCUMENTS)


def test_documents_are_cut_only_if_longer_than_a_shard(tmp_path):
    build(tmp_path, shard_tokens=200)
    files = shard_files(tmp_path / "train_*.bin")
    assert len(files) > 1 and all(read_shard(file)[0] == ENCODING.eot_token for file in files)


def test_the_order_of_arrival_makes_no_difference(tmp_path):
    build(tmp_path / "a", shard_tokens=500)
    build(tmp_path / "b", DOCUMENTS[::-1] + DOCUMENTS[3:9], shard_tokens=500)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    build(tmp_path / "c", shard_tokens=500, seed=1)
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_another_build_replaces_all_of_the_first(tmp_path):
    build(tmp_path / "a", shard_tokens=50)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    build(tmp_path / "a", shard_tokens=10**6)
    build(tmp_path / "b", shard_tokens=10**6)
    assert contents(tmp_path / "a") == {**contents(tmp_path / "b"), "notes.txt": b"mine"}


def test_shards_of_others_are_not_touched(tmp_path):
    write_shard(tmp_path / "fineweb_train_000001.bin", [1, 2])
    before = contents(tmp_path)
    with pytest.raises(ShardError, match="daisy didn't build it"):
        build(tmp_path)
    assert contents(tmp_path) == before


def test_a_build_that_fails_leaves_the_old_one(tmp_path):
    build(tmp_path, shard_tokens=500)
    before = contents(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    for fail_at in range(5):
        with mock.patch("os.fsync", side_effect=[None] * fail_at + [full]):
            with pytest.raises(ShardError, match="No space left"):
                build(tmp_path, shard_tokens=300)
        assert contents(tmp_path) == before
    with mock.patch.object(shards, "encode_documents", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        build(tmp_path, shard_tokens=300)
    assert contents(tmp_path) == before


KILLED = """
import os, sys
from unittest import mock
sys.path.insert(0, "tests")
import test_shards_loader as t
from daisy import shards
calls, real = [0], getattr(os, sys.argv[2])
def die_at(*args, **options):
    calls[0] += 1
    if calls[0] > int(sys.argv[3]): os._exit(9)
    return real(*args, **options)
with mock.patch("os." + sys.argv[2], die_at):
    t.build(sys.argv[1], shard_tokens=500)
"""


@pytest.mark.parametrize("call, times", [("fsync", 1), ("replace", 6), ("replace", 8)])
def test_a_killed_build_is_never_taken_for_a_whole_one(tmp_path, call, times):
    build(tmp_path / "whole", shard_tokens=500)
    assert python(KILLED, tmp_path / "killed", call, times).returncode == 9
    assert not (tmp_path / "killed" / "manifest.json").exists()
    build(tmp_path / "killed", shard_tokens=500)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("documents, options, reason", [
    ([], {}, "no document"),
    (DOCUMENTS[:1], {"val_fraction": 0.0001}, "none falls to val"),
    (DOCUMENTS, {"val_fraction": 1}, "below 1"),
    (DOCUMENTS, {"val_fraction": -0.1}, "at least 0"),
    (DOCUMENTS, {"val_fraction": float("nan")}, "at least 0"),
    (DOCUMENTS, {"shard_tokens": 0}, "shard_tokens=0"),
])
def test_builds_that_cannot_be(tmp_path, documents, options, reason):
    with pytest.raises(ShardError, match=reason) as error:
        build(tmp_path / "out", documents, **options)
    one_line(error)
    assert not (tmp_path / "out").exists()


def test_no_validation_split_on_demand(tmp_path):
    manifest = build(tmp_path, val_fraction=0)
    assert manifest["documents"] == {"train": 40, "val": 0} and not list(tmp_path.glob("val_*"))


def test_the_manifest_tells_a_changed_byte(tmp_path):
    manifest = build(tmp_path)
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    for file in manifest["files"]:
        assert shards._sha256(tmp_path / file["name"]) == file["sha256"]


# ---- the command ----

@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": document.text, "n": 1}) + "\n" for document in DOCUMENTS))
    return path


def test_command(corpus, tmp_path, capsys):
    arguments = [str(corpus), str(tmp_path / "out"), "--vocab-size", "270", "--val-fraction", "0.3", "--quiet"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "train:" in said.out and "val:" in said.out and said.err == ""
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"] == str(corpus) and manifest["vocab_size"] == 270
    encoding = str(tmp_path / "out" / "encoding.json")
    assert main([str(corpus), str(tmp_path / "again"), "--encoding", encoding, "--val-fraction", "0.3", "--quiet"]) == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_command_is_the_same_in_every_process(corpus, tmp_path):
    code = "import sys; from daisy.shards import main; sys.exit(main())"
    for seed in ("1", "2"):
        ran = python(code, corpus, tmp_path / seed, "--vocab-size", 270, "--val-fraction", 0.3,
                     env={**os.environ, "PYTHONHASHSEED": seed})
        assert ran.returncode == 0, ran.stderr
        assert "shards" in ran.stderr and "Traceback" not in ran.stderr  # the progress bar
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_command_help(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for option in ("--vocab-size", "--encoding", "--column", "--shard-tokens", "--val-fraction", "--seed"):
        assert option in said


@pytest.mark.parametrize("arguments", [[], ["only_source"], ["a", "b", "--vocab-size", "many"], ["a", "b", "--nonsense"]])
def test_command_usage_errors(arguments, capsys):
    assert main(arguments) == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("change, reason", [
    ({0: "nowhere.jsonl"}, "nowhere.jsonl"),
    ({3: "200"}, "vocab_size=200"),
    ({3: "65537"}, "vocab_size=65,537"),
    ({3: "9000"}, "vocab_size"),
    ({4: "--column", 5: "missing"}, "missing"),
    ({4: "--val-fraction", 5: "2"}, "val_fraction=2"),
    ({4: "--shard-tokens", 5: "0"}, "shard_tokens=0"),
    ({4: "--encoding", 5: "nowhere.json"}, "nowhere.json"),
])
def test_command_data_errors(corpus, tmp_path, capsys, change, reason):
    arguments = [str(corpus), str(tmp_path / "out"), "--vocab-size", "270", "--seed", "0", "--quiet"]
    for place, value in change.items():
        arguments[place] = value
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.err.startswith("daisy-build-shards: ") and said.err.count("\n") == 1 and reason in said.err
    assert said.out == "" and not (tmp_path / "out").exists()


def test_command_says_so_when_the_disk_is_full(corpus, tmp_path):
    "A file-size limit of the system stands for the disk."
    code = ("import resource, signal, sys; from daisy.shards import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500)); sys.exit(main())")
    ran = python(code, corpus, tmp_path / "out", "--vocab-size", 270, "--quiet")
    assert ran.returncode == 1 and ran.stdout == "" and ran.stderr.count("\n") == 1
    assert "can't be written" in ran.stderr and not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.partial"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".building"]  # which the same command goes on with


def test_out_dir_is_a_file(corpus, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main([str(corpus), str(tmp_path / "out"), "--vocab-size", "270", "--quiet"]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and (tmp_path / "out").read_text() == "mine"


# ---- rows ----

documents_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def tokens_of(lengths, first=0):
    "Documents of these lengths as tokens: END_OF_TEXT (0), then numbers that are different everywhere; `first` are cut off."
    tokens = np.arange(1, 1 + sum(lengths))
    tokens[np.cumsum([0, *lengths[:-1]])] = EOS
    return tokens[first:].astype(np.uint16)


@quick
@given(lengths=documents_strategy, first=st.integers(0, 20), seq_len=st.integers(1, 30), mode=st.sampled_from(["pack", "stream"]))
def test_rows_keep_the_rule(lengths, first, seq_len, mode):
    tokens = tokens_of(lengths, min(first, sum(lengths) - 1))
    starts = document_starts(tokens, EOS)
    rows = plan_rows(len(tokens), starts, seq_len, mode)
    assert rows.dtype == np.int64 and (np.diff(rows) >= seq_len).all()
    assert all(0 <= row and row + seq_len < len(tokens) for row in rows)
    if mode == "stream":
        assert rows.tolist() == list(range(0, len(tokens) - seq_len, seq_len))
        return
    bounds = np.unique([0, *starts, len(tokens)])
    length_at = np.repeat(np.diff(bounds), np.diff(bounds))
    for row in rows:  # a document begins here, or goes on that is longer than a row
        assert tokens[row] == EOS or length_at[row] > seq_len
    taken = np.zeros(len(tokens), dtype=bool)
    for row in rows:
        taken[row:row + seq_len] = True
    left_out = np.flatnonzero(~taken[:rows[-1]]) if len(rows) else []
    assert all(length_at[left_out] <= seq_len)  # nothing of a long document is skipped


def test_an_unknown_mode():
    with pytest.raises(ShardError, match="neither"):
        plan_rows(10, np.array([0]), 4, "random")


# ---- the loader ----

def write_shards(folder, shards_of_lengths):
    files = []
    for i, lengths in enumerate(shards_of_lengths):
        files.append(Path(folder, f"train_{i:03d}.bin"))
        write_shard(files[-1], (tokens_of(lengths) + 1000 * i * (tokens_of(lengths) > 0)).astype(np.uint16))
    return files


def all_rows(files, seq_len, mode):
    "Every row of one epoch in order, as lists of inputs and targets."
    rows = []
    for file in files:
        tokens = read_shard(file).tolist()
        for start in plan_rows(len(tokens), document_starts(np.array(tokens), EOS), seq_len, mode):
            rows.append((tokens[start:start + seq_len], tokens[start + 1:start + seq_len + 1]))
    return rows


def read(files, batch_size, seq_len, world_size, steps, **options):
    "The rows of `steps` global micro-batches in order, and the position after them."
    rows, positions = [], []
    with contextlib.ExitStack() as stack:
        loaders = [TokenLoader(files, batch_size, seq_len, eos_id=EOS, rank=rank, world_size=world_size, **options)
                   for rank in range(world_size)]
        for one in loaders:
            stack.callback(one.close)
        for _ in range(steps):
            batches = [next(one) for one in loaders]
            assert all(batch.position == batches[0].position for batch in batches)
            positions.append(batches[0].position)
            for batch in batches:
                assert batch.inputs.shape == batch.targets.shape == (batch_size, seq_len)
                assert batch.inputs.dtype == batch.targets.dtype == torch.int64
                assert batch.inputs.is_contiguous() and batch.targets.is_contiguous()
                rows += list(zip(batch.inputs.tolist(), batch.targets.tolist()))
    return rows, positions[-1] if positions else None


@settings(max_examples=40, deadline=None)
@given(shard_lengths=st.lists(documents_strategy, min_size=1, max_size=4), seq_len=st.integers(1, 12),
       batch_size=st.integers(1, 4), world_size=st.integers(1, 4), prefetch=st.integers(0, 3),
       mode=st.sampled_from(["pack", "stream"]))
def test_ranks_are_disjoint_and_complete(shard_lengths, seq_len, batch_size, world_size, prefetch, mode):
    with tempfile.TemporaryDirectory() as folder:
        files = write_shards(folder, shard_lengths)
        expected = all_rows(files, seq_len, mode)
        if not expected:
            with pytest.raises(ShardError, match="tokens for one row"):
                TokenLoader(files, batch_size, seq_len, eos_id=EOS, mode=mode)
            return
        steps = -(-len(expected) // (batch_size * world_size)) + 1
        rows, _ = read(files, batch_size, seq_len, world_size, steps, mode=mode, prefetch=prefetch)
        assert rows == list(itertools.islice(itertools.cycle(expected), len(rows)))


@settings(max_examples=40, deadline=None)
@given(shard_lengths=st.lists(documents_strategy, min_size=1, max_size=4), seq_len=st.integers(1, 8),
       before=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 9)),
       after=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9)),
       begin_shard=st.integers(1, 9), mode=st.sampled_from(["pack", "stream"]))
def test_resumed_is_uninterrupted_on_any_ranks(shard_lengths, seq_len, before, after, begin_shard, mode):
    with tempfile.TemporaryDirectory() as folder:
        files = write_shards(folder, [[9, 9], *shard_lengths])
        options = {"mode": mode, "begin_shard": begin_shard, "prefetch": 1}
        first, position = read(files, before[0], seq_len, *before[1:], **options)
        position = json.loads(json.dumps(position))
        second, end = read(files, after[0], seq_len, *after[1:], **{**options, "position": position})
        whole, whole_end = read(files, 1, seq_len, 1, len(first) + len(second), **options)
        assert first + second == whole and end == whole_end


def test_epochs_shards_and_positions_count_as_told(tmp_path):
    files = write_shards(tmp_path, [[8, 9], [8, 8, 9], [9]])  # 2, 3 and 1 rows of 8
    places = []
    for begin_shard in (1, 3, 4, 6):
        rows, _ = read(files, 1, 8, 1, 8, begin_shard=begin_shard)
        first = (begin_shard - 1) % 3
        expected = all_rows(files[first:] + files[:first], 8, "pack")
        assert rows == (expected * 2)[:8]
    with contextlib.closing(TokenLoader(files, 1, 8, eos_id=EOS)) as one:
        for batch in itertools.islice(one, 7):
            places.append((batch.position["epoch"], batch.position["shard"], batch.position["row"], batch.position["file"]))
    assert places == [(0, 0, 1, "train_000.bin"), (0, 1, 0, "train_001.bin"), (0, 1, 1, "train_001.bin"),
                      (0, 1, 2, "train_001.bin"), (0, 2, 0, "train_002.bin"), (1, 0, 0, "train_000.bin"),
                      (1, 0, 1, "train_000.bin")]


def test_a_position_survives_another_row_length(tmp_path):
    files = write_shards(tmp_path, [[16] * 10 + [1]])
    _, position = read(files, 1, 16, 1, 3)
    rows, _ = read(files, 1, 8, 1, 1, position=position)
    assert position["token"] == 48 and rows[0][0] == read_shard(files[0])[48:56].tolist()


def test_stats_add_up(tmp_path):
    files = write_shards(tmp_path, [[20, 5, 9, 30], [7, 7, 7]])
    with contextlib.closing(TokenLoader(files, 1, 8, eos_id=EOS, prefetch=0)) as one:
        while one.stats["shards"] < 2:
            next(one)
        rows = len(all_rows(files, 8, "pack"))
        assert one.stats == {"shards": 2, "tokens": 85, "used_tokens": 8 * rows, "cut_tokens": 85 - 8 * rows}


def test_a_shard_is_opened_when_its_turn_comes(tmp_path):
    files = write_shards(tmp_path, [[9], [9], [9], [9]])
    opened = []
    with mock.patch.object(loader, "read_shard", lambda path, vocab: opened.append(path.name) or read_shard(path, vocab)):
        with contextlib.closing(TokenLoader(files, 1, 8, eos_id=EOS, prefetch=0)) as one:
            counts = []
            for _ in range(4):
                next(one)
                counts.append(len(opened))
    assert counts == [1, 2, 3, 4] and opened == [file.name for file in files]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_file_that_vanishes_between_steps(tmp_path, prefetch):
    files = write_shards(tmp_path, [[9] * 20] * 5)
    with contextlib.closing(TokenLoader(files, 1, 8, eos_id=EOS, prefetch=prefetch)) as one:
        next(one)
        files[0].unlink()  # it is mapped, and stays readable
        files[3].unlink()  # neither read now nor opened ahead
        rows = 1
        with pytest.raises(ShardError, match="train_003.bin.*No such file") as error:
            for _ in one:
                rows += 1
        one_line(error)
        assert rows == 3 * len(plan_rows(180, np.arange(0, 180, 9), 8))


def test_an_error_comes_again_and_closing_is_final(tmp_path):
    files = write_shards(tmp_path, [[9] * 3]) + [tmp_path / "missing.bin"]
    one = TokenLoader(files, 1, 8, eos_id=EOS)
    for _ in range(3):
        with pytest.raises(ShardError, match="missing.bin"):
            while True:
                next(one)
    one.close()
    one.close()
    with pytest.raises(ShardError, match="closed"):
        next(one)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(("daisy-prefetch", "daisy-open"))]


def test_threads_end_when_closed_or_forgotten(tmp_path):
    files = write_shards(tmp_path, [[9] * 20])
    loaders = [TokenLoader(files, 1, 8, eos_id=EOS) for _ in range(5)]
    for one in loaders:
        next(one)
    for one in loaders[:3]:
        one.close()
    assert len(loader_threads()) == 2 * 2  # one makes batches, one opens shards
    threads = loader_threads()
    del loaders, one
    gc.collect()
    for thread in threads:
        thread.join(timeout=60)
    assert not loader_threads()


def test_a_process_that_forgets_to_close_still_ends(tmp_path):
    files = write_shards(tmp_path, [[9] * 20])
    code = ("import sys; from daisy.loader import TokenLoader; "
            "one = TokenLoader([sys.argv[1]], 1, 8, eos_id=0, prefetch=4); next(one); print('done')")
    ran = python(code, files[0])
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "done\n", "")


def test_batches_are_not_overwritten(tmp_path):
    files = write_shards(tmp_path, [[9] * 20])
    with contextlib.closing(TokenLoader(files, 2, 8, eos_id=EOS)) as one:
        kept = [(batch.inputs, batch.inputs.clone()) for batch in itertools.islice(one, 6)]
    assert all(torch.equal(batch, copy) for batch, copy in kept)


@pytest.mark.parametrize("change, reason", [
    ({"files": []}, "no shards"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"seq_len": 0}, "seq_len=0"),
    ({"seq_len": 10_000}, "10,001 tokens for one row"),
    ({"rank": 2, "world_size": 2}, "rank=2"),
    ({"rank": -1}, "rank=-1"),
    ({"begin_shard": 0}, "begin_shard=0"),
    ({"begin_shard": -3}, "begin_shard=-3"),
    ({"mode": "shuffle"}, '"shuffle"'),
    ({"vocab_size": 3}, "beyond the vocabulary"),
    ({"files": ["nowhere.bin"]}, "nowhere.bin"),
    ({"position": {"step": 3}}, "isn't a loader's position"),
    ({"position": 3}, "isn't a loader's position"),
    ({"position": {"epoch": 0, "shard": "x", "token": 0, "file": "train_000.bin"}}, "isn't a loader's position"),
    ({"position": {"epoch": 0, "shard": 5, "token": 0, "file": "train_005.bin"}}, "train_005.bin as number 6"),
    ({"position": {"epoch": 0, "shard": 0, "token": 0, "file": "other.bin"}}, "other.bin as number 1"),
])
def test_what_a_loader_refuses(tmp_path, change, reason):
    files = write_shards(tmp_path, [[9, 9], [9, 9]])
    arguments = {"files": files, "batch_size": 1, "seq_len": 8, "eos_id": EOS, **change}
    with pytest.raises(ShardError) as error:
        TokenLoader(**arguments)
    assert reason in one_line(error)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("prefetch", [0, 2])
def test_on_a_gpu_the_batches_are_the_same(tmp_path, prefetch):
    files = write_shards(tmp_path, [[9] * 50, [30] * 20])
    device = f"cuda:{torch.cuda.device_count() - 1}"
    with contextlib.closing(TokenLoader(files, 4, 8, eos_id=EOS)) as here, contextlib.closing(
            TokenLoader(files, 4, 8, eos_id=EOS, device=device, prefetch=prefetch)) as there:
        for one, other in itertools.islice(zip(here, there), 50):
            assert str(other.inputs.device) == str(other.targets.device) == device
            assert torch.equal(one.inputs, other.inputs.cpu()) and torch.equal(one.targets, other.targets.cpu())
            assert one.position == other.position


# ---- validation ----

@settings(max_examples=40, deadline=None)
@given(shard_lengths=st.lists(documents_strategy, min_size=1, max_size=3), seq_len=st.integers(1, 12),
       batch_size=st.integers(1, 3), world_size=st.integers(1, 3), max_tokens=st.none() | st.integers(1, 200))
def test_validation_predicts_every_token_once(shard_lengths, seq_len, batch_size, world_size, max_tokens):
    with tempfile.TemporaryDirectory() as folder:
        files = write_shards(folder, [[2], *shard_lengths])
        ranks = [list(validation_batches(files, batch_size, seq_len, max_tokens=max_tokens, rank=rank,
                                         world_size=world_size)) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1  # or a collective would hang
        steps = [torch.cat([batches[step].inputs for batches in ranks]) for step in range(len(ranks[0]))]
        inputs = torch.cat(steps)
        targets = torch.cat([batches[step].targets for step in range(len(ranks[0])) for batches in ranks])
        assert inputs.shape == targets.shape and inputs.shape[1] == seq_len
        real = targets != IGNORE
        tokens = [read_shard(file).astype(np.int64) for file in files]
        assert targets[real].tolist() == np.concatenate([part[1:] for part in tokens])[:max_tokens].tolist()
        assert inputs[real].tolist() == np.concatenate([part[:-1] for part in tokens])[:max_tokens].tolist()
        assert (inputs[~real] == 0).all()


@pytest.mark.parametrize("change, reason", [
    ({"files": []}, "no shards"), ({"max_tokens": 0}, "max_tokens=0"), ({"rank": 1}, "rank=1"), ({"batch_size": 0}, "batch_size=0"),
])
def test_what_validation_refuses_at_once(tmp_path, change, reason):
    arguments = {"files": write_shards(tmp_path, [[9]]), "batch_size": 1, "seq_len": 8, **change}
    with pytest.raises(ShardError, match=reason):
        validation_batches(**arguments)


def test_validation_needs_a_token_to_predict(tmp_path):
    write_shard(tmp_path / "one.bin", [5])
    with pytest.raises(ShardError, match="takes two"):
        next(validation_batches([tmp_path / "one.bin"], 1, 8))


def test_the_python_docs_from_source_to_batches(tmp_path):
    manifest = build_corpus_shards("python_docs", tmp_path, 300, progress=False)
    files = shard_files(tmp_path / "train_*.bin")
    with contextlib.closing(TokenLoader(files, 4, 256, eos_id=299, vocab_size=300)) as one:
        batch = next(one)
        assert batch.inputs.max() < 300 and batch.inputs[0, 0] == 299
        assert one.stats["cut_tokens"] < 0.02 * manifest["tokens"]["train"]
