"""The arena runs what its file says, resumes, writes failures down, and its figures are those of models whose recall is
known.
"""

import copy
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_student
from transformers import LlamaConfig, LlamaForCausalLM

from xlstm_arena import arms, data, report, runner, scoring, students, summary, teacher
from xlstm_arena.students import Training, changed, load_float32, row_question
from xlstm_arena.teacher import tokenizer
from xlstm_hybrid.errors import ConfigError, EvaluationError
from xlstm_hybrid.merging.merge import merge

SETTING = {
    "name": "tiny",
    "teachers": {"llama": "teacher"},
    "seeds": [0, 1],
    "student": {"sliding_window": 16, "num_sink_tokens": 2, "mlstm_context": 64},
    "data": {"length": 48, "recall_share": 0.5},
    "align": {"max_steps": 2, "per_device_train_batch_size": 4},
    "distill": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "top_k": 8},
    "on_policy": {"max_steps": 1, "per_device_train_batch_size": 4, "max_completion_length": 1},
    "evaluate": {"lengths": [64, 256], "rows": 8, "tokens": 1024, "batch_tokens": 512, "short_rows": 8, "text_rows": 2},
    "arms": {"hybrid": {"tier": 1, "about": "the reference"}},
}


def write(folder, **changes):
    """An arena's file; JSON is YAML."""
    path = folder / "arena.yaml"
    path.write_text(json.dumps({**SETTING, **changes}))
    return path


def arena_of(folder, **changes):
    return arms.load_arena(write(folder, **changes))


