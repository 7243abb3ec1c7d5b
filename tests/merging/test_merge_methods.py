"""Each merge method is the formula of its paper, and its limits are the methods that it grew out of."""

import math

import pytest
import torch
from conftest import tiny_student, token_ids
from safetensors.torch import save_file

from xlstm_hybrid.checkpoint.files import write_manifest
from xlstm_hybrid.errors import CheckpointError, MergeError
from xlstm_hybrid.merging.methods import (
    MERGES,
    check_options,
    elected_mean,
    fisher_diagonals,
    gram_matrices,
    measure_statistics,
    threshold,
    weight_files_digest,
)
from xlstm_hybrid.recipe.merge_settings import METHODS, NEED_KEYS, NEED_STATISTICS, OPTIONS

linear, task_arithmetic, ties, dare = (MERGES[name] for name in ("linear", "task_arithmetic", "ties", "dare"))
SHARES = [0.5, 0.25, 0.25]


def waves(*shape, step, dtype=torch.float64):
    return torch.sin(torch.arange(1.0, 1 + math.prod(shape), dtype=torch.float64) * step).view(shape).to(dtype)


def experts(count=3, shape=(7, 5), dtype=torch.float64):
    return [waves(*shape, step=0.7 + 0.31 * j, dtype=dtype) for j in range(count)]


BASE = waves(7, 5, step=0.13)


def extra(method, tensors):
    """The arguments that a method needs beside tensors, weights and base."""
    found = {"keys": [f"e{j}/w" for j in range(len(tensors))]} if method in NEED_KEYS else {}
    if method == "fisher":
        found["statistics"] = [t.double().abs() + 0.1 for t in tensors]
    if method == "regmean":
        found["statistics"] = [t.T.double() @ t.double() + torch.eye(t.shape[1]) for t in tensors]
    return found


def call(method, tensors, weights, base=BASE, **options):
    return MERGES[method](tensors, weights, base, **options, **extra(method, tensors))


def two_or_three(method):
    return (experts(2), [0.5, 0.5]) if method == "slerp" else (experts(), SHARES)


def test_every_method_that_settings_name_is_there_and_no_other():
    assert set(METHODS) == set(MERGES) and set(OPTIONS) <= set(METHODS)


