"""Promises 5, 11 and 44 to 46: the template, marks in shards and batches, the builder and its command, and fine-tuning as typed."""
import contextlib
import gzip
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daisy.checkpoint import latest_checkpoint, load_checkpoint
from daisy.config import load_config
from daisy.corpus import CorpusError
from daisy.generate import Sampling, generate
from daisy.gpt import GPT, GPTConfig
from daisy.loader import IGNORE, TokenLoader, validation_batches
from daisy.real_run import Run, newest_checkpoint, sample_main, starting_checkpoint, train_main
from daisy.sft import (
    INSTRUCTION, RESPONSE, TEMPLATE, build_sft_shards, encode_conversation, main, one_turn, python_questions, shares)
from daisy.shards import HEADER_BYTES, ShardError, read_mask, read_shard, scored_tokens, shard_length, write_shard
from daisy.tokens import EncodingError, load_encoding, save_encoding, train_encoding

ROOT = Path(__file__).resolve().parents[1]
quick = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def encoding():
    return train_encoding(["### Instruction:\nWhat does it do?\n\n### Response:\nIt counts the words of a text."], 300, "toy")


def one_line(error):
    message = str(error.value)
    assert message and "\n" not in message
    return message


def runs_of(tokens, scored):
    "The scored stretches of a token list."
    return [[t for t, _ in group] for marked, group in itertools.groupby(zip(tokens, scored), key=lambda pair: pair[1]) if marked]


# the template

words = st.text(alphabet="ab ,.#\n?é`", min_size=1, max_size=30).filter(lambda text: text.strip())


@quick
@given(system=st.none() | words, turns=st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_exactly_the_responses_are_scored(encoding, system, turns):
    messages = [{"role": "system", "content": system}] * (system is not None) + [m for turn in turns for m in one_turn(*turn)]
    tokens, scored = encode_conversation(encoding, messages)
    assert [encoding.decode(run) for run in runs_of(tokens, scored)] == [answer.strip() for _, answer in turns]
    assert tokens.count(encoding.eot_token) == 1 == tokens[0:1].count(encoding.eot_token)
    text = "\n\n".join(([f"### System:\n{system.strip()}"] if system else [])
                       + [f"{INSTRUCTION}{ask.strip()}\n\n{RESPONSE}{answer.strip()}" for ask, answer in turns])
    assert encoding.decode(tokens[1:]) == text
    opened, _ = encode_conversation(encoding, messages[:-1])
    assert tokens[:len(opened)] == opened, "what a model is given to answer is how the training text begins"


def test_one_turn_is_the_template_in_any_vocabulary(encoding):
    try:
        encodings = [encoding, load_encoding("gpt2")]
    except EncodingError:  # its files are not on this machine
        encodings = [encoding]
    for any_encoding in encodings:
        for prompt in ("What does os.path.join do?", "Sum up:\n\n- one\n- two", "naïve  spaces"):
            tokens, scored = encode_conversation(any_encoding, one_turn(prompt))
            assert tokens == [any_encoding.eot_token, *any_encoding.encode_ordinary(TEMPLATE.format(prompt=prompt))]
            assert not any(scored)


@pytest.mark.parametrize("messages, reason", [
    ([], "in turns, not none"), ([{"role": "assistant", "content": "Hi"}], "in turns"), (one_turn("a") * 2, "in turns, not user, user"),
    ([{"role": "tool", "content": "x"}], "role 'tool'"), (one_turn(" "), "the user's text is empty"), (one_turn("a", "\n"), "assistant's text is empty"),
    ([{"role": "user"}], "NoneType, not text"), ([{"role": "system", "content": "Be kind."}], "in turns")])
def test_what_is_no_conversation_is_one_line(encoding, messages, reason):
    with pytest.raises(ValueError, match=reason) as error:
        encode_conversation(encoding, messages)
    one_line(error)


def test_decoding_stops_where_training_stopped(encoding, tmp_path):
    "A model that has learned one conversation of two turns by heart answers each turn word for word, and stops."
    turns = [("What is it?", "A counter."), ("Of what?", "Words in a text.")]
    messages = [m for turn in turns for m in one_turn(*turn)]
    tokens, scored = encode_conversation(encoding, messages)
    write_shard(tmp_path / "a.bin", np.array((tokens + [encoding.eot_token]), dtype=np.uint16), np.array(scored + [False]))
    batch = next(validation_batches([tmp_path / "a.bin"], 1, len(tokens), eos_id=encoding.eot_token))
    assert (batch.targets == encoding.eot_token).sum() == 2, "one end for each response"
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=300, num_layers=2, num_heads=2, head_dim=16, model_dim=32, max_seq_len=128, eos_token_id=encoding.eot_token))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(80):
        loss = model(batch.inputs, batch.targets)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    for turn in (1, 2):
        prompt, _ = encode_conversation(encoding, messages[:2 * turn - 1])
        said = list(generate(model.eval(), prompt, 60, Sampling(0), stop_id=encoding.eot_token))
        assert encoding.decode(said) == turns[turn - 1][1]


