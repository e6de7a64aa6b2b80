"""Each switch of the GPT when it is off, when it is on, and in a compiled graph."""
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from daisy.gpt import GPT, GPTConfig, activation_bytes, compile_gpt
from daisy.rope import apply_rope

ROOT = Path(__file__).parent.parent
V, EOS, T = 60, 0, 300  # rows longer than two of the blocks of 128 that long-range links come in
SHAPE = dict(vocab_size=V, num_layers=4, num_heads=2, head_dim=8, model_dim=32, max_seq_len=T, eos_token_id=EOS, window_short=20)
OFF = dict(value_embeds=False, residual_gates=False, x0_gates=False, qk_norm=False, logit_softcap=0.0, rope_fraction=1.0)
SWITCHES = dict(
    value_embeds=dict(value_embeds=True), value_layers=dict(value_embeds=True, value_layers="0 -1"), residual_gates=dict(residual_gates=True),
    x0_gates=dict(x0_gates=True), depth_skips=dict(depth_skips=True), qk_norm=dict(qk_norm=True), softcap=dict(logit_softcap=15.0),
    half_rope=dict(rope_fraction=0.5), attention_gate=dict(attention_gate=True), smear=dict(smear=True), backout=dict(backout=True),
    long_range=dict(long_every=2), grouped=dict(num_kv_heads=1), tied=dict(tie_head=True))
switches = pytest.mark.parametrize("switch", SWITCHES)


def awake(config, seed=0, **kwargs):
    model, generator = GPT(config, **kwargs), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2: p.add_(0.3 * torch.randn(p.shape, generator=generator))
            elif not p.any(): p.normal_(std=p.size(1) ** -0.5, generator=generator)
    return model


def tokens_like(B, length, seed=0, low=0):
    return torch.randint(low, V, (B, length), generator=torch.Generator().manual_seed(seed))


# a plain transformer that knows nothing of daisy

def rotations(length, half=4, base=10_000.0):
    angle = torch.outer(torch.arange(length).double(), base ** (-torch.arange(half).double() / half))
    return angle.cos().float()[:, None], angle.sin().float()[:, None]


def rotate(x, cos, sin):
    "Rotary embeddings of x (B, T, H, hd)."
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


def masks_of(tokens, windows):
    "Causal, within the window and within the document: one mask (B, 1, T, T) a layer."
    position, documents = torch.arange(tokens.size(1)), (tokens == EOS).cumsum(1)
    near = {w: (position[:, None] >= position) & (position[:, None] - position < w) for w in set(windows)}
    return [(near[w] & (documents[:, :, None] == documents[:, None, :]))[:, None] for w in windows]


def plain_gpt(weights, tokens, cos, sin, masks, rotate=rotate):
    "Logits of an ordinary pre-norm GPT from a dict of its matrices, one mask a layer."
    norm = lambda x: F.rms_norm(x, x.shape[-1:])
    x = norm(F.embedding(tokens, weights["embed.weight"]))
    for i, mask in enumerate(masks):
        w = {name: weights[f"blocks.{i}.{name}.weight"] for name in ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.up", "mlp.down")}
        fused = F.linear(norm(x), torch.cat([w["attn.q"], w["attn.k"], w["attn.v"]]))
        q, k, v = (part.unflatten(-1, (-1, 8)) for part in fused.chunk(3, dim=-1))
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=8 ** -0.5).transpose(1, 2).flatten(2)
        x = x + F.linear(y, w["attn.out"])
        x = x + F.linear(F.relu(F.linear(norm(x), w["mlp.up"])).square(), w["mlp.down"])
    return F.linear(norm(x), weights["head.weight"])[..., :V]


def test_all_off_is_the_plain_network_bit_for_bit():
    model, tokens = awake(GPTConfig(**SHAPE, **OFF)), tokens_like(2, T)
    with torch.no_grad():
        assert torch.equal(model(tokens), plain_gpt(model.state_dict(), tokens, *rotations(T), masks_of(tokens, [20, 20, 20, T])))


# what a switch costs

VIEWS = ("view", "aten.t.", "transpose", "slice", "split", "unsqueeze", "alias", "detach", "expand", "as_strided", "permute", "select")


