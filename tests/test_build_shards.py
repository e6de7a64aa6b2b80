"""The builder as its user meets it: killed, stopped, out of disk, twice at once, odd text; and the shard reader, fuzzed."""
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from unittest import mock

import bench_build
import fuzz_shard_reader
import numpy as np
import pytest
from dying import run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from daisy import corpus, shards
from daisy.corpus import CorpusError, open_corpus, read_jsonl, read_text_files
from daisy.shards import ShardError, build_corpus_shards, document_starts, main, read_shard, shard_files
from daisy.tokens import save_encoding, train_encoding

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-c", "import sys; from daisy.shards import main; sys.exit(main())"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def encoding(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoding") / "encoding.json"
    save_encoding(train_encoding(["the cat sat on the mat, the hat and the rat "], 270, "test"), path)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "200 documents and 40 repeats, in a folder of two JSONL files."
    folder = tmp_path_factory.mktemp("source")
    texts = [f"{i} " + "the cat sat on the mat. " * (1 + i * 7 % 30) for i in range(200)]
    write_jsonl(folder / "a.jsonl", texts[:120] + texts[:20])
    write_jsonl(folder / "b.jsonl", texts[100:])
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    "6 MB: long enough to encode for a signal to come in the middle."
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(20_000)]
    return write_jsonl(tmp_path_factory.mktemp("large") / "l.jsonl", [" ".join(rng.choices(words, k=400)) for _ in range(2500)])


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def build(source, folder, encoding, **options):
    return build_corpus_shards(source, folder, encoding=encoding, progress=False, **{"shard_tokens": 2000, "val_fraction": 0.2, **options})


def start(*arguments):
    return subprocess.Popen([*COMMAND, *map(str, arguments)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(process):
    "The exit code and the one line of a command that failed."
    out, err = process.communicate(timeout=200)
    assert out == "" and err.count("\n") == 1 and err.startswith("daisy-build-shards: "), err
    return process.returncode, err


def wait_until(condition, timeout_s=120):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it didn't happen"
        time.sleep(0.01)


def below(pid):
    "The processes that `pid` has started."
    with contextlib.suppress(OSError):  # a thread or the process itself has just ended
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return []


def alive(pid):
    with contextlib.suppress(OSError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


# ---- the same bytes ----

@pytest.mark.parametrize("processes", [1, 2, 5])
def test_the_number_of_processes_makes_no_difference(source, encoding, tmp_path, processes):
    build(source, tmp_path / "one", encoding)
    build(source, tmp_path / "many", encoding, processes=processes)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert json.loads((tmp_path / "one" / "manifest.json").read_text())["documents"]["train"] + \
        json.loads((tmp_path / "one" / "manifest.json").read_text())["documents"]["val"] == 200


def test_neither_do_files_and_formats(source, encoding, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [document.text for document in open_corpus(source)]
    random.Random(1).shuffle(texts)
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "x.parquet")
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(texts): (tmp_path / "texts" / f"{i}.txt").write_text(text)
    for name, origin, column in [("a", source, "text"), ("b", tmp_path / "x.parquet", "body"), ("c", tmp_path / "texts", "text")]:
        build(origin, tmp_path / name, encoding, column=column)
        (tmp_path / name / "manifest.json").unlink()  # it names its source
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


@settings(max_examples=60, deadline=None)
@given(buckets=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=9), min_size=1, max_size=4), shard_tokens=st.integers(1, 25))
def test_cutting_keeps_every_token_and_cuts_only_what_must_be_cut(buckets, shard_tokens):
    arrays = [np.concatenate([np.arange(n) for n in lengths]) for lengths in buckets]
    cut = [np.concatenate(shard) for shard in shards._cut(arrays, 0, shard_tokens)]
    assert np.concatenate(cut).tolist() == np.concatenate(arrays).tolist()
    assert all(0 < len(shard) <= shard_tokens for shard in cut)
    ends = np.cumsum([n for lengths in buckets for n in lengths])
    lengths = [n for bucket in buckets for n in bucket]
    at = 0
    for shard, following in zip(cut, cut[1:]):
        at += len(shard)
        if at in ends:  # a document ends here, and the next would not have fitted
            assert len(shard) + lengths[int(np.searchsorted(ends, at)) + 1] > shard_tokens
        else:
            assert len(shard) == shard_tokens and lengths[int(np.searchsorted(ends, at))] > shard_tokens


def test_the_encoding_is_trained_on_a_sample_that_ignores_the_order(source, tmp_path, monkeypatch):
    texts = [document.text for document in open_corpus(source)]
    assert (build_corpus_shards(source, tmp_path / "all", 300, progress=False)["vocab_size"]) == 300
    monkeypatch.setattr(shards, "SAMPLE_BYTES", 5000)
    samples = []
    monkeypatch.setattr(shards, "train_encoding", lambda sample, *rest: samples.append(list(sample)) or train_encoding(samples[-1], *rest))
    for name, order in (("a", texts), ("b", texts[::-1])):
        build_corpus_shards(write_jsonl(tmp_path / f"{name}.jsonl", order), tmp_path / name, 270, progress=False, shard_tokens=2000)
    assert samples[0] == samples[1] and 5000 <= sum(map(len, samples[0])) < 5000 + max(map(len, texts))
    first = read_shard(tmp_path / "a" / "train_000.bin")
    assert shards.load_encoding(tmp_path / "a" / "encoding.json").decode(first[1:].tolist()).startswith(samples[0][0])


def test_a_sample_of_words_that_never_repeat_is_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "DISTINCT_BYTES", 1000)
    (tmp_path / "s").mkdir()
    words = ("".join("etaoinshrd"[int(digit)] for digit in f"{i:09d}") for i in range(500))
    documents = [corpus.Document(word, f"{word} " * 50) for word in words]
    shards._spill(documents, tmp_path / "s", 0, 0, mock.Mock())
    assert len(list(shards._sample(tmp_path / "s", 0))) == 53  # each brings 19 new bytes: the word, with a space and without


