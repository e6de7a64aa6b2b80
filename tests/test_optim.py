"What lessons 10, 12 and 13 promise, tried on many shapes, settings and steps."
import copy
import io
import math
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn

from daisy.gpt import GPT, GPTConfig
from daisy.muon import NEWTON_SCHULZ, POLAR_EXPRESS, Muon, _compiled, newton_schulz, polar_express
from daisy.optim import GROUPS, build_optimizers, load_optimizer_state, parameter_groups, update_to_weight_ratios
from daisy.schedules import COOLDOWN_SHAPES, Schedule, lr_factors, set_hyperparameters

RATES = dict(embed_params_lr=0.3, value_embed_lr=0.15, scalar_params_lr=0.05, hidden_matrix_params_lr=0.02, head_params_lr=0.008)


def tiny_gpt(**changes):
    shape = dict(vocab_size=64, num_layers=2, num_heads=2, head_dim=8, model_dim=16, max_seq_len=16, eos_token_id=63)
    return GPT(GPTConfig(**{**shape, **changes}))


def matrix_with(sigma, m, n, seed=0):
    random = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(m, len(sigma), generator=random, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, len(sigma), generator=random, dtype=torch.float64))[0]
    return ((U * sigma) @ V.T).float(), U, V


def give_gradients(*models, seed):
    random = torch.Generator().manual_seed(seed)
    for params in zip(*models):
        gradient = torch.randn(params[0].shape, generator=random)
        for p in params:
            p.grad = gradient.to(p.dtype)


# Orthogonalization

@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 40), log_condition=st.floats(0, 6), log_scale=st.floats(-20, 20),
       seed=st.integers(0, 100), method=st.sampled_from([newton_schulz, polar_express]))
def test_polynomials_act_on_singular_values(m, n, log_condition, log_scale, seed, method):
    sigma = torch.logspace(0, -log_condition, min(m, n), dtype=torch.float64)
    G, U, V = matrix_with(sigma, m, n, seed)
    expected = sigma / sigma.norm()
    for a, b, c in ([NEWTON_SCHULZ] * 5 if method is newton_schulz else POLAR_EXPRESS[:5]):
        expected = a * expected + b * expected**3 + c * expected**5
    result = method(G * 10**log_scale).double()
    assert (result - (U * expected) @ V.T).norm() < 2e-3 * math.sqrt(min(m, n))


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40), (3, 24, 16), (2, 3, 8, 16)])
def test_enough_steps_reach_the_svd(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    U, _, Vt = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(polar_express(G, steps=15), U @ Vt, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", [newton_schulz, polar_express])
@pytest.mark.parametrize("G", [torch.zeros(4, 8), torch.full((8, 4), 3e38), torch.full((4, 4), 1e-42), torch.ones(2, 5, 3),
                               torch.eye(6)[:, :1] @ torch.ones(1, 9)], ids=["zero", "huge", "denormal", "rank 1", "one row"])
def test_odd_gradients_stay_finite(method, G):
    for steps in (5, 30):
        result = method(G, steps)
        assert result.isfinite().all() and result.abs().max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept_and_the_argument_untouched(dtype):
    G = torch.randn(5, 7).to(dtype)
    before = G.clone()
    assert polar_express(G).dtype == dtype and torch.equal(G, before)


# Muon

@pytest.mark.parametrize("nesterov", [True, False])
def test_plain_mode_is_torch_muon(nesterov):
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((8, 8), (24, 8), (8, 24), (24, 8))]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    a = Muon(ours, lr=0.02, weight_decay=0.1, nesterov=nesterov, cautious=False, normalize_neurons=False, method="newton_schulz")
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, nesterov=nesterov)
    for seed in range(4):
        give_gradients(ours, theirs, seed=seed)
        a.step()
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):  # torch's rounding, switched off
            b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_stacks_change_nothing_and_gradients_are_only_read():
    torch.manual_seed(0)
    together = [nn.Parameter(torch.randn(shape)) for shape in ((8, 4), (8, 4), (3, 8, 4), (4, 8))]
    apart = [nn.Parameter(p.detach().clone()) for p in together]
    one, many = Muon(together, weight_decay=0.1), [Muon([p], weight_decay=0.1) for p in apart]
    for seed in range(3):
        give_gradients(together, apart, seed=seed)
        kept = [p.grad.clone() for p in together]
        one.step()
        for optimizer in many:
            optimizer.step()
        assert all(torch.equal(p.grad, gradient) for p, gradient in zip(together, kept))
    torch.testing.assert_close(together, apart)


