"""Properties of rotations and masks over random documents, windows and block sizes, beyond what the lessons show."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from daisy.masks import (MaskSpec, block_mask, dense_mask, document_ids, document_starts, flex_block_mask, layer_windows,
                         varlen_bounds, varlen_capacity, varlen_mask, visible_keys)
from daisy.rope import apply_rope, rope_tables

SPECS = st.builds(MaskSpec, window=st.none() | st.integers(1, 60), long_every=st.integers(0, 4), block_size=st.integers(1, 20))


@st.composite
def documents(draw, max_tokens=50):
    "Document numbers (B, T) of rows that may start in the middle of a document; one-token documents are common."
    T = draw(st.integers(1, max_tokens))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=1, max_size=3))
    return document_ids(torch.tensor(rows).int(), eos_id=1)


def brute_force(spec, doc_ids):
    "The definition, pair by pair."
    B, T = doc_ids.shape
    ids = doc_ids.tolist()

    def sees(b, q, k):
        near = spec.window is None or q - k < spec.window
        linked = spec.long_every > 0 and (k // spec.block_size + 1) % spec.long_every == 0
        return k <= q and ids[b][q] == ids[b][k] and (near or linked)

    return torch.tensor([[[[sees(b, q, k) for k in range(T)] for q in range(T)]] for b in range(B)])


def tiles(mask, size):
    "Every block (i, j) of a dense mask, flattened: (B, pairs)."
    for i in range(0, mask.shape[-1], size):
        for j in range(0, mask.shape[-1], size):
            yield i // size, j // size, mask[:, 0, i:i + size, j:j + size].flatten(1)


@settings(deadline=None, max_examples=60)
@given(SPECS, documents())
def test_dense_mask_is_the_definition(spec, doc_ids):
    assert torch.equal(dense_mask(spec, doc_ids), brute_force(spec, doc_ids))


@settings(deadline=None, max_examples=60)
@given(SPECS, documents(), st.data())
def test_positions_in_any_order_are_rows_and_columns_of_the_dense_mask(spec, doc_ids, data):
    "As a cache asks: some of the queries, and keys in places of their own, some of them empty (below 0)."
    B, T = doc_ids.shape
    of_rows = lambda low: torch.tensor(data.draw(st.lists(st.lists(st.integers(low, T - 1), min_size=5, max_size=5), min_size=B, max_size=B)))
    queries, keys = of_rows(0), of_rows(-3)
    starts = document_starts(doc_ids).gather(1, queries)
    expected = torch.stack([mask[0][q][:, k.clamp(min=0)] & (k >= 0) for mask, q, k in zip(brute_force(spec, doc_ids), queries, keys)])
    assert torch.equal(visible_keys(spec, queries, keys, starts), expected)
    row = torch.arange(T)[None]
    assert torch.equal(visible_keys(spec, row, row)[:, None], brute_force(spec, torch.zeros(1, T)))  # one document, one row for all


@settings(deadline=None, max_examples=150)
@given(SPECS, documents())
def test_block_maps_equal_the_dense_mask(spec, doc_ids):
    full, partial = block_mask(spec, doc_ids)
    for i, j, pairs in tiles(dense_mask(spec, doc_ids), spec.block_size):
        assert torch.equal(full[:, i, j], pairs.all(1))
        assert torch.equal(partial[:, i, j], pairs.any(1) & ~pairs.all(1))


@settings(deadline=None, max_examples=60)
@given(SPECS, documents())
def test_flex_block_mask_covers_exactly_the_blocks_and_pairs(spec, doc_ids):
    from torch.nn.attention.flex_attention import create_mask

    B, T = doc_ids.shape
    ours = flex_block_mask(spec, doc_ids)
    full, partial = block_mask(spec, doc_ids)
    assert torch.equal(ours.to_dense()[:, 0].bool(), full | partial)
    assert ours.full_kv_num_blocks.sum() <= full.sum()  # a short last block is never called full
    assert torch.equal(create_mask(ours.mask_mod, B, None, T, T, device="cpu"), dense_mask(spec, doc_ids))


@settings(deadline=None, max_examples=60)
@given(SPECS, documents())
def test_flex_block_mask_lists_columns_as_torch_would_from_our_rows(spec, doc_ids):
    "The backward pass goes by columns, and no CPU runs it: so the lists themselves are compared."
    from torch.nn.attention.flex_attention import BlockMask

    ours = flex_block_mask(spec, doc_ids)
    theirs = BlockMask.from_kv_blocks(ours.kv_num_blocks, ours.kv_indices, ours.full_kv_num_blocks, ours.full_kv_indices,
                                      BLOCK_SIZE=spec.block_size, mask_mod=ours.mask_mod, seq_lengths=ours.seq_lengths)
    for name in ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):
        got, want = getattr(ours, name), getattr(theirs, name)
        assert torch.equal(got, want) and got.dtype == want.dtype and got.is_contiguous(), name
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE and ours.seq_lengths == theirs.seq_lengths


@settings(deadline=None, max_examples=100)
@given(SPECS, documents())
def test_long_range_blocks_respect_documents_and_causality(spec, doc_ids):
    mask = dense_mask(spec, doc_ids)
    plain = dense_mask(MaskSpec(), doc_ids)
    near = dense_mask(MaskSpec(window=spec.window), doc_ids)
    assert not (mask & ~plain).any()  # links add nothing that document and causality forbid
    assert not (near & ~mask).any()  # and take nothing from the window
    assert not mask.triu(1).any() and mask.diagonal(dim1=2, dim2=3).all()


def document_lengths(doc_ids):
    "Counted one token at a time; each row begins a new document."
    lengths = []
    for row in doc_ids.tolist():
        lengths.append(1)
        for before, now in zip(row, row[1:]):
            if before == now:
                lengths[-1] += 1
            else:
                lengths.append(1)
    return lengths


@settings(deadline=None, max_examples=60)
@given(documents())
def test_varlen_bounds_cut_where_the_document_changes(doc_ids):
    bounds = varlen_bounds(doc_ids)
    assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == doc_ids.numel()
    assert bounds.diff().tolist() == document_lengths(doc_ids)


@settings(deadline=None, max_examples=100)
@given(documents(), st.integers(1, 200))
def test_bounds_of_fixed_length_end_in_empty_documents_or_are_refused(doc_ids, capacity):
    lengths = document_lengths(doc_ids)
    if capacity < len(lengths):
        with pytest.raises(RuntimeError, match=f"more than {capacity} documents"):
            varlen_bounds(doc_ids, capacity)
    else:
        bounds = varlen_bounds(doc_ids, capacity)
        assert bounds.shape == (capacity + 1,) and bounds.dtype == torch.int32
        assert bounds.diff().tolist() == lengths + [0] * (capacity - len(lengths))


@given(st.integers(1, 10**6), st.integers(0, 10**5))
def test_capacity_has_room_for_what_was_seen_and_few_shapes(num_tokens, documents):
    capacity = varlen_capacity(num_tokens, documents)
    assert min(num_tokens, max(256, num_tokens // 128, 2 * documents)) <= capacity <= num_tokens
    assert capacity == num_tokens or capacity.bit_count() == 1


@settings(deadline=None, max_examples=100)
@given(st.builds(MaskSpec, window=st.none() | st.integers(1, 60)), documents())
def test_packed_documents_with_a_window_are_the_dense_mask(spec, doc_ids):
    "Read as the kernels do: in each document causal, and window - 1 keys to the left."
    B, T = doc_ids.shape
    bounds, max_seq_len, window = varlen_mask(spec, doc_ids)
    assert window.device.type == "cpu" and max_seq_len == T >= bounds.diff().max()
    document = torch.searchsorted(bounds, torch.arange(B * T), right=True)
    q, k = torch.arange(B * T)[:, None], torch.arange(B * T)[None]
    packed = (k <= q) & (k >= q - (window - 1)) & (document[:, None] == document[None])
    assert torch.equal(packed, torch.block_diag(*dense_mask(spec, doc_ids)[:, 0].int()).bool())


def test_packed_documents_refuse_long_range_blocks_and_name_flex():
    with pytest.raises(ValueError, match="long_every 3.*flex"):
        varlen_mask(MaskSpec(window=8, long_every=3), document_ids(torch.zeros(1, 8), eos_id=1))


@given(st.integers(1, 50), st.text("SL", min_size=1, max_size=6))
def test_layer_windows_follow_the_pattern_and_end_long(num_layers, pattern):
    windows = layer_windows(num_layers, 128, 1024, pattern)
    assert len(windows) == num_layers and windows[-1] == 1024
    assert all(w == (1024 if pattern[i % len(pattern)] == "L" else 128) for i, w in enumerate(windows[:-1]))


def test_layer_windows_alternate_by_default():
    assert layer_windows(9, 1, 2) == [1, 1, 1, 2, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("pattern", ["", "SX", "ssl"])
def test_a_wrong_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="S \\(short\\) and L \\(long\\)"):
        layer_windows(4, 1, 2, pattern)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"window": -3}, {"block_size": 0}, {"long_every": -1}])
def test_a_wrong_spec_is_refused_with_its_value(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}"):
        MaskSpec(**wrong)


def test_a_growing_window_compiles_one_graph():
    from torch.nn.attention.flex_attention import flex_attention

    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    attend = torch.compile(lambda q, mask: flex_attention(q, q, q, block_mask=mask), backend=count, fullgraph=True)
    q = torch.randn(1, 2, 64, 16)
    doc_ids = document_ids((torch.arange(64) % 23 == 5).int()[None], eos_id=1)
    for window in (4, 8, 20, None):
        spec = MaskSpec(window, block_size=16)
        expected = F.scaled_dot_product_attention(q, q, q, attn_mask=dense_mask(spec, doc_ids))
        torch.testing.assert_close(attend(q, flex_block_mask(spec, doc_ids)), expected)
    assert len(graphs) == 1


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 4000), st.integers(0, 4000), st.integers(0, 2000), st.sampled_from([100.0, 10_000.0, 1e6]),
       st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_only_the_distance_matters(query_at, key_at, shift, base, rotary_fraction):
    cos, sin = rope_tables(6001, 16, base=base, rotary_fraction=rotary_fraction)
    q, k = torch.randn(2, 1, 1, 1, 16)

    def score(m, n):
        return (apply_rope(q, cos[m:m + 1], sin[m:m + 1]) * apply_rope(k, cos[n:n + 1], sin[n:n + 1])).sum()

    torch.testing.assert_close(score(query_at, key_at), score(query_at + shift, key_at + shift), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rotation_keeps_type_shape_and_length(dtype):
    x = torch.randn(2, 7, 3, 8).to(dtype)
    turned = apply_rope(x, *rope_tables(7, 8))
    assert turned.dtype == dtype and turned.shape == x.shape
    torch.testing.assert_close(turned.double().norm(dim=-1), x.double().norm(dim=-1), atol=0, rtol=2e-2 if dtype.itemsize == 2 else 1e-6)


def test_rows_may_have_positions_of_their_own():
    cos, sin = rope_tables(20, 8)
    x = torch.randn(2, 5, 3, 8)
    at = torch.tensor([[0, 1, 2, 3, 4], [9, 10, 0, 1, 2]])
    turned = apply_rope(x, cos[at], sin[at])
    torch.testing.assert_close(turned[1, :2], apply_rope(x[1:, :2], cos[9:11], sin[9:11])[0])
    torch.testing.assert_close(turned[1, 2:], apply_rope(x[1:, 2:], cos[:3], sin[:3])[0])


@pytest.mark.parametrize("wrong", [{"head_dim": 7}, {"head_dim": 0}, {"head_dim": 8, "rotary_fraction": 1.5}])
def test_tables_refuse_what_they_cannot_make(wrong):
    with pytest.raises(ValueError, match=str(list(wrong.values())[-1])):
        rope_tables(4, **wrong)