class Operations(TorchDispatchMode):
    "Counts the operations that torch runs, by name; views, which cost nothing, are left out."
    def __enter__(self):
        self.counts = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not any(view in str(function) for view in VIEWS):
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def counted(logits_of):
    "The operations of a forward and a backward."
    with Operations() as operations:
        logits_of().sum().backward()
    return operations.counts


def counted_model(**switches):
    model, tokens = awake(GPTConfig(**{**SHAPE, **OFF, **switches})), tokens_like(2, T)
    masks = model.masks(tokens)
    return counted(lambda: model.compute(tokens, None, masks)), {name for name, _ in model.named_parameters()}


def test_all_off_runs_what_the_plain_network_runs_and_nothing_else():
    model, tokens = awake(GPTConfig(**SHAPE, **OFF)), tokens_like(2, T)
    weights, tables, masks = dict(model.named_parameters()), rotations(T), masks_of(tokens, [20, 20, 20, T])
    rotation = lambda x, cos, sin: apply_rope(x, cos[:, 0], sin[:, 0])  # its own operations don't count here, only what stands around it
    by_hand = counted(lambda: plain_gpt(weights, tokens, *tables, masks, rotation))
    ours, names = counted_model()
    assert ours == by_hand and len(names) == 6 * SHAPE["num_layers"] + 2
    assert by_hand["aten.mm.default"] == 3 * (4 * SHAPE["num_layers"] + 1)  # the counter counts


@switches
def test_a_switch_that_is_on_is_seen(switch):
    "In what runs, or in the numbers where it only changes shapes, masks or tables; and its parameters are there or aren't."
    (plain, plain_names), (counts, names) = counted_model(), counted_model(**SWITCHES[switch])
    only_numbers = switch in ("half_rope", "long_range", "grouped")
    assert (counts == plain) == only_numbers
    assert bool(names - plain_names) == (switch not in ("qk_norm", "softcap", "half_rope", "long_range", "grouped", "tied"))
    assert plain_names - names == ({"head.weight"} if switch == "tied" else set())
    tokens = tokens_like(2, T)
    if switch != "grouped":
        assert not torch.equal(awake(GPTConfig(**{**SHAPE, **OFF, **SWITCHES[switch]}))(tokens), awake(GPTConfig(**SHAPE, **OFF))(tokens))


# each switch beside the full network

@switches
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"])
def test_the_cached_path_computes_what_training_computed(switch, dtype, tolerance):
    model, tokens = awake(GPTConfig(**{**SHAPE, **OFF, **SWITCHES[switch]}), compute_dtype=dtype), tokens_like(2, T)
    cache = model.new_cache(2, T)
    with torch.no_grad():
        cached = torch.cat([model(piece, cache=cache) for piece in tokens.split([1, 1, 7, 200, T - 209], dim=1)], dim=1)
        full = model(tokens)
    assert (cached - full).norm() < tolerance * full.norm()


@switches
@pytest.mark.parametrize("mode", ["cheap", "full"])
def test_what_is_computed_again_is_the_same(switch, mode):
    gradients = []
    for activation_checkpointing in ("none", mode):
        model = awake(GPTConfig(**{**SHAPE, **SWITCHES[switch], "activation_checkpointing": activation_checkpointing}))
        model(tokens_like(2, 40), tokens_like(2, 40, seed=1)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients):
        assert torch.equal(ours, theirs)


def test_smear_reads_the_token_before_but_never_another_document():
    config = GPTConfig(**{**SHAPE, **OFF, "num_layers": 1, "window_short": 1, "window_long": 1, "smear": True})
    model = awake(config)  # no layer looks back: only the smear does
    tokens = tokens_like(1, 12, low=1)
    tokens[0, 6] = EOS
    with torch.no_grad():
        logits = model(tokens)
        for t in range(12):
            changed = tokens.clone()
            changed[0, t] = tokens[0, t] % (V - 1) + 1 if t != 6 else 5
            moved = (model(changed) != logits).any(-1)[0].nonzero().flatten().tolist()
            assert moved == ([t] if t in (5, 11) else [t, t + 1]), (t, moved)


