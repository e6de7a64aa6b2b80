"""What the lesson on evaluation can't hold: harness, transformers, command lines, bad input, every switch of the model.

`pip install -e '.[hf]'` and `pip install -e '.[lm-eval]'` bring what the tests that are skipped without them need.
"""
import importlib.util
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from daisy import evaluate
from daisy.gpt import GPT, GPTConfig
from daisy.tokens import encode_documents, train_encoding

needs_transformers = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("transformers", "safetensors"))), reason="pip install -e '.[hf]'")
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install -e '.[lm-eval]'")

TEXT = "def join(path, *paths):\n    Join two or more pathname components, inserting '/' as needed.\n\nÜber 12 daisies: 🌼 don't.\n"


@pytest.fixture(scope="module")
def encoding():
    return train_encoding([TEXT * 3, "The quick brown fox. " * 20], vocab_size=300, name="test")


def config_of(encoding, **changes) -> GPTConfig:
    shape = dict(vocab_size=encoding.n_vocab, num_layers=4, num_heads=4, head_dim=16, model_dim=64, max_seq_len=48, eos_token_id=encoding.eot_token)
    return GPTConfig(**shape | changes)


def noisy_model(config: GPTConfig, seed=0) -> GPT:
    "Every weight and gate away from where it starts, so that nothing that is left out goes unnoticed."
    model = GPT(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim < 2 else 0.1))
    return model.eval()


@pytest.fixture(scope="module")
def model(encoding):
    return noisy_model(config_of(encoding, window_short=16))


def nats_by_loop(model, ids, start):
    with torch.no_grad():
        return [-model(torch.tensor([ids[:i]]))[0, -1].log_softmax(-1)[ids[i]].item() for i in range(start, len(ids))]


# scoring

@pytest.mark.parametrize("batch_tokens", [1, 40, 100_000])
def test_spans_in_any_batches_are_scored_as_one_by_one(model, encoding, batch_tokens):
    dice = random.Random(0)
    base = [dice.randrange(256) for _ in range(45)]
    spans = [([encoding.eot_token, *base[:dice.randrange(1, 45)], *[dice.randrange(256) for _ in range(dice.randrange(3))]], 0) for _ in range(12)]
    spans = [(ids, dice.randrange(1, len(ids))) for ids, _ in spans]
    for (ids, start), (nats, hits) in zip(spans, evaluate.score_spans(model, spans, batch_tokens), strict=True):
        torch.testing.assert_close(nats, torch.tensor(nats_by_loop(model, ids, start)), atol=2e-5, rtol=1e-5)
        with torch.no_grad(): likeliest = model(torch.tensor([ids]))[0].argmax(-1)
        assert hits.tolist() == [likeliest[i - 1].item() == ids[i] for i in range(start, len(ids))]


def test_rows_may_be_longer_than_in_training_and_no_longer_than_memory(model, encoding):
    [ids] = encode_documents(encoding, [TEXT * 3])
    assert len(ids) > 2 * model.config.max_seq_len
    [(nats, _)] = evaluate.score_spans(model, [(ids.tolist(), len(ids) - 4)])
    torch.testing.assert_close(nats, torch.tensor(nats_by_loop(model, ids.tolist(), len(ids) - 4)), atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"too long to read at once: at most 50; shorten it, or raise batch_tokens"):
        evaluate.score_spans(model, [(ids.tolist(), 5)], batch_tokens=50)


def test_logits_that_are_not_numbers_are_refused(encoding):
    broken = noisy_model(config_of(encoding))
    with torch.no_grad(): broken.head.weight[5] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        evaluate.score_spans(broken, [([encoding.eot_token, 5, 6], 1)])