def test_cautious_decay_never_pulls_against_the_update():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(6, 6))
    free = nn.Parameter(w.detach().clone())
    give_gradients([w], [free], seed=0)
    before = w.detach().clone()
    Muon([w], weight_decay=0.5).step()
    Muon([free]).step()
    decayed = w.detach() != free.detach()
    shrinks = before * (before - free.detach()) >= 0
    assert decayed.any() and not decayed[~shrinks].any()


def test_missing_zero_and_huge_gradients():
    params = [nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
    params[0].grad, params[1].grad = torch.zeros(4, 6), torch.full((4, 6), 1e30)
    before = [p.detach().clone() for p in params]
    optimizer = Muon(params)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(params[0], before[0]) and torch.equal(params[2], before[2])
    assert params[1].isfinite().all() and not torch.equal(params[1], before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_resumes_to_the_last_bit(dtype):
    ours = [nn.Parameter(torch.randn(6, 4).to(dtype)) for _ in range(2)]
    optimizer = Muon(ours, weight_decay=0.1)
    give_gradients(ours, seed=0)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = [nn.Parameter(p.detach().clone()) for p in ours]
    resumed = Muon(again, weight_decay=0.1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert all(value.dtype == torch.float32 for state in resumed.state.values() for value in state.values())
    for seed in (1, 2):
        give_gradients(ours, again, seed=seed)
        optimizer.step()
        resumed.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, again))


@pytest.mark.parametrize("make, words", [
    (lambda p: Muon([nn.Parameter(torch.zeros(3))]), "shape (3,)"), (lambda p: Muon([p], lr=-1), "lr=-1"),
    (lambda p: Muon([p], momentum=2), "momentum=2"), (lambda p: Muon([p], method="svd"), "polar_express"),
    (lambda p: Muon([p], momentum=1.0), "momentum=1.0"), (lambda p: Muon([p], lr=math.inf), "lr=inf"),
    (lambda p: Muon([p], lr=math.nan), "lr=nan"), (lambda p: Muon([p], weight_decay=math.inf), "weight_decay=inf"),
    (lambda p: Muon([p], steps=0), "steps=0"), (lambda p: Muon([p], steps=2.5), "steps=2.5"),
    (lambda p: Muon([nn.Parameter(torch.zeros(0, 4))]), "shape (0, 4)")])
def test_muon_names_the_mistake(make, words):
    with pytest.raises(ValueError) as error:
        make(nn.Parameter(torch.zeros(3, 3)))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_refused_group_does_not_stay():
    p = nn.Parameter(torch.randn(3, 3))
    muon = Muon([p])
    for group in (dict(params=[nn.Parameter(torch.zeros(4))]), dict(params=[nn.Parameter(torch.zeros(3, 3))], momentum=1.0)):
        with pytest.raises(ValueError):
            muon.add_param_group(group)
        assert [group["params"] for group in muon.param_groups] == [[p]]
    p.grad = torch.ones(3, 3)
    muon.step()
    muon.add_param_group(dict(params=[nn.Parameter(torch.zeros(4, 2))]))
    assert len(muon.param_groups) == 2


def test_stacks_that_nobody_uses_any_more_are_dropped():
    "As one parameter after the other goes without a gradient, all state together stays as large as it has to be."
    params = [nn.Parameter(torch.randn(6, 4)) for _ in range(8)]
    muon = Muon(params)
    for missing in range(8):
        give_gradients(params, seed=missing)
        for p in params[:missing]:
            p.grad = None
        muon.step()
        for name, numbers in (("momentum_buffer", 24), ("second_moment", 6)):
            memory = {s.data_ptr(): s.nbytes() for p in params for s in [muon.state[p][name].untyped_storage()]}
            assert sum(memory.values()) == 8 * numbers * 4
            stacks = [stack for (_, kind), (_, stack, _) in muon._stacks.items() if kind == name]
            assert [len(stack) for stack in stacks] == [8 - missing]


def test_more_shapes_than_torch_compiles_by_default_are_all_compiled(monkeypatch):
    graphs, compile_ = [], torch.compile

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compile_(function, backend=counting, **settings))
    torch._dynamo.reset()
    _compiled.cache_clear()
    params = [nn.Parameter(torch.randn(4, 4 + i)) for i in range(12)]
    muon = Muon(params, compile=True)
    with torch._dynamo.config.patch(cache_size_limit=8):    # torch's own, whatever an earlier test has set
        for step in range(2):
            give_gradients(params, seed=step)
            muon.step()
    _compiled.cache_clear()
    torch._dynamo.reset()
    assert len(graphs) == 12 and torch._dynamo.config.cache_size_limit >= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_that_misses_steps_keeps_its_own_state(dtype):
    "Who is stacked with whom changes from step to step; nobody's momentum may."
    torch.manual_seed(0)
    together = [nn.Parameter(torch.randn(6, 4).to(dtype)) for _ in range(3)]
    apart = [nn.Parameter(p.detach().clone()) for p in together]
    one, many = Muon(together), [Muon([p]) for p in apart]
    for seed, present in enumerate([(0, 1, 2), (1, 2), (0, 2), (0, 1, 2), (1,), (0, 1, 2)]):
        give_gradients(together, apart, seed=seed)
        for i in {0, 1, 2} - set(present):
            together[i].grad = apart[i].grad = None
        for optimizer in (one, *many):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(together, apart))
    assert all(torch.equal(one.state[p][key], many[i].state[q][key]) for i, (p, q) in enumerate(zip(together, apart))
               for key in ("momentum_buffer", "second_moment"))


