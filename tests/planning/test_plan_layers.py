"""Memories for a budget: bytes are those of the tensors, groups are ranked by what they bring, and the plan becomes a
student.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_config, tiny_student, token_ids
from test_exact import KEPT, MIXED
from tiny_teachers import teacher, teacher_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from xlstm_hybrid.cli import app
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.data.long_context import documents
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.planning import layers as allocation
from xlstm_hybrid.planning.cache_size import allocated_bytes, cache_bytes, filled_bytes
from xlstm_hybrid.planning.layers import (
    allocate,
    answers_of,
    best_groups,
    keep_groups,
    rank_groups,
    restored,
    retrieval_rows,
)
from xlstm_hybrid.planning.run import machine_of, plan
from xlstm_hybrid.reports.card import summary
from xlstm_hybrid.state import layer_tensors, prefill

# --- bytes -------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "plain": {},
    "no window": {"mixer_branches": "memory", "memory_feature_map": "softmax_signed", "memory_feature_dim": 5},
    "no memory": {"mixer_branches": "window"},
    "joint softmax": {"mixer_combine": "joint", "memory_cell": "linear"},
    "delta rule": {
        "memory_cell": "delta",
        "memory_feature_map": "silu",
        "sparse_memory": 3,
        "sparse_memory_score": "random",
    },
    "windows differ": {"layer_windows": [3, 7, 12], "layer_sinks": [0, 2, 4]},
    "all of it": MIXED | {"sparse_memory": 6},
    "three groups": KEPT | {"sparse_memory": 9},
    "the teacher's layers": {"layer_types": MIXED["teacher_layer_types"], "teacher_sliding_window": 5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_bytes_from_the_config_are_the_bytes_of_the_tensors(name, dtype):
    model = tiny_student(torch.float64 if dtype == torch.float64 else torch.float32, **LAYOUTS[name])
    if dtype == torch.bfloat16:
        kept = model._get_dtype_plan(dtype)
        for key, x in model.named_parameters():
            x.data = x.data.to(torch.float32 if any(part in kept for part in key.split(".")) else dtype)
    for length in (2, 30):
        cache = prefill(model, token_ids(1, length))
        held = sum(x.numel() * x.element_size() for layer in cache.layers for x in layer_tensors(layer).values())
        assert sum(cache_bytes(model.config, length, dtype).values()) == held, length
        # what slid out of a prompt's keys is freed with the next token
        if "teacher_sliding_window" not in LAYOUTS[name]:
            assert allocated_bytes(cache) == filled_bytes(cache) == held


@pytest.mark.parametrize("kept", [None, [[1], []]])
@torch.no_grad()
def test_a_short_context_does_not_pay_for_the_window(kept):
    """At any length no more than the teacher's bytes and the state's, and what the formula says."""
    fields = {"num_hidden_layers": 2, "sliding_window": 256, "num_sink_tokens": 4} | (
        {"kept_groups": kept} if kept else {}
    )
    model, held = tiny_student(torch.float32, **fields), 1 if kept else 0
    pair, groups = 2 * 16 * 4, 4  # bytes of a key and its value, key/value heads of both layers
    for length, slots in ((30, 30), (300, 260), (3000, 260)):
        cache = prefill(model, token_ids(1, length), piece=1000)
        found = cache_bytes(model.config, length, "float32")
        assert sum(found.values()) == filled_bytes(cache) == allocated_bytes(cache), length
        assert found["state"] == (8 - 2 * held) * (16 * 16 + 16 + 1) * 4 + 2 * 8
        assert found["window"] == (groups - held) * slots * pair and found["kept"] == held * length * (pair + 8)
        teacher = sum(cache_bytes(model.config, length, "float32", teacher=True).values())
        assert teacher == length * groups * pair
        assert sum(found.values()) <= teacher + found["state"] + held * length * 8  # the kept columns' places


def test_the_plan_of_a_run_names_the_cache():
    found = plan(teacher("llama").config, machine_of(1, 80e9)).cache
    length, K, G, H = 4096, 10, 2, 6
    assert found["length"] == length and sum(found["teacher"].values()) == 3 * length * G * 2 * K * 2
    assert sum(found["student"].values()) == 3 * (G * 516 * 2 * K * 2 + H * (K * K + K + 1) * 4 + 8)


def test_parts_are_what_they_say():
    config = tiny_config(**MIXED, sparse_memory=6)
    found, twice = (cache_bytes(config, length, "bfloat16") for length in (100, 200))
    K, pair = 16, 2 * 16 * 2
    assert found["state"] == 2 * (2 * (K * K + K + 1) * 4 + 8)  # two hybrid layers with two of four query heads each
    assert found["window"] == 2 * 10 * pair and found["full"] == 2 * 100 * pair
    assert found["sparse"] == 2 * (6 * (pair + 4 + 8) + 10 * 4)
    assert found["kept"] == 100 * (pair + 8) + 4 * (pair + 8)  # one of them slid by 5 in the teacher
    assert {name for name in found if twice[name] != found[name]} == {"kept", "full"}
    assert sum(cache_bytes(config, 100, torch.bfloat16, teacher=True).values()) == (100 + 100 + 4) * 2 * pair
    with pytest.raises(ConfigError, match="length=0"):
        cache_bytes(config, 0)


# --- ranking -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    ids = token_ids(6, 30)
    answers = torch.zeros(6, 30, dtype=torch.bool)
    answers[:, 25:28] = True
    answers[3, 27] = False
    return ids, answers


@torch.no_grad()
def test_a_restored_group_is_a_kept_group():
    model, ids = tiny_student(), token_ids(2, 30)
    plain = model(ids, use_cache=False).logits
    with restored(model, [(0, 1), (2, 0)]):
        found = model(ids, use_cache=False).logits
    want = keep_groups(model, [[1], [], [0]])(ids, use_cache=False).logits
    torch.testing.assert_close(found, want, atol=1e-9, rtol=1e-9)
    assert torch.equal(model(ids, use_cache=False).logits, plain) and (found - plain).abs().max() > 0.1


@torch.no_grad()
def test_figures_of_answers_are_cross_entropy_and_shares(rows):
    model, (ids, answers) = tiny_student(), rows
    logits, nll, right = model(ids, use_cache=False).logits, [], []
    for b, t in answers.nonzero().tolist():
        nll.append(-logits[b, t - 1].log_softmax(-1)[ids[b, t]].item())
        right.append((b, bool(logits[b, t - 1].argmax() == ids[b, t])))
    found = answers_of(model, ids, answers, batch_size=4)
    assert (
        found["nll"] == pytest.approx(sum(nll) / 17, rel=1e-5)
        and found["token_accuracy"] == sum(r for _, r in right) / 17
    )
    best = ids.clone()
    best[:, 1:] = torch.where(answers[:, 1:], logits[:, :-1].argmax(-1), ids[:, 1:])
    # the first token of three
    assert answers_of(model, torch.where(answers.cumsum(-1) == 1, best, ids), answers)["row_accuracy"] == 0


def test_groups_are_ranked_by_what_they_bring(rows):
    model, (ids, answers) = tiny_student(), rows
    for method in ("add", "ablate"):
        found = rank_groups(model, ids, answers, method=method, batch_size=6)
        assert len(found["groups"]) == 6 and [g["gain"] for g in found["groups"]] == sorted(
            (g["gain"] for g in found["groups"]), reverse=True
        )
        for entry in found["groups"]:
            one = (entry["layer"], entry["group"])
            chosen = [one] if method == "add" else [(j, g) for j in range(3) for g in range(2) if (j, g) != one]
            with restored(model, chosen):
                nll = answers_of(model, ids, answers)["nll"]
            want = found["none"]["nll"] - nll if method == "add" else nll - found["all"]["nll"]
            assert entry["gain"] == pytest.approx(want, abs=1e-6)


def test_layers_before_a_group_are_passed_once_and_not_for_every_group(rows, monkeypatch):
    model, (ids, answers) = tiny_student(), rows
    passed = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda attention, *_: passed.append(attention.layer_idx))
    rank_groups(model, ids, answers, batch_size=6)
    # none, all, two groups of each layer from it on, and one pass to the next layer
    assert [passed.count(j) for j in range(3)] == [2 + 2 * (j + 1) + 1 for j in range(3)]
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_the_best_groups_are_written_per_layer_as_a_student_keeps_them():
    config = tiny_config()
    ranking = ranking_of(config, [((2, 1), 0.5), ((0, 0), 0.3), ((2, 0), 0.2), ((1, 1), 0.1)])
    found = [best_groups(ranking, count) for count in range(4)]
    assert found == [[[], [], []], [[], [], [1]], [[0], [], [1]], [[0], [], [0, 1]]]
    assert keep_groups(tiny_student(), found[2]).config.kept_groups == found[2]
    with pytest.raises(ConfigError, match="count=5, expected 0 to 4"):
        best_groups(ranking, 5)


def test_only_a_group_whose_heads_reach_the_output_can_matter(rows):
    """A planted group: the output projection reads nobody else, so that every other gain is 0."""
    model, (ids, answers) = tiny_student(), rows
    with torch.no_grad():
        for j, layer in enumerate(model.model.layers):
            weight = layer.self_attn.o_proj.weight.unflatten(1, (4, 16))
            weight[:, [h for h in range(4) if (j, h // 2) != (1, 1)]] = 0
    for method in ("ablate", "add"):
        gains = {
            (g["layer"], g["group"]): abs(g["gain"])
            for g in rank_groups(model, ids, answers, method=method, batch_size=6)["groups"]
        }
        assert gains.pop((1, 1)) > 0.01 and max(gains.values()) < 1e-6


def test_greedy_takes_the_best_beside_those_before_it(rows):
    model, (ids, answers) = tiny_student(), rows
    found = rank_groups(model, ids, answers, method="greedy", steps=2, batch_size=6)["groups"]
    first, second = ((g["layer"], g["group"]) for g in found[:2])
    alone = {
        (g["layer"], g["group"]): g["nll"]
        for g in rank_groups(model, ids, answers, method="add", batch_size=6)["groups"]
    }
    assert first == min(alone, key=alone.get) and len({(g["layer"], g["group"]) for g in found}) == 6
    with restored(model, [first, second]):
        pair = answers_of(model, ids, answers)["nll"]
    assert found[1]["nll"] == pytest.approx(pair, abs=1e-6) and pair == min(g["nll"] for g in found[1:])
    assert found[1]["gain"] == pytest.approx(found[0]["nll"] - pair, abs=1e-6)


def test_what_cannot_be_ranked_is_refused(rows):
    ids, answers = rows
    with pytest.raises(ConfigError, match="without kept groups"):
        rank_groups(tiny_student(kept_groups=[[0], [], []]), ids, answers)
    with pytest.raises(ConfigError, match="with an answer in every row"):
        rank_groups(tiny_student(), ids, torch.zeros_like(answers))
    with pytest.raises(ConfigError, match="method='error'"):
        rank_groups(tiny_student(), ids, answers, method="error")


# --- choosing ----------------------------------------------------------------------------------------------------


def ranking_of(config, order):
    entries = [{"layer": j, "group": g, "gain": gain} for (j, g), gain in order]
    return {"layers": config.num_hidden_layers, "key_value_heads": config.num_key_value_heads, "groups": entries}


def total(config, length, **changes):
    fields = config.to_dict() | changes
    return sum(cache_bytes(tiny_config(**fields), length).values())


def test_a_budget_is_filled_but_never_exceeded_and_more_of_it_never_keeps_less():
    config, length, before = tiny_config(num_hidden_layers=5), 400, -1
    least, teacher = total(config, length), sum(cache_bytes(config, length, teacher=True).values())
    for budget in range(least, 2 * teacher, 5000):
        plan = allocate(config, budget, length, sparse_share=0.25)
        groups = sum(map(len, plan.student["kept_groups"] or [])) + 2 * plan.student["layer_types"].count(
            "full_attention"
        )
        sparse = plan.student.get("sparse_memory", 0)
        assert plan.total <= budget and plan.total == total(config, length, **plan.student) and groups >= before
        eight_more = 8 * (10 - groups) * (2 * 16 * 2 + 4 + 8)  # the sparse memory grows by eight tokens
        assert budget - plan.total < eight_more or sparse + 8 > length - 10 or groups == 10
        before = groups
    assert groups == 10 and plan.student["layer_types"] == ["full_attention"] * 5
    with pytest.raises(ConfigError, match=f"has {least:,} at 400 tokens"):
        allocate(config, least - 1, length)


def test_the_best_groups_are_kept_and_those_that_bring_nothing_are_not():
    config = tiny_config()
    order = [((2, 1), 0.5), ((0, 0), 0.3), ((2, 0), 0.2), ((1, 1), 0.1), ((1, 0), 0.0), ((0, 1), -0.2)]
    three = total(
        config, 400, kept_groups=[[0], [], []], layer_types=["hybrid_sliding", "hybrid_sliding", "full_attention"]
    )
    plan = allocate(config, three, 400, ranking=ranking_of(config, order))
    assert plan.student["layer_types"] == ["hybrid_sliding", "hybrid_sliding", "full_attention"] and plan.student[
        "kept_groups"
    ] == [[0], [], []]
    assert (
        plan.measured
        and plan.total <= three
        and "sparse_memory" not in plan.student
        and plan.student["memory_feature_dim"] is None
    )
    rich = allocate(config, 10**7, 400, ranking=ranking_of(config, order), sparse_share=0.25)
    assert (
        rich.student["kept_groups"] == [[0], [1], []]
        and "2 of 6 groups brought nothing" in rich.notes[0]
        and rich.student["sparse_memory"] > 300
    )
    for wrong in (ranking_of(config, order[:5]), ranking_of(tiny_config(num_hidden_layers=2), order), {"groups": 3}):
        with pytest.raises(ConfigError, match="ranking"):
            allocate(config, 10**6, 400, ranking=wrong)


def test_what_no_group_can_use_widens_the_features_up_to_twice_the_head():
    config, length = tiny_config(head_dim=32), 4000
    least, wider = total(config, length), total(config, length, memory_feature_dim=48)
    assert [allocate(config, b, length).student["memory_feature_dim"] for b in (least, wider - 1, wider)] == [
        None,
        None,
        48,
    ]
    rich = allocate(config, total(config, length, memory_feature_dim=64) + 20_000, length)
    assert (
        rich.student["memory_feature_dim"] == 64
        and rich.total == total(config, length, memory_feature_dim=64)
        and not rich.student["kept_groups"]
    )
    assert "features were widened from 32 to 64" in rich.notes[0]
    assert allocate(config, rich.budget, length, widen=False).total == least
    # no kernel has more than 128
    assert allocate(tiny_config(head_dim=128), 10**7, 40_000).student["memory_feature_dim"] is None
    assert (
        allocate(tiny_config(head_dim=96, num_hidden_layers=1), 2 * 10**6, 40_000).student["memory_feature_dim"] == 128
    )


def test_windows_in_the_first_layer_alone_leave_their_bytes_to_the_memory():
    config, length = tiny_config(head_dim=32, num_hidden_layers=4, sliding_window=64), 4000
    budget = total(config, length)
    plan = allocate(config, budget, length, windows="first")
    assert plan.student["layer_windows"] == [64, 1, 1, 1] and plan.student["layer_sinks"] == [
        config.num_sink_tokens,
        0,
        0,
        0,
    ]
    assert (
        plan.student["memory_feature_dim"] in (48, 64)
        and plan.total <= budget
        and plan.total == total(config, length, **plan.student)
    )
    order = [((1, 0), 0.5), ((1, 1), 0.4), *(((j, g), 0.0) for j in (0, 2, 3) for g in (0, 1))]
    kept = allocate(config, 10**7, length, windows="first", ranking=ranking_of(config, order)).student
    assert (
        kept["layer_types"][1] == "full_attention"
        and kept["layer_windows"] == [64, None, 1, 1]
        and kept["layer_sinks"][1] == 0
    )
    sinks = [config.num_sink_tokens, 0, 0, 0]
    tight = allocate(
        config, total(config, length, layer_windows=[32, 1, 1, 1], layer_sinks=sinks), length, windows="first"
    )
    assert tight.student["layer_windows"] == [32, 1, 1, 1] and "cut from 64 to 32" in tight.notes[0]
    with pytest.raises(ConfigError, match="windows='last'"):
        allocate(config, budget, length, windows="last")


def test_without_a_ranking_groups_are_spread_evenly_and_the_plan_says_so():
    config = tiny_config(num_hidden_layers=8)
    assert allocation.evenly(config, 2) == [(2, 0), (6, 0)] and allocation.evenly(config, 4) == [
        (1, 1),
        (3, 1),
        (5, 1),
        (7, 1),
    ]
    assert sorted(allocation.evenly(config, 16)) == [(j, g) for j in range(8) for g in range(2)]
    plan = allocate(config, total(config, 400, kept_groups=[[0]] * 4 + [[]] * 4), 400)
    assert (
        [len(kept) for kept in plan.student["kept_groups"]] == [0, 1, 0, 1, 0, 1, 0, 1]
        and "not measured" in plan.notes[0]
        and not plan.measured
    )


def test_a_window_that_does_not_fit_is_halved():
    config = tiny_config(sliding_window=256)
    plan = allocate(config, total(config, 4000, sliding_window=64) + 100, 4000)
    assert (
        plan.student["sliding_window"] == 64 and "cut from 256 to 64" in plan.notes[0] and config.sliding_window == 256
    )


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A teacher of one KV group more than tests/tiny_teachers has layers for, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = Tokenizer(models.WordLevel({chr(c): c - 29 for c in range(32, 127)} | {"\n": 1, "?": 2}, unk_token="?"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="\n").save_pretrained(folder)  # noqa: S106
    teacher("llama").save_pretrained(folder)
    return folder


def invoke(*arguments):
    result = CliRunner().invoke(app, ["plan-layers", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_rows_end_in_their_answers(directory):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    found = documents(tokenizer, "needle", 400, 3)
    rows, answers = retrieval_rows(tokenizer, found)
    for ids, mask, doc in zip(rows, answers, found, strict=True):
        assert "".join(tokenizer.convert_ids_to_tokens(ids[mask])) == doc["answer"] and int(mask.int().argmax()) == 400


def test_a_measured_plan_becomes_a_student_through_a_file(directory, tmp_path):
    common = ("--window", 16, "--sinks", 2, "--dtype", "float32")
    said = invoke(
        directory,
        "--budget",
        "150KB",
        "--length",
        900,
        *common,
        "--measure",
        "--kind",
        "needle",
        "--rows",
        2,
        "--tokens",
        400,
        "--save-ranking",
        tmp_path / "ranking.json",
        "--out",
        tmp_path / "student.yaml",
        "--json",
        tmp_path / "plan.json",
    )
    ranking, plan = (json.loads((tmp_path / name).read_text()) for name in ("ranking.json", "plan.json"))
    assert len(ranking["groups"]) == 6 and ranking["kind"] == "needle" and plan["measured"] and plan["total"] <= 150_000
    assert "NLL" in said and "needle" in json.dumps(plan["ranking"])
    again = invoke(
        directory,
        "--budget",
        "150KB",
        "--length",
        900,
        *common,
        "--ranking",
        tmp_path / "ranking.json",
        "--out",
        tmp_path / "student.json",
    )
    assert "ranking (ablate, 2 rows" in again
    fields = yaml.safe_load((tmp_path / "student.yaml").read_text())
    assert (
        fields == json.loads((tmp_path / "student.json").read_text())
        and "by measurement" in (tmp_path / "student.yaml").read_text()
    )
    result = CliRunner().invoke(
        app, ["convert", str(directory), str(tmp_path / "s"), "--options", str(tmp_path / "student.yaml")]
    )
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert all(config[name] == value for name, value in fields.items())
    said = summary([{"stage": "convert", "config": fields}])
    assert (
        f"{sum(map(len, fields['kept_groups']))} key/value groups" in said
        and "a window of 16 tokens and 2 sink" in said
    )
    said = summary(
        [
            {
                "stage": "convert",
                "config": {**fields, "sparse_memory": 24, "memory_feature_dim": 32, "layer_windows": [16, 1, None]},
            }
        ]
    )
    assert (
        "memory of 24 tokens" in said
        and "32 features per head" in said
        and "windows per layer: 16, 1, None tokens" in said
    )
    on_student = invoke(tmp_path / "s", "--budget", "1MB", "--length", 900)
    assert "window 16, sinks 2" in on_student


def test_groups_of_a_gguf_teacher_are_measured_in_a_real_text(tmp_path):
    pytest.importorskip("gguf")
    from tiny_gguf import write_gguf

    tiny = Path(__file__).parents[2] / "recipes/tiny_teacher/tiny-llama"
    original = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    write_gguf(tmp_path / "tiny.gguf", original, tiny)
    original.save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "plain")
    (tmp_path / "wall.txt").write_text(" ".join(f"The wall has {n} stones." for n in range(300)))
    asked = ("--budget", "2MB", "--length", 900, "--window", 16, "--sinks", 2, "--dtype", "float32")
    asked += ("--measure", "--rows", 1, "--tokens", 500, "--haystack", tmp_path / "wall.txt")
    for model, name in ((tmp_path / "tiny.gguf", "a.json"), (tmp_path / "plain", "b.json")):
        invoke(model, *asked, "--save-ranking", tmp_path / name)
    file, directory = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert file["haystack"] == "wall.txt" and file["prompt_tokens"] == 500 and file["seconds"] > 0
    order = [[(entry["layer"], entry["group"]) for entry in found["groups"]] for found in (file, directory)]
    assert sorted(order[0]) == [(j, g) for j in range(4) for g in range(2)] and order[0] == order[1]
    gains = [[entry["gain"] for entry in found["groups"]] for found in (file, directory)]
    assert gains[0] == pytest.approx(gains[1], abs=1e-4) and max(gains[0]) > 0.01
    with pytest.raises(ConfigError, match="--haystack: read by --measure alone"):
        invoke(tiny, "--budget", "2MB", "--length", 900, "--haystack", tmp_path / "wall.txt")


def test_without_a_measurement_the_plan_says_so_and_bad_arguments_are_named(directory, tmp_path):
    assert "not measured" in invoke(directory, "--budget", "200KB", "--length", 900, "--window", 16)
    for arguments, message in (
        (("--budget", "many", "--length", 900), "budget='many'"),
        (("--budget", "1KB", "--length", 900), "expected a budget of at least that"),
        (
            ("--budget", "1MB", "--length", 900, "--measure", "--ranking", directory / "config.json"),
            "expected one of them",
        ),
        (
            ("--budget", "1MB", "--length", 900, "--ranking", directory / "config.json"),
            "not a file of plan-layers --measure",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            invoke(directory, *arguments)
    (tmp_path / "o.yaml").write_text("teacher: other\n")
    with pytest.raises(ConfigError, match=r"o\.yaml: expected fields"):
        raise (
            CliRunner()
            .invoke(app, ["convert", str(directory), str(tmp_path / "x"), "--options", str(tmp_path / "o.yaml")])
            .exception
        )


def test_layers_of_linear_attention_are_no_full_ones(tmp_path):
    teacher_config("qwen3_next").save_pretrained(tmp_path)  # no weights
    said = invoke(tmp_path, "--budget", "12kB", "--length", 4096)
    assert "linear layers: [0, 2]; full layers: none; kept groups: none" in said


def test_a_plan_for_every_kind_of_layer_converts(tmp_path):
    """Qwen3 of the tests has two sliding layers: their kept groups keep the teacher's window, and whole layers become
    sliding again.
    """
    from xlstm_hybrid.conversion.families import student_config

    source = teacher("qwen3")
    config = student_config(source.config, sliding_window=16, num_sink_tokens=2)
    for budget in (40_000, 60_000, 200_000, 900_000):
        plan = allocate(config, budget, 900, dtype="float32")
        convert(source, tmp_path / str(budget), **plan.student)
    assert plan.student["layer_types"] == config.teacher_layer_types
