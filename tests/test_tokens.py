"""Encodings beyond what their lesson shows: round trips of anything, processes that end when they should, exact counts."""
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from dying import run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from daisy import tokens
from daisy.tokens import (END_OF_TEXT, EncodingError, count_words, encode_documents, encoding_from_json, encoding_to_json,
                          gpt2_ranks, learn_merges, load_encoding, save_encoding, token_byte_lengths, train_encoding)

ROOT = Path(__file__).resolve().parents[1]
quick = settings(max_examples=60, deadline=None)
any_text = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("abc \n<|endoftext|>")), max_size=200)


@pytest.fixture(scope="module")
def encoding():
    return train_encoding(["the cat sat on the mat with a hat, and that was that.\n    zwölf(日本)\n" * 5], 290, "cats")


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


# round trips

@quick
@given(st.lists(any_text, max_size=12))
def test_any_documents_come_back(encoding, strings):
    arrays = list(encode_documents(encoding, iter(strings)))
    eot, lengths = encoding.eot_token, token_byte_lengths(encoding)
    assert all(a.dtype == np.uint16 and a[0] == eot and eot not in a[1:] for a in arrays)
    assert [encoding.decode(a[1:].tolist()) for a in arrays] == strings
    assert [lengths[a].sum() for a in arrays] == [len(text.encode("utf-8")) for text in strings]
    assert [a[1:].tolist() for a in arrays] == [encoding.encode_ordinary(text) for text in strings]


@quick
@given(trained_on=st.lists(any_text, max_size=6), size=st.integers(257, 400), text=any_text, data=st.binary(max_size=100))
def test_any_encoding_is_the_same_after_a_file(trained_on, size, text, data):
    size = min(size, 257 + len(learn_merges(count_words(trained_on), size - 257)))
    encoding = train_encoding(trained_on, size, "any")
    with tempfile.TemporaryDirectory() as folder:
        save_encoding(encoding, Path(folder, "encoding.json"))
        again = load_encoding(Path(folder, "encoding.json"))
        assert os.listdir(folder) == ["encoding.json"]
    assert again.n_vocab == encoding.n_vocab == size and again.eot_token == size - 1
    assert again.encode_ordinary(text) == encoding.encode_ordinary(text) and again.decode(again.encode_ordinary(text)) == text
    ids = [again.encode_single_token(data[i:i + 1]) for i in range(len(data))]
    assert again.decode_bytes(ids) == data
    assert encoding_to_json(encoding_from_json(encoding_to_json(again))) == encoding_to_json(encoding)


def test_half_a_surrogate_pair_is_replaced(encoding):
    ids, = encode_documents(encoding, ["a\ud800b"])
    assert encoding.decode(ids[1:].tolist()) == "a\ufffdb"


def test_an_encoding_that_cannot_be_written(encoding, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path, reason in ((tmp_path / "missing" / "e.json", "No such file"), (tmp_path / "file" / "e.json", "Not a directory")):
        with pytest.raises(EncodingError) as error: save_encoding(encoding, path)
        one_line(error, str(path), reason)
    save_encoding(encoding, tmp_path / "e.json")
    with mock.patch("os.replace", side_effect=OSError(28, "No space left on device")):
        with pytest.raises(EncodingError) as error: save_encoding(train_encoding(["abab"], 258, "other"), tmp_path / "e.json")
    one_line(error, "No space left")
    assert load_encoding(tmp_path / "e.json").name == "cats" and sorted(os.listdir(tmp_path)) == ["e.json", "file"]


# training

@quick
@given(st.lists(st.text("ab \n", max_size=30), max_size=8), st.integers(0, 40))
def test_counts_stay_exact_merge_by_merge(strings, num_merges):
    pairs = tokens._PairCounts(count_words(strings))
    for new_id in range(256, 256 + num_merges):
        counted = Counter()
        for ids, times in zip(pairs.words, pairs.times):
            for pair in zip(ids, ids[1:]): counted[pair] += times
        assert +pairs.count == counted
        best = pairs.most_frequent()
        assert best == min(counted, key=lambda pair: (-counted[pair], pair), default=None)
        if best is None: break
        pairs.merge(best, new_id)


def test_the_same_vocabulary_in_every_process():
    code = ("from daisy.tokens import train_encoding, encoding_to_json; import hashlib\n"
            "texts = ['b a b a c a c a d e d e f'] * 3 + ['ab ba cd dc']\n"
            "print(hashlib.sha256(encoding_to_json(train_encoding(texts, 265, 'x')).encode()).hexdigest())")
    seen = {subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, cwd=ROOT, text=True,
                           capture_output=True, check=True).stdout for seed in ("0", "1", "2")}
    assert len(seen) == 1


def test_gpt2_ranks_cover_all_bytes_and_follow_the_list():
    ranks = gpt2_ranks("#version: 0.2\nĠ t\nĠt h\nĊ Ċ\n")
    assert sorted(ranks.values()) == list(range(259)) and {bytes([byte]) for byte in range(256)} <= set(ranks)
    assert (ranks[b" t"], ranks[b" th"], ranks[b"\n\n"]) == (256, 257, 258)


# in processes

TEXTS = [f"document {i}: " + "the cat sat on the mat. " * (i % 50 * 40) + END_OF_TEXT * (i % 3) for i in range(220)]