# ---- interrupted ----

def encoded_by(monkeypatch):
    "A list that fills with the buckets that this process encodes."
    names, real = [], shards._encode_bucket
    monkeypatch.setattr(shards, "_encode_bucket", lambda path, *rest: names.append(path.stem) or real(path, *rest))
    return names


def finished_in(folder):
    return {path.stem for path in (folder / ".building").glob("*.ids")}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_then_the_same_line(large, encoding, tmp_path, monkeypatch, number):
    options = ["--encoding", encoding, "--shard-tokens", 200_000, "--processes", 2]
    whole = start(large, tmp_path / "whole", *options, "--quiet")
    killed = start(large, tmp_path / "killed", *options)
    wait_until(lambda: len(finished_in(tmp_path / "killed")) >= 5)
    workers = below(killed.pid)
    killed.send_signal(number)
    assert killed.wait(120) == -number and len(workers) >= 2
    wait_until(lambda: not any(map(alive, workers)))
    finished = finished_in(tmp_path / "killed")
    assert 5 <= len(finished) < 128 and not list((tmp_path / "killed").glob("*.bin"))
    names = encoded_by(monkeypatch)
    assert main([*map(str, [large, tmp_path / "killed", *options[:-1], 1]), "--quiet"]) == 0
    assert not finished & set(names) and len(names) + len(finished) == len({*names, *finished}) >= 64
    assert whole.wait(200) == 0 and contents(tmp_path / "killed") == contents(tmp_path / "whole")


KILLED = """
import os, sys
from unittest import mock
from daisy.shards import build_corpus_shards
calls, real = [0], getattr(os, sys.argv[4])
def die_at(*args, **options):
    calls[0] += 1
    if calls[0] > int(sys.argv[5]): os._exit(9)
    return real(*args, **options)
with mock.patch("os." + sys.argv[4], die_at):
    build_corpus_shards(sys.argv[1], sys.argv[2], encoding=sys.argv[3], shard_tokens=2000, val_fraction=0.2, progress=False)
"""


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.8, 0.9, 0.999])
def test_killed_at_any_moment(source, encoding, tmp_path, monkeypatch, call, share):
    "Before the first file, among the buckets, among the shards, while they move: no manifest, and the rest is done later."
    with mock.patch(f"os.{call}", wraps=getattr(os, call)) as calls: build(source, tmp_path / "whole", encoding)
    times = int(share * calls.call_count)
    dead = subprocess.run([sys.executable, "-c", KILLED, source, tmp_path / "out", encoding, call, str(times)], env=ENVIRONMENT)
    assert dead.returncode == 9 and not (tmp_path / "out" / "manifest.json").exists()
    finished, names = finished_in(tmp_path / "out"), encoded_by(monkeypatch)
    build(source, tmp_path / "out", encoding)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not finished & set(names) and (finished or share < 0.1)