def test_backout_takes_the_middle_away():
    config = GPTConfig(**{**SHAPE, **OFF, "backout": True})
    model, tokens = awake(config), tokens_like(1, 10)
    streams = []
    for block in model.blocks: block.register_forward_hook(lambda block, args, out: streams.append(out))
    with torch.no_grad():
        hidden = model.hidden(tokens)
        x = streams[3] - model.backout_gate * streams[1]  # what two of four layers have written
        torch.testing.assert_close(hidden, F.rms_norm(x, x.shape[-1:]))


def test_value_layers_say_where():
    layers = lambda value_layers, **other: GPTConfig(**{**SHAPE, "value_layers": value_layers, **other}).value_embed_layers
    assert layers("") == [1, 3] and layers("0 -1") == [0, 3] and layers("3 -1 1") == [1, 3] and layers("0", value_embeds=False) == []
    with pytest.raises(ValueError, match=r"value_layers names layer 4, but there are 4: use 0 to 3, or -1 to -4 from the end"):
        GPT(GPTConfig(**SHAPE, value_layers="4"))


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5])
def test_a_window_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=f"a window fraction of {fraction} is not above 0 and at most 1"):
        GPT(GPTConfig(**SHAPE)).set_window_fraction(fraction)


def test_a_fraction_of_the_window_is_a_smaller_window():
    tokens = tokens_like(1, T)
    model, small = awake(GPTConfig(**SHAPE, window_long=80)), awake(GPTConfig(**{**SHAPE, "window_short": 5, "window_long": 20}))
    model.set_window_fraction(0.25)
    assert torch.equal(model(tokens), small(tokens))
    model.set_window_fraction(1e-9)  # a token always sees itself
    assert model(tokens).isfinite().all()


# one graph for each shape

ALL = dict(depth_skips=True, smear=True, backout=True, attention_gate=True, long_every=2, rope_fraction=0.5, value_layers="0 -1")


@pytest.fixture
def graphs():
    "A compiler that only counts the graphs it is given."
    torch._dynamo.reset()
    counted = []

    def count(graph, inputs):
        counted.append(graph)
        return graph.forward
    yield counted, count
    torch._dynamo.reset()


@pytest.mark.parametrize("extras", [{}, ALL, dict(activation_checkpointing="cheap"), dict(activation_checkpointing="full")],
                         ids=["default", "all", "cheap", "full"])
def test_a_window_schedule_compiles_one_graph_a_shape(graphs, extras):
    "Training at one shape while the window grows, validation without gradients at another: two graphs, whatever the number of steps."
    counted, count = graphs
    model = awake(GPTConfig(**SHAPE, **extras))
    fast = compile_gpt(model, "full", backend=count)
    for step, fraction in enumerate((0.25, 0.5, 0.75, 1.0)):
        model.set_window_fraction(fraction)
        for micro_batch in range(2):  # other documents each time
            tokens, targets = tokens_like(2, 200, seed=10 * step + micro_batch), tokens_like(2, 200, seed=5)
            model.zero_grad()
            loss = fast(tokens, targets)
            loss.backward()
            torch.testing.assert_close(loss, model(tokens, targets))
        with torch.no_grad():
            fast(tokens_like(1, T, seed=step), tokens_like(1, T))
        assert len(counted) == 2, f"{len(counted)} graphs after {step + 1} windows"


@pytest.mark.parametrize("extras", [{}, ALL, dict(activation_checkpointing="cheap")], ids=["default", "all", "cheap"])
def test_compiled_by_layers_depth_costs_no_graph_and_nor_do_windows(graphs, extras):
    counted, count = graphs
    of_depth = {}
    for num_layers in (8, 16):
        torch._dynamo.reset(), counted.clear()
        model = awake(GPTConfig(**{**SHAPE, **extras, "num_layers": num_layers, "max_seq_len": 64}))
        fast = compile_gpt(model, "layers", backend=count)
        for step, fraction in enumerate((0.25, 0.5, 1.0)):
            model.set_window_fraction(fraction)
            tokens, targets = tokens_like(2, 40, seed=step), tokens_like(2, 40, seed=5)
            loss = fast(tokens, targets)
            got = torch.autograd.grad(loss, list(model.parameters()))
            expected = model(tokens, targets)
            torch.testing.assert_close(loss, expected)
            for ours, theirs in zip(got, torch.autograd.grad(expected, list(model.parameters()))):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
            with torch.no_grad():
                fast(tokens_like(1, 64, seed=step), tokens_like(1, 64))
            of_depth.setdefault(num_layers, len(counted))
            assert len(counted) == of_depth[num_layers], f"{len(counted)} graphs after {step + 1} windows"
    assert of_depth[8] == of_depth[16] <= 14  # embedding, loss, and a few kinds of layers, with gradients and without


