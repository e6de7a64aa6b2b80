"""What lesson 17 can't hold: properties of sampling over many inputs, the cache for many shapes and rows, streaming of any bytes."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import daisy.attention
import daisy.generate
from daisy.generate import (Decoder, Replayed, Sampling, choose_token, decode_one_token, generate, generate_batch, keep_top_k, keep_top_p,
                            next_token_probs, penalize_repetition, prefill, reading_copy, stream_text)
from daisy.gpt import GPT, GPTConfig
from daisy.masks import MaskSpec
from daisy.tokens import encoding_from_merges

from test_attention import by_torch

finite = st.floats(-1e4, 1e4, width=32)
logit_rows = arrays("float32", array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40), elements=finite).map(torch.from_numpy)
samplings = st.builds(Sampling, temperature=st.one_of(st.just(0.0), st.floats(1e-300, 100)), top_k=st.integers(0, 60),
                      top_p=st.floats(1e-6, 1.0), repetition_penalty=st.floats(0.01, 100))


# ---- the distribution

@settings(deadline=None, max_examples=200)
@given(logit_rows, samplings, st.data())
def test_a_distribution_comes_out_whatever_goes_in(logits, sampling, data):
    B, V = logits.shape
    seen = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, V - 1), min_size=3, max_size=3), min_size=B, max_size=B)))
    before = logits.clone()
    probs = next_token_probs(logits, sampling, seen=seen)
    assert torch.equal(logits, before)
    assert probs.shape == (B, V) and probs.dtype == torch.float32 and (probs >= 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(B))
    if sampling.top_k:
        assert ((probs > 0).sum(-1) <= sampling.top_k).all()
    torch.multinomial(probs, 1)


@settings(deadline=None)
@given(logit_rows, st.integers(1, 60))
def test_top_k_keeps_the_k_largest(logits, k):
    kept = keep_top_k(logits, k)
    assert (kept.isfinite().sum(-1) == min(k, logits.size(1))).all()
    for row, cut in zip(logits, kept):
        assert torch.equal(cut[cut.isfinite()], row[cut.isfinite()])
        if (cut == -math.inf).any():
            assert row[cut.isfinite()].min() >= row[cut == -math.inf].max()


@settings(deadline=None)
@given(arrays("float32", array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40), elements=st.floats(-10, 10, width=32)).map(torch.from_numpy),
       st.floats(1e-6, 0.999))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    kept, probs = keep_top_p(logits, p).isfinite(), logits.double().softmax(-1)
    assert kept.any(-1).all()
    for row, keep in zip(probs, kept):
        assert row[keep].sum() >= p - 1e-5
        assert row[keep].sum() - row[keep].min() < p + 1e-5  # without its least likely token it falls short
        if (~keep).any():
            assert row[keep].min() >= row[~keep].max() - 1e-7


@pytest.mark.parametrize("p, kept", [(0.1, 1), (0.5, 1), (0.50001, 2), (0.75, 2), (0.76, 3), (0.875, 3), (0.9, 4)])
def test_top_p_on_exact_halves(p, kept):
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert keep_top_p(logits, p).isfinite().sum() == kept


@settings(deadline=None)
@given(logit_rows, st.floats(1.0, 10.0), st.data())
def test_a_penalty_never_helps(logits, penalty, data):
    seen = torch.tensor([data.draw(st.lists(st.integers(0, logits.size(1) - 1), min_size=4, max_size=4))] * logits.size(0))
    after = penalize_repetition(logits, seen, penalty)
    assert (after <= logits).all()
    untouched = torch.ones_like(logits, dtype=torch.bool).scatter(-1, seen, False)
    assert torch.equal(after[untouched], logits[untouched])


def test_temperature_zero_is_greedy_and_cold_comes_near():
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, 4.0, -1.0]])
    greedy = next_token_probs(logits, Sampling(temperature=0))
    assert greedy.tolist() == [[0, 1, 0], [1, 0, 0]]
    for cold in (1e-320, 1e-12, 1e-3):
        torch.testing.assert_close(next_token_probs(logits, Sampling(temperature=cold)), greedy)


def test_minus_infinity_bans_a_token():
    probs = next_token_probs(torch.tensor([[0.0, -math.inf, 0.0]]), Sampling(1.0, 3, 0.99))
    assert probs.tolist() == [[0.5, 0, 0.5]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_raised(dtype):
    logits = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(next_token_probs(logits, Sampling(top_p=0.9)), next_token_probs(logits.float(), Sampling(top_p=0.9)))


@pytest.mark.parametrize("row", [[math.nan, 1.0], [math.nan] * 2, [math.inf, 1.0], [-math.inf] * 2])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_give_no_distribution(row, temperature):
    with pytest.raises(ValueError, match="NaN or infinity") as error:
        next_token_probs(torch.tensor([[1.0, 2.0], row]), Sampling(temperature))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, value", [
    ("temperature", -1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1), ("top_k", 2.5), ("top_p", 0), ("top_p", -0.1),
    ("top_p", 1.01), ("top_p", math.nan), ("repetition_penalty", 0), ("repetition_penalty", -1), ("repetition_penalty", math.nan),
    ("repetition_penalty", math.inf)])
def test_a_setting_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} {value} must be"):
        Sampling(**{name: value})


def shares(logits, sampling, seen=None, pointers=4000):
    "How often each token (V,) of one row of logits is chosen by pointers at equal distances."
    places = (torch.arange(pointers) + 0.5)[:, None] / pointers
    many = None if seen is None else torch.zeros(pointers, logits.size(1), dtype=torch.bool).scatter(1, seen.expand(pointers, -1), True)
    return choose_token(logits.expand(pointers, -1), places, sampling, many).flatten().bincount(minlength=logits.size(1)) / pointers


@settings(deadline=None, max_examples=60)
@given(arrays("float32", array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40), elements=st.floats(-9, 9, width=32)).map(torch.from_numpy),
       samplings, st.data())
def test_pointers_choose_by_the_distribution(logits, sampling, data):
    logits = logits[:1]
    if len(set(logits[0].tolist())) < logits.size(1):
        logits = logits + torch.arange(logits.size(1)) * 1e-3  # which of equal tokens a cut keeps is nobody's promise
    seen = torch.tensor([data.draw(st.lists(st.integers(0, logits.size(1) - 1), min_size=3, max_size=3))])
    probs = next_token_probs(logits, sampling, seen=seen)[0]
    if sampling.top_p < 1 and (next_token_probs(logits, Sampling(sampling.temperature, sampling.top_k, 1.0, sampling.repetition_penalty), seen=seen)
                               .sort(descending=True).values.cumsum(-1) - sampling.top_p).abs().min() < 1e-4:
        return  # at the very edge of a cut rounding decides
    torch.testing.assert_close(shares(logits, sampling, seen), probs, atol=6e-4, rtol=0)


@pytest.mark.parametrize("pointer", [0.0, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("sampling", [Sampling(1, 0), Sampling(1, 3), Sampling(1, 0, 0.6), Sampling(1, 3, 0.6)], ids=str)
def test_no_pointer_hits_a_token_without_chance(sampling, pointer):
    logits = torch.tensor([[-math.inf, 2.0, -math.inf, 1.0, 0.0, -3.0, -math.inf]])
    chosen = choose_token(logits, torch.tensor([[pointer]]), sampling).item()
    assert next_token_probs(logits, sampling)[0, chosen] > 0


@pytest.mark.parametrize("row", [[math.nan, 1.0], [math.nan] * 2, [math.inf, 1.0], [-math.inf] * 2])
@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(0.8), Sampling(1, 0, 0.5), Sampling(1, 1)], ids=str)
def test_a_row_without_numbers_is_reported_and_the_others_go_on(row, sampling):
    assert choose_token(torch.tensor([[9.0, -9.0], row]), torch.zeros(2, 1), sampling).tolist() == [[0], [-1]]


# ---- the cache

def random_model(seed=0, **changes):
    "Random everywhere: a new model's head is zero, and would agree with anything."
    shape = dict(vocab_size=90, num_layers=3, num_heads=2, head_dim=8, model_dim=16, max_seq_len=16, eos_token_id=0, window_short=5)
    model, generator = GPT(GPTConfig(**shape | changes)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim < 2))
    return model.eval()


FEATURES = [dict(), dict(num_layers=1), dict(num_layers=2, window_pattern="SL"), dict(num_layers=6, depth_skips=True), dict(num_kv_heads=1),
            dict(tie_head=True), dict(value_embeds=False), dict(x0_gates=False, residual_gates=False), dict(qk_norm=False),
            dict(logit_softcap=0.0), dict(rope_fraction=0.5), dict(window_short=1), dict(window_short=0, window_pattern="L"),
            dict(vocab_size=64), dict(max_seq_len=8, window_long=4, window_short=2), dict(smear=True), dict(backout=True),
            dict(attention_gate=True), dict(value_layers="0 1 -1"), dict(long_every=2, max_seq_len=300),
            dict(num_layers=5, depth_skips=True, smear=True, backout=True, attention_gate=True, tie_head=True, num_kv_heads=1)]


@torch.no_grad()
def cached_logits(model, tokens, prompt_len, piece=1):
    "Logits (B, T - prompt_len + 1, V), the text after the prompt in pieces of `piece` tokens."
    cache = model.new_cache(*tokens.shape)
    rows = [prefill(model, tokens[:, :prompt_len], cache)[:, None]]
    for t in range(prompt_len, tokens.size(1), piece):
        rows.append(decode_one_token(model, tokens[:, t:t + 1], cache)[:, None] if piece == 1 else model(tokens[:, t:t + piece], cache=cache))
    assert cache.length == tokens.size(1)
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("feature", FEATURES, ids=str)
@pytest.mark.parametrize("prompt_len, piece", [(1, 1), (7, 1), (30, 1), (6, 4)])
def test_cached_is_uncached_at_every_position(feature, prompt_len, piece):
    model = random_model(**feature)
    tokens = torch.randint(0, 60, (3, 40), generator=torch.Generator().manual_seed(1))
    tokens[1, [0, 9, 17, 18]] = 0  # documents that begin and end inside prompt and continuation
    with torch.no_grad():
        expected = model(tokens)[:, prompt_len - 1:]
    assert expected.std() > 0.1
    torch.testing.assert_close(cached_logits(model, tokens, prompt_len, piece), expected, atol=1e-4, rtol=1e-4)


def rows_of(*lengths, seed=5):
    "Rows of tokens with a document's end in some of them."
    rows = [torch.randint(1, 60, (n,), generator=torch.Generator().manual_seed(seed + n)) for n in lengths]
    rows[0][0], rows[-1][-1] = 0, 0
    return rows


@pytest.mark.parametrize("feature", FEATURES, ids=str)
@pytest.mark.parametrize("read_tokens", [2048, 7])
@torch.no_grad()
def test_rows_of_any_lengths_get_what_each_would_get_alone(feature, read_tokens, monkeypatch):
    "Prompts of 1 to 33 tokens read in one pass, or in pieces in which some rows have ended, then 12 tokens each."
    monkeypatch.setattr(daisy.generate, "READ_TOKENS", read_tokens)
    model, rows = random_model(**feature), rows_of(1, 33, 16, 7, 8)
    new = torch.randint(0, 60, (5, 12), generator=torch.Generator().manual_seed(2))
    counts = torch.tensor([len(row) for row in rows])
    cache = model.new_cache(5, 45)
    got = [prefill(model, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=3), cache, counts)]
    got += [decode_one_token(model, column, cache) for column in new.split(1, dim=1)]
    for i, row in enumerate(rows):
        expected = model(torch.cat([row, new[i]])[None])[0, len(row) - 1:]
        torch.testing.assert_close(torch.stack(got, dim=1)[i], expected, atol=1e-4, rtol=1e-4)
    assert cache.lengths.tolist() == (counts + 12).tolist()


@pytest.mark.parametrize("feature", FEATURES, ids=str)
def test_a_layer_keeps_no_more_than_its_window(feature):
    model = random_model(**feature)
    cache = model.new_cache(2, 1000)
    expected = [1000 if feature.get("long_every") else window for window in model.config.windows]
    assert [keys.size(1) for keys in cache.keys] == [values.size(1) for values in cache.values] == expected
    assert [keys.size(1) for keys in model.new_cache(2, 3).keys] == [min(places, 3) for places in expected]


@pytest.mark.parametrize("feature", FEATURES, ids=str)
@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(0, repetition_penalty=1.5), Sampling(0.9, 20, 0.9, 1.2)], ids=str)
def test_generate_is_the_naive_loop(feature, sampling):
    model, tokens = random_model(**feature), torch.tensor([[0, 5, 6]])
    with torch.no_grad():
        for pointer in torch.rand(30, generator=torch.Generator().manual_seed(3)):
            seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool).scatter(1, tokens, True)
            tokens = torch.cat([tokens, choose_token(model(tokens)[:, -1], pointer.view(1, 1), sampling, seen)], dim=1)
    assert list(generate(model, [0, 5, 6], 30, sampling, seed=3)) == tokens[0, 3:].tolist()


# ---- many rows, recorded steps

PROMPTS = [[0, 5, 6], [7] * 20, [0, 3, 0, 9, 9, 1, 2]]


@pytest.mark.parametrize("feature", FEATURES, ids=str)
def test_a_batch_writes_what_its_rows_write_alone_recorded_or_not(feature):
    model, sampling = random_model(**feature), Sampling(0.9, 20, 0.9, 1.2)
    alone = [list(generate(model, prompt, 50, sampling, seed=3 + i)) for i, prompt in enumerate(PROMPTS)]
    assert generate_batch(model, PROMPTS, 50, sampling, seed=3) == alone
    decoder = Decoder(model, graphs=True, record=lambda work: work)
    for _ in range(3):  # as it is, recorded, replayed
        assert generate_batch(decoder, PROMPTS, 50, sampling, seed=3) == alone


def test_one_recording_a_shape():
    recorded = []

    def record(work):
        recorded.append(work)
        return work

    decoder = Decoder(random_model(), graphs=True, record=record)
    for seed in range(4):
        for prompt in ([1, 2], [3] * 150):
            list(generate(decoder, prompt, 60, seed=seed))
    assert len(recorded) == 3  # prompts of up to 128 and of up to 256 tokens, and a step
    list(generate(decoder, [1], 60, Sampling(0.5)))
    assert len(recorded) == 4  # another temperature is another step, seen for the second time


def test_nothing_in_a_recorded_step_moves():
    "Replaying works on addresses: after the first text no tensor of the batch may be another one."
    decoder = Decoder(random_model(smear=True), graphs=True, record=lambda work: work)

    def addresses():
        batch = decoder._batch
        tensors = [x for x in (*vars(batch).values(), *vars(batch.cache).values(), *batch.cache.keys, *batch.cache.values, *batch.cache.rope)
                   if isinstance(x, torch.Tensor)]
        return [x.data_ptr() for x in tensors]

    list(generate(decoder, [1, 2], 40, Sampling(repetition_penalty=1.2), seed=0))
    before = addresses()
    list(generate(decoder, [1, 2, 3], 40, Sampling(repetition_penalty=1.2), seed=1))
    assert addresses() == before and len(before) > 15


def test_each_row_stops_by_itself():
    model, sampling = random_model(), Sampling(1.0)
    free = generate_batch(model, PROMPTS, 40, sampling, seed=0)
    stops = {free[0][5], free[1][20]}
    for decoder in (model, Decoder(model, graphs=True, record=lambda work: work)):
        cut = generate_batch(decoder, PROMPTS, 40, sampling, seed=0, stop_id=stops)
        assert cut == [row[:next((i for i, token in enumerate(row) if token in stops), 40)] for row in free]
        assert list(generate(decoder, PROMPTS[0], 40, sampling, seed=0, stop_id=stops)) == cut[0]
    assert generate_batch(model, [], 5) == []


def test_two_texts_from_one_decoder_at_a_time():
    decoder = Decoder(random_model())
    first = generate(decoder, [1], 20)
    next(first)
    assert len(list(generate(decoder, [2], 5))) == 5
    with pytest.raises(RuntimeError, match="another was begun"):
        list(first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature", FEATURES, ids=str)
@torch.no_grad()
def test_the_reading_copy_computes_the_same(feature, dtype):
    model = random_model(**feature)
    model.compute_dtype = dtype
    before, tokens = {name: p.clone() for name, p in model.named_parameters()}, torch.randint(0, 60, (2, 40))
    state, twin = torch.get_rng_state(), reading_copy(model)
    assert torch.equal(torch.get_rng_state(), state)  # training's random numbers are left alone
    assert torch.equal(twin(tokens), model(tokens)) or dtype == torch.float32
    torch.testing.assert_close(twin(tokens), model(tokens), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(before[name], p) and p.dtype == torch.float32 for name, p in model.named_parameters())
    if dtype == torch.bfloat16:
        assert {m.weight.dtype for m in twin.modules() if isinstance(m, torch.nn.Linear)} == {dtype}


def test_work_is_recorded_the_second_time_and_replayed_from_then_on():
    done, recorded = [], []

    def record(work):
        recorded.append(len(done))
        return lambda: done.append("replayed")

    work = Replayed(lambda: done.append("done"), record=record)
    for _ in range(4): work()
    assert done == ["done", "replayed", "replayed", "replayed"] and recorded == [1]


def test_a_way_to_compile_that_is_none():
    with pytest.raises(ValueError, match="compiled='maybe' is not known: choose false, layers or full"):
        Decoder(random_model(), "maybe")


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["layers", "full"])
@pytest.mark.parametrize("feature", [dict(), FEATURES[-1]], ids=str)
def test_compiled_steps_write_the_same_and_compile_once(compiled, feature):
    torch._dynamo.reset(), torch._dynamo.utils.counters.clear()
    model, sampling = random_model(**feature), Sampling(0.9, 20, 0.9, 1.2)
    expected = generate_batch(model, PROMPTS, 50, sampling, seed=3)
    decoder = Decoder(model, compiled, graphs=True, record=lambda work: work)
    assert generate_batch(decoder, PROMPTS, 50, sampling, seed=3) == expected
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert generate_batch(decoder, PROMPTS, 50, sampling, seed=3) == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs and (compiled == "layers" or graphs == 1)


class TorchKernel:
    "Stands in for the Triton kernel of single tokens: takes what that takes, and computes it by torch's operations."

    def __getitem__(self, grid):
        return self.run

    @staticmethod
    def run(qkv, value_embed, x, gate, cos, sin, keys, values, lengths, starts, arrived, tops, totals, sums, output, scale, places,
            window, long_every, block_size, heads, key_heads, half, norm, gated, width, splits, block, num_warps):
        assert not arrived.any() and places == keys.size(1) and tops.shape == (len(qkv), heads, splits) and splits * block >= places
        assert keys.shape[2:] == (key_heads, 2 * half) and (value_embed is None and not gated or (gate.size(1), x.size(-1)) == (gated, width))
        piece = daisy.attention.Piece(lengths[:, None], starts, lengths, None, None, False)
        cache = daisy.attention.LayerCache(keys, values, MaskSpec(window or None, long_every, block_size), piece, places, None)
        output.copy_(by_torch(qkv, value_embed, x, gate, (cos, sin), cache, norm, scale).view(output.shape))


@pytest.fixture
def triton_by_torch(monkeypatch):
    "As if there were a CUDA GPU with Triton, for single tokens' attention."
    monkeypatch.setattr(daisy.attention, "_one_token_kernel", TorchKernel)
    choose = lambda how, device, head_dim: "triton" if how == "auto" else how
    monkeypatch.setattr(daisy.attention, "choose_one_token", choose)
    monkeypatch.setattr(daisy.generate, "choose_one_token", choose)


@pytest.mark.parametrize("feature", FEATURES, ids=str)
def test_single_tokens_through_one_operator_write_the_same(feature, triton_by_torch):
    model, sampling = random_model(**feature), Sampling(0.9, 20, 0.9, 1.2)
    expected = generate_batch(Decoder(model, attention="torch"), PROMPTS, 50, sampling, seed=3)
    decoder = Decoder(model, graphs=True, record=lambda work: work)
    assert decoder.attention == "triton" and generate_batch(decoder, PROMPTS, 50, sampling, seed=3) == expected
    assert decoder._batch.cache.arrived.shape == (3, model.config.kv_heads)


def test_the_operator_is_used_for_single_tokens_alone_and_without_gradients(triton_by_torch, monkeypatch):
    called = []
    monkeypatch.setattr(daisy.attention, "_one_token_kernel", lambda: called.append(1) or TorchKernel())
    model, tokens = random_model(), torch.randint(0, 60, (2, 12))
    cache = model.new_cache(2, 12)
    with torch.no_grad():
        prefill(model, tokens[:, :4], cache), model(tokens[:, 4:7], cache=cache)
        assert not called
        decode_one_token(model, tokens[:, 7:8], cache)
    assert len(called) == model.config.num_layers
    assert decode_one_token(model, tokens[:, 8:9], cache).requires_grad and len(called) == model.config.num_layers


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["layers", "full"])
def test_compiled_steps_use_the_operator_without_copying_rings(compiled, triton_by_torch, monkeypatch):
    "The compiler hands it the very tensors of the cache, and compiles once."
    torch._dynamo.reset(), torch._dynamo.utils.counters.clear()
    model, sampling = random_model(**FEATURES[-1]), Sampling(0.9, 20, 0.9, 1.2)
    expected = generate_batch(Decoder(model, attention="torch"), PROMPTS, 50, sampling, seed=3)
    rings = set()
    run = TorchKernel.run
    monkeypatch.setattr(TorchKernel, "run", staticmethod(lambda *given, **named: rings.update(x.data_ptr() for x in given[6:8]) or run(*given, **named)))
    decoder = Decoder(model, compiled, graphs=True, record=lambda work: work)
    assert generate_batch(decoder, PROMPTS, 50, sampling, seed=3) == expected
    cache, graphs = decoder._batch.cache, torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert rings == {ring.data_ptr() for ring in cache.keys + cache.values} and (compiled == "layers" or graphs == 1)
    assert generate_batch(decoder, PROMPTS, 50, sampling, seed=3) == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


# ---- generate

def test_seeds():
    model, hot = random_model(), Sampling(temperature=1.0, top_k=0)
    first = list(generate(model, [1], 30, hot, seed=5))
    torch.manual_seed(99)  # what else the program draws doesn't matter
    assert list(generate(model, [1], 30, hot, seed=5)) == first
    assert list(generate(model, [1], 30, hot, seed=6)) != first
    assert list(generate(model, [1], 30, hot)) != list(generate(model, [1], 30, hot))
    assert list(generate(model, [1], 10, hot, seed=5)) == first[:10]
    assert list(generate(model, [1], 3, hot, seed=2**63 - 1)) and list(generate(model, [1], 3, hot, seed=0))
    state = torch.get_rng_state()
    list(generate(model, [1], 3, hot))
    assert torch.equal(torch.get_rng_state(), state)  # training's random numbers are left alone


def test_it_stops():
    model = random_model()
    ids = list(generate(model, [1], 40, Sampling(1.0), seed=0))
    stop = ids[17]
    assert list(generate(model, [1], 40, Sampling(1.0), seed=0, stop_id=stop)) == ids[:ids.index(stop)]
    assert list(generate(model, [1], 0)) == []
    assert list(generate(model, [1], 40, Sampling(1.0), seed=0, stop_id=10**9)) == ids


def test_greedy_never_leaves_the_vocabulary_and_its_padding_is_unreachable():
    model = random_model(vocab_size=65)  # padded to 128
    assert max(generate(model, [1], 200, Sampling(5.0, 0), seed=0)) < 65


@pytest.mark.parametrize("wrong, words", [
    (dict(prompt=[]), "the prompt is empty"), (dict(prompt=[1, 90]), "token 90 is not in the model's vocabulary of 90"),
    (dict(prompt=[-1]), "token -1 is not in"), (dict(max_tokens=-1), "max_tokens -1 must be"), (dict(seed=-1), "seed -1 must be"),
    (dict(seed=2**63), "must be from 0 to")])
def test_what_cannot_be_continued(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        next(generate(random_model(), **dict(prompt=[1], max_tokens=4) | wrong))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_diverged_model_says_so(temperature):
    model = random_model()
    with torch.no_grad():
        model.embed.weight[3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        next(generate(model, [3], 5, Sampling(temperature)))


def test_a_model_can_be_trained_on_after_it_wrote_past_its_context():
    model = random_model()
    assert len(list(generate(model, [1], 60, Sampling(1.0), seed=0))) == 60  # four times max_seq_len
    tokens = torch.randint(1, 90, (2, 17))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert loss.isfinite() and model.embed.weight.grad.isfinite().all()


def test_gradients_stay_on_between_tokens():
    for _ in generate(random_model(), [1], 3):
        assert torch.is_grad_enabled()


# ---- streaming

BYTES = encoding_from_merges([(240, 159), (256, 146), (97, 98)], "bytes")  # 256 bytes, "f0 9f", "f0 9f 92", "ab", and the end of text


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=30))
def test_a_text_streams_as_it_is(text):
    pieces = list(stream_text(BYTES, BYTES.encode_ordinary(text)))
    assert "".join(pieces) == text and all(pieces)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 400), max_size=30))
def test_any_ids_stream(ids):
    known = b"".join(BYTES.decode_single_token_bytes(i) if i < BYTES.n_vocab else "\ufffd".encode() for i in ids)
    pieces = list(stream_text(BYTES, ids))
    assert "".join(pieces) == known.decode("utf-8", errors="replace")
    assert not any("\ud800" <= character <= "\udfff" for character in "".join(pieces))


def test_a_character_comes_out_whole_and_at_once():
    ids = list("a💥b".encode())
    assert list(stream_text(BYTES, ids)) == ["a", "💥", "b"]
    assert list(stream_text(BYTES, ids[:3])) == ["a", "\ufffd"]       # the model stopped in the middle
    assert list(stream_text(BYTES, [*ids[:3], 97])) == ["a", "\ufffda"]  # it went on with something else


def test_streaming_waits_for_nothing():
    def ids():
        yield from b"ab"
        raise KeyboardInterrupt
    stream = stream_text(BYTES, ids())
    assert next(stream) == "a" and next(stream) == "b"
    with pytest.raises(KeyboardInterrupt):
        next(stream)