@pytest.fixture(scope="module")
def minute(tmp_path_factory):
    """A folder with a teacher of one layer."""
    folder = tmp_path_factory.mktemp("arena")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=data.VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    return folder


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": {"a": {"colour": "red"}}}, r"arms.a: arm: unknown keys \['colour'\]"),
        ({"arms": {"a": {"student": {"sliding_windows": 3}}}}, r"no options \['sliding_windows'\]"),
        ({"arms": {"a": {"stages": ["distill", "align"]}}}, "in this order"),
        ({"arms": {"a": {"start": "b", "stages": []}, "b": {"start": "a", "stages": []}}}, "circle"),
        ({"arms": {"a": {"start": "nobody", "stages": []}}}, "expected another arm"),
        ({"arms": {"a": {"teachers": ["gpt"]}}}, r"arms.a: teachers=\['gpt'\]: expected some of \['llama'\]"),
        (
            {
                "teachers": {"llama": "x", "qwen3": "y"},
                "arms": {"a": {"teachers": ["qwen3"]}, "b": {"start": "a", "stages": []}},
            },
            "not made for llama",
        ),
        ({"arms": {"teacher": {}}}, "not 'teacher'"),
        (
            {"arms": {"a": {"distill": {"max_steps": 3}, "experts": {"x": {}, "y": {}}}}},
            "3 steps are not 2 equal parts",
        ),
        ({"arms": {"a": {"kind": "distil"}}}, "delta.max_steps=None"),
        ({"arms": {"a": {"stages": ["calibrate"]}}}, "calibrate.max_steps=None"),
        (
            {"arms": {"a": {"stages": ["calibrate"], "calibrate": {"max_steps": 1, "learning_rate": 1}}}},
            r"a.calibrate: unknown keys \['learning_rate'\]",
        ),
        ({"arms": {"a": {"delta": {"max_steps": 3}}}}, "delta: settings of a stage that it does not run"),
        ({"data": {"length": 48, "recall_share": 1.5}}, "recall_share=1.5: expected 0 to 1"),
        ({"arms": {"a": {"keep": {"groups": 0, "by": "ablate"}}}}, "keep=.*expected groups"),
        ({"arms": {"a": {"restore": ["mlp"]}}}, r"restore=\['mlp'\]"),
        ({"arms": {"a": {"freeze": ["q_proj"], "stages": []}}}, "freeze with the stage distill"),
        (
            {"arms": {"a": {"distill": {"max_steps": 4}, "experts": {"x": {}, "y": {}}, "merge": {"method": "mean"}}}},
            "merge.method='mean'",
        ),
        ({"arms": {"a": {"expert_stages": ["on_policy"]}}}, "expected experts as well"),
        ({"seeds": [-1]}, "-1 is no number"),
        ({"evaluate": {"lengths": [64]}}, "exactly the keys"),
        (
            {"orderings": [{"claim": "c", "better": "hybrid", "worse": "x", "measures": ["short"], "source": "s"}]},
            "no arm or row 'x'",
        ),
        (
            {
                "orderings": [
                    {"claim": "c", "better": "hybrid", "worse": "hybrid", "measures": ["single@65"], "source": "s"}
                ]
            },
            "'single@65', expected",
        ),
        ({"colour": "red"}, r"unknown keys \['colour'\]"),
    ],
)
def test_a_file_that_says_something_else_is_refused_by_name(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        arena_of(tmp_path, **changes)


def test_the_shipped_arms_read_equal_tokens_unless_they_say_so():
    """Stage by stage the same rows: what an arm costs more is another arm's start, or a stage of its own."""
    arena = arms.load_arena()
    usual, more = arena.tokens(arena.arms["hybrid"]), arena.tokens(arena.arms["on-policy"])
    steps = {
        stage: getattr(arena, stage)["max_steps"] * getattr(arena, stage)["per_device_train_batch_size"]
        for stage in ("calibrate", "align", "distill", "on_policy")
    }
    assert (usual, more) == (
        (steps["align"] + steps["distill"]) * arena.data["length"],
        steps["on_policy"] * arena.data["length"],
    )
    # with the arm that it starts from
    whole = {name: sum(arena.tokens(arena.arms[n]) for n in runner.line_of(arena, name)) for name in arena.arms}
    begun = {arm.start for arm in arena.arms.values()} - {"hybrid"}  # half a way: other arms go on from them
    others = {name: tokens for name, tokens in whole.items() if tokens != usual and name not in begun}
    extended = {"on-policy", "on-policy-jsd", "off-policy", "experts-on-policy"}
    half = {"aligned": steps["align"], "calibrated-aligned": steps["align"], "calibrated-alone": steps["calibrate"]}
    half = {name: rows * arena.data["length"] for name, rows in half.items()}
    assert others == {"window-untrained": 0} | half | dict.fromkeys(extended, usual + more)
    assert 12 <= sum(arm.tier == 1 for arm in arena.arms.values()) <= 20 and list(arena.arms)[0] == "hybrid"


def test_all_shipped_settings_are_accepted_by_their_trainers():
    arena = arms.load_arena()
    runner.check_trainer_settings(arena, arena.arms)
    wrong = replace(arena.arms["hybrid"], distill={"kl_weights": 0.5}, align={"loss_form": "cubic"})
    with pytest.raises(ConfigError, match="(?s)loss_form='cubic'.*no setting 'kl_weights'"):
        runner.check_trainer_settings(replace(arena, arms={"hybrid": wrong}), ["hybrid"])


def test_every_arm_reads_the_same_rows_for_a_seed_and_other_ones_for_another(minute):
    arena = arena_of(
        minute, arms={"a": {}, "b": {"student": {"num_sink_tokens": 0}}, "c": {"data": {"recall_share": 0.9}}}
    )
    rows = lambda arm, seed, stage: Training(arena, arena.arms[arm], "llama", seed, minute / "w", None).rows_of(stage)  # noqa: E731
    assert rows("a", 0, "distill") == rows("b", 0, "distill") and len(rows("a", 0, "distill")) == 8
    assert rows("a", 0, "distill") != rows("a", 1, "distill") and rows("a", 0, "distill") != rows("a", 0, "align")
    assert rows("a", 0, "distill") != rows("c", 0, "distill")


def test_stage_0_is_a_stage_of_an_arm(minute, tmp_path):
    """The student is no worse than its window; a shut gate leaks three parts in ten thousand."""
    stage = {"calibrate": {"max_steps": 2, "per_device_train_batch_size": 4}}
    arena = arena_of(minute, **stage, arms={"a": {"stages": ["calibrate"]}})
    facts = Training(arena, arena.arms["a"], "llama", 0, tmp_path / "work", None, lambda line: None).run(tmp_path / "a")
    (layer,) = facts["figures"]["calibrate"]["relative_error"]
    assert facts["tokens"] == {"calibrate": 2 * 4 * 48} and layer["after"] <= 1.01 * layer["window"]
    mixer = load_float32(tmp_path / "a").model.layers[0].self_attn.mlstm
    assert mixer.igate_weight.abs().sum() == 0 and mixer.ogate_bias.isfinite().all()


# --- runner ------------------------------------------------------------------------------------------------------


def run(arena, out, only=None, seeds=(0,), **options):
    return runner.run_jobs(
        arena, runner.choose_jobs(arena, out, only, list(seeds)), workers=0, progress=lambda text: None, **options
    )


ARMS = {
    "hybrid": {"tier": 1, "about": "the reference", "evaluate": {"memory": {"mixer_branches": "memory"}}},
    "broken": {"student": {"layer_types": ["hybrid_sliding"] * 3}},
    "after-broken": {"start": "broken", "stages": []},
    "sparse-free": {"start": "hybrid", "stages": [], "student": {"sparse_memory": 4}},
    "experts": {
        "experts": {"x": {"recall_share": 0.9}, "y": {}},
        "merge": {"method": "linear", "weights": {"x": 0.75, "y": 0.25}},
    },
    "frozen": {"stages": ["distill"], "freeze": ["q_proj", "k_proj"]},
    "ties": {
        "experts": {"x": {"recall_share": 0.9}, "y": {}},
        "merge": {"method": "ties", "options": {"density": 0.5}},
        "stages": ["distill"],
    },
    "rollouts": {"start": "hybrid", "stages": ["on_policy"]},
    "lora": {"lora": {"targets": "projections", "r": 2}, "stages": ["distill"]},
    "restored": {"start": "lora", "stages": [], "restore": ["q_proj", "k_proj"]},
}


@pytest.fixture(scope="module")
def ran(minute):
    """`(arena, run directory, {arm: status})` of one seed of all kinds of arms."""
    arena = arena_of(minute, arms=ARMS)
    return arena, minute / "run", {job.arm: state for job, state in run(arena, minute / "run").items()}


def result_of(out, arm, seed=0):
    return json.loads((out / "results/llama" / arm / f"{seed}.json").read_text())


@pytest.mark.slow
def test_a_failure_is_written_down_and_the_others_go_on(ran):
    _, out, states = ran
    assert {arm for arm, state in states.items() if state == runner.FAILED} == {"broken", "after-broken"}
    assert all(state == runner.DONE for arm, state in states.items() if "broken" not in arm) and len(states) == 11
    assert "layer_types" in result_of(out, "broken")["error"] and "ConfigError" in result_of(out, "broken")["error"]
    assert "starts from llama/broken/0, which is failed" in result_of(out, "after-broken")["error"]


@pytest.mark.slow
def test_a_result_says_what_was_read_and_what_came_of_it(ran):
    _, out, _ = ran
    found = result_of(out, "hybrid")
    assert found["facts"]["tokens"] == {"align": 2 * 4 * 48, "distill": 2 * 4 * 48} and set(found["rows"]) == {
        "main",
        "memory",
    }
    assert found["facts"]["cpu_seconds"]["distill"] > 0 and math.isfinite(found["facts"]["figures"]["distill"]["ce"])
    cell = found["rows"]["main"]["recall"]["multikey"]["64"]
    assert cell["coverage"] == 18 / 64 and cell["n"] == 8 * 4 and len(cell["rows"]) == 8
    assert found["rows"]["memory"]["recall"]["single"]["64"]["coverage"] == 0  # that row has no window
    assert all(row["cached"]["passed"] for row in found["rows"].values())
    assert result_of(out, "experts")["facts"]["tokens"] == {"align": 384, "distill x": 192, "distill y": 192}
    assert list(result_of(out, "rollouts")["facts"]["tokens"]) == ["on_policy"]


@pytest.mark.slow
def test_merged_experts_are_the_weighted_mean_of_two_that_learned_different_things(ran, minute, monkeypatch):
    arena, out, _ = ran
    experts = {}

    def watched(folders, *args, **options):
        experts.update({folder.name: load_float32(folder).state_dict() for folder in folders})
        merge(folders, *args, **options)

    starts, distill = [], Training.distill
    monkeypatch.setattr(
        Training,
        "distill",
        lambda training, model, *a: (starts.append(copy.deepcopy(model.state_dict())), distill(training, model, *a))[1],
    )
    monkeypatch.setattr(students, "merge", watched)
    Training(arena, arena.arms["experts"], "llama", 0, minute / "w", None, lambda text: None).run(minute / "experts")
    merged, name = load_float32(minute / "experts").state_dict(), "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(starts[0][name], starts[1][name]) and not torch.equal(experts["x"][name], experts["y"][name])
    torch.testing.assert_close(merged[name], 0.75 * experts["x"][name] + 0.25 * experts["y"][name])
    # a run can be had again
    torch.testing.assert_close(merged[name], load_float32(out / "students/llama/experts/0").state_dict()[name])


@pytest.mark.slow
def test_restored_modules_are_the_teachers_again_and_the_others_what_training_left(ran, minute):
    _, out, _ = ran
    trained, restored = (load_float32(out / "students/llama" / arm / "0").state_dict() for arm in ("lora", "restored"))
    teacher = load_float32(minute / "teacher").state_dict()
    same = {name for name, x in teacher.items() if torch.equal(x, restored[name]) and not torch.equal(x, trained[name])}
    assert same == {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk"}
    assert all(torch.equal(x, trained[name]) for name, x in restored.items() if name not in same)


@pytest.mark.slow
def test_frozen_modules_are_the_teachers_after_training(ran, minute):
    _, out, _ = ran
    teacher, frozen = (
        load_float32(minute / "teacher").state_dict(),
        load_float32(out / "students/llama/frozen/0").state_dict(),
    )
    same = {name.split(".")[-2] for name, x in teacher.items() if "proj" in name and torch.equal(x, frozen[name])}
    assert same == {"q_proj", "k_proj"}


@pytest.mark.slow
def test_a_finished_job_is_kept_and_a_changed_one_waits_for_redo(ran, minute):
    arena, out, _ = ran
    path, student = out / "results/llama/lora/0.json", out / "students/llama/lora/0/model.safetensors"
    before = path.stat().st_mtime_ns, student.stat().st_mtime_ns
    assert run(arena, out, ["lora"])[runner.ArenaJob("llama", "lora", 0, out)] == runner.DONE
    assert (path.stat().st_mtime_ns, student.stat().st_mtime_ns) == before
    evaluate = {**arena.evaluate, "short_rows": 4}
    assert (
        run(replace(arena, evaluate=evaluate), out, ["lora"])[runner.ArenaJob("llama", "lora", 0, out)] == runner.STALE
    )
    assert path.stat().st_mtime_ns == before[0]
    states = run(replace(arena, evaluate=evaluate), out, ["lora"], redo=True)
    assert (
        set(states.values()) == {runner.DONE} and len(result_of(out, "lora")["rows"]["main"]["short_rows"]["copy"]) == 4
    )
    assert student.stat().st_mtime_ns == before[1]  # evaluated anew, not trained
    learned = replace(arena.arms["lora"], distill={"learning_rate": 2e-3})
    other = replace(arena, evaluate=evaluate, arms={**arena.arms, "lora": learned})
    assert run(other, out, ["lora"], redo=True)[runner.ArenaJob("llama", "lora", 0, out)] == runner.DONE
    assert student.stat().st_mtime_ns != before[1]


@pytest.mark.slow
def test_a_result_whose_bytes_miss_a_part_of_the_cache_is_not_taken(ran, tmp_path):
    arena, out, _ = ran
    job = runner.ArenaJob("llama", "sparse-free", 0, tmp_path)
    for folder in ("results", "students"):
        shutil.copytree(out / folder / "llama/sparse-free", tmp_path / folder / "llama/sparse-free")
    found = runner.status_of(arena, job)[1]
    assert runner.status_of(arena, job)[0] == runner.DONE
    found["rows"]["main"]["cache_bytes"]["64"] -= 8
    job.result.write_text(json.dumps(found))
    assert runner.status_of(arena, job)[0] == runner.STALE


@pytest.mark.slow
def test_a_damaged_result_is_named(ran, tmp_path):
    arena, out, _ = ran
    job = runner.ArenaJob("llama", "hybrid", 0, tmp_path)
    shutil.copytree(out / "results", tmp_path / "results")
    job.result.write_text("{")
    with pytest.raises(EvaluationError, match="llama/hybrid/0.json cannot be read"):
        runner.status_of(arena, job)


def test_no_job_is_begun_when_the_time_is_up(minute, tmp_path):
    arena = arena_of(minute)
    assert set(run(arena, tmp_path, minutes=-1).values()) == {runner.MISSING} and not (tmp_path / "results").exists()


def test_an_unknown_arm_or_teacher_is_refused(minute):
    with pytest.raises(ConfigError, match="no arm nobody"):
        runner.choose_jobs(arena_of(minute), minute, ["nobody"])
    with pytest.raises(ConfigError, match="no teacher nobody"):
        runner.choose_jobs(arena_of(minute), minute, teachers=["nobody"])


def test_an_arm_of_one_teacher_is_a_job_of_that_teacher_alone(minute, tmp_path):
    arena = arena_of(
        minute, teachers={"llama": "teacher", "qwen3": "teacher"}, arms={"all": {}, "one": {"teachers": ["qwen3"]}}
    )
    jobs = runner.choose_jobs(arena, tmp_path, seeds=[0], teachers=["llama", "qwen3"])
    assert [(j.teacher, j.arm) for j in jobs] == [
        ("llama", "teacher"),
        ("llama", "all"),
        *(("qwen3", name) for name in ("teacher", "all", "one")),
    ]
    with pytest.raises(ConfigError, match="one made for other teachers than llama"):
        runner.choose_jobs(arena, tmp_path, only=["one"])


@pytest.mark.slow
def test_an_arm_brings_those_that_it_starts_from(ran):
    arena, out, _ = ran
    assert [job.arm for job in runner.choose_jobs(arena, out, ["rollouts"], [0])] == ["teacher", "hybrid", "rollouts"]
    assert [job.arm for job in runner.choose_jobs(arena, out, None, [0], tier=1)] == ["teacher", "hybrid"]


@pytest.mark.slow
def test_a_job_waits_while_the_arm_that_it_starts_from_runs(ran):
    arena, out, _ = ran
    first, then = (runner.ArenaJob("llama", arm, 7, out) for arm in ("hybrid", "rollouts"))
    crew = runner.Crew(arena, {}, [then], 2, None, lambda text: None)
    crew.running[first] = None
    assert crew.next() is None and crew.todo == [then]


@pytest.mark.slow
def test_worker_processes_leave_the_same_results_and_a_killed_one_is_written_down(minute, tmp_path, monkeypatch):
    arena = arena_of(minute, arms={"hybrid": {}, "worse": {"student": {"num_sink_tokens": 0}}})
    jobs = runner.choose_jobs(arena, tmp_path, ["hybrid"], [0])
    assert set(runner.run_jobs(arena, jobs, workers=2, progress=lambda text: None).values()) == {runner.DONE}
    run(arena, tmp_path / "here", ["hybrid"])
    there, here = (result_of(folder, "hybrid")["rows"]["main"] for folder in (tmp_path, tmp_path / "here"))
    assert there["short_rows"] == here["short_rows"] and there["recall"] == here["recall"]
    monkeypatch.setattr(runner, "in_process", kill)
    states = runner.run_jobs(
        arena, runner.choose_jobs(arena, tmp_path, ["worse"], [0]), workers=2, progress=lambda text: None
    )
    assert states[runner.ArenaJob("llama", "worse", 0, tmp_path)] == runner.FAILED
    assert "exit code -9" in result_of(tmp_path, "worse")["error"]


def kill(arena, job):
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


# --- students ----------------------------------------------------------------------------------------------------


def test_a_question_ends_before_the_answer_to_its_last_ask():
    ids = [data.BOS, 300, data.FACT, 40, 170, data.ASK, 40, 170, data.MAX, 230, 231, 232, data.EQUALS, 232]
    labels = [-100] * 7 + [170] + [-100] * 5 + [232]
    twice, scored = ids[:8] + [data.ASK, 40, 170], labels[:8] + [-100, -100, 170]
    assert len(row_question(twice, scored, 4)["prompt"].split()) == 10  # the last of the two
    read = lambda row: {name: tokenizer()(text)["input_ids"] for name, text in row.items()}  # noqa: E731
    assert read(row_question(ids, labels, 4)) == {"prompt": ids[:7], "completion": [170]}
    assert read(row_question(ids[8:], labels[8:], 4)) == {"prompt": ids[8:13], "completion": [232]}


def test_the_same_weights_under_another_config_say_what_that_config_says():
    student = tiny_student(torch.float32, vocab_size=data.VOCAB, gain=1.0)
    ids = data.tests("single", 64, 2)["input_ids"]
    other = changed(student, {"mixer_branches": "window"})
    assert not torch.allclose(other(ids).logits, student(ids).logits)
    student.config.mixer_branches = "window"
    torch.testing.assert_close(other(ids).logits, student(ids).logits)
    student.config.mixer_branches = "both"
    kept = changed(student, {"kept_groups": [[0], [], []]})
    assert kept.config.kept_groups == [[0], [], []] and kept(ids).logits.isfinite().all()
    with pytest.raises(ConfigError, match="changes the parameters"):
        changed(student, {"memory_feature_dim": 32})


# --- scores ------------------------------------------------------------------------------------------------------


class Oracle(torch.nn.Module):
    """Answers what it was told within the last `reach` tokens, and nothing else."""

    def __init__(self, reach):
        super().__init__()
        self.reach, self.device, self.generation_config = reach, torch.device("cpu"), None
        self.config = SimpleNamespace(model_type="llama")

    def forward(self, input_ids, **kwargs):
        logits = torch.zeros(*input_ids.shape, data.VOCAB)
        for row, ids in enumerate(input_ids.tolist()):
            for t in range(2, len(ids)):
                for s in range(max(2, t - self.reach + 1), t):
                    if ids[t - 1] == data.ASK and ids[s - 2] == data.FACT and ids[s - 1] == ids[t]:
                        logits[row, t, ids[s]] = 9.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("kind", data.LONG)
def test_recall_of_a_model_that_sees_a_window_is_the_share_of_facts_in_it(kind):
    test = data.tests(kind, 128, 6, seed=3)
    hits = scoring.hits_of(Oracle(32), test, 256)
    assert torch.equal(hits, test["depth"] < 32)
    cell = scoring.recall_cell(hits, test["depth"], 128, (32, 0), 32)
    assert cell["accuracy"] == (test["depth"] < 32).double().mean() and cell["coverage"] == 0.25 and cell["beyond"] == 0
    assert cell["excess"] == pytest.approx((cell["accuracy"] - 0.25) / 0.75)
    assert [p["accuracy"] for p in cell["by_distance"] if p["to"] <= 32] == [1.0] * ((test["depth"] < 32).any().item())
    assert sum(p["answers"] for p in cell["by_distance"]) == cell["n"] and all(
        p["accuracy"] == 0 for p in cell["by_distance"] if p["from"] >= 32
    )


def test_the_first_distance_beyond_a_window_is_its_width():
    """A token sees W tokens, itself included: a fact W tokens back has just left."""
    hits, depth = torch.tensor([[True, False, True]]), torch.tensor([[31, 32, 64]])
    cell = scoring.recall_cell(hits, depth, 128, (32, 4), 32)
    assert (cell["beyond"], cell["beyond_n"]) == (0.5, 2)
    assert [(p["from"], p["to"], p["accuracy"]) for p in cell["by_distance"]] == [
        (0, 32, 1.0),
        (32, 64, 0.0),
        (64, 128, 1.0),
    ]


def test_a_model_that_remembers_everything_has_an_excess_of_one():
    test = data.tests("multiquery", 128, 4)
    cell = scoring.recall_cell(scoring.hits_of(Oracle(10**6), test, 10**6), test["depth"], 128, (32, 4), 32)
    assert (cell["accuracy"], cell["excess"], cell["beyond"], cell["beyond_n"]) == (
        1.0,
        1.0,
        1.0,
        int((test["depth"] >= 32).sum()),
    )


def test_the_window_of_a_row_is_its_own():
    student = tiny_student(torch.float32, vocab_size=data.VOCAB)
    assert scoring.seen_by(student, 32, 4) == (7, 3)
    student.config.mixer_branches = "memory"
    assert scoring.seen_by(student, 32, 4) == (0, 0)
    assert scoring.seen_by(Oracle(1), 32, 4) == (32, 4)


def test_bytes_are_those_of_the_cache_and_only_full_attention_grows(minute):
    teacher = load_float32(minute / "teacher")
    # one layer, one group, keys and values of 8 floats
    assert scoring.bytes_at(teacher, [64, 128]) == {"64": 64 * 2 * 8 * 4, "128": 128 * 2 * 8 * 4}
    found = scoring.bytes_at(tiny_student(torch.float32, vocab_size=data.VOCAB), [64, 128])
    state, window = 4 * (16 * 16 + 16 + 1) * 4, 2 * 2 * (7 + 3) * 16 * 4
    assert found["64"] == found["128"] == 3 * (state + window + 8)  # eight bytes: the count of tokens


def test_a_cache_that_tells_something_else_is_found(monkeypatch):
    student = tiny_student(torch.float32, vocab_size=data.VOCAB)
    good = scoring.cached_check(student, 64, 512)
    assert good["passed"] and good["same"] == 1 and good["answers"] == 8
    right = scoring.prefill
    monkeypatch.setattr(scoring, "prefill", lambda model, ids, **k: right(model, ids.roll(1, 1), **k))
    assert not scoring.cached_check(student, 64, 512)["passed"]


# --- summary and report ------------------------------------------------------------------------------------------


def test_intervals_are_student_t_over_seeds_and_bootstrap_over_rows_of_one():
    three = summary.stat([0.1, 0.2, 0.6])
    assert three["mean"] == pytest.approx(0.3) and three["over"] == "seeds"
    assert three["high"] - 0.3 == pytest.approx(4.303 * math.sqrt(0.07) / math.sqrt(3))  # variance of the sample: .07
    one = summary.stat([0.5], [0.0, 1.0] * 50)
    assert (
        one["over"] == "rows"
        and one["low"] == pytest.approx(0.40, abs=0.021)
        and one["high"] == pytest.approx(0.60, abs=0.021)
    )
    assert summary.stat([]) is None and summary.stat([0.5])["low"] is None


def scores_as(recall, short=0.5, size=1000, window=4):
    """A row of results with recall {kind: accuracy} at 64 and 128."""

    def cell(length, accuracy):
        depth = torch.tensor([[1], [length - 1]])
        made = scoring.recall_cell(torch.tensor([[True], [False]]), depth, length, (window, 0), window)
        c = made["coverage"]
        return {**made, "accuracy": accuracy, "excess": (accuracy - c) / (1 - c)}

    tests = {kind: {str(n): cell(n, recall.get(kind, 0.0)) for n in (64, 128)} for kind in data.LONG}
    return {
        "recall": tests,
        "short": dict.fromkeys(data.SHORT, short),
        "short_rows": {t: [0.0, 1.0] for t in data.SHORT},
        "perplexity": 10.0,
        "cache_bytes": {"64": size, "128": size},
        "cached": {"answers": 8, "same": 1.0, "error": 1e-7, "passed": True},
    }


FIGURES = {  # arm: (single of three seeds, bytes)
    "teacher": ((1.0, 1.0, 1.0), 40_000),
    "hybrid": ((0.2, 0.3, 0.4), 1000),
    "better": ((0.97, 0.98, 0.96), 1500),
    "same": ((0.1, 0.9, 0.2), 3000),
    "worse": ((0.1, 0.2, 0.3), 1000),
    "fat": ((1.0, 1.0, 1.0), 2500),
}


@pytest.fixture
def constructed(minute, tmp_path):
    """An arena whose results are written by hand: W = 4, so that 64 is 16 W and 128 is 32 W."""
    orderings = [
        {"claim": f"{a} over {b}", "better": a, "worse": b, "measures": ["single@64"], "source": "a paper"}
        for a, b in (("better", "hybrid"), ("worse", "hybrid"), ("same", "hybrid"), ("hybrid", "later"))
    ]
    names = ("hybrid", "better", "same", "worse", "fat", "later")
    arena = arena_of(
        minute,
        seeds=[0, 1, 2],
        student={"sliding_window": 4, "num_sink_tokens": 0},
        arms={n: {"about": n} for n in names},
        orderings=orderings,
        evaluate={**SETTING["evaluate"], "lengths": [64, 128]},
    )
    for arm, (singles, size) in FIGURES.items():
        for seed, single in enumerate(singles):
            job = runner.ArenaJob("llama", arm, seed, tmp_path)
            job.result.parent.mkdir(parents=True, exist_ok=True)
            facts = (
                {}
                if arm == "teacher"
                else {
                    "tokens": {"align": 10**6, "distill": 10**6},
                    "cpu_seconds": {"align": 60.0},
                    "seconds": {"align": 9.0},
                }
            )
            short = 0.8 if arm == "teacher" else 0.9 if arm in ("better", "fat") else 0.6
            rows = {"main": scores_as({"single": single, "multikey": single / 2}, short, size)}
            job.result.write_text(
                json.dumps(
                    {
                        "format_version": 1,
                        "status": "done",
                        "arm": arm,
                        "seed": seed,
                        "teacher": "llama",
                        "rows": rows,
                        "facts": facts,
                        "fingerprints": runner.fingerprints(arena, job),
                    }
                )
            )
    return arena, tmp_path


def test_orderings_are_decided_by_paired_differences(constructed):
    found = summary.summarise(*constructed)
    assert [(e["better"], e["verdict"]) for e in found["orderings"]] == [
        ("better", summary.HOLDS),
        ("worse", summary.FAILS),
        ("same", summary.OPEN),
        ("hybrid", summary.NOT_RUN),
    ]
    # minus a tenth on every seed: the pairs know, the means alone would not
    worse = found["orderings"][1]["difference"]
    assert worse["mean"] == pytest.approx(-0.1) and worse["high"] == pytest.approx(-0.1)


def test_goals_levers_and_verdicts_follow_from_the_results(constructed):
    found = summary.summarise(*constructed)
    rows = {row["name"]: row for row in found["teachers"]["llama"]["rows"]}
    assert (rows["better"]["c_0"], rows["better"]["alpha_star"]) == (1.0, 0.0)
    assert rows["hybrid"]["c_0"] == 0 and rows["hybrid"]["alpha_star"] == pytest.approx(0.25)
    assert [g["name"] for g in found["goals"] if g["goal"] == "constant" and g["met"]] == ["better"]
    lever = {e["name"]: e for e in found["levers"]}
    assert (
        lever["better"]["single"]["mean"] == pytest.approx((0.97 - 0.3) / (1 - 4 / 64))
        and lever["better"]["worth_a_gpu"]
    )
    assert not lever["worse"]["worth_a_gpu"] and found["teachers"]["llama"]["missing"] == ["later"]


def test_a_cache_that_grows_is_no_constant_memory(constructed):
    arena, out = constructed
    for seed in range(3):
        file = runner.ArenaJob("llama", "better", seed, out).result
        found = json.loads(file.read_text())
        found["rows"]["main"]["cache_bytes"] = {"64": 1400, "128": 1500, "256": 1600}
        file.write_text(json.dumps(found))
    longer = replace(arena, evaluate={**arena.evaluate, "lengths": [64, 128, 256]})
    assert "better" in {
        g["name"] for g in summary.goals(arena, "llama", summary.summarise(arena, out)["teachers"]["llama"]["rows"])
    }
    rows = summary.summarise(arena, out)["teachers"]["llama"]["rows"]
    assert "better" not in {g["name"] for g in summary.goals(longer, "llama", rows)}


def test_the_front_holds_what_nothing_beats():
    points = [("a", 10, 0.5), ("b", 20, 0.4), ("c", 20, 0.9), ("d", 10, 0.5), ("e", 5, 0.1)]
    assert summary.pareto(points) == ["a", "c", "d", "e"]


def test_the_report_prints_the_figures_and_names_what_is_missing(constructed, tmp_path):
    arena, out = constructed
    files = report.write_arena_report(summary.summarise(arena, out), tmp_path / "docs")
    page = (tmp_path / "docs/arena.md").read_text()
    assert "| better | 3 | 1.00 | .000 |" in page and "runnable, not run: later" in page and "$" not in page
    assert f".97 ± {4.303 * 0.01 / math.sqrt(3):.2f}".replace("0.", ".") in page and "Met by better." in page
    gains = {
        line.split(" | ")[0]: line.split(" | ")[-1]
        for line in page[page.index("## Levers") : page.index("## Goals")].splitlines()
        if " | " in line
    }
    assert (gains["| better"], gains["| worse"]) == ("yes |", "no |")
    assert "| worse over hybrid | a paper | llama | single@64 | worse | hybrid | -.100 ± .000 | does not hold |" in page
    numbers = json.loads((tmp_path / "docs/arena/results.json").read_text())
    assert numbers["teachers"]["llama"]["rows"][1]["name"] == "hybrid"
    assert {"arena/single.png", "arena/front_32w.png"} <= set(files) and (
        tmp_path / "docs/arena/single.png"
    ).read_bytes()[:4] == b"\x89PNG"
    again = report.write_arena_report(json.loads(json.dumps(summary.summarise(arena, out))), tmp_path / "again")
    assert files == again and page == (tmp_path / "again/arena.md").read_text()


def test_another_teacher_gets_its_tables_and_goals(constructed, tmp_path):
    arena, out = constructed
    arena = replace(arena, teachers={**arena.teachers, "other": "teacher"})
    for name in ("teacher", "hybrid", "better"):
        shutil.copytree(out / "results/llama" / name, out / "results/other" / name)
    found = summary.summarise(arena, out)
    assert found["teachers"]["other"]["shape"] == {
        "parameters": 18_352,
        "layers": 1,
        "heads": 2,
        "groups": 1,
        "head_dim": 8,
    }
    report.write_arena_report(found, tmp_path / "docs")
    page = (tmp_path / "docs/arena.md").read_text()
    others = page[page.index("### other") : page.index("## Not in the tables")]
    assert (
        "0.02 M parameters: 1 layers of 2 heads of 8 dims in 1 key/value groups." in others and "| fat |" not in others
    )
    assert (
        "arena/other_single.png" in others and (tmp_path / "docs/arena/other_front.png").read_bytes()[:4] == b"\x89PNG"
    )
    assert (
        "| better | .97 | 1.500 | 1.00 | yes |" in others
        and "One key/value group of one layer is already 100.0%" in others
    )
    assert "| better over hybrid | a paper | other | single@64 | better | hybrid | .670 ± .262 | holds |" in page
    assert (
        "- other: runnable, not run: fat, later, same, worse" in page
        and "| worse over hybrid | a paper | other |" not in page
    )


def test_teachers_of_a_run_directory_are_found_whichever_is_asked_for(minute, tmp_path, monkeypatch):
    """A report reads results of every teacher; one that was trained in an earlier run is in OUT, not where the file
    says.
    """
    trained = []
    monkeypatch.setattr(teacher, "train_teacher", lambda name, directory: trained.append((name, directory)))
    arena = arena_of(minute, teachers={"llama": "teacher", "qwen3": "nowhere", "own": "elsewhere"})
    shutil.copytree(minute / "teacher", tmp_path / "teachers/qwen3")
    teacher.provide(arena, ["llama"], tmp_path)
    assert (
        arena.teacher_dir("llama") == minute / "teacher"
        and arena.teacher_dir("qwen3") == tmp_path / "teachers/qwen3"
        and not trained
    )
    with pytest.raises(ConfigError, match="no teacher at .*own.*none of the families"):
        teacher.provide(arena, ["own"], tmp_path)
    teacher.provide(arena_of(minute, teachers={"llama": "teacher", "olmo2": "nowhere"}), ["olmo2"], tmp_path)
    assert trained == [("olmo2", tmp_path / "teachers/olmo2")]


def test_a_result_of_other_settings_is_left_out_and_said(constructed):
    arena, out = constructed
    found = summary.summarise(replace(arena, distill={**arena.distill, "learning_rate": 5e-4}), out)
    assert [row["name"] for row in found["teachers"]["llama"]["rows"]] == ["teacher"]
    assert found["teachers"]["llama"]["stale"] == ["better", "fat", "hybrid", "same", "worse"]


@pytest.mark.slow
def test_every_shipped_arm_runs_on_a_minute_teacher(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=data.VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    shrink = lambda given: {**given, **{k: 2 for k in ("max_steps", "per_device_train_batch_size") if k in given}}  # noqa: E731
    arena, made = arms.load_arena(), {}
    for name, arm in arena.arms.items():
        shorter = {"length": 96} if "length" in arm.data else {}
        small = {"num_hidden_layers": 2, "slstm_intermediate_size": 48} if arm.kind == "distil" else arm.student
        made[name] = replace(
            arm, student=small, data={**arm.data, **shorter}, **{s: shrink(getattr(arm, s)) for s in arms.TRAINED}
        )
    arena = replace(
        arena,
        teachers={"llama": str(tmp_path / "teacher")},
        arms=made,
        data={"length": 64, "recall_share": 0.5},
        orderings=[],
        evaluate={**SETTING["evaluate"], "lengths": [64]},
        **{s: shrink(getattr(arena, s)) for s in arms.TRAINED},
    )
    states = run(arena, tmp_path / "run")
    assert {
        str(job): result_of(tmp_path / "run", job.arm)["error"] for job, state in states.items() if state != runner.DONE
    } == {}
    for job in states:
        for row in result_of(tmp_path / "run", job.arm)["rows"].values():
            assert row["cached"].get("passed", "refused" in row["cached"]), job