def test_stacks_are_cut_where_they_would_be_too_large(monkeypatch):
    torch.manual_seed(0)
    whole = [nn.Parameter(torch.randn(6, 4)) for _ in range(5)]
    cut = [nn.Parameter(p.detach().clone()) for p in whole]
    a, b = Muon(whole, weight_decay=0.1), Muon(cut, weight_decay=0.1)
    for seed in range(3):
        give_gradients(whole, cut, seed=seed)
        a.step()
        with monkeypatch.context() as patch:
            patch.setattr("daisy.muon._STACK_NUMBERS", 50)
            b.step()
    torch.testing.assert_close(whole, cut)
    assert b.state[cut[0]]["momentum_buffer"].untyped_storage().nbytes() == 2 * 24 * 4


def test_a_copied_or_older_muon_goes_on():
    ours = [nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
    optimizer = Muon(ours)
    give_gradients(ours, seed=0)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["compile"]                     # as saved before there was one
    twins = [nn.Parameter(p.detach().clone()) for p in ours]
    older = Muon(twins)
    older.load_state_dict(state)
    copied = copy.deepcopy(optimizer)
    give_gradients(ours, twins, copied.param_groups[0]["params"], seed=1)
    for muon in (optimizer, older, copied):
        muon.step()
    for others in (twins, copied.param_groups[0]["params"]):
        assert all(torch.equal(p, q) for p, q in zip(ours, others))


@pytest.mark.slow
def test_compiled_muon_takes_the_same_step_and_compiles_once_a_shape():
    from torch._dynamo.utils import counters
    torch.manual_seed(0)
    plain = [nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (8, 8), (16, 8))]
    fast = [nn.Parameter(p.detach().clone()) for p in plain]
    a, b = Muon(plain, weight_decay=0.1), Muon(fast, weight_decay=0.1, compile=True)
    counters.clear()
    for seed in range(5):
        give_gradients(plain, fast, seed=seed)
        for muon in (a, b):
            muon.param_groups[0].update(lr=0.02 / (seed + 1), momentum=0.85 + 0.02 * seed)
            muon.step()
    torch.testing.assert_close(plain, fast, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_muon_iterates_in_bfloat16_and_agrees_with_the_cpu(compile):
    torch.manual_seed(0)
    here = [nn.Parameter(torch.randn(shape)) for shape in ((96, 96), (96, 96), (192, 96), (96, 192))]
    there = [nn.Parameter(p.detach().clone().cuda()) for p in here]
    start = [p.detach().clone() for p in here]
    a, b = Muon(here, weight_decay=0.1), Muon(there, weight_decay=0.1, compile=compile)
    for seed in range(5):
        give_gradients(here, seed=seed)
        for p, q in zip(here, there):
            q.grad = p.grad.cuda()
        a.step()
        b.step()
    for p, q, first in zip(here, there, start):
        assert (q.cpu() - p).norm() < 0.05 * (p - first).norm()
    assert all(value.dtype == torch.float32 for state in b.state.values() for value in state.values())


@pytest.mark.gpu
def test_the_whole_step_of_a_medium_model_costs_less_than_four_per_cent():
    "16 layers x 1024 at 524,288 tokens a step: about 1.8 s on one H100, so 70 ms for all optimizers."
    shapes = 64 * [(1024, 1024)] + 16 * [(4096, 1024), (1024, 4096)]
    matrices = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
    tables = [nn.Parameter(torch.randn(50_304, 1024, device="cuda")) for _ in range(10)]
    optimizers = [Muon(matrices, weight_decay=0.1, compile=True), torch.optim.AdamW(tables, fused=True)]
    for p in matrices + tables:
        p.grad = torch.randn_like(p)
    times = []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for optimizer in optimizers:
            optimizer.step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    print(f"optimizer step: {sorted(times)[3]:.1f} ms")
    assert sorted(times)[3] < 70, times


# Groups

@pytest.mark.parametrize("changes", [{}, dict(tie_head=True), dict(value_embeds=False, x0_gates=False, residual_gates=False),
                                     dict(depth_skips=True, num_layers=4)])
def test_every_parameter_in_exactly_one_group(changes):
    model = tiny_gpt(**changes)
    groups = parameter_groups(model)
    assert tuple(groups) == GROUPS
    members = [p for params in groups.values() for p in params]
    assert len(members) == len(set(members)) and set(members) == set(model.parameters())
    assert all(p.ndim >= 2 for p in groups["matrix"]) and groups["head"] and bool(groups["embed"]) != bool(changes.get("tie_head"))
    for kind in ("muon", "adamw"):
        optimizers = build_optimizers(model, optimizer=kind, **RATES)
        in_groups = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        assert len(in_groups) == len(set(in_groups)) and set(in_groups) == set(members)


def test_gates_have_their_own_groups_and_rates():
    model = tiny_gpt(depth_skips=True, num_layers=4)
    groups = parameter_groups(model)
    assert groups["x0_gates"] == [model.x0_gates] and groups["residual_gates"] == [model.residual_gates]
    assert any(p is model.skip_gates for p in groups["scalar"])

    def rates(**changes):
        return {group["name"]: group["initial_lr"] for o in build_optimizers(model, **RATES, **changes) for group in o.param_groups}
    assert {rates()[name] for name in ("x0_gates", "residual_gates", "scalar")} == {0.05}
    own = rates(x0_gates_lr=0.5, residual_gates_lr=0.0)
    assert (own["x0_gates"], own["residual_gates"], own["scalar"]) == (0.5, 0.0, 0.05)
    assert all(group["weight_decay"] == 0 for o in build_optimizers(model, adamw_weight_decay=0.1, **RATES) for group in o.param_groups
               if group["name"] in ("x0_gates", "residual_gates", "scalar"))


def test_adamw_throughout_has_its_own_rate_for_matrices():
    def matrix_lr(kind, **changes):
        optimizers = build_optimizers(tiny_gpt(), optimizer=kind, **RATES, **changes)
        return next(group["lr"] for o in optimizers for group in o.param_groups if group["name"] == "matrix")
    assert matrix_lr("adamw", adamw_matrix_lr=0.003) == 0.003 and matrix_lr("adamw") == 0.02
    assert matrix_lr("muon", adamw_matrix_lr=0.003) == 0.02


def test_variants_of_muon_are_keywords():
    settings = dict(muon_method="newton_schulz", muon_normalize_neurons=False, muon_cautious=False)
    matrix = build_optimizers(tiny_gpt(), **RATES, **settings)[1].param_groups[0]
    assert (matrix["method"], matrix["normalize_neurons"], matrix["cautious"], matrix["compile"]) == ("newton_schulz", False, False, False)
    with pytest.raises(ValueError, match="svd"):
        build_optimizers(tiny_gpt(), **RATES, muon_method="svd")


def test_an_unknown_parameter_and_optimizer_are_named():
    model = tiny_gpt()
    model.router = nn.Linear(4, 3, bias=False)
    with pytest.raises(ValueError, match="router.weight"):
        parameter_groups(model)
    with pytest.raises(ValueError, match="adagrad"):
        build_optimizers(tiny_gpt(), optimizer="adagrad", **RATES)


@pytest.mark.parametrize("where, name, stranger", [
    ("", "aggregate", nn.Linear(4, 3, bias=False)), ("", "navigate", nn.Linear(4, 3, bias=False)), ("", "router_bias", nn.Parameter(torch.zeros(4))),
    ("blocks.0.mlp", "table", nn.Embedding(5, 4)), ("blocks.1.attn", "bias", nn.Parameter(torch.zeros(4)))], ids=lambda value: value if isinstance(value, str) else "")
def test_a_name_that_only_holds_gate_a_vector_and_a_table_in_a_block_are_strangers(where, name, stranger):
    model = tiny_gpt()
    setattr(model.get_submodule(where), name, stranger)
    with pytest.raises(ValueError, match=f"{where}.?{name}") as error:
        parameter_groups(model)
    assert "\n" not in str(error.value)


def test_a_module_that_is_no_gpt_is_told_so():
    with pytest.raises(ValueError, match="parameter weight of shape"):
        parameter_groups(nn.Linear(3, 3))


def test_every_parameter_of_a_gpt_with_all_switches_has_the_group_that_it_had():
    model = tiny_gpt(num_layers=4, depth_skips=True, smear=True, backout=True, attention_gate=True)
    model.blocks[0].mlp.gate_proj, model.blocks[0].mlp.aggregate = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    name_of = {p: name for name, p in model.named_parameters()}
    found = {group: {name_of[p] for p in params} for group, params in parameter_groups(model).items()}
    layers = range(4)
    assert found == {
        "embed": {"embed.weight"}, "value_embeds": {"value_embeds.1.weight", "value_embeds.3.weight"}, "head": {"head.weight"},
        "x0_gates": {"x0_gates"}, "residual_gates": {"residual_gates"},
        "matrix": {f"blocks.{i}.{name}.weight" for i in layers for name in ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.up", "mlp.down")} |
                  {"blocks.0.mlp.gate_proj.weight", "blocks.0.mlp.aggregate.weight"},
        "scalar": {"skip_gates", "backout_gate", "smear.gate_scale", "smear.gate.weight", "blocks.1.attn.value_gate.weight",
                   "blocks.3.attn.value_gate.weight"} | {f"blocks.{i}.attn.attention_gate.weight" for i in layers}}


def test_a_model_without_a_head_of_its_own_is_not_taken_for_a_tied_one():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, 3)
    wrapper, tied = Wrapper(), Wrapper()
    tied.head = None
    assert parameter_groups(wrapper)["embed"] == [wrapper.embed.weight] and parameter_groups(tied)["head"] == [tied.embed.weight]


def test_compiled_models_have_the_same_groups():
    wrapper = nn.Module()
    wrapper._orig_mod = tiny_gpt()
    assert {name: len(params) for name, params in parameter_groups(wrapper).items()} == \
           {name: len(params) for name, params in parameter_groups(tiny_gpt()).items()}


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_run_resumes_exactly_and_keeps_its_own_settings(kind):
    model = tiny_gpt()
    optimizers = build_optimizers(model, optimizer=kind, adamw_weight_decay=0.1, **RATES)
    give_gradients(model.parameters(), seed=0)
    for optimizer in optimizers:
        optimizer.step()
    twin = tiny_gpt()
    twin.load_state_dict(model.state_dict())
    resumed = build_optimizers(twin, optimizer=kind, adamw_weight_decay=0.1, **RATES)
    saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    for optimizer, state in zip(resumed, saved):
        load_optimizer_state(optimizer, state)
    for step in range(1, 4):
        give_gradients(model.parameters(), twin.parameters(), seed=step)
        for same in (optimizers, resumed):
            set_hyperparameters(same, Schedule(4), step)
            for optimizer in same:
                optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))

    slower = build_optimizers(twin, optimizer=kind, **{**RATES, "embed_params_lr": 0.01})
    load_optimizer_state(slower[0], saved[0])
    assert slower[0].param_groups[0]["initial_lr"] == 0.01