def test_cheap_recomputation_compiles_without_a_word():
    "In a process of its own, since torch says it once in each: with the filter nothing, without it the reminder."
    code = """if True:
        import logging, sys, torch
        from daisy.gpt import GPT, GPTConfig, compile_gpt
        model = GPT(GPTConfig(vocab_size=50, num_layers=1, num_heads=1, head_dim=8, model_dim=8, max_seq_len=8, eos_token_id=0, activation_checkpointing="cheap"))
        fast, tokens = compile_gpt(model, backend="aot_eager"), torch.ones(1, 8, dtype=torch.long)
        if "speak" in sys.argv: logging.getLogger("torch._higher_order_ops.wrap").filters.clear()
        fast(tokens, tokens).backward()
    """
    quiet, loud = (subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT) for words in ((), ("speak",)))
    assert quiet.returncode == loud.returncode == 0, quiet.stderr
    assert "context_fn" not in quiet.stderr and "context_fn" in loud.stderr


@pytest.mark.parametrize("how", ["layers", "full"])
def test_flex_takes_a_growing_window_without_another_graph(graphs, how):
    "Its masks hold the window as a tensor. (Only the way up: flex attention has no backward on a CPU.)"
    counted, count = graphs
    model = awake(GPTConfig(**SHAPE, **ALL), backend="flex")
    judge = awake(GPTConfig(**SHAPE, **ALL))
    fast = compile_gpt(model, how, backend=count)
    seen = []
    for seed, fraction in enumerate((0.25, 0.5, 0.75, 1.0)):
        model.set_window_fraction(fraction), judge.set_window_fraction(fraction)
        tokens = tokens_like(2, T, seed=seed)
        with torch.no_grad():
            torch.testing.assert_close(fast(tokens, tokens), judge(tokens, tokens), rtol=1e-5, atol=1e-5)
        seen.append(len(counted))
    assert len(set(seen)) == 1 and (how == "layers" or seen[0] == 1)


def test_what_would_break_the_graph_is_an_error(graphs):
    _, count = graphs
    model = GPT(GPTConfig(**SHAPE))
    model.blocks[0].mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    for how in ("layers", "full"):
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compile_gpt(model, how, backend=count)(tokens_like(1, 8), tokens_like(1, 8))
    with pytest.raises(ValueError, match="how='fast' is not known: choose layers or full"):
        compile_gpt(model, "fast")


# what is kept for the way back

@pytest.mark.parametrize("shape", [dict(), dict(num_kv_heads=1, mlp_ratio=2), dict(value_embeds=False, head_dim=32), dict(value_layers="0 1 2 -1")], ids=str)
def test_activation_bytes_are_what_torch_saves(shape):
    "In float32, against the storages that autograd saves, but for weights; T is small, so that masks hardly count."
    model = GPT(GPTConfig(**{**SHAPE, "num_layers": 6, "model_dim": 96, "head_dim": 16, "max_seq_len": 8, **shape}))
    tokens, saved = tokens_like(256, 8, low=1), {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.hidden(tokens)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    side_by_side = sum(w.nbytes for name, w in model.named_parameters() if name.endswith(("attn.q.weight", "attn.k.weight", "attn.v.weight")))
    measured = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in weights) - side_by_side
    assert abs(activation_bytes(model, tokens.numel()) / measured - 1) < 0.05
    twin = GPT(model.config, compute_dtype=torch.bfloat16)
    assert activation_bytes(twin, 100) * 2 == activation_bytes(model, 100)


def test_less_is_kept_the_more_is_computed_again():
    kept = [activation_bytes(GPT(GPTConfig(**SHAPE, activation_checkpointing=how)), 1000) for how in ("none", "cheap", "full")]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 3