def test_documents_without_files_are_never_mixed_with_earlier_ones(encoding, tmp_path):
    "`build_shards` can't know what a killed one was given."
    code = ("import os, sys; from unittest import mock; from daisy.corpus import Document; from daisy.shards import build_shards, load_encoding; "
            "mock.patch('os.fsync', side_effect=[None] * 20 + [SystemExit]).start(); mock.patch('shutil.rmtree').start(); "
            "build_shards([Document(str(i), f'first {i}') for i in range(99)], load_encoding(sys.argv[1]), sys.argv[2], progress=False)")
    subprocess.run([sys.executable, "-c", code, encoding, tmp_path / "out"], env=ENVIRONMENT)
    assert len(finished_in(tmp_path / "out")) == 18
    documents = [corpus.Document(str(i), f"second {i}") for i in range(99)]
    for name in ("out", "fresh"):
        shards.build_shards(documents, shards.load_encoding(encoding), tmp_path / name, progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def interrupt(source, folder, encoding, writes=20, **options):
    with mock.patch("os.fsync", side_effect=[None] * writes + [KeyboardInterrupt]), pytest.raises(KeyboardInterrupt):
        build(source, folder, encoding, **options)
    assert len(finished_in(folder)) == writes - 2  # the first were state.json and encoding.json


@pytest.mark.parametrize("change", ["touched", "longer", "new file", "seed", "val_fraction", "shard_tokens", "encoding"])
def test_another_source_or_setting_begins_anew(source, encoding, tmp_path, monkeypatch, change):
    (tmp_path / "source").mkdir()
    for path in source.iterdir(): (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
    interrupt(tmp_path / "source", tmp_path / "out", encoding)
    options = {"seed": {"seed": 1}, "val_fraction": {"val_fraction": 0.3}, "shard_tokens": {"shard_tokens": 900}}.get(change, {})
    if change == "touched": os.utime(tmp_path / "source" / "a.jsonl", (1, 1))
    if change == "longer": write_jsonl(tmp_path / "source" / "a.jsonl", ["something else"])
    if change == "new file": write_jsonl(tmp_path / "source" / "c.jsonl", ["one more"])
    if change == "encoding":
        encoding = tmp_path / "other.json"
        save_encoding(train_encoding(["a rat and a bat and a hat "], 262, "other"), encoding)
    names = encoded_by(monkeypatch)
    build(tmp_path / "source", tmp_path / "out", encoding, **options)
    assert len(names) > 60
    build(tmp_path / "source", tmp_path / "fresh", encoding, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_damaged_bucket_is_noticed(source, encoding, tmp_path, damage):
    interrupt(source, tmp_path / "out", encoding)
    bucket = next((tmp_path / "out" / ".building").glob("train_*.text"))
    if damage == "changed":
        data = bucket.read_bytes()
        bucket.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        with pytest.raises(ShardError, match="damaged"): build(source, tmp_path / "out", encoding)
    elif damage == "cut": bucket.write_bytes(bucket.read_bytes()[:-1])
    else: bucket.unlink()
    build(source, tmp_path / "out", encoding)
    build(source, tmp_path / "fresh", encoding)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def workers_of(pid):
    def is_worker(child):
        with contextlib.suppress(OSError): return b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    return [child for child in below(pid) if is_worker(child)]


@pytest.mark.parametrize("moment", ["starting", "encoding"])
def test_ctrl_c_says_what_is_kept(large, encoding, tmp_path, moment):
    running = start(large, tmp_path / "out", "--encoding", encoding, "--processes", 2, "--quiet")
    wait_until(lambda: finished_in(tmp_path / "out") if moment == "encoding" else workers_of(running.pid))
    running.send_signal(signal.SIGINT)
    for worker in below(running.pid):  # a terminal sends it to all
        with contextlib.suppress(ProcessLookupError): os.kill(worker, signal.SIGINT)
    code, line = said(running)
    assert code == 130 and "stopped" in line and "same command" in line
    assert (tmp_path / "out" / ".building" / "state.json").exists() and bool(finished_in(tmp_path / "out")) == (moment == "encoding")


def test_a_worker_that_is_killed(large, encoding, tmp_path):
    options = [large, tmp_path / "out", "--encoding", encoding, "--quiet"]
    running = start(*options, "--processes", 2)
    wait_until(lambda: finished_in(tmp_path / "out"))
    os.kill(workers_of(running.pid)[0], signal.SIGKILL)
    code, line = said(running)
    assert code == 1 and "killed" in line and "fewer processes" in line and "same command" in line
    assert main(list(map(str, options))) == 0


def test_two_builds_at_once(encoding, tmp_path):
    "The first waits for its source, a pipe."
    os.mkfifo(tmp_path / "pipe.jsonl")
    options = ["--encoding", encoding, "--val-fraction", 0.2, "--quiet"]
    first = start(tmp_path / "pipe.jsonl", tmp_path / "out", *options)
    writing_ends = []

    def is_reading():  # a pipe can be opened for writing, without waiting, only when somebody reads it
        with contextlib.suppress(OSError): writing_ends.append(os.open(tmp_path / "pipe.jsonl", os.O_WRONLY | os.O_NONBLOCK))
        return writing_ends

    wait_until(is_reading)
    code, line = said(start(write_jsonl(tmp_path / "x.jsonl", ["a", "b"]), tmp_path / "out", *options))
    assert code == 1 and "another build" in line and str(tmp_path / "out") in line
    write_jsonl(tmp_path / "pipe.jsonl", [f"document {i}" for i in range(50)])
    os.close(writing_ends[0])
    assert first.wait(120) == 0
    assert sum(json.loads((tmp_path / "out" / "manifest.json").read_text())["documents"].values()) == 50


# ---- disks and memory ----

def limited(num_bytes):
    "A command whose files can't grow beyond `num_bytes`."
    return [sys.executable, "-c", "import resource, signal, sys; from daisy.shards import main; signal.signal(signal.SIGXFSZ, "
            f"signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, ({num_bytes}, {num_bytes})); sys.exit(main())"]


@pytest.mark.parametrize("num_bytes, processes, stage", [(20_000, 1, "reading"), (45_000, 1, "encoding"), (45_000, 2, "encoding"), (65_000, 1, "shards")])
def test_a_full_disk_then_the_same_line(tmp_path, num_bytes, processes, stage):
    "Texts of 30 kB, which take 60 kB of ids when each byte is a token."
    save_encoding(train_encoding([""], 257, "bytes"), tmp_path / "encoding.json")
    source = write_jsonl(tmp_path / "x.jsonl", [f"{i} " + "abc" * (10_000 if i < 3 else 10) for i in range(40)])
    options = [*map(str, [source, tmp_path / "out", "--encoding", tmp_path / "encoding.json", "--val-fraction", 0.2, "--processes", processes]), "--quiet"]
    ran = subprocess.run([*limited(num_bytes), *options], env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stdout == "" and ran.stderr.count("\n") == 1, ran.stderr
    assert "File too large" in ran.stderr and "free some space" in ran.stderr and "same command" in ran.stderr
    assert {"encoding": ".ids", "shards": ".bin"}.get(stage, "out: ") in ran.stderr
    assert (tmp_path / "out" / ".building").exists() == (tmp_path / "out").exists() == (stage != "reading")
    assert not list((tmp_path / "out").rglob("*.bin")) and not list((tmp_path / "out").rglob(".*.partial"))
    assert main(options) == 0 and main([options[0], str(tmp_path / "fresh"), *options[2:]]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_memory_does_not_grow_with_the_input(tmp_path, encoding):
    peaks = []
    for megabytes in (2, 8):
        path = tmp_path / f"{megabytes}.jsonl"
        bench_build.write_jsonl(path, megabytes * 10**6)
        peaks.append(bench_build.build(path, tmp_path / f"{megabytes}", ["--encoding", str(encoding), "--processes", "1"])["rss_anon_mb"])
    assert peaks[1] < peaks[0] + 10 and peaks[1] < 120, peaks


# ---- documents of any length ----

def test_a_document_longer_than_a_shard_and_one_alone(tmp_path, encoding):
    text = "the cat sat on the mat " * 400
    manifest = build(write_jsonl(tmp_path / "x.jsonl", [text]), tmp_path / "out", encoding, shard_tokens=1000, val_fraction=0)
    files = shard_files(tmp_path / "out" / "train_*.bin")
    tokens = np.concatenate([read_shard(file) for file in files])
    assert len(files) > 2 and document_starts(tokens, 269).tolist() == [0] and manifest["documents"] == {"train": 1, "val": 0}
    assert shards.load_encoding(encoding).decode(tokens[1:].tolist()) == text


def test_a_document_of_one_letter(tmp_path, encoding):
    assert build(write_jsonl(tmp_path / "x.jsonl", ["x"]), tmp_path / "out", encoding, val_fraction=0)["tokens"] == {"train": 2, "val": 0}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_document_that_memory_could_not_hold_is_named(tmp_path, encoding, capsys, name):
    text = "the cat " * 200_000  # 1.6 MB
    if name == "a.txt": (tmp_path / name).write_text(text)
    elif name == "a.jsonl": write_jsonl(tmp_path / name, ["short", text])
    else:
        pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").table({"text": ["short", text]}), tmp_path / name)
    options = [str(tmp_path / name), str(tmp_path / "out"), "--encoding", str(encoding), "--val-fraction", "0", "--quiet"]
    assert main([*options, "--max-document-mb", "1"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and name in line and "more than 1 MB" in line and "max_document_mb" in line
    assert not (tmp_path / "out").exists() and main(options) == 0


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_file_without_line_breaks_is_not_read_whole(tmp_path, name):
    with open(tmp_path / name, "wb") as file:
        for _ in range(60): file.write(b"x" * 10**6)
        file.write(b"\n" + b'{"text": "after"}\n')
    tracemalloc.start()
    try:
        if name == "a.jsonl":
            with pytest.warns(UserWarning, match="line 1: a line of more than 4 MB"):
                assert [d.text for d in read_jsonl(tmp_path / name, max_bad=1, max_document_mb=1)] == ["after"]
        else:
            with pytest.raises(CorpusError, match="more than 1 MB"): list(read_text_files(tmp_path / name, max_document_mb=1))
        assert tracemalloc.get_traced_memory()[1] < 25e6
    finally:
        tracemalloc.stop()


def test_a_large_row_group_is_not_read_whole(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text = random.Random(0).randbytes(500).hex()
    parquet.write_table(pyarrow.table({"text": [f"{i} {text}" for i in range(40_000)]}), tmp_path / "a.parquet", compression="none")
    assert parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1 and (tmp_path / "a.parquet").stat().st_size > 40e6
    before, most = pyarrow.total_allocated_bytes(), 0
    for i, _ in enumerate(open_corpus(tmp_path / "a.parquet")):
        if i % 100 == 0: most = max(most, pyarrow.total_allocated_bytes() - before)
    assert i == 39_999 and 0 < most < 15e6


def test_a_long_line_in_zst_is_not_read_whole(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(random.Random(0).randbytes(15_000_000).hex().encode() + b'\n{"text": "after"}\n'))
    with pytest.warns(UserWarning, match="line 1: a line of more than 4 MB"):
        assert [d.text for d in read_jsonl(tmp_path / "a.jsonl.zst", max_bad=1, max_document_mb=1)] == ["after"]


# ---- odd text ----

ODD = {"NUL": "a\0b", "byte order mark inside": "a\ufeffb", "combining": "e\u0301 n\u0303\u0323", "right to left": "\u05e9\u05dc\u05d5\u05dd \u202e\u0645\u0631\u062d\u0628\u0627",
       "emoji": "\U0001f469\u200d\U0001f680 \U0001f1eb\U0001f1f7", "line separators": "a\u2028b\u2029c\x85d\x0be\x0cf", "carriage returns": "a\r\nb\rc",
       "end of text": "a <|endoftext|> b", "noncharacter": "\uffff \U0010ffff", "spaces": "  a\u00a0\u3000b  "}


@pytest.mark.parametrize("escaped", [True, False])
def test_odd_text_comes_back_as_it_was(tmp_path, encoding, escaped):
    lines = (json.dumps({"text": text}, ensure_ascii=escaped) for text in ODD.values())
    (tmp_path / "odd.jsonl").write_bytes("".join(line + "\r\n" for line in lines).encode())
    build(tmp_path / "odd.jsonl", tmp_path / "out", encoding, val_fraction=0, shard_tokens=10**6)
    tokens = read_shard(tmp_path / "out" / "train_000.bin", 270)
    parts = np.split(tokens, document_starts(tokens, 269)[1:])
    assert sorted(shards.load_encoding(encoding).decode(part[1:].tolist()) for part in parts) == sorted(ODD.values())


@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=12))
def test_any_texts_come_back_each_once(encoding, texts):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "any.jsonl")
        path.write_bytes("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts + texts[:2]).encode())
        build(path, Path(folder, "out"), encoding, val_fraction=0, shard_tokens=10**6)
        tokens = read_shard(Path(folder, "out", "train_000.bin"), 270)
        parts = np.split(tokens, document_starts(tokens, 269)[1:])
        assert sorted(shards.load_encoding(encoding).decode(part[1:].tolist()) for part in parts) == sorted(set(texts))


def test_a_byte_order_mark_before_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "first"}\n{"text": "second"}\n')
    assert [document.text for document in open_corpus(tmp_path)] == ["first", "second"]


def test_bad_lines_are_one_line_of_the_command(tmp_path, encoding, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\nnot json\n{"text": "\\ud83d"}\n{"text": "\xff"}\n{"text": "fine"}\n')
    options = [str(tmp_path / "a.jsonl"), str(tmp_path / "out"), "--encoding", str(encoding), "--val-fraction", "0", "--quiet"]
    assert main(options) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "a.jsonl, line 2: not JSON" in line and "max_bad=0" in line and not (tmp_path / "out").exists()
    assert main([*options, "--max-bad", "2"]) == 1 and "line 4: byte 0xff" in capsys.readouterr().err
    assert main([*options, "--max-bad", "3"]) == 0
    said = capsys.readouterr()
    assert said.err == f"daisy-build-shards: {tmp_path / 'a.jsonl'}: 3 bad lines skipped, the first is line 2: not JSON (Expecting value: line 1 column 1 (char 0))\n"
    assert "train: 2 documents" in said.out


def test_parquet_without_the_column(tmp_path, encoding, capsys):
    pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").table({"body": ["x"]}), tmp_path / "a.parquet")
    assert main([str(tmp_path / "a.parquet"), str(tmp_path / "out"), "--encoding", str(encoding), "--quiet"]) == 1
    assert re.fullmatch(r"daisy-build-shards: .*a.parquet: no column 'text'; it has body\n", capsys.readouterr().err)


def test_fineweb_is_not_a_text(tmp_path, capsys):
    assert main(["fineweb", str(tmp_path / "out")]) == 1
    assert "python data/cached_fineweb100B.py" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("processes", ["0", "-1"])
def test_processes_are_checked(source, tmp_path, capsys, processes):
    assert main([str(source), str(tmp_path / "out"), "--processes", processes]) == 1
    assert f"processes={processes}" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- the reader, fuzzed ----

def test_fuzzed_shards_are_read_or_refused():
    seed = int.from_bytes(os.urandom(4), "little")
    assert fuzz_shard_reader.fuzz(3, seed) > 20


def test_the_fuzz_target_notices(monkeypatch):
    "A reader that fails otherwise, and one that reads what isn't there."
    monkeypatch.setattr(shards, "read_shard", lambda path, vocab_size: np.fromfile(path, "<u2", offset=1024))
    with pytest.raises(AssertionError, match="seed 0, input"): fuzz_shard_reader.fuzz(10, 0)


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_process_that_dies_while_it_sends_ends_a_build_with_one_line(tmp_path):
    "Half a message in the pipe and its lock held for ever: the pool alone would wait until the end of time."
    (tmp_path / "text").mkdir()
    for number in range(40): (tmp_path / "text" / f"{number}.txt").write_text(f"{number} apples and pears. " * 50)
    ran = run_script(tmp_path, """
shards._encode_in_worker = dying.dies_while_sending
shards.build_corpus_shards("text", "out", vocab_size=270, processes=2, progress=False)""")
    assert ran.returncode == 1
    assert any(line.startswith("daisy.shards.UnfinishedError: an encoding process was killed") for line in ran.stderr.splitlines()), ran.stderr