def test_update_to_weight_ratio_by_hand():
    model = tiny_gpt()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.embed.weight.mul_(1.5)
    ratios = update_to_weight_ratios(model, before)
    assert ratios["embed"] == pytest.approx(0.5) and ratios["matrix"] == 0 and ratios["head"] == float("inf")


# Schedules

schedules = st.builds(
    Schedule, total_iters=st.integers(1, 500), warmup_steps=st.integers(0, 100), cooldown_frac=st.floats(0, 1),
    final_lr_frac=st.floats(0, 1), cooldown_shape=st.sampled_from(sorted(COOLDOWN_SHAPES)), momentum_peak=st.floats(0.9, 1),
    momentum_start=st.floats(0, 0.9), momentum_warmup_steps=st.integers(0, 100), momentum_cooldown_steps=st.integers(0, 100),
    window_start=st.none() | st.floats(0.01, 1), window_warmup_frac=st.floats(0, 1), window_stages=st.integers(2, 9),
    batch_start=st.none() | st.floats(0.01, 1), batch_warmup_frac=st.floats(0, 1), batch_stages=st.integers(2, 9))


@settings(max_examples=100, deadline=None)
@given(schedule=schedules)
def test_schedules_rise_then_fall_within_their_bounds(schedule):
    steps = range(schedule.total_iters)
    for values in ([schedule.lr(step) for step in steps], [schedule.momentum(step) for step in steps]):
        top = values.index(max(values))
        assert all(b >= a - 1e-9 for a, b in zip(values[:top], values[1:top + 1]))
        assert all(b <= a + 1e-9 for a, b in zip(values[top:], values[top + 1:]))
        assert 0 <= min(values) and max(values) <= 1 + 1e-9
    assert schedule.lr(0) > 0 or schedule.final_lr_frac < 1e-9
    windows = [schedule.window_fraction(step) for step in steps]
    assert sorted(windows) == windows and max(windows) <= 1 + 1e-9 and len(set(windows)) <= schedule.window_stages
    assert schedule.window_fraction(schedule.total_iters) == pytest.approx(1)
    for full in (1, 3, 8):
        pieces = [schedule.accumulation_steps(step, full) for step in steps]
        assert sorted(pieces) == pieces and 1 <= pieces[0] and schedule.accumulation_steps(schedule.total_iters, full) == full
        assert len(set(pieces)) <= schedule.batch_stages and (schedule.batch_start is not None or set(pieces) == {full})