# --- what all share --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MERGES)
def test_low_precision_is_accumulated_in_float32_and_the_dtype_is_kept(method):
    tensors, weights = two_or_three(method)
    low = [t.bfloat16() for t in tensors]
    result = call(method, low, weights, BASE.bfloat16())
    exact = call(method, [t.double() for t in low], weights, BASE.bfloat16().double())
    assert result.dtype == torch.bfloat16 and exact.dtype == torch.float64
    # half an ulp of bfloat16, and what float32 adds
    assert ((result.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_a_sum_of_many_small_shares_does_not_vanish_in_low_precision():
    one, two = torch.tensor([1.0, 256.0]).bfloat16(), torch.tensor([1.0078125, 2.0]).bfloat16()
    for result in (linear([one, two, two], SHARES), task_arithmetic([one, two, two], SHARES, one)):
        assert torch.equal(result, (one.double() * 0.5 + two.double() * 0.5).bfloat16())


@pytest.mark.parametrize("method", MERGES)
def test_inputs_are_left_alone(method):
    tensors, weights = two_or_three(method)
    given, base = [t.clone() for t in tensors], BASE.clone()
    call(method, given, weights, base)
    assert all(torch.equal(a, b) for a, b in zip(given, tensors, strict=True)) and torch.equal(base, BASE)


@pytest.mark.parametrize("method", MERGES)
def test_equal_experts_are_returned(method):
    one = experts(1)[0]
    count = 2 if method == "slerp" else 3
    options = {"drop": 0.0} if "dare" in method else {"density": 1.0} if method == "ties" else {}
    torch.testing.assert_close(call(method, [one] * count, [1 / count] * count, **options), one, rtol=1e-6, atol=1e-9)


# --- task vectors ----------------------------------------------------------------------------------------------


def test_linear_and_task_arithmetic_are_their_formulas():
    a, b, c = experts()
    torch.testing.assert_close(linear([a, b, c], SHARES), 0.5 * a + 0.25 * b + 0.25 * c, rtol=0, atol=1e-15)
    expected = BASE + 0.5 * (0.5 * (a - BASE) + 0.25 * (b - BASE) + 0.25 * (c - BASE))
    torch.testing.assert_close(task_arithmetic([a, b, c], SHARES, BASE, scale=0.5), expected, rtol=0, atol=1e-15)


def test_trimming_keeps_the_largest_magnitudes():
    base = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    delta = torch.tensor([[0.125, -0.5, 0.25], [0.375, -0.3125, 0.0]])
    assert ties([base + delta], [1.0], base, density=0.5).sub(base).tolist() == [[0, -0.5, 0], [0.375, -0.3125, 0]]
    assert torch.equal(ties([base + delta], [1.0], base, density=1.0), base + delta)
    assert ties([base + delta], [1.0], base, density=0.01).sub(base).count_nonzero() == 1
    # as large as the smallest that is kept
    assert ties([2 * base], [1.0], base, density=0.25).sub(base).count_nonzero() == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_threshold_is_the_magnitude_of_that_rank_whatever_the_blocks(dtype, monkeypatch):
    expert, base = (torch.randn(997, generator=torch.Generator().manual_seed(s)).to(dtype) ** 3 for s in (0, 1))
    ranked = (
        (expert.double() - base.double())
        .abs()
        .to(torch.promote_types(dtype, torch.float32))
        .sort(descending=True)
        .values
    )
    for size in (2**20, 64):
        monkeypatch.setattr("xlstm_hybrid.merging.methods.BLOCK", size)
        for density, rank in ((0.2, 199), (0.001, 1), (1.0, 997), (0.5, 498)):
            assert threshold(expert, base, density) == pytest.approx(ranked[rank - 1].item(), rel=1e-7)


def test_signs_are_elected_by_weighted_mass_and_the_mean_is_of_those_that_agree():
    deltas = [
        torch.tensor([1.0, 1.0, -3.0, 0.0, 2.0]),
        torch.tensor([2.0, -3.0, 1.0, 0.0, -2.0]),
        torch.tensor([3.0, 1.0, 0.0, 0.0, 0.0]),
    ]
    assert elected_mean(deltas, [1 / 3] * 3).tolist() == pytest.approx([2, -3, -3, 0, 0])  # a tie elects nothing
    assert elected_mean(deltas, [0.8, 0.1, 0.1]).tolist() == pytest.approx(
        [(0.8 + 0.2 + 0.3) / 1, (0.8 + 0.1) / 0.9, -3, 0, 2]
    )


def test_ties_is_trim_elect_and_disjoint_mean():
    base = torch.tensor([10.0, 10.0, 10.0, 10.0])
    one, two = base + torch.tensor([4.0, -1.0, 3.0, 0.1]), base + torch.tensor([2.0, 5.0, -0.1, -0.2])
    assert ties([one, two], [0.5, 0.5], base, density=0.5).tolist() == pytest.approx([13, 15, 13, 10])
    assert ties([one, two], [0.5, 0.5], base, density=0.5, scale=0.5).tolist() == pytest.approx([11.5, 12.5, 11.5, 10])


def test_ties_agrees_with_pefts_where_all_weights_are_equal():
    peft = pytest.importorskip("peft.utils.merge_utils")
    tensors = experts(4)
    deltas = [t - BASE for t in tensors]
    theirs = peft.ties(deltas, torch.ones(4, dtype=torch.float64), density=0.4)
    torch.testing.assert_close(ties(tensors, [0.25] * 4, BASE, density=0.4), BASE + theirs, rtol=0, atol=1e-12)


def test_dare_drops_the_share_it_should_and_keeps_the_sum():
    base, expert = torch.zeros(400, 500), torch.ones(400, 500)
    result = dare([expert], [1.0], base, keys=["math/w"], drop=0.9)
    assert sorted(result.unique().tolist()) == pytest.approx([0, 10])
    kept = result.count_nonzero().item() / result.numel()
    assert abs(kept - 0.1) < 4 * math.sqrt(0.09 / 200_000) and abs(result.mean().item() - 1) < 0.03


def test_what_is_dropped_depends_on_expert_tensor_and_seed_and_on_nothing_else():
    def mask(seed, key, count=2048):
        return dare([torch.ones(count)], [1.0], torch.zeros(count), keys=[key], drop=0.5, seed=seed) != 0

    masks = {place: mask(*place) for place in ((0, "math/a"), (0, "math/b"), (0, "code/a"), (1, "math/a"))}
    torch.manual_seed(5)
    assert torch.equal(masks[0, "math/a"], mask(0, "math/a"))
    for j, a in enumerate(masks.values()):
        for b in list(masks.values())[j + 1 :]:
            assert 0.4 < (a == b).float().mean() < 0.6
    golden = mask(0, "math/model.norm.weight", 16)
    assert golden.int().tolist() == [1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 0]  # numpy keeps the stream of Philox


@pytest.mark.parametrize("method", MERGES)
def test_blocks_do_not_change_a_bit(method, monkeypatch):
    tensors, weights = two_or_three(method)
    whole = call(method, tensors, weights)
    monkeypatch.setattr("xlstm_hybrid.merging.methods.BLOCK", 4)
    in_blocks = call(method, tensors, weights)
    if method == "slerp":  # its angle is a sum over the blocks
        torch.testing.assert_close(in_blocks, whole, rtol=1e-14, atol=1e-15)
    else:
        assert torch.equal(in_blocks, whole)


def test_dare_without_dropping_is_task_arithmetic_and_with_elected_signs_full_ties():
    tensors = experts()
    keys = ["a", "b", "c"]
    torch.testing.assert_close(dare(tensors, SHARES, BASE, keys=keys, drop=0.0), task_arithmetic(tensors, SHARES, BASE))
    torch.testing.assert_close(
        MERGES["dare_ties"](tensors, SHARES, BASE, keys=keys, drop=0.0), ties(tensors, SHARES, BASE, density=1.0)
    )


# --- slerp -----------------------------------------------------------------------------------------------------


def test_slerp_follows_the_arc():
    slerp = MERGES["slerp"]
    x, y = torch.tensor([3.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 5.0], dtype=torch.float64)
    half = slerp([x, y], [0.5, 0.5])
    # 45 degrees; on a circle the norm stays
    torch.testing.assert_close(half, torch.tensor([3.0, 5.0], dtype=torch.float64) * math.sqrt(0.5))
    third = slerp([x, y], [2 / 3, 1 / 3])
    assert math.degrees(math.atan2(third[1] / 5, third[0] / 3)) == pytest.approx(30)
    assert torch.equal(slerp([x, y], [1.0, 0.0]), x) and torch.equal(slerp([x, y], [0.0, 1.0]), y)


@pytest.mark.parametrize("second", [2.0, -2.0, 0.0])
def test_slerp_between_parallel_tensors_is_the_line(second):
    x = waves(3, 4, step=0.3)
    torch.testing.assert_close(MERGES["slerp"]([x, second * x], [0.75, 0.25]), (0.75 + 0.25 * second) * x)


# --- statistics ------------------------------------------------------------------------------------------------


def test_fisher_trusts_the_expert_that_is_sure():
    a, b = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([5.0, 5.0, 5.0])
    sure = [torch.tensor([1.0, 0.0, 3.0]), torch.tensor([0.0, 2.0, 1.0])]
    result = MERGES["fisher"]([a, b], [0.5, 0.5], statistics=sure, floor=1e-6)
    assert result.tolist() == pytest.approx([1, 5, 2], abs=1e-4)
    assert MERGES["fisher"]([a, b], [0.5, 0.5], statistics=[torch.zeros(3)] * 2).tolist() == [3, 3, 3]
    weighted = MERGES["fisher"]([a, b], [0.25, 0.75], statistics=[torch.ones(3)] * 2)
    assert weighted.tolist() == pytest.approx([4, 4, 4])


def test_regmean_is_the_least_squares_solution_over_all_experts_inputs():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(40, 5, generator=generator, dtype=torch.float64) * (1 + 3 * j) for j in range(2)]
    weights = experts(2, (3, 5))
    grams = [x.T @ x / len(x) for x in inputs]
    merged = MERGES["regmean"](weights, [0.5, 0.5], statistics=grams, alpha=1.0)
    rows, targets = torch.cat(inputs), torch.cat([x @ w.T for x, w in zip(inputs, weights, strict=True)])
    expected = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    diagonal = MERGES["regmean"](weights, [0.5, 0.5], statistics=grams, alpha=0.0)
    shares = [g.diag() / sum(h.diag() for h in grams) for g in grams]
    torch.testing.assert_close(diagonal, weights[0] * shares[0] + weights[1] * shares[1], rtol=0, atol=1e-5)


def test_inputs_that_no_expert_saw_get_the_plain_mean():
    weights, gram = experts(2, (3, 4)), torch.zeros(4, 4, dtype=torch.float64)
    gram[0, 0] = 2.0
    merged = MERGES["regmean"](weights, [0.5, 0.5], statistics=[gram, gram])
    torch.testing.assert_close(merged, (weights[0] + weights[1]) / 2, rtol=0, atol=1e-12)
    assert torch.equal(MERGES["regmean"](weights, [0.5, 0.5], statistics=[0 * gram] * 2), linear(weights, [0.5, 0.5]))


@pytest.fixture(scope="module")
def small():
    return tiny_student(torch.float32, num_hidden_layers=2)


def test_fisher_diagonals_are_mean_squared_gradients_of_single_rows(small):
    ids = token_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    found, rows = fisher_diagonals(
        small, [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:]}], labels="data"
    )
    expected = torch.zeros_like(small.model.norm.weight)
    for row, length in zip(ids, (9, 6, 9), strict=True):
        logp = small(row[None, :length]).logits[0, :-1].float().log_softmax(-1)
        likelihood = logp.gather(-1, row[1:length, None]).sum()
        expected += torch.autograd.grad(likelihood, small.model.norm.weight)[0].square() / 3
    assert rows == 3
    torch.testing.assert_close(found["model.norm.weight"], expected, rtol=1e-4, atol=1e-6)
    assert set(found) == {n for n, _ in small.named_parameters()} and all((x >= 0).all() for x in found.values())
    assert all(p.grad is None for p in small.parameters())