# marks in shards

@quick
@given(pairs=st.lists(st.tuples(st.integers(0, 65_535), st.booleans()), min_size=1, max_size=60).filter(lambda pairs: any(m for _, m in pairs)))
def test_marks_round_trip_and_the_ids_stay_where_they_were(pairs):
    ids, marks = map(list, zip(*pairs))
    with tempfile.TemporaryDirectory() as folder:
        plain, marked = Path(folder, "plain.bin"), Path(folder, "marked.bin")
        write_shard(plain, ids)
        write_shard(marked, ids, np.array(marks))
        assert read_shard(marked).tolist() == ids and shard_length(marked) == len(ids)
        assert marked.stat().st_size == plain.stat().st_size + (len(ids) + 7) // 8
        assert marked.read_bytes()[HEADER_BYTES:plain.stat().st_size] == plain.read_bytes()[HEADER_BYTES:]
        assert read_mask(plain) is None and scored_tokens(None, 0, 3).all()
        for begin in range(0, len(ids), 7):
            count = min(9, len(ids) - begin)
            assert scored_tokens(read_mask(marked), begin, count).tolist() == marks[begin:begin + count]


@pytest.mark.parametrize("cut", range(1, 15))
def test_a_marked_shard_cut_anywhere_is_refused(tmp_path, cut):
    path = tmp_path / "x.bin"
    write_shard(path, [1, 2, 3, 4, 5, 6], np.array([False, True] * 3))
    for data in (path.read_bytes()[:-cut], path.read_bytes() + b"\1" * cut):
        (tmp_path / "y.bin").write_bytes(data)
        for read in (shard_length, read_shard, read_mask):
            with pytest.raises(ShardError) as error: read(tmp_path / "y.bin")
            assert "y.bin" in one_line(error)


@pytest.mark.parametrize("marks, reason", [([True], "for each of the 3"), ([False] * 3, "true for one at least"), ([1, 0, 1], "not int64"), ([[True] * 3], "shape")])
def test_marks_that_fit_nothing_are_not_written(tmp_path, marks, reason):
    with pytest.raises(ShardError, match=reason) as error:
        write_shard(tmp_path / "x.bin", [1, 2, 3], np.array(marks))
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_a_reader_of_the_first_version_refuses_marked_shards(tmp_path):
    "Who knows nothing of marks would train on prompts; the version in the header tells."
    write_shard(tmp_path / "x.bin", [1, 2, 3], np.array([True] * 3))
    assert np.frombuffer((tmp_path / "x.bin").read_bytes(), "<i4", 3).tolist() == [20240520, 2, 3]


# marks in batches

EOS = 0
conversation = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(0, 3), st.integers(0, 4))


def marked_shard(path, conversations, base=0):
    "Prompt, response, perhaps another prompt and response: ids count up, so that each tells where it stands."
    ids, marks = [], []
    for lengths in conversations:
        ids, marks = ids + [EOS], marks + [False]
        for number, length in enumerate(lengths if lengths[2] and lengths[3] else lengths[:2]):
            ids += range(base + len(ids), base + len(ids) + length)
            marks += [number % 2 == 1] * length
    write_shard(path, ids + [EOS], np.array(marks + [False]))
    return ids + [EOS], marks + [False]


def target_by_hand(ids, marks, i):
    "What to learn after token i - 1: token i where it belongs to a response, END_OF_TEXT behind a response, else nothing."
    if marks[i]: return ids[i]
    return EOS if marks[i - 1] else IGNORE


@settings(max_examples=40, deadline=None)
@given(shards=st.lists(st.lists(conversation, min_size=2, max_size=9), min_size=1, max_size=3), seq_len=st.integers(1, 9),
       batch_size=st.integers(1, 3), world_size=st.integers(1, 3), prefetch=st.integers(0, 2), mode=st.sampled_from(["pack", "stream"]))