@settings(max_examples=50, deadline=None)
@given(schedule=schedules)
def test_a_run_ends_where_it_was_told(schedule):
    assume(schedule.cooldown_frac > 0.01 and schedule.warmup_steps <= schedule.total_iters)
    assert schedule.lr(schedule.total_iters) == pytest.approx(schedule.final_lr_frac, abs=1e-9)
    assert schedule.lr(10 * schedule.total_iters + 100) == pytest.approx(schedule.final_lr_frac, abs=1e-9)


def test_the_ends_of_a_schedule_without_length():
    "A run may go on for longer than its schedule; the smallest fractions there are don't overflow."
    assert Schedule(10, cooldown_frac=0.0).lr(11) == 1 and Schedule(10, cooldown_frac=5e-324).lr(11) == 0
    for fraction in (0.0, 5e-324):
        windows = [Schedule(10, window_start=0.25, window_warmup_frac=fraction).window_fraction(step) for step in range(12)]
        assert min(windows) >= 0.25 and windows[1:] == [1] * 11


def test_setting_twice_is_setting_once():
    optimizers = build_optimizers(tiny_gpt(), muon_weight_decay=0.1, **RATES)
    schedule = Schedule(100, warmup_steps=10, momentum_warmup_steps=50)
    set_hyperparameters(optimizers, schedule, 80)
    once = [{key: group[key] for key in ("lr", "weight_decay")} for optimizer in optimizers for group in optimizer.param_groups]
    for step in (3, 99, 80, 80):
        set_hyperparameters(optimizers, schedule, step)
    twice = [{key: group[key] for key in ("lr", "weight_decay")} for optimizer in optimizers for group in optimizer.param_groups]
    assert once == twice
    matrix = optimizers[1].param_groups[0]
    assert matrix["lr"] == pytest.approx(0.02 * 0.4) and matrix["weight_decay"] == pytest.approx(0.1 * 0.4) and matrix["momentum"] == 0.95