def test_the_fisher_of_drawn_labels_is_reproducible_and_is_not_that_of_the_data(small):
    batches = [{"input_ids": token_ids(2, 9)}]
    one, again, other = (fisher_diagonals(small, batches, seed=s)[0]["model.norm.weight"] for s in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert not torch.equal(one, fisher_diagonals(small, batches, labels="data")[0]["model.norm.weight"])
    with pytest.raises(MergeError, match="labels='x': expected 'model' or 'data'"):
        fisher_diagonals(small, batches, labels="x")


def test_the_fisher_counts_the_tokens_that_labels_score(small):
    """Of two packed documents, the second from token 5 on: its first token and the question of the first are not
    scored.
    """
    ids = token_ids(1, 9)
    labels, positions = ids.clone(), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    labels[0, [0, 1, 5]] = -100
    found, _ = fisher_diagonals(small, [{"input_ids": ids, "labels": labels, "position_ids": positions}], labels="data")
    logp = [small(part).logits[0, :-1].float().log_softmax(-1) for part in (ids[:, :5], ids[:, 5:])]
    likelihood = logp[0].gather(-1, ids[0, 1:5, None])[1:].sum() + logp[1].gather(-1, ids[0, 6:, None]).sum()
    expected = torch.autograd.grad(likelihood, small.model.norm.weight)[0].square()
    torch.testing.assert_close(found["model.norm.weight"], expected, rtol=1e-4, atol=1e-6)


def test_gram_matrices_are_mean_outer_products_of_real_tokens_inputs(small):
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    seen = []
    hook = small.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    found, shared, tokens = gram_matrices(small, [{"input_ids": ids, "attention_mask": mask, "labels": ids}])
    hook.remove()
    x = seen[0].flatten(0, 1)[mask.flatten().bool()].double()
    assert tokens == 16
    torch.testing.assert_close(found["model.layers.1.mlp.down_proj"].double(), x.T @ x / 16, rtol=1e-5, atol=1e-7)
    layer = "model.layers.0."
    assert shared[layer + "self_attn.k_proj"] == shared[layer + "self_attn.v_proj"] == layer + "self_attn.q_proj"
    assert shared[layer + "mlp.up_proj"] == layer + "mlp.gate_proj" and layer + "self_attn.o_proj" in found
    assert not any(m._forward_pre_hooks for m in small.modules())


def test_statistics_know_to_which_weights_they_belong(small, tmp_path):
    small.save_pretrained(tmp_path / "a")
    before = weight_files_digest(tmp_path / "a")
    write_manifest(tmp_path / "a")
    assert weight_files_digest(tmp_path / "a") == before  # read from the manifest now
    save_file({"w": torch.ones(1)}, tmp_path / "a" / "model.safetensors")
    write_manifest(tmp_path / "a")
    assert weight_files_digest(tmp_path / "a") != before


@pytest.mark.parametrize(("kind", "where"), [("fisher", "a/f.safetensors"), ("hessian", "f.safetensors")])
def test_statistics_of_an_unknown_kind_or_inside_of_a_checkpoint_are_refused(kind, where, small, tmp_path):
    small.save_pretrained(tmp_path / "a")
    with pytest.raises(MergeError, match=f"kind='{kind}', out=f.safetensors: expected one of"):
        measure_statistics(tmp_path / "a", [{"input_ids": token_ids(1, 5)}], tmp_path / where, kind)
    with pytest.raises(MergeError, match="no tokens to measure gram statistics on"):
        measure_statistics(tmp_path / "a", [], tmp_path / "g.safetensors", "gram")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# --- options ---------------------------------------------------------------------------------------------------


def test_every_option_is_one_that_its_method_takes():
    for method, names in OPTIONS.items():
        tensors, weights = experts(), SHARES
        for name in names:
            value = {"seed": 3, "drop": 0.5}.get(name, 0.5)
            assert call(method, tensors, weights, **{name: value}).shape == (7, 5)
    assert set(NEED_STATISTICS) | NEED_KEYS <= set(MERGES)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("linear", {"scale": 1.0}, "scale: it takes no options"),
        ("ties", {"density": 0.0}, "density=0.0: expected a share above 0, at most 1"),
        ("ties", {"drop": 0.5}, r"drop: expected one of \['density', 'scale'\]"),
        (
            "dare",
            {"drop": 1.0, "scale": -1},
            "drop=1.0: expected a share of at least 0, below 1; scale=-1: expected a number above 0",
        ),
        ("dare", {"seed": 1.5}, "seed=1.5: expected a whole number"),
        ("fisher", {"floor": float("nan")}, "floor=nan: expected a number above 0"),
        ("regmean", {"alpha": "1"}, "alpha='1': expected a share between 0 and 1"),
    ],
)
def test_options_that_describe_nothing_are_all_named(method, options, message):
    with pytest.raises(MergeError, match=message):
        check_options(method, options)


def test_a_damaged_file_of_statistics_is_named(tmp_path):
    from contextlib import ExitStack

    from xlstm_hybrid.merging.methods import Statistics

    (tmp_path / "f.safetensors").write_bytes(b"no")
    with ExitStack() as stack, pytest.raises(CheckpointError, match="statistics f.safetensors of math cannot be read"):
        Statistics(tmp_path / "f.safetensors", "fisher", "math", tmp_path, {}, stack)