def test_only_marked_targets_count_on_any_ranks(shards, seq_len, batch_size, world_size, prefetch, mode):
    with tempfile.TemporaryDirectory() as folder:
        files, texts = [], []
        for n, conversations in enumerate(shards):
            files.append(Path(folder, f"train_{n}.bin"))
            texts.append(marked_shard(files[-1], conversations, base=1 + 1000 * n))
        place = {token: (n, i) for n, (ids, _) in enumerate(texts) for i, token in enumerate(ids) if token != EOS}
        loaders = {(rank, all_count): TokenLoader(files, batch_size, seq_len, eos_id=EOS, rank=rank, world_size=world_size, mode=mode,
                                                  prefetch=prefetch, loss_on_prompt=all_count)
                   for rank in range(world_size) for all_count in (False, True)}
        for _ in range(4):
            for rank in range(world_size):
                some, everything = next(loaders[rank, False]), next(loaders[rank, True])
                assert torch.equal(some.inputs, everything.inputs) and some.position == everything.position
                assert some.targets.dtype == torch.int64 and (everything.targets != IGNORE).all()
                for row, plain, wanted in zip(some.inputs.tolist(), everything.targets.tolist(), some.targets.tolist()):
                    known = next((i for i, token in enumerate([*row, plain[-1]]) if token != EOS))
                    n, first = place[[*row, plain[-1]][known]]
                    ids, marks = texts[n]
                    start = first - known
                    assert wanted == [target_by_hand(ids, marks, start + i + 1) for i in range(seq_len)]
                    for i, target in enumerate(wanted):
                        if row[i] == EOS: assert target == IGNORE, "the first token of a document never tells what the last one would say"
        for loader in loaders.values(): loader.close()


def test_marked_batches_go_on_from_a_position(tmp_path):
    files = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for n, file in enumerate(files): marked_shard(file, [(2, 3, 1, 2), (1, 4, 0, 0)] * 6, base=1 + 1000 * n)
    def read(steps, position=None, world_size=1, batch_size=2):
        loaders = [TokenLoader(files, batch_size, 6, eos_id=EOS, position=position, rank=r, world_size=world_size) for r in range(world_size)]
        batches = [next(loader) for _ in range(steps) for loader in loaders]
        for loader in loaders: loader.close()
        return [row for batch in batches for row in batch.targets.tolist()], batches[-1].position
    whole, _ = read(12)
    first, position = read(5)
    second, _ = read(7, json.loads(json.dumps(position)), world_size=2, batch_size=1)
    assert first + second == whole and any(IGNORE in row for row in whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("prefetch", [0, 2])
def test_marked_batches_on_a_gpu_are_the_same(tmp_path, prefetch):
    marked_shard(tmp_path / "a.bin", [(2, 3, 1, 2), (1, 4, 0, 0)] * 9, base=1)
    here, there = (TokenLoader([tmp_path / "a.bin"], 2, 6, eos_id=EOS, device=device, prefetch=prefetch) for device in ("cpu", "cuda"))
    for _ in range(12):
        one, two = next(here), next(there)
        assert two.inputs.is_cuda and torch.equal(one.inputs, two.inputs.cpu()) and torch.equal(one.targets, two.targets.cpu())
        assert two.inputs.is_contiguous() and two.targets.is_contiguous() and two.targets.dtype == torch.int64
    here.close(); there.close()


@settings(max_examples=30, deadline=None)
@given(conversations=st.lists(conversation, min_size=1, max_size=8), seq_len=st.integers(1, 12), world_size=st.integers(1, 3))
def test_validation_scores_every_response_token_and_every_end_once(conversations, seq_len, world_size):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "val.bin")
        ids, marks = marked_shard(file, conversations, base=1)
        passes = [list(validation_batches([file], 2, seq_len, rank=rank, world_size=world_size, eos_id=EOS)) for rank in range(world_size)]
        rows = [row for group in zip(*passes) for batch in group for row in batch.targets.tolist()]
        wanted = [target_by_hand(ids, marks, i) for i in range(1, len(ids))]
        assert [t for row in rows for t in row][:len(wanted)] == wanted
        assert sum(t != IGNORE for row in rows for t in row) == sum(marks) + len(runs_of(ids, marks))
        with pytest.raises(ShardError, match="eos_id"): list(validation_batches([file], 2, seq_len))
        everything = [t for batch in validation_batches([file], 2, seq_len, loss_on_prompt=True) for t in batch.targets.flatten().tolist()]
        assert everything[:len(ids) - 1] == ids[1:]


# the builder

ROWS = [{"instruction": f"What is {n}?", "response": f"It is {n * n}, surely.", "source": "me"} for n in range(60)]


def write_rows(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def built(sources, out_dir, encoding, **options):
    options = {"val_fraction": 0.2, "progress": False, **options}
    return build_sft_shards([str(source) for source in sources], out_dir, encoding, **options)


def shard_bytes(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).glob("*.bin"))}