def test_processes_change_nothing(encoding):
    assert sum(map(len, TEXTS)) > 8 * tokens._BATCH_CHARS
    alone = list(encode_documents(encoding, TEXTS))
    together = list(encode_documents(encoding, iter(TEXTS), 2))
    assert len(alone) == len(TEXTS) and all(map(np.array_equal, alone, together)) and len(together) == len(alone)
    assert all(a.dtype == np.uint16 for a in together)


def test_little_text_starts_no_process(encoding):
    with mock.patch.object(tokens, "ProcessPoolExecutor", side_effect=AssertionError("a process was started")):
        assert len(list(encode_documents(encoding, TEXTS[:3], 8))) == 3
        assert list(encode_documents(encoding, [], 8)) == []


@pytest.mark.parametrize("num_processes", [0, -1])
def test_a_number_of_processes_that_cannot_be(encoding, num_processes):
    with pytest.raises(EncodingError) as error: next(encode_documents(encoding, ["x"], num_processes))
    one_line(error, f"num_processes={num_processes}")


def test_texts_are_read_as_they_are_needed(encoding):
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield "x " * (tokens._BATCH_CHARS // 2)

    documents = encode_documents(encoding, endless(), 2)
    for _ in range(5): next(documents)
    assert read <= 5 + 2 * 2 + 1
    documents.close()


def test_an_error_of_the_source_comes_out_as_it_is(encoding):
    def texts():
        yield from TEXTS
        raise KeyError("line 12 isn't JSON")

    documents = encode_documents(encoding, texts(), 2)
    with pytest.raises(KeyError, match="line 12"): list(documents)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_text_that_tiktoken_gives_up_on_is_one_clear_error(encoding, num_processes):
    texts = ["x" * tokens._BATCH_CHARS, "y" * tokens._BATCH_CHARS, " " * 5_000_000 + "x"]
    greedy = tokens.tiktoken.Encoding("greedy", pat_str=r"(?:\s+(?!\S)|\s+|\S)", mergeable_ranks=encoding._mergeable_ranks,
                                      special_tokens={END_OF_TEXT: encoding.eot_token})
    with pytest.raises(EncodingError) as error: list(encode_documents(greedy, texts, num_processes))
    one_line(error, "tiktoken gave up")


SCRIPT = """
import os, signal, sys
from daisy.tokens import encode_documents, train_encoding

def endless():
    while True: yield "the cat sat on the mat. " * 20_000

def main():
    encoding = train_encoding(["the cat sat on the mat. " * 9], 265, "cats")
    for i, ids in enumerate(encode_documents(encoding, endless(), 2)):
        if i == 3: print("running", flush=True)

if __name__ == "__main__": main()
"""


def in_group(group):
    "Processes of a process group that still run."
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgid = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgid) == group and state != "Z": found.append(int(stat.parent.name))
    return found


@pytest.fixture
def running(tmp_path):
    "A script that encodes in two processes, in a process group of its own."
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, tmp_path / "script.py"], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    yield process
    if in_group(process.pid): os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end: time.sleep(0.05)
    assert condition()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_ctrl_c_leaves_no_process(running):
    assert running.stdout.readline() == "running\n" and len(in_group(running.pid)) >= 3
    os.killpg(running.pid, signal.SIGINT)  # what a terminal does
    _, errors = running.communicate(timeout=200)
    assert running.returncode not in (0, None) and errors.count("Traceback") == 1 and "KeyboardInterrupt" in errors
    wait_for(lambda: not in_group(running.pid))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_parent_that_is_killed(running, signal_number):
    assert running.stdout.readline() == "running\n"
    os.kill(running.pid, signal_number)
    assert running.wait(timeout=200) == -signal_number
    wait_for(lambda: not in_group(running.pid))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_worker_that_dies_is_one_clear_error(running):
    assert running.stdout.readline() == "running\n"
    workers = [pid for pid in in_group(running.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, errors = running.communicate(timeout=200)
    assert running.returncode == 1
    assert any(line.startswith("daisy.tokens.EncodingError: one of 2 processes that encode has died") for line in errors.splitlines()), errors


def test_a_worker_that_dies_while_it_sends_is_one_clear_error(tmp_path):
    "Half a message in the pipe and its lock held for ever: the pool alone would wait until the end of time."
    ran = run_script(tmp_path, """
tokens._encode_in_worker = dying.dies_while_sending
encoding = tokens.train_encoding(["aa bb"], 258, "x")
list(tokens.encode_documents(encoding, ["a" * 600_000] * 4, 2))""")
    assert ran.returncode == 1
    assert any(line.startswith("daisy.tokens.EncodingError: one of 2 processes that encode has died") for line in ran.stderr.splitlines()), ran.stderr


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    (tmp_path / "script.py").write_text("from daisy.tokens import *\n"
                                        "encoding = train_encoding(['aa bb'], 258, 'x')\n"
                                        "print(len(list(encode_documents(encoding, ['a' * 600_000] * 4, 2))))\n")
    ran = subprocess.run([sys.executable, tmp_path / "script.py"], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                         capture_output=True, timeout=200)
    assert ran.returncode == 1 and ran.stdout == ""
    said = [line for line in ran.stderr.splitlines() if "EncodingError: one of 2 processes" in line]  # Python may add a word on what they leave behind
    assert len(said) == 1 and "`if __name__ == '__main__':`" in said[0]