def test_bits_per_byte_counts_every_byte_once_and_agrees_with_the_loop(model, encoding):
    texts = [TEXT, "", "a", TEXT * 2 + "🌼"]
    for seq_len, stride in ((48, 0), (48, 48), (10, 3)):
        score = evaluate.score_texts(model, encoding, texts, seq_len=seq_len, stride=stride, batch_tokens=200)
        assert score.num_bytes.sum() == sum(len(text.encode()) for text in texts)
        nats = 0.0
        for ids in map(np.ndarray.tolist, encode_documents(encoding, texts)):
            for begin, first, end in evaluate.plan_windows(len(ids), seq_len, stride or seq_len // 2):
                nats += sum(nats_by_loop(model, ids[begin:end], first - begin))
        assert score.bits.sum() == pytest.approx(nats / np.log(2), rel=1e-5)


def test_an_untrained_model_needs_the_bits_of_its_vocabulary(encoding):
    "All logits are 0, so each token costs log2 V: the only way to another figure is to lose or double a token."
    fresh = GPT(config_of(encoding)).eval()
    [ids] = encode_documents(encoding, [TEXT * 40])
    score = evaluate.score_texts(fresh, encoding, [TEXT * 40])
    assert score.bits.sum() == pytest.approx((len(ids) - 1) * np.log2(encoding.n_vocab), rel=1e-5)
    assert len(score.bits) == -(-len((TEXT * 40).encode()) // evaluate.PIECE_BYTES) > 1


def test_shards_become_text_again_for_models_of_another_vocabulary(tmp_path, encoding, model):
    from daisy.shards import build_corpus_shards
    (tmp_path / "texts").mkdir()
    texts = [f"{TEXT}\nNumber {i} of many texts. " + "More of it. " * i for i in range(30)]
    for i, text in enumerate(texts): (tmp_path / "texts" / f"{i}.txt").write_text(text)
    build_corpus_shards(tmp_path / "texts", tmp_path / "shards", vocab_size=280, val_fraction=0.4, processes=1, progress=False)
    found = [text for split in ("train", "val") for text in evaluate.read_texts(str(tmp_path / "shards" / f"{split}_*.bin"))]
    assert sorted(found) == sorted(texts)
    first = evaluate.read_texts(str(tmp_path / "shards" / "train_*.bin"), max_bytes=100)
    assert sum(len(text.encode()) for text in first) == 100
    assert evaluate.score_texts(model, encoding, first).num_bytes.sum() == 100


def test_what_is_no_shard_is_refused_before_a_vocabulary_is_looked_for(tmp_path, monkeypatch):
    from daisy.shards import ShardError
    (tmp_path / "junk.bin").write_bytes(b"junk" * 600)
    def none_here(name): raise AssertionError("looked for a vocabulary")
    monkeypatch.setattr(evaluate, "load_encoding", none_here)
    with pytest.raises(ShardError, match="junk.bin"): evaluate.open_task(f"bpb:{tmp_path}/junk.bin")


def test_models_of_different_vocabularies_are_compared_piece_by_piece(encoding):
    other = train_encoding([TEXT], vocab_size=260, name="other")
    task = evaluate.Task("text", texts=(TEXT * 70, "short", TEXT * 80))
    results = [evaluate.measure(GPT(config_of(enc)).eval(), enc, task)[0] for enc in (encoding, other)]
    assert len(results[0].values) == len(results[1].values) and results[0].weights.sum() == results[1].weights.sum()
    gained = results[1].minus(results[0])
    assert gained.low <= gained.value <= gained.high and gained.value > 0  # fewer merges, more tokens, each log2 V bits
    assert "bpb, with 95% intervals" in evaluate.report(task, {"a": results[:1], "b": results[1:]})


def test_no_text_is_an_error(tmp_path, model, encoding):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="no text to score"): evaluate.read_texts(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="nothing|no text"): evaluate.score_texts(model, encoding, [""])
    with pytest.raises(ValueError, match="no corpus"): evaluate.open_task(f"bpb:{tmp_path}/none.txt")


# choices

def test_choices_are_scored_where_they_begin_to_differ(model, encoding):
    item = evaluate.Item("The quick", (" brown fox", " brown", "er fox", " daisies"), 0)
    [scores] = evaluate.score_choices(model, encoding, [item])
    context = [encoding.eot_token, *encoding.encode_ordinary(item.context)]
    for choice, (total, per_byte, per_token, gain) in zip(item.choices, scores):
        whole = [encoding.eot_token, *encoding.encode_ordinary(item.context + choice)]
        start = evaluate.choice_spans(encoding, item.context, item.choices)[0][1]
        assert whole[:start] == context[:start]
        assert total == pytest.approx(sum(nats_by_loop(model, whole, start)), rel=1e-5)
        assert per_byte == pytest.approx(total / len(choice.strip())) and per_token == pytest.approx(total / (len(whole) - start))
        assert np.isnan(gain)


def test_a_chat_is_scored_in_the_template_and_from_the_response_on(model, encoding):
    from daisy.sft import encode_conversation, one_turn
    item = evaluate.Item("Why?", ("  def", "x"), 0, blank="Say it.", chat=True)
    [scores] = evaluate.score_choices(model, encoding, [item])
    for choice, cost in zip(item.choices, scores):
        totals = []
        for prompt in (item.context, item.blank):
            ids, start = encode_conversation(encoding, one_turn(prompt, choice))[0], len(encode_conversation(encoding, one_turn(prompt))[0])
            assert encoding.decode(ids[start:]) == choice.strip() and "### Response:" in encoding.decode(ids[:start])
            totals.append(sum(nats_by_loop(model, ids, start)))
        assert cost[0] == pytest.approx(totals[0], rel=1e-5) and cost[3] == pytest.approx(totals[0] - totals[1], abs=1e-3)


def test_an_empty_context_is_the_start_of_a_document(model, encoding):
    items = [evaluate.Item("", ("The quick", "Join"), 0), evaluate.Item("The", (" quick", " fox"), 0)]
    scores = evaluate.score_choices(model, encoding, items)
    for item, some in zip(items, scores):
        for choice, cost in zip(item.choices, some[:, 0]):
            ids = [encoding.eot_token, *encoding.encode_ordinary(item.context + choice)]
            start = evaluate.choice_spans(encoding, item.context, item.choices)[0][1]
            assert cost == pytest.approx(sum(nats_by_loop(model, ids, start)), rel=1e-5)


def test_questions_without_choices_are_answered_in_words_alone(tmp_path, model, encoding):
    (tmp_path / "open.jsonl").write_text(json.dumps(ROWS["open"]))
    task = evaluate.open_task(str(tmp_path / "open.jsonl"))
    [result] = evaluate.measure(model, encoding, task)
    assert result.metric == "exact match" and result.values.tolist() == [0]
    assert evaluate.report(task, {"a": [result]}).splitlines()[0] == f"{tmp_path}/open.jsonl: 1 questions"


def test_a_tie_is_a_guess(encoding):
    "An untrained model finds all tokens as likely: choices of as many tokens share the mark, whichever stands first."
    fresh, item = GPT(config_of(encoding)).eval(), evaluate.Item("Q", ("a", "b", "c", "d"), 3)
    scores = evaluate.score_choices(fresh, encoding, [item, replace(item, answer=0)])
    assert evaluate.mark_choices(scores, [item, replace(item, answer=0)]).tolist() == [0.25, 0.25]


ROWS = {
    "hellaswag": {"ctx": "A cat", "endings": ["sits.", "flies.", "sings."], "label": "1", "activity_label": "Cats"},
    "arc": {"id": "x", "question": {"stem": "Why?", "choices": [{"text": "so", "label": "A"}, {"text": "no", "label": "B"}]}, "answerKey": "B"},
    "arc_hf": {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["1", "2"]}, "answerKey": "2"},
    "mmlu": {"question": "Why?", "choices": ["so", "no"], "answer": 1, "subject": "x"},
    "open": {"question": "Why?", "answer": "no"},
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_known_format_is_read(tmp_path, kind):
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + json.dumps(ROWS[kind]) + "\n\n", encoding="utf-8")
    [item] = evaluate.read_questions(path)
    assert item.choices[item.answer] == {"hellaswag": " flies.", "mmlu": " B"}.get(kind, " no")
    assert item.context == {"hellaswag": "A cat", "mmlu": "Why?\nA. so\nB. no\nAnswer:"}.get(kind, "Question: Why?\nAnswer:")