def conversations_in(encoding, folder, split):
    "The conversations of a split as (text, text of the scored parts)."
    found = []
    for file in sorted(Path(folder).glob(f"{split}_*.bin")):
        tokens, marks = read_shard(file).tolist(), scored_tokens(read_mask(file), 0, shard_length(file))
        assert tokens[-1] == encoding.eot_token and not marks[-1], "a last END_OF_TEXT is the target behind the last response"
        starts = [i for i, token in enumerate(tokens) if token == encoding.eot_token]
        for begin, end in zip(starts, starts[1:]):
            found.append((encoding.decode(tokens[begin + 1:end]), encoding.decode([t for t, m in zip(tokens[begin:end], marks[begin:end]) if m])))
    return found


def test_every_conversation_is_in_one_split_once(encoding, tmp_path):
    again = [dict(instruction="what is 7?", response="Another answer to a question that is there."), ROWS[3], ROWS[5]]
    manifest = built([write_rows(tmp_path / "a.jsonl", ROWS + again)], tmp_path / "out", encoding, shard_tokens=400)
    train, val = (conversations_in(encoding, tmp_path / "out", split) for split in ("train", "val"))
    wanted = {(TEMPLATE.format(prompt=row["instruction"]) + row["response"], row["response"]) for row in ROWS + again}
    assert sorted(train + val) == sorted(wanted) and len(train) > len(val) > 0
    assert manifest["conversations"] == {"read": 63, "repeated": 2, "train": len(train), "val": len(val)}
    def asked(split): return {text.partition("\n\n")[0].lower() for text, _ in split}
    assert not asked(train) & asked(val), "two answers to one question stand on the same side"
    assert len(list((tmp_path / "out").glob("train_*.bin"))) > 1 and sum(manifest["tokens"].values()) == sum(
        shard_length(file) for file in (tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet", "messages", "completion", "folder"])
def test_any_format_gives_the_same_bytes(encoding, tmp_path, kind):
    built([write_rows(tmp_path / "a.jsonl")], tmp_path / "one", encoding)
    path = tmp_path / f"b.{kind}"
    if kind == "jsonl.gz": path.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    elif kind == "jsonl.zst": path.write_bytes(pytest.importorskip("zstandard").compress((tmp_path / "a.jsonl").read_bytes()))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind == "folder":
        path.mkdir()
        write_rows(path / "1.jsonl", ROWS[:20]); write_rows(path / "2.jsonl", ROWS[20:])
    else:
        rows = [{"messages": one_turn(row["instruction"], row["response"])} if kind == "messages" else
                {"prompt": row["instruction"], "completion": row["response"]} for row in ROWS]
        path = write_rows(tmp_path / "b.jsonl", rows)
    built([path], tmp_path / "two", encoding)
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")


def test_messages_in_parquet_are_read_as_they_are_nested(encoding, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    rows = [{"messages": one_turn(row["instruction"], row["response"]) + one_turn("And again?", "No.")} for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    built([tmp_path / "a.parquet"], tmp_path / "one", encoding)
    built([write_rows(tmp_path / "a.jsonl", rows)], tmp_path / "two", encoding)
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")


def test_the_order_of_rows_makes_no_difference_and_the_seed_does(encoding, tmp_path):
    for name, rows, seed in (("a", ROWS, 0), ("b", ROWS[::-1], 0), ("c", ROWS, 1)):
        built([write_rows(tmp_path / f"{name}.jsonl", rows)], tmp_path / name, encoding, num_tokens=800, seed=seed)
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b") != shard_bytes(tmp_path / "c")


def test_weights_divide_the_budget(encoding, tmp_path):
    write_rows(tmp_path / "a.jsonl")
    write_rows(tmp_path / "b.jsonl", [{"prompt": f"Why {n}?", "completion": f"Because of {n}, and only of that."} for n in range(90)])
    manifest = built([f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.jsonl:3"], tmp_path / "out", encoding, num_tokens=1200)
    a, b = manifest["source_tokens"]["train"].values()
    assert 250 < a <= 300 and 820 < b <= 900 and a + b + 1 == manifest["tokens"]["train"]
    with pytest.raises(ShardError, match="weights divide a budget") as error:
        built([f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.jsonl:3"], tmp_path / "none", encoding)
    one_line(error)


def test_a_budget_bounds_what_is_held(encoding, tmp_path):
    "Of many conversations only the budget stays in memory: the same ones as when all are kept."
    rows = [{"prompt": f"Number {n}?", "completion": "Yes. " * 5} for n in range(2000)]
    path, held = write_rows(tmp_path / "a.jsonl", rows), []
    from daisy import sft
    add = sft._Pool.add
    def counted(pool, example):
        add(pool, example)
        held.append(pool.num_tokens)
    with mock.patch.object(sft._Pool, "add", counted):
        built([path], tmp_path / "few", encoding, num_tokens=1000, val_tokens=500)
    assert max(held) < 1200
    built([path], tmp_path / "all", encoding, val_tokens=500)
    few, everything = (conversations_in(encoding, tmp_path / name, "train") for name in ("few", "all"))
    assert few == everything[:len(few)] and 10 < len(few) < len(everything)


amounts = st.lists(st.tuples(st.floats(1, 1e6), st.floats(0.01, 100)), min_size=1, max_size=5)


@quick
@given(amounts=amounts, budget=st.floats(1, 1e6))
def test_shares_add_up_and_keep_the_weights(amounts, budget):
    available, weights = map(list, zip(*amounts))
    taken = shares(available, weights, budget)
    assert sum(taken) == pytest.approx(min(budget, sum(available)))
    assert all(0 <= t <= a * (1 + 1e-9) for t, a in zip(taken, available))
    full = [t / w for t, a, w in zip(taken, available, weights) if t < a * (1 - 1e-9)]
    assert max(full, default=0) == pytest.approx(min(full, default=0)), "whoever isn't used up has its share by weight"
    assert all(t / w <= min(full) * (1 + 1e-6) for t, w in zip(taken, weights)) if full else True


BAD = {"no response": ({"instruction": "Why?"}, "no response"), "zero tokens": ({"instruction": "Why?", "response": " \n"}, "no response: 'response' is empty"),
       "not text": ({"prompt": "Why?", "completion": 3}, "int, not text"), "no conversation": ({"text": "Once"}, "columns text"),
       "question last": ({"messages": one_turn("Why?")}, "the user has the last word"), "null": ({"prompt": "Why?", "completion": None}, "no response"),
       "a tool": ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"), "no messages": ({"messages": "hello"}, "a list of objects")}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_or_skipped_and_counted(encoding, tmp_path, name):
    row, reason = BAD[name]
    path = write_rows(tmp_path / "a.jsonl", [*ROWS[:30], row, *ROWS[30:]])
    with pytest.raises(CorpusError, match=re.escape(reason)) as error:
        built([path], tmp_path / "out", encoding)
    assert f"{path}, row 31: " in one_line(error) and not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="1 bad rows skipped, the first is row 31"):
        built([path], tmp_path / "out", encoding, max_bad=1)
    built([write_rows(tmp_path / "good.jsonl")], tmp_path / "good", encoding)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "good")


@pytest.mark.parametrize("change, reason", [
    (dict(sources=[]), "no source"), (dict(sources=["nothing.jsonl"]), "no source 'nothing.jsonl'"), (dict(sources=["a b"]), "no source 'a b'"),
    (dict(sources=["{}/a.csv"]), "a .csv isn't read; convert it to JSONL"),
    (dict(num_tokens=0), "must be at least 1"), (dict(val_fraction=0), "above 0 and below 1"), (dict(val_tokens=0), "at least 1"),
    (dict(sources=["{}/a.jsonl:0"]), "above 0"), (dict(sources=["{}/a.jsonl:nan"]), "above 0"), (dict(sources=["{}/empty.jsonl"]), "no conversation in it"),
    (dict(sources=["{}/one.jsonl"]), "none falls to")])
def test_what_cannot_be_built_is_one_line(encoding, tmp_path, change, reason):
    write_rows(tmp_path / "a.jsonl"); write_rows(tmp_path / "empty.jsonl", []); write_rows(tmp_path / "one.jsonl", ROWS[:1])
    sources = [source.format(tmp_path) for source in change.pop("sources", [f"{tmp_path}/a.jsonl"])]
    with pytest.raises(ValueError, match=reason) as error:
        built(sources, tmp_path / "out", encoding, **change)
    one_line(error)
    assert not (tmp_path / "out").exists()


def test_a_build_that_fails_leaves_the_old_one(encoding, tmp_path):
    path = write_rows(tmp_path / "a.jsonl")
    built([path], tmp_path / "out", encoding)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    write_rows(path, ROWS + [{"instruction": "?"}])
    with pytest.raises(CorpusError): built([path], tmp_path / "out", encoding)
    write_rows(path, ROWS[:50])
    with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")), pytest.raises(ShardError, match="No space left"):
        built([path], tmp_path / "out", encoding)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    built([path], tmp_path / "out", encoding, shard_tokens=300)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {file["name"] for file in manifest["files"]} | {"manifest.json"} == {file.name for file in (tmp_path / "out").iterdir()}


def test_shards_of_others_are_not_touched(encoding, tmp_path):
    (tmp_path / "out").mkdir()
    write_shard(tmp_path / "out" / "fineweb_val_000000.bin", [1, 2])
    with pytest.raises(ShardError, match="daisy didn't build it"):
        built([write_rows(tmp_path / "a.jsonl")], tmp_path / "out", encoding)


# the command

def command(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1", **options.pop("env", {})}
    return subprocess.run([sys.executable, str(ROOT / "build_sft_shards.py"), *map(str, arguments)], capture_output=True, text=True,
                          timeout=120, env=environment, **options)


def test_the_command_is_the_same_in_every_process(encoding, tmp_path):
    write_rows(tmp_path / "a.jsonl")
    save_encoding(encoding, tmp_path / "encoding.json")
    for seed, name in (("1", "one"), ("2", "two")):
        done = command("--source", "a.jsonl", "--out-dir", name, "--encoding", "encoding.json", "--val-fraction", "0.2", cwd=tmp_path, env={"PYTHONHASHSEED": seed})
        assert done.returncode == 0, done.stderr
        assert "reading:" in done.stderr and re.search(r"train: \d+ conversations, [\d,]+ tokens, [\d,]+ of them scored; a.jsonl", done.stdout)
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two") and shard_bytes(tmp_path / "one")
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == ["encoding.json", "manifest.json", "train_000.bin", "val_000.bin"]


def test_the_command_says_in_one_line_what_is_wrong(encoding, tmp_path, capsys):
    save_encoding(encoding, tmp_path / "encoding.json")
    write_rows(tmp_path / "a.jsonl", [*ROWS, {"instruction": "?", "response": ""}])
    line = ["--source", f"{tmp_path}/a.jsonl", "--out-dir", f"{tmp_path}/out", "--encoding", f"{tmp_path}/encoding.json", "--quiet"]
    assert main(line) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("build_sft_shards.py: ") and "row 61" in said and "\n" not in said
    assert main([*line, "--max-bad", "1", "--val-fraction", "0.2"]) == 0
    assert "1 bad rows skipped" in capsys.readouterr().err
    assert main(["--encoding", "klingon"]) == 1 and main(["--tokens", "many"]) == 2 and main(["--help"]) == 0
    with mock.patch("daisy.sft.build_sft_shards", side_effect=KeyboardInterrupt):
        assert main(line) == 130


# data sets of the hub, on this machine

class Hub(ThreadingHTTPServer):
    "Answers for data sets: `files` by path, and `failures[path]` how often to hang up first."
    daemon_threads = True

    def __init__(self, files, sha="abc123", listing=None):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.sha, self.listing, self.failures, self.asked = files, sha, listing, {}, []
        self.env = {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}"}

    def handle_error(self, *_): pass


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        hub = self.server
        hub.asked.append(self.path)
        if self.path == "/api/datasets/owner/chats":
            data = hub.listing or json.dumps({"sha": hub.sha, "siblings": [{"rfilename": name} for name in hub.files]}).encode()
        else:
            data = hub.files.get(self.path.removeprefix(f"/datasets/owner/chats/resolve/{hub.sha}/"))
        if data is None:
            self.send_response(404); self.send_header("Content-Length", "0"); return self.end_headers()
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.send_response(206 if start else 200)
        if start: self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if hub.failures.get(self.path, 0):
            hub.failures[self.path] -= 1
            data = data[:start + (len(data) - start) // 2]
        self.wfile.write(data[start:])

    def log_message(self, *_): pass


@contextlib.contextmanager
def serving(hub):
    threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def from_hub(hub, tmp_path, source="owner/chats", *arguments):
    save_encoding(train_encoding(["It is so, surely."], 260, "toy"), tmp_path / "encoding.json")
    return command("--source", source, "--out-dir", "out", "--encoding", "encoding.json", "--val-fraction", "0.2", *arguments, cwd=tmp_path, env=hub.env)


def test_a_data_set_of_the_hub_by_its_name(tmp_path):
    files = {"README.md": b"# chats", "data/train-0.jsonl": jsonl(ROWS[:30]), "data/train-1.jsonl.gz": gzip.compress(jsonl(ROWS[30:])),
             "data/test-0.jsonl": jsonl([dict(prompt="Held out?", completion="Yes.")])}
    with serving(Hub(files)) as hub:
        hub.failures["/datasets/owner/chats/resolve/abc123/data/train-0.jsonl"] = 1
        done = from_hub(hub, tmp_path)
        assert done.returncode == 0, done.stderr
        assert "60 read" in done.stdout, "the training files and no others"
        asked = len(hub.asked)
        assert from_hub(hub, tmp_path).returncode == 0 and hub.asked[asked:] == ["/api/datasets/owner/chats"], "what is there isn't fetched again"
        assert from_hub(hub, tmp_path, "owner/chats/data/test-0.jsonl:2", "--tokens", "100").returncode == 1
    write_rows(tmp_path / "a.jsonl")
    done = command("--source", "a.jsonl", "--out-dir", "local", "--encoding", "encoding.json", "--val-fraction", "0.2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "local")


@pytest.mark.parametrize("files, listing, reason", [
    ({"README.md": b"#"}, None, "has no .jsonl"), ({}, b"<html>", "no list of a data set's files"), ({"../../x.jsonl": b"{}"}, None, "outside of its folder"),
    ({"/etc/x.jsonl": b"{}"}, None, "outside of its folder"), ({"train.jsonl": b"{\n"}, None, "not JSON"), ({"train.parquet": b"PAR1"}, None, "train.parquet")])
def test_a_hub_that_answers_nonsense_is_one_line(tmp_path, files, listing, reason):
    with serving(Hub(files, listing=listing)) as hub:
        done = from_hub(hub, tmp_path)
    said = [line for line in re.split(r"[\r\n]+", done.stderr) if line.startswith("build_sft_shards.py")]
    assert done.returncode == 1 and len(said) == 1 and reason in said[0] and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("x.jsonl"))


def test_a_data_set_that_the_hub_lacks_and_no_hub_at_all(tmp_path):
    with serving(Hub({})) as hub:
        done = from_hub(hub, tmp_path, "owner/other")
    assert done.returncode == 1 and "404" in done.stderr and "Traceback" not in done.stderr
    done = from_hub(hub, tmp_path)  # it has gone
    assert done.returncode == 1 and "no network?" in done.stderr and "Traceback" not in done.stderr


# questions about Python

def test_held_out_questions_are_in_no_training_text():
    "Neither in the shards of pretraining nor in those of fine-tuning, with the defaults of both."
    from daisy.corpus import python_docs, split_of
    train, held_out = python_questions("train"), python_questions("val")
    assert held_out == python_questions("val") != python_questions("val", seed=1)
    assert len(held_out) >= 200 and not {q.name for q in train} & {q.name for q in held_out}
    text = "\n".join(" ".join(document.text.lower().split()) for document in python_docs() if split_of(document.text, 0.05) == "train")
    tuned = {" ".join(question.answer.lower().split()).rstrip(".") for question in train}
    for question in held_out:
        answer = " ".join(question.answer.lower().split()).rstrip(".")
        assert answer not in text and answer not in tuned, question
    assert not {q.document for q in train} & {q.document for q in held_out} and len({q.answer for q in held_out}) == len(held_out)


def test_the_shards_of_questions_hold_the_split_of_the_documents(tmp_path):
    encoding = train_encoding([q.answer for q in python_questions("val")], 400, "toy")
    manifest = build_sft_shards(["python_questions"], tmp_path, encoding, progress=False)
    val = dict(conversations_in(encoding, tmp_path, "val"))
    assert val == {TEMPLATE.format(prompt=q.question) + q.answer: q.answer for q in python_questions("val")}
    train = conversations_in(encoding, tmp_path, "train")
    assert any(text.startswith(TEMPLATE.format(prompt="What does os.path.join do?")) for text, _ in train)
    assert not {answer for _, answer in train} & set(val.values()) and manifest["conversations"]["train"] == len(train)


# fine-tuning as typed

TINY = ["num_layers=2", "num_heads=2", "head_dim=16", "model_dim=32", "max_seq_len=64", "num_iterations=12", "val_loss_every=6", "val_tokens=2000",
        "global_batch_size=4", "device=cpu", "sample_tokens=5"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A folder as after ./run.sh config/tiny.yml, in a small shape."
    folder = tmp_path_factory.mktemp("typed")
    shutil.copytree(ROOT / "config", folder / "config")
    with contextlib.chdir(folder) if sys.version_info >= (3, 11) else moved_to(folder):
        assert train_main(["config/tiny.yml", *TINY]) == 0
    return folder


@contextlib.contextmanager
def moved_to(folder):
    before = os.getcwd()
    os.chdir(folder)
    try: yield
    finally: os.chdir(before)


SHORT = [word for word in TINY if word.split("=")[0] not in ("num_layers", "num_heads", "head_dim", "model_dim")]


def test_pretrain_fine_tune_ask(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    before = {file.name for file in (trained / "checkpoints").iterdir()}
    assert train_main(["config/tiny_sft.yml", *SHORT]) == 0
    said = capsys.readouterr().out
    assert "building python_questions shards" in said and "weights only" in said and "12 steps" in said
    assert {file.name for file in (trained / "checkpoints").iterdir()} == before, "the pretrained model's files stay"
    rows = [json.loads(line) for line in (trained / "checkpoints_sft" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert losses[-1] < losses[0] and [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    tuned, base = load_checkpoint("checkpoints_sft/state_step_12.pt"), load_checkpoint("checkpoints/state_step_12.pt")
    assert tuned["tokens_seen"] == 2 * base["tokens_seen"] and tuned["encoding"] == base["encoding"]
    assert sample_main(["--prompt", "What does os.path.join do?", "--max_tokens", "5"]) == 0


def test_the_newest_checkpoint_of_all_folders_is_sampled(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert newest_checkpoint() is None
    for number, name in enumerate(("checkpoints_sft", "checkpoints", "other")):
        Path(name).mkdir()
        shutil.copy(latest_checkpoint(trained / "checkpoints"), f"{name}/state_step_1.pt")
        os.utime(f"{name}/state_step_1.pt", (number + 1, number + 1))
    assert newest_checkpoint() == Path("checkpoints/state_step_1.pt")
    os.utime("checkpoints_sft/state_step_1.pt", (9, 9))
    assert newest_checkpoint() == Path("checkpoints_sft/state_step_1.pt") and starting_checkpoint("checkpoints") == Path("checkpoints/state_step_1.pt")


@pytest.mark.parametrize("line, reason", [
    (["config/tiny_sft.yml"], "train one first, ./run.sh config/tiny.yml"), (["config/instruct_sft.yml"], "init_checkpoint="),
    (["config/tiny_sft.yml", "init_checkpoint=gone.pt"], "no such file"), (["config/instruct_sft_1.6B.yml"], "init_checkpoint=")])
def test_without_a_checkpoint_one_line_says_what_to_type(trained, tmp_path, monkeypatch, capsys, line, reason):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "config", tmp_path / "config")
    assert train_main(line) == 1
    said = capsys.readouterr().err.strip()
    assert reason in said and "\n" not in said and not list(tmp_path.glob("checkpoints*")) and not (tmp_path / "data").exists()


def test_without_shards_one_line_names_the_builder(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "config", tmp_path / "config")
    assert train_main(["config/instruct_sft.yml", f"init_checkpoint={latest_checkpoint(trained / 'checkpoints')}"]) == 1
    said = capsys.readouterr().err.strip()
    assert "build_sft_shards.py --source SOURCE --out-dir data/sft" in said and "\n" not in said


@pytest.mark.parametrize("name", ["instruct_sft", "instruct_sft_1.6B"])
def test_instruct_configs_train_on_shards_of_ones_own(trained, monkeypatch, capsys, name):
    monkeypatch.chdir(trained)
    write_rows(trained / "mine.jsonl")
    assert main(["--source", "mine.jsonl", "--out-dir", "data/sft", "--encoding", "data/python_docs/encoding.json", "--val-fraction", "0.2", "--quiet"]) == 0
    line = [f"config/{name}.yml", f"--init_checkpoint={latest_checkpoint('checkpoints')}", "--ignore_prior_schedule=true", *SHORT, "device_batch_size=2",
            "num_iterations=40", "attention=auto", f"checkpoint_dir={name}", "hidden_matrix_params_lr=0.02"]
    assert train_main(line) == 0
    rows = [json.loads(row) for row in (trained / name / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert losses[-1] < losses[0] - 0.1 and sum("loss" in row for row in rows) == 40, losses
    capsys.readouterr()


def test_loss_on_prompt_scores_everything(trained, monkeypatch):
    monkeypatch.chdir(trained)
    write_rows(trained / "mine.jsonl")
    main(["--source", "mine.jsonl", "--out-dir", "data/both", "--encoding", "data/python_docs/encoding.json", "--val-fraction", "0.2", "--quiet"])
    def tokens(*more):
        config = load_config("config/tiny.yml", [*TINY, "val_tokens=0", "corpus=none", "train_files=data/both/train_*.bin", "val_files=data/both/val_*.bin", *more])
        return Run(config).validate().tokens
    number = shard_length("data/both/val_000.bin")
    assert tokens("loss_on_prompt=true") == number - 1 > tokens() > 0


def test_a_checkpoint_of_another_vocabulary_is_one_line(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    write_rows(trained / "mine.jsonl")
    other = train_encoding([row["response"] for row in ROWS], 300, "other")
    save_encoding(other, trained / "other.json")
    assert main(["--source", "mine.jsonl", "--out-dir", "data/other", "--encoding", "other.json", "--val-fraction", "0.2", "--quiet"]) == 0
    capsys.readouterr()
    assert train_main(["config/instruct_sft.yml", "init_checkpoint=checkpoints", "train_files=data/other/train_*.bin", "val_files=data/other/val_*.bin", *SHORT,
                       "device_batch_size=2", "attention=auto", f"checkpoint_dir={tmp_path}/x"]) == 1
    said = capsys.readouterr().err.strip()
    assert "another encoding" in said and "\n" not in said