@pytest.mark.parametrize("mistake", [dict(total_iters=0), dict(cooldown_frac=50), dict(cooldown_shape="sqrt"), dict(window_start=0.0),
                                     dict(batch_start=1.5), dict(batch_stages=1),
                                     dict(warmup_steps=-1)])
def test_a_setting_out_of_range_is_named(mistake):
    with pytest.raises(ValueError, match=next(iter(mistake))) as error:
        Schedule(**{"total_iters": 10, **mistake})
    assert "\n" not in str(error.value)


@given(width=st.integers(16, 4096), tokens=st.integers(1, 10**7), kind=st.sampled_from(["muon", "adamw"]))
def test_learning_rates_follow_batch_and_width(width, tokens, kind):
    here, base = lr_factors(width, tokens, kind), lr_factors(768, 524_288, kind)
    assert set(here) == set(GROUPS) and set(base.values()) == {1.0}
    four_batches, four_widths = lr_factors(width, 4 * tokens, kind), lr_factors(4 * width, tokens, kind)
    for name in GROUPS:
        assert four_batches[name] == pytest.approx(2 * here[name])
        slower = {"embed": 2, "value_embeds": 2, "head": 2, "matrix": 4 if kind == "adamw" else 1}.get(name, 1)
        assert four_widths[name] == pytest.approx(here[name] / slower)


def test_a_model_without_width_has_no_rate():
    with pytest.raises(ValueError, match="model_dim=0"):
        lr_factors(0, 1024)
    with pytest.raises(ValueError, match="unknown optimizer 'adam': choose muon or adamw"):
        lr_factors(768, 524_288, "adam")