WRONG = [
    ("hellaswag", dict(label=3), "label 3 names none of the 3 choices"), ("hellaswag", dict(label="-1"), "leave it out"),
    ("hellaswag", dict(label=""), "names none"), ("hellaswag", dict(label=True), "names none"), ("hellaswag", dict(label=None), "names none"),
    ("hellaswag", dict(endings="abc"), "'endings' holds \"abc\", not a list"), ("hellaswag", dict(endings=["a"]), "1 choices"),
    ("hellaswag", dict(endings=["a", ""]), "isn't empty"), ("hellaswag", dict(endings=["a", 3]), "holds 3"), ("hellaswag", dict(ctx=4), "not text"),
    ("arc", dict(answerKey="C"), "answerKey 'C' is not one of the labels A, B"), ("arc", dict(question={"stem": "Why?"}), "no field 'choices'"),
    ("arc", dict(question={"stem": "Why?", "choices": ["so", "no"]}), "no field 'text'"), ("arc_hf", dict(choices={"text": ["so"], "label": ["1"]}), "1 choices"),
    ("arc_hf", dict(choices={"text": ["so", "no"], "label": ["2", "2"]}), "not one of"), ("arc_hf", dict(question=None), "'question' holds null"),
    ("mmlu", dict(answer=2), "answer 2 names none"), ("mmlu", dict(answer="E"), "answer 'E'"), ("mmlu", dict(choices=["a"] * 30, answer=0), "26 letters"),
    ("mmlu", dict(answer=1.5), "names none"), ("open", dict(answer=" "), "empty"), ("open", dict(answer=5), "not text"), ("open", dict(question=5), "not text"),
]


@pytest.mark.parametrize("kind, change, words", WRONG)
def test_a_wrong_row_is_one_line_with_file_and_line(tmp_path, kind, change, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[kind]) + "\n\n" + json.dumps(ROWS[kind] | change))
    with pytest.raises(evaluate.QuestionError) as error: evaluate.read_questions(path)
    assert str(error.value).startswith(f"{path}, line 3: ") and words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind, field", [(kind, field) for kind, row in ROWS.items() for field in row if field not in ("id", "activity_label", "subject")])
def test_a_missing_field_is_named(tmp_path, kind, field):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({name: value for name, value in ROWS[kind].items() if name != field}))
    with pytest.raises(evaluate.QuestionError, match="line 1: (no field|an unknown format|field '(question|answer)')"): evaluate.read_questions(path)


@pytest.mark.parametrize("data, words", [(b"", "no questions"), (b"\n \n", "no questions"), (b"{]", "line 1: not JSON"), (b'"a"', "a JSON object is needed"),
                                         (b"\xff\xfe", "line 1: not UTF-8"), (b"[" * 100_000, "line 1: not JSON"), (b"{}", "unknown format")])
def test_a_file_without_questions_is_refused(tmp_path, data, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(evaluate.QuestionError) as error: evaluate.read_questions(path)
    assert words in str(error.value)
    with pytest.raises(evaluate.QuestionError, match="no task"): evaluate.open_task(str(tmp_path / "none.jsonl"))
    with pytest.raises(evaluate.QuestionError, match="directory"): evaluate.read_questions(tmp_path)


# answers in words

def test_written_answers_are_greedy_and_end_where_they_should(model, encoding):
    with torch.no_grad():
        ids = [encoding.eot_token, *encoding.encode_ordinary("The quick")]
        for _ in range(20): ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    whole = encoding.decode(ids[1:], errors="replace").removeprefix("The quick").split("<|endoftext|>")[0]
    prompt = evaluate.prompt_ids(encoding, "The quick")
    assert evaluate.write_answer(model, encoding, prompt, 20) == whole
    end = whole[3:5]
    assert evaluate.write_answer(model, encoding, prompt, 20, until=("never there", end)) == whole[:whole.index(end)]
    right = evaluate.Item("The quick", (whole.upper(),), 0, until=())
    assert evaluate.mark_written(model, encoding, [right, replace(right, choices=("fox",))], max_tokens=20).tolist() == [1, 0]


# intervals

def test_intervals_cover_what_they_promise_for_ratios_too():
    rng, missed = np.random.default_rng(0), 0
    for _ in range(200):
        num_bytes = rng.integers(50, 150, size=60)
        e = evaluate.estimate(num_bytes * rng.gamma(4, 0.5, 60), num_bytes, resamples=500)
        missed += not e.low <= 2.0 <= e.high
    assert 2 <= missed <= 26  # 10 expected; percentile intervals of 60 items miss a little more


def test_paired_intervals_are_narrow_where_items_are_hard_for_both():
    rng = np.random.default_rng(0)
    hard = rng.gamma(2, 1, 300)
    a, b = hard + rng.normal(0, 0.1, 300), hard + 0.05 + rng.normal(0, 0.1, 300)
    paired, apart = evaluate.difference(b, a), evaluate.difference(rng.permutation(b), a)
    assert paired.low > 0 > apart.low and (apart.high - apart.low) > 5 * (paired.high - paired.low)
    with pytest.raises(ValueError, match="300 items against 299"): evaluate.difference(a, b[1:])
    with pytest.raises(ValueError, match="at least one item"): evaluate.bootstrap([])
    assert (evaluate.bootstrap(a, seed=1) == evaluate.bootstrap(a, seed=1)).all() and (evaluate.bootstrap(a, seed=1) != evaluate.bootstrap(a, seed=2)).any()


def test_the_best_rule_is_compared_on_the_same_items():
    items = tuple(evaluate.Item("join paths", choices, 0) for choices in (("join paths", "a cat sits", "it"), ("joins", "a long other text", "b")))
    task = evaluate.Task("toy", items=(*items, evaluate.Item("What?", ("that",), 0)))  # the last has no choices and counts for no rule
    rule = evaluate.best_rule(task)
    assert rule.metric == "most letters shared" and rule.values.tolist() == [1, 1]
    said = evaluate.report(task, {"a": [evaluate.Result("accuracy by sum", np.array([1.0, 0])), evaluate.Result("exact match", np.zeros(3))]})
    assert "accuracy by sum, with 95% intervals; change from the rule most letters shared" in said and "-50.0 points (-100.0 to +0.0)" in said
    assert "exact match, with 95% intervals\n" in said


# the questions about Python

def test_python_items_are_many_held_out_and_hard_to_guess():
    from daisy.sft import python_questions
    items = evaluate.python_items()
    held, trained = ({q.answer for q in python_questions(split)} for split in ("val", "train"))
    assert len(items) >= 200 and items == evaluate.python_items()
    for item in items:
        assert len(set(item.choices)) == 4 and set(item.choices) <= held and not set(item.choices) & trained
        lengths = [len(choice) for choice in item.choices]
        assert all(evaluate._is_near(n, lengths[item.answer]) for n in lengths)
    rules = {name: marks.mean() for name, marks in evaluate.mark_rules(items).items()}
    assert rules["chance"] == 0.25 and rules["shortest"] < 0.35 and rules["longest"] < 0.35
    assert 0.25 < rules["most letters shared"] < 0.45  # drawn at random it would be 0.85


@pytest.mark.gpu
def test_a_gpu_scores_as_the_cpu_does(encoding):
    from daisy.real_run import examine
    config = config_of(encoding, window_short=16)
    fast = noisy_model(config).to("cuda")
    fast.compute_dtype, fast.backend = torch.bfloat16, "flex"
    task, items = evaluate.Task("text", texts=(TEXT * 30,)), [evaluate.Item("The quick", (" brown", " fox", " daisies grow here"), 0)]
    [slow], [quick] = evaluate.measure(noisy_model(config), encoding, task), examine(fast, encoding, task)
    assert fast.backend == "flex"
    assert slow.estimate().value == pytest.approx(quick.estimate().value, rel=0.02)
    fast.backend = "sdpa"
    [slow], [quick] = evaluate.score_choices(noisy_model(config), encoding, items), evaluate.score_choices(fast, encoding, items)
    np.testing.assert_allclose(slow, quick, rtol=0.05, atol=0.2)


# lm-eval

TASK = """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: toy_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
WRITTEN = """
task: toy_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
generation_kwargs: {{until: ["\\n"], max_gen_toks: 5}}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
metric_list: [{{metric: exact_match}}]
"""


@needs_harness
def test_lm_eval_drives_a_model_without_a_network(tmp_path, monkeypatch, model, encoding):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"): monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import lm_eval
    from lm_eval.tasks import TaskManager
    dice = random.Random(0)
    words = "the quick brown fox join path components inserting daisies don't".split()
    rows = [dict(question=" ".join(dice.choices(words, k=5)), choices=dice.sample(words, 3), answer=dice.randrange(3)) for _ in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    for name, text in (("choice", TASK), ("rolling", ROLLING), ("written", WRITTEN)):
        (tmp_path / "tasks" / f"toy_{name}.yaml").write_text(text.format(path=tmp_path / "rows.jsonl"))
    found = lm_eval.simple_evaluate(evaluate.lm_eval_model(model, encoding), tasks=["toy_choice", "toy_rolling", "toy_written"], num_fewshot=0,
                                    task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False))["results"]
    items = [evaluate.Item(row["question"], tuple(" " + choice for choice in row["choices"]), row["answer"]) for row in rows]
    scores = evaluate.score_choices(model, encoding, items)
    assert found["toy_choice"]["acc,none"] == pytest.approx(evaluate.mark_choices(scores, items).mean())
    assert found["toy_choice"]["acc_norm,none"] == pytest.approx(evaluate.mark_choices(scores, items, "byte").mean())
    score = evaluate.score_texts(model, encoding, [row["question"] for row in rows])
    assert found["toy_rolling"]["bits_per_byte,none"] == pytest.approx(score.bits_per_byte, rel=1e-6)
    assert found["toy_written"]["exact_match,none"] == 0


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is here")
def test_without_lm_eval_the_way_to_it_is_named(model, encoding):
    with pytest.raises(ValueError, match=r"pip install -e '\.\[lm-eval\]'"): evaluate.lm_eval_model(model, encoding)


# transformers

SWITCHES = [
    {}, dict(window_short=8), dict(window_short=8, window_long=20, window_pattern="SL"), dict(value_embeds=False, residual_gates=False, x0_gates=False),
    dict(depth_skips=True), dict(depth_skips=True, num_layers=5, value_layers="0 1 -1"), dict(qk_norm=False), dict(logit_softcap=0.0), dict(tie_head=True),
    dict(rope_fraction=0.5, rope_base=500.0), dict(smear=True), dict(backout=True), dict(attention_gate=True), dict(num_kv_heads=2),
    dict(mlp_ratio=2, head_dim=8), dict(vocab_size=320),
    dict(window_short=8, depth_skips=True, smear=True, backout=True, attention_gate=True, num_kv_heads=1, tie_head=True, vocab_size=310, rope_fraction=0.5),
]


def tokens_of(encoding, rows=2, length=48, seed=0):
    "Rows of several documents."
    tokens = torch.randint(encoding.n_vocab - 1, (rows, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = tokens[0, 17] = tokens[1, 30] = encoding.eot_token
    return tokens


def exported(model, encoding, folder, **options):
    from transformers import AutoModelForCausalLM
    evaluate.export_model(model.config, model.state_dict(), encoding, folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=not options.get("plain")).eval()


@needs_transformers
@pytest.mark.parametrize("changes", SWITCHES, ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()) or "default")
def test_an_export_computes_what_daisy_computes(tmp_path, encoding, changes):
    model = noisy_model(config_of(encoding, **changes))
    theirs, tokens = exported(model, encoding, tmp_path / "out"), tokens_of(encoding)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=2e-4, rtol=2e-4)
        loss = theirs(tokens, labels=tokens).loss
        torch.testing.assert_close(loss, model(tokens[:, :-1], tokens[:, 1:].contiguous()), atol=1e-4, rtol=1e-4)


@needs_transformers
def test_long_range_blocks_are_exported(tmp_path, encoding):
    model = noisy_model(config_of(encoding, window_short=16, window_long=32, long_every=2, max_seq_len=400))
    theirs, tokens = exported(model, encoding, tmp_path / "out"), tokens_of(encoding, length=400)
    tokens[:, 1:] = tokens[:, 1:].clamp(max=encoding.n_vocab - 2)  # one document, so that the blocks are in reach
    with torch.no_grad():
        without = noisy_model(replace(model.config, long_every=0))(tokens)
        assert (without - model(tokens)).abs().max() > 1e-2
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=2e-4, rtol=2e-4)


@needs_transformers
def test_an_export_generates_alone_and_in_a_padded_batch(tmp_path, encoding, model):
    from daisy.generate import Sampling, generate
    theirs = exported(model, encoding, tmp_path / "out")
    prompts = [[encoding.eot_token, *encoding.encode_ordinary(text)] for text in ("The quick brown", "Join")]
    wanted = [list(generate(model, prompt, 12, Sampling(temperature=0.0), stop_id=encoding.eot_token)) for prompt in prompts]
    for prompt, answer in zip(prompts, wanted):
        got = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=12, do_sample=False)
        assert got[0, len(prompt):].tolist()[:len(answer)] == answer
    longest = max(map(len, prompts))
    padded = torch.tensor([[encoding.eot_token] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    for row, answer in zip(theirs.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False), wanted):
        assert row[longest:].tolist()[:len(answer)] == answer


@needs_transformers
def test_padding_is_no_part_of_a_text_that_no_end_of_text_opens(tmp_path, encoding):
    model = noisy_model(config_of(encoding, smear=True, window_short=8))
    theirs, text = exported(model, encoding, tmp_path / "out"), torch.tensor([encoding.encode_ordinary("The quick brown fox")])
    padded = torch.cat([torch.full((1, 7), encoding.eot_token), text], dim=1)
    mask = torch.cat([torch.zeros(1, 7, dtype=torch.long), torch.ones_like(text)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(theirs(padded, attention_mask=mask).logits[:, 7:], model(text), atol=2e-4, rtol=2e-4)


@needs_transformers
@pytest.mark.parametrize("changes", [{}, dict(qk_norm=False), dict(tie_head=True), dict(num_kv_heads=2, mlp_ratio=3), dict(vocab_size=310, rope_base=700.0)], ids=str)
def test_a_plain_model_is_a_standard_architecture(tmp_path, encoding, changes):
    model = noisy_model(config_of(encoding, **evaluate.PLAIN_VALUES | changes))
    theirs = exported(model, encoding, tmp_path / "out", plain=True)
    assert type(theirs).__module__.startswith("transformers.models.") and not list((tmp_path / "out").glob("*.py"))
    tokens = tokens_of(encoding)
    tokens[:, 1:] = tokens[:, 1:].clamp(max=encoding.n_vocab - 2)  # one document: a standard model knows no others
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=3e-4, rtol=3e-4)
    got = theirs.generate(tokens[:1, :8], attention_mask=torch.ones(1, 8, dtype=torch.long), max_new_tokens=6, do_sample=False)
    with torch.no_grad(): assert got[0, 8].item() == model(tokens[:1, :8])[0, -1].argmax().item()


@pytest.mark.parametrize("changes, word", [(dict(smear=True), "smear=True"), (dict(logit_softcap=15.0), "logit_softcap=15.0"), (dict(window_short=8), "windows below"),
                                           (dict(head_dim=8), "head_dim 8"), (dict(rope_fraction=0.5), "rope_fraction")])
def test_what_no_standard_architecture_has_is_named(encoding, changes, word):
    config = config_of(encoding, **evaluate.PLAIN_VALUES | changes)
    with pytest.raises(ValueError, match=word): evaluate.plain_model(config, GPT(config).state_dict())


@needs_transformers
def test_bfloat16_halves_the_file_and_stays_near(tmp_path, encoding, model):
    theirs = exported(model, encoding, tmp_path / "half", dtype=torch.bfloat16)
    evaluate.export_model(model.config, model.state_dict(), encoding, tmp_path / "full")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "full")]
    assert 0.45 < sizes[0] / sizes[1] < 0.6
    with torch.no_grad(): difference = theirs.float()(tokens_of(encoding)).logits - model(tokens_of(encoding))
    assert difference.abs().mean() < 0.1
    with pytest.raises(ValueError, match="not an empty folder"):
        evaluate.export_model(model.config, model.state_dict(), encoding, tmp_path / "half")


def random_texts(seed=0):
    dice = random.Random(seed)
    alphabets = ["abc ABC'  \n\t.,()_123", "".join(map(chr, range(32, 127))), "äöüßéñ 中文日本 🌼🚀\u200d\u0301 \u00a0\u2003", " \n\r\t\x0b\x0c\x1c\x1f\x85\u2028x-", "don't I'll we've '' s't"]
    return ["".join(dice.choices(dice.choice(alphabets), k=dice.randrange(1, 60))) for _ in range(400)] + [TEXT, "", " " * 300, "a" * 300, "\n" * 50 + "x"]


def assert_same_ids(encoding, folder):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in random_texts():
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == encoding.encode_ordinary(text), repr(text)
        assert tokenizer(text)["input_ids"] == [encoding.eot_token, *encoding.encode_ordinary(text)]
        assert tokenizer.decode(encoding.encode_ordinary(text), clean_up_tokenization_spaces=False) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == encoding.eot_token and len(tokenizer) == encoding.n_vocab


@needs_transformers
def test_the_exported_tokenizer_gives_the_same_ids(tmp_path, encoding, model):
    evaluate.export_model(model.config, model.state_dict(), encoding, tmp_path / "out")
    assert_same_ids(encoding, tmp_path / "out")


@needs_transformers
def test_the_exported_chat_template_is_that_of_fine_tuning(tmp_path, encoding, model):
    from transformers import AutoTokenizer

    from daisy.sft import encode_conversation, one_turn
    evaluate.export_model(model.config, model.state_dict(), encoding, tmp_path / "out")
    tokenizer, asked = AutoTokenizer.from_pretrained(tmp_path / "out"), one_turn(" What does join do? ")
    for messages in (asked, [{"role": "system", "content": "Be brief."}, *asked]):
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == encode_conversation(encoding, messages)[0]
    several = [*one_turn("a b", "c"), *asked]
    assert tokenizer.apply_chat_template(several, tokenize=False) == encoding.decode(encode_conversation(encoding, several)[0])


@needs_transformers
def test_gpt2s_too(tmp_path):
    from daisy.tokens import EncodingError, gpt2_encoding
    try:
        encoding = gpt2_encoding()
    except EncodingError as error:
        pytest.skip(str(error))
    config = config_of(encoding, num_layers=1, model_dim=8, num_heads=1, head_dim=8, value_embeds=False)
    evaluate.export_model(config, GPT(config).state_dict(), encoding, tmp_path / "out")
    assert_same_ids(encoding, tmp_path / "out")


def test_an_export_without_safetensors_says_what_to_install(tmp_path, monkeypatch, encoding, model):
    import sys
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[hf\]'"): evaluate.export_model(model.config, model.state_dict(), encoding, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# the commands

@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    "A folder with a run of two steps of a model of 257 tokens, and one of three steps of the same."
    from daisy.real_run import train_main
    from daisy.shards import build_corpus_shards
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "text").mkdir()
    for i in range(40): (folder / "text" / f"{i}.txt").write_text(f"Document {i} says that {i} plus {i} is {2 * i}. " * 8)
    build_corpus_shards(str(folder / "text"), folder / "data", vocab_size=257)
    (folder / "run.yml").write_text(f"train_files: {folder}/data/train_*.bin\nval_files: {folder}/data/val_*.bin\nvocab_size: 257\nnum_layers: 2\n"
                                    "num_heads: 2\nhead_dim: 8\nmodel_dim: 16\nwindow_short: 8\nnum_iterations: 2\nglobal_batch_size: 2\n"
                                    f"max_seq_len: 32\nval_seq_len: 32\ndevice: cpu\nsample_tokens: 0\ncheckpoint_dir: {folder}/two\n")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in list(ROWS.values())[:4] * 5))
    assert train_main([str(folder / "run.yml")]) == 0
    assert train_main([str(folder / "run.yml"), f"checkpoint_dir={folder}/three", "num_iterations=3", f"eval_task={folder}/rows.jsonl"]) == 0
    return folder


def test_a_run_asks_before_and_after(run_dir, capsys):
    from daisy.real_run import train_main
    assert train_main([str(run_dir / "run.yml"), f"checkpoint_dir={run_dir}/asked", f"eval_task={run_dir}/rows.jsonl"]) == 0
    said = capsys.readouterr().out
    assert f"{run_dir}/rows.jsonl: 20 questions; without a model: chance" in said and said.count("    step 0 ") == said.count("    step 2 ") == 3
    assert train_main([str(run_dir / "run.yml"), f"checkpoint_dir={run_dir}/none", "eval_task=quiz.jsonl"]) == 1
    assert "no task 'quiz.jsonl'" in capsys.readouterr().err and not (run_dir / "none").exists()


def test_asking_changes_nothing_that_is_learned(run_dir):
    from daisy.checkpoint import load_checkpoint
    from daisy.real_run import train_main
    assert train_main([str(run_dir / "run.yml"), f"checkpoint_dir={run_dir}/silent", "num_iterations=3"]) == 0
    asked, silent = (load_checkpoint(run_dir / name / "state_step_3.pt")["model"] for name in ("three", "silent"))
    assert all(torch.equal(asked[name], silent[name]) for name in asked)


def test_the_report_and_the_rows(run_dir, tmp_path, capsys):
    from daisy.real_run import evaluate_main
    from daisy.speed import read_rows
    tasks = [str(run_dir / "rows.jsonl"), f"bpb:{run_dir}/data/val_*.bin"]
    command = [str(run_dir / "two"), str(run_dir / "three" / "state_step_3.pt"), "--tasks", *tasks, "--written", "--out", str(tmp_path)]
    assert evaluate_main(command) == 0 and evaluate_main(command) == 0
    said = capsys.readouterr().out
    assert "two/state_step_2 " in said and "three/state_step_3 " in said and "points (" in said and "exact match" in said
    rows = read_rows(tmp_path / "evaluate.jsonl")
    assert len(rows) == 2 * 2 * 5 and [{**r, "date": 0} for r in rows[:10]] == [{**r, "date": 0} for r in rows[10:]], "the same each time"
    first = rows[0]
    assert first["task"] == tasks[0] and first["metric"] == "accuracy by sum" and first["n"] == 20 and first["name"] == "two/state_step_2"
    assert "compared_with" not in first and next(r for r in rows if r["name"] == "three/state_step_3")["compared_with"] == "two/state_step_2"
    items = evaluate.open_task(tasks[0]).items
    rules = {name: marks.mean() for name, marks in evaluate.mark_rules([item for item in items if len(item.choices) > 1]).items()}
    assert first["rule_accuracy"] == round(max(rules.values()), 6) == round(rules[first["rule"]], 6) and f"change from the rule {first['rule']}, and from" in said
    assert first["over_rule"] == pytest.approx(first["accuracy"] - first["rule_accuracy"], abs=2e-4)
    assert first["over_rule_interval"][0] <= first["over_rule"] <= first["over_rule_interval"][1]
    assert all(("over_rule" in row) == row["metric"].startswith("accuracy") for row in rows)
    bpb = [row for row in rows[:10] if row["metric"] == "bpb"]
    assert len(bpb) == 2 and bpb[0]["interval"][0] <= bpb[0]["bpb"] <= bpb[0]["interval"][1] and bpb[0]["bytes"] > 100
    assert bpb[1]["difference"] == pytest.approx(bpb[1]["bpb"] - bpb[0]["bpb"], abs=2e-4)
    assert "--out" not in first["command"] and first["command"].startswith("daisy-evaluate")


@pytest.mark.parametrize("words, said", [
    (["none.pt"], "no checkpoint at none.pt"), (["."], "no checkpoint at ."), (["{two}", "--tasks", "quiz"], "no task 'quiz'"), (["{two}", "--tasks", "bpb:"], "names no text"), (["{two}", "--tasks", "bpb:none.txt"], "no corpus"),
    (["{two}", "--tasks", "bpb:none_*.bin"], "matches no file"), (["{rows}"], "not a usable checkpoint"), (["{two}", "--max_bytes", "0"], "must be 1 or more"),
    (["{two}", "--device", "tpu"], "not known"), (["{two}", "{two}/state_step_2.pt"], "is named twice"),
])
def test_what_cannot_be_measured_is_one_line(run_dir, tmp_path, monkeypatch, capsys, words, said):
    from daisy.real_run import evaluate_main
    monkeypatch.chdir(tmp_path)
    assert evaluate_main([word.format(two=run_dir / "two", rows=run_dir / "rows.jsonl") for word in words]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error


def test_usage_errors_are_code_2(capsys):
    from daisy.real_run import evaluate_main, export_main
    assert evaluate_main([]) == 2 and export_main(["a"]) == 2 and evaluate_main(["--help"]) == 0 and export_main(["--help"]) == 0


def test_chat_asks_in_the_template(run_dir):
    [task, plain] = [evaluate.open_task(str(run_dir / "rows.jsonl"), chat=chat) for chat in (True, False)]
    assert all(item.chat for item in task.items) and not any(item.chat for item in plain.items)


@needs_transformers
def test_a_checkpoint_is_exported_by_the_command(run_dir, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from daisy.real_run import export_main, load_model
    assert export_main([str(run_dir / "three"), str(tmp_path / "out")]) == 0 and "trust_remote_code=True" in capsys.readouterr().out
    model, encoding = load_model(run_dir / "three" / "state_step_3.pt", torch.device("cpu"))
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True), AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("Document 3 says", return_tensors="pt")
    with torch.no_grad(): torch.testing.assert_close(theirs(**ids).logits, model(ids["input_ids"]), atol=1e-4, rtol=1e-4)
    assert export_main([str(run_dir / "three"), str(tmp_path / "out")]) == 1 and "not an empty folder" in capsys.readouterr().err
    assert export_main([str(run_dir / "three"), str(tmp_path / "plain"), "--plain"]) == 1
    assert "no standard architecture has value_embeds=True" in capsys.readouterr().err and not (tmp_path / "plain").exists()


@needs_transformers
def test_an_export_loads_where_daisy_is_not_installed(tmp_path, encoding, model):
    "In a process of its own that can't import daisy."
    import subprocess
    import sys
    evaluate.export_model(model.config, model.state_dict(), encoding, tmp_path / "out")
    code = ("import sys; sys.modules['daisy'] = None\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True); t = AutoTokenizer.from_pretrained({str(tmp_path / 'out')!r})\n"
            "print(t.decode(m.generate(**t('The quick', return_tensors='pt'), max_new_tokens=4, do_sample=False)[0]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "The quick" in done.stdout, done.stderr
