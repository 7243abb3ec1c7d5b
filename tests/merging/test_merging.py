"""A merge is the weighted mean of its experts, the same bits in any order, and nothing at all where the experts do not
belong together.
"""

import json
import os
import re
import subprocess
import weakref
from pathlib import Path

import pytest
import torch
from conftest import assert_same_model, tiny_student, token_ids
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

import xlstm_hybrid.merging.merge
from xlstm_hybrid.checkpoint.files import (
    add_provenance,
    digest,
    read_provenance,
    verify_files,
    weight_files,
    write_manifest,
)
from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError, MergeError
from xlstm_hybrid.merging.merge import GROUPS, group_of, merge, mergekit_architecture, stream_weights
from xlstm_hybrid.merging.methods import MERGES, measure_statistics, task_arithmetic


def tensors(seed, dtype=torch.float32):
    """Weights of one expert: values whose float32 sums depend on the order."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 10 ** torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in (
            ("embed.weight", (11, 6)),
            ("layer.0.weight", (6, 6)),
            ("layer.1.weight", (6, 6)),
            ("norm.bias", (6,)),
        )
    }


def checkpoint(folder, weights, config=None, stages=("convert", "align"), last="distill:math"):
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {"model_type": "xlstm_hybrid", "vocab_size": 11, "layer_types": ["hybrid_sliding"]} | (config or {})
    (folder / "config.json").write_text(json.dumps(fields))
    if stages:
        add_provenance(folder, last, stages=[{"stage": s, "figures": {"made": 1}} for s in stages])
    return folder


@pytest.fixture
def experts(tmp_path):
    return [
        checkpoint(tmp_path / "experts" / name, tensors(j), last=f"distill:{name}")
        for j, name in enumerate(("math", "code", "chat"))
    ]


def stored(folder):
    return {name: load_file(file)[name] for name, file in weight_files(folder).items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# --- values ----------------------------------------------------------------------------------------------------


def test_linear_is_the_weighted_mean(experts, tmp_path):
    merge(experts, tmp_path / "out", weights=[0.5, 0.3, 0.2])
    for name, value in stored(tmp_path / "out").items():
        expected = sum(w * tensors(j)[name].double() for j, w in enumerate((0.5, 0.3, 0.2)))
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-5)


def test_weights_are_uniform_unless_given(experts, tmp_path):
    merge(experts, tmp_path / "out")
    merge(experts, tmp_path / "thirds", weights=[1 / 3] * 3)
    assert same_bits(stored(tmp_path / "out"), stored(tmp_path / "thirds"))


def test_one_expert_is_returned_as_it_is(experts, tmp_path):
    merge(experts[:1], tmp_path / "alone")
    merge(experts, tmp_path / "all", weights=[1, 0, 0])
    assert same_bits(stored(tmp_path / "alone"), tensors(0)) and same_bits(stored(tmp_path / "all"), tensors(0))


def test_task_arithmetic_adds_what_each_expert_learned(experts, tmp_path):
    base = checkpoint(tmp_path / "base", tensors(9), stages=["convert"], last="align")
    (base / "provenance.json").write_text(json.dumps({"format_version": 1, "stages": read_provenance(experts[0])[:-1]}))
    merge(experts, tmp_path / "out", weights=[0.5, 0.25, 0.25], method="task_arithmetic", base=base)
    for name, value in stored(tmp_path / "out").items():
        start = tensors(9)[name].double()
        expected = start + sum(w * (tensors(j)[name].double() - start) for j, w in enumerate((0.5, 0.25, 0.25)))
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-4)
    assert read_provenance(tmp_path / "out")[-1]["config"]["base"] == "base"


# --- order, shards, files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.35, 0.4, 0.25), (1 / 3, 1 / 3, 1 / 3)])
def test_the_order_of_the_experts_does_not_change_a_bit(weights, experts, tmp_path):
    results = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)):
        merge([experts[j] for j in order], tmp_path / "out", weights=[weights[j] for j in order], overwrite=True)
        results.append((tmp_path / "out" / "model.safetensors").read_bytes())
    assert len(set(results)) == 1
    a, b, c = (tensors(j)["embed.weight"] / 3 for j in range(3))
    assert not torch.equal(a + b + c, c + b + a)  # values of this kind do depend on the order


def test_shards_hold_the_same_tensors_as_one_file(experts, tmp_path):
    merge(experts, tmp_path / "one")
    merge(experts, tmp_path / "many", shard_bytes=200)
    merge([tmp_path / "many"], tmp_path / "again")  # and are read again
    assert len(set(weight_files(tmp_path / "many").values())) == 3  # 264, 144, 144 + 24 bytes
    assert same_bits(stored(tmp_path / "one"), stored(tmp_path / "many")) and same_bits(
        stored(tmp_path / "one"), stored(tmp_path / "again")
    )
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (66 + 36 + 36 + 6)


def test_one_tensor_of_each_expert_is_in_memory_at_a_time(experts, tmp_path, monkeypatch):
    alive, peak, load = [], [], xlstm_hybrid.merging.merge.Checkpoint.tensor

    def watched(self, name):
        value = load(self, name)
        alive.append(weakref.ref(value.untyped_storage()))
        peak.append(sum(r() is not None for r in alive))
        return value

    monkeypatch.setattr(xlstm_hybrid.merging.merge.Checkpoint, "tensor", watched)
    merge(experts, tmp_path / "out", shard_bytes=1)
    assert len(peak) == 12 and max(peak) <= 3


def test_the_result_is_listed_and_knows_where_it_comes_from(experts, tmp_path):
    merge(experts, tmp_path / "out", weights=[0.5, 0.3, 0.2])
    verify_files(tmp_path / "out")
    stages = read_provenance(tmp_path / "out")
    assert [s["stage"] for s in stages] == ["convert", "align", "distill:math", "distill:code", "distill:chat", "merge"]
    assert stages[-1]["config"] == {
        "method": "linear",
        "experts": [{"name": "math", "weight": 0.5}, {"name": "code", "weight": 0.3}, {"name": "chat", "weight": 0.2}],
    }
    assert str(tmp_path) not in (tmp_path / "out" / "provenance.json").read_text()


def test_tokenizer_and_settings_of_the_first_come_along_and_pickles_do_not(experts, tmp_path):
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "training_args.bin",
        "optimizer.pt",
        "modeling.py",
        "notes.txt",
    ):
        (experts[0] / name).write_text("{}")
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(experts[0] / "tokenizer.json"))
    settings = {"eos_token": "e", "name_or_path": "/home/x", "auto_map": {}, "vocab_file": "/etc/y"}
    (experts[0] / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((experts[0] / "config.json").read_text()) | {
        "auto_map": {"AutoConfig": "modeling.Evil"},
        "_name_or_path": "/home/x",
    }
    (experts[0] / "config.json").write_text(json.dumps(config))
    (experts[1] / "vocab.json").write_text("{}")
    merge(experts, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "provenance.json",
        "manifest.json",
    }
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"eos_token": "e"}
    assert not {"auto_map", "_name_or_path"} & set(json.loads((tmp_path / "out" / "config.json").read_text()))


def test_merged_students_load_and_a_student_merged_with_itself_is_itself(tmp_path):
    for seed, name in enumerate("ab"):
        student = tiny_student(torch.bfloat16)
        with torch.no_grad():
            student.model.embed_tokens.weight += seed
        student.save_pretrained(tmp_path / name)
    merge([tmp_path / "a", tmp_path / "a"], tmp_path / "same", unrecorded=True)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "mixed", shard_bytes=20_000, unrecorded=True)
    a, same, mixed = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("a", "same", "mixed"))
    ids = token_ids(2, 20)
    assert_same_model(same, a, ids)
    shift = mixed.model.embed_tokens.weight.float() - a.model.embed_tokens.weight.float()
    torch.testing.assert_close(shift, torch.full_like(shift, 0.5), atol=0.02, rtol=0)  # half an ulp of bfloat16 below 4
    # gates stay float32
    assert {p.dtype for p in mixed.parameters()} == {p.dtype for p in a.parameters()} == {torch.bfloat16, torch.float32}


def test_settings_that_a_trainer_writes_and_no_model_computes_with_stop_no_merge(tmp_path):
    base = checkpoint(tmp_path / "base", tensors(5), stages=["convert"], last="align")
    trained = {
        "pad_token_id": 3,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "attention_dropout": 0.1,
        "mlstm_chunk_size": 16,
    }
    stages, folders = ["convert", "align"], []
    for j, name in enumerate(("math", "code")):
        config = trained if name == "math" else trained | {"pad_token_id": 0}
        folders.append(checkpoint(tmp_path / name, tensors(j), config, stages, f"distill:{name}"))
        for file in (folders[-1], base):
            record = json.loads((file / "provenance.json").read_text())
            record["stages"] = [{"stage": s["stage"]} for s in record["stages"]]
            (file / "provenance.json").write_text(json.dumps(record))
    merge(folders, tmp_path / "out", method="task_arithmetic", base=base)
    assert json.loads((tmp_path / "out/config.json").read_text())["pad_token_id"] == 3  # that of the first
    other = checkpoint(tmp_path / "other", tensors(7), trained | {"eos_token_id": 5}, stages, "distill:other")
    with pytest.raises(MergeError, match="config eos_token_id: 2 in math, 5 in other"):
        merge([folders[0], other], tmp_path / "again")


def test_a_config_field_that_an_older_version_did_not_write_has_its_default(experts, tmp_path):
    fields = json.loads((experts[0] / "config.json").read_text())
    # the last one is of the training alone
    known = fields | {"memory_cell": "mlstm", "memory_rope": True, "window_dropout": 0.3}
    (experts[1] / "config.json").write_text(json.dumps(known))
    merge(experts, tmp_path / "out")
    (experts[1] / "config.json").write_text(json.dumps(known | {"memory_cell": "linear"}))
    with pytest.raises(MergeError, match="config memory_cell: 'mlstm' in math, 'linear' in code"):
        merge(experts, tmp_path / "other")


# --- module groups, options, statistics ------------------------------------------------------------------------


def test_every_tensor_of_a_student_has_its_module_group():
    student = tiny_student(
        torch.float32, qk_norm="head", layer_types=["hybrid_sliding", "full_attention", "hybrid_sliding"]
    )
    found = {group: set() for group in GROUPS}
    for name in student.state_dict():
        found[group_of(name)].add(re.sub(r"^model\.(layers\.\d+\.)?|self_attn\.|mlp\.|\.weight$|\.bias$", "", name))
    assert found == {
        "feature_maps": {"mlstm.q_map", "mlstm.k_map"},
        "gates": {
            f"mlstm.{name}" for name in ("igate_weight", "fgate_weight", "fgate_bias", "ogate_weight", "ogate_bias")
        },
        "attention": {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
        "mlp": {"gate_proj", "up_proj", "down_proj"},
        "embeddings": {"embed_tokens", "lm_head"},
        "norms": {"input_layernorm", "post_attention_layernorm", "norm"},
        "other": set(),
    }


def named(seed):
    """Weights with the names of a student's."""
    names = (
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.mlstm.q_map",
        "model.layers.0.self_attn.mlstm.igate_weight",
    )
    return dict(zip(names, tensors(seed).values(), strict=True))


def test_module_groups_may_have_weights_of_their_own(tmp_path):
    folders = [checkpoint(tmp_path / n, named(j), last=f"distill:{n}") for j, n in enumerate("ab")]
    merge(folders, tmp_path / "out", weights=[0.5, 0.5], group_weights={"gates": [1, 0], "embeddings": [0.25, 0.75]})
    shares = (0.25, 0.5, 0.5, 1.0)
    for (name, value), share in zip(named(0).items(), shares, strict=True):
        torch.testing.assert_close(stored(tmp_path / "out")[name], share * value + (1 - share) * named(1)[name])
    config = read_provenance(tmp_path / "out")[-1]["config"]
    assert config["group_weights"] == {"gates": [1.0, 0.0], "embeddings": [0.25, 0.75]}
    merge(
        folders[::-1],
        tmp_path / "turned",
        weights=[0.5, 0.5],
        group_weights={"gates": [0, 1], "embeddings": [0.75, 0.25]},
    )
    assert same_bits(stored(tmp_path / "turned"), stored(tmp_path / "out"))


def with_base(experts, folder):
    base = checkpoint(folder / "base", tensors(9), stages=["convert"], last="align")
    (base / "provenance.json").write_text(json.dumps({"format_version": 1, "stages": read_provenance(experts[0])[:-1]}))
    return base


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties", "task_arithmetic"])
def test_methods_get_their_options_and_do_not_depend_on_the_order_of_the_experts(method, experts, tmp_path):
    base, options = with_base(experts, tmp_path), {"scale": 0.5} | ({"density": 0.5} if method == "ties" else {})
    results = []
    for order in ((0, 1, 2), (2, 0, 1)):
        merge([experts[j] for j in order], tmp_path / "out", method=method, base=base, options=options, overwrite=True)
        results.append(stored(tmp_path / "out"))
    assert same_bits(*results) and read_provenance(tmp_path / "out")[-1]["config"]["options"] == options
    names, third = ("chat", "code", "math"), [1 / 3] * 3
    ordered = [tensors({"math": 0, "code": 1, "chat": 2}[n]) for n in names]
    for name, value in results[0].items():
        given = [e[name] for e in ordered]
        keys = {"keys": [f"{n}/{name}" for n in names]} if "dare" in method else {}
        assert torch.equal(value, MERGES[method](given, third, tensors(9)[name], **options, **keys))


def test_dare_is_reproducible_and_its_seed_matters(experts, tmp_path):
    base, results = with_base(experts, tmp_path), []
    for seed in (0, 0, 1):
        merge(experts, tmp_path / "out", method="dare", base=base, options={"seed": seed, "drop": 0.5}, overwrite=True)
        results.append(stored(tmp_path / "out"))
    assert same_bits(results[0], results[1]) and not same_bits(results[0], results[2])


def test_experts_of_one_name_do_not_drop_the_same_elements(tmp_path):
    base = checkpoint(tmp_path / "base", {"w": torch.zeros(2000)}, stages=None)
    twins = [checkpoint(tmp_path / place / "math", {"w": torch.ones(2000)}, stages=None) for place in "ab"]
    merge(twins, tmp_path / "out", method="dare", base=base, options={"drop": 0.5}, unrecorded=True)
    assert sorted(stored(tmp_path / "out")["w"].unique().tolist()) == [0, 1, 2]


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Two students of one start and their statistics: {kind: [file]}."""
    folder, files = tmp_path_factory.mktemp("students"), {"fisher": [], "gram": []}
    for seed, name in enumerate("ab"):
        student = tiny_student(torch.float32, num_hidden_layers=2)
        with torch.no_grad():
            for p in student.parameters():
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        student.save_pretrained(folder / name)
        add_provenance(folder / name, f"distill:{name}", stages=[{"stage": "convert"}])
        write_manifest(folder / name)
        for kind, made in files.items():
            made.append(folder / f"{name}-{kind}.safetensors")
            batches = [{"input_ids": token_ids(2, 12, seed=10 * seed + j)} for j in range(2)]
            count = measure_statistics(folder / name, batches, made[-1], kind)
            assert count == (4 if kind == "fisher" else 48)
    return [folder / "a", folder / "b"], files


@pytest.mark.parametrize(
    ("method", "kind", "covered", "rest"), [("fisher", "fisher", 41, 0), ("regmean", "gram", 15, 41 - 15)]
)
def test_statistics_weigh_what_they_cover_and_the_rest_is_linear(method, kind, covered, rest, students, tmp_path):
    folders, files = students
    merge(folders, tmp_path / "out", method=method, statistics=files[kind])
    merge(folders, tmp_path / "linear")
    found, plain, (a, b) = stored(tmp_path / "out"), stored(tmp_path / "linear"), (stored(f) for f in folders)
    different = {name for name in found if not torch.equal(found[name], plain[name])}
    assert len(different) == covered
    assert read_provenance(tmp_path / "out")[-1]["config"]["tensors"] == {method: covered} | (
        {"linear": rest} if rest else {}
    )
    name = "model.layers.1.mlp.up_proj.weight"
    inputs = {
        "fisher": [load_file(f).get(name) for f in files[kind]],
        "gram": [load_file(f).get("model.layers.1.mlp.gate_proj") for f in files[kind]],
    }[kind]
    expected = MERGES[method]([a[name], b[name]], [0.5, 0.5], statistics=inputs)
    torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
    merge(folders[::-1], tmp_path / "turned", method=method, statistics=files[kind][::-1])
    assert same_bits(stored(tmp_path / "turned"), found)


def test_a_regmean_of_experts_answers_more_like_them_than_their_mean_does(students, tmp_path):
    """On inputs that the Gram matrices saw, the merged first projection is nearer to each expert's than the plain mean
    is.
    """
    folders, files = students
    merge(folders, tmp_path / "out", method="regmean", statistics=files["gram"], options={"alpha": 1.0})
    name, wrong = "model.layers.0.self_attn.q_proj.weight", {"out": 0.0, "mean": 0.0}
    weights = [stored(f)[name].double() for f in folders]
    merged = {"out": stored(tmp_path / "out")[name].double(), "mean": (weights[0] + weights[1]) / 2}
    for weight, file in zip(weights, files["gram"], strict=True):
        gram = load_file(file)["model.layers.0.self_attn.q_proj"].double()
        for kind, value in merged.items():
            wrong[kind] += torch.trace((value - weight) @ gram @ (value - weight).T).item()
    assert wrong["out"] < 0.999 * wrong["mean"]


def test_statistics_of_other_weights_or_another_kind_are_refused(students, tmp_path):
    folders, files = students
    with pytest.raises(
        MergeError,
        match="2 mismatches: statistics b-fisher.safetensors of a: measured on other weights; statistics a-fisher",
    ):
        merge(folders, tmp_path / "out", method="fisher", statistics=files["fisher"][::-1])
    with pytest.raises(MergeError, match="statistics a-gram.safetensors of a: kind 'gram', expected 'fisher'"):
        merge(folders, tmp_path / "out", method="fisher", statistics=files["gram"])
    spoilt = load_file(files["fisher"][0])
    spoilt["model.norm.weight"] *= -1
    from safetensors import safe_open

    with safe_open(files["fisher"][0], "pt") as file:
        notes = file.metadata()
    save_file(spoilt, tmp_path / "bad.safetensors", metadata=notes)
    with pytest.raises(
        MergeError, match="statistics bad.safetensors: model.norm.weight holds values that are negative or not finite"
    ):
        merge(folders, tmp_path / "out", method="fisher", statistics=[tmp_path / "bad.safetensors", files["fisher"][1]])
    assert not (tmp_path / "out").exists()


# --- start, vocabulary, writing --------------------------------------------------------------------------------


def test_experts_may_have_gone_through_several_stages_of_their_own(tmp_path):
    folders = []
    for j, name in enumerate(("math", "code")):
        folder = checkpoint(tmp_path / name, tensors(j), last=f"distill:{name}")
        add_provenance(folder, f"on-policy:{name}", stages=read_provenance(folder))
        folders.append(folder)
    merge(folders, tmp_path / "out")
    assert [s["stage"] for s in read_provenance(tmp_path / "out")] == [
        "convert",
        "align",
        "distill:math",
        "on-policy:math",
        "distill:code",
        "on-policy:code",
        "merge",
    ]


def test_equal_records_of_different_starts_are_told_apart_by_the_manifest(tmp_path):
    folders = []
    for j, (name, parent) in enumerate((("math", "a" * 64), ("code", "b" * 64))):
        folder = checkpoint(tmp_path / name, tensors(j), last=f"distill:{name}")
        record = json.loads((folder / "provenance.json").read_text())
        record["stages"][-1]["parent_manifest"] = parent
        (folder / "provenance.json").write_text(json.dumps(record))
        folders.append(folder)
    with pytest.raises(
        MergeError, match=r"start: math and code do not come from the same checkpoint .manifest a{12}... and b{12}"
    ):
        merge(folders, tmp_path / "out")
    base = checkpoint(tmp_path / "base", tensors(9), stages=["convert"], last="align")
    (base / "provenance.json").write_text(json.dumps({"format_version": 1, "stages": read_provenance(folders[0])[:-1]}))
    write_manifest(base)
    with pytest.raises(MergeError, match="start: math and base do not come from the same checkpoint .manifest"):
        merge(folders[:1], tmp_path / "out", method="ties", base=base)
    record = json.loads((folders[0] / "provenance.json").read_text())
    record["stages"][-1]["parent_manifest"] = digest(base / "manifest.json")
    (folders[0] / "provenance.json").write_text(json.dumps(record))
    merge(folders[:1], tmp_path / "out", method="ties", base=base)


def test_vocabularies_must_agree_token_by_token(experts, tmp_path):
    def tokenizer(folder, vocab, added=()):
        made = Tokenizer(models.WordLevel(vocab, unk_token="a"))
        made.add_special_tokens(list(added))
        made.enable_padding(pad_token=folder.name)
        made.save(str(folder / "tokenizer.json"))

    for expert in experts:
        tokenizer(expert, {"a": 0, "b": 1})
    merge(experts, tmp_path / "out")  # other settings may differ
    tokenizer(experts[1], {"a": 1, "b": 0}, ["<new>"])
    with pytest.raises(
        MergeError, match="vocabulary: 3 tokens differ between math and code, such as '<new>', 'a', 'b'"
    ):
        merge(experts, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("content", ["no json", "[1]", '{"version": 3}', '{"model": "BPE"}'])
def test_a_tokenizer_file_that_is_none_is_named(content, experts, tmp_path):
    for expert in experts:
        (expert / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="math: tokenizer.json is not one .*copy it from an intact checkpoint"):
        merge(experts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_streamed_files_are_those_of_safetensors_byte_for_byte(tmp_path):
    values = {
        "b": torch.ones(3, 2).bfloat16(),
        "a": torch.arange(5.0),
        "z": torch.zeros(0, 4),
        "i": torch.arange(3),
        "s": torch.tensor(2.5),
        "f": torch.tensor([True, False, True]),
        "ünï": torch.ones(2).half(),
    }
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL", torch.float16: "F16"}
    shapes = {n: (names[v.dtype], tuple(v.shape)) for n, v in sorted(values.items())}
    stream_weights(tmp_path, shapes, values.get, {"format": "pt"})
    save_file(values, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_the_record_keeps_what_a_search_measured(experts, tmp_path):
    merge(experts, tmp_path / "out", figures={"search": {"candidates": 3}})
    assert read_provenance(tmp_path / "out")[-1]["figures"] == {"search": {"candidates": 3}}


# a Python of an environment that holds mergekit and this package's own requirements
MERGEKIT = os.environ.get("MERGEKIT_PYTHON")


def test_the_architecture_names_every_tensor_and_marks_what_some_layers_lack(tmp_path):
    student = tiny_student(
        torch.float32, layer_types=["hybrid_sliding", "full_attention", "hybrid_sliding"], tie_word_embeddings=True
    )
    student.save_pretrained(tmp_path / "a")
    made = mergekit_architecture(tmp_path / "a")
    assert made["model_type"] == "xlstm_hybrid" and made["architectures"] == ["XLSTMHybridForCausalLM"]
    templates = {w["name"]: w for w in made["layer_templates"]["weights"]}
    named = {w["name"] for w in [*made["pre_weights"], *made["post_weights"]]}
    for j in range(3):
        named |= {name.replace("${layer_index}", str(j)) for name in templates}
    assert set(stored(tmp_path / "a")) | {"lm_head.weight"} <= named
    gate = templates["model.layers.${layer_index}.self_attn.mlstm.igate_weight"]
    assert gate == {"name": gate["name"], "optional": True, "force_dtype": "float32"}
    assert "optional" not in templates["model.layers.${layer_index}.self_attn.q_proj.weight"]
    assert made["post_weights"][-1] == {
        "name": "lm_head.weight",
        "optional": True,
        "vocabulary_axis": 0,
        "tied_names": ["model.embed_tokens.weight"],
    }


@pytest.mark.slow
@pytest.mark.skipif(not MERGEKIT, reason="MERGEKIT_PYTHON names no Python with mergekit (LGPL-3: never a dependency)")
def test_mergekit_reads_the_architecture_and_agrees_on_the_mean(students, tmp_path):
    (tmp_path / "arch.json").write_text(json.dumps(mergekit_architecture(students[0][0])))
    spec = {
        "models": [
            {"model": str(f), "parameters": {"weight": w}} for f, w in zip(students[0], (0.25, 0.75), strict=True)
        ],
        "merge_method": "linear",
        "dtype": "float32",
    }
    program = f"""
import json, sys, xlstm_hybrid
from mergekit.architecture import json_definitions as d, arch_info_for_config
arch = d._load_architecture_json(open({str(tmp_path / "arch.json")!r}).read())
d.NAME_TO_ARCH["XLSTMHybridForCausalLM"] = [arch]
from transformers import AutoConfig
assert arch_info_for_config(AutoConfig.from_pretrained({str(students[0][0])!r})) is arch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
run_merge(MergeConfiguration.model_validate(json.loads({json.dumps(spec)!r})), {str(tmp_path / "theirs")!r}, MergeOptions(copy_tokenizer=False))
"""
    subprocess.run(
        [MERGEKIT, "-c", program],
        check=True,
        env=os.environ | {"PYTHONPATH": "src:kernels"},
        cwd=Path(__file__).parents[2],
    )
    merge(students[0], tmp_path / "ours", weights=[0.25, 0.75])
    theirs, ours = stored(tmp_path / "theirs"), stored(tmp_path / "ours")
    assert set(theirs) == set(ours)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-6, atol=1e-6)


# --- refusals --------------------------------------------------------------------------------------------------


def test_every_mismatch_is_listed_at_once(experts, tmp_path):
    odd = tensors(3)
    odd["extra"] = odd.pop("norm.bias")
    odd["embed.weight"], odd["layer.0.weight"] = torch.zeros(12, 6), odd["layer.0.weight"].bfloat16()
    odd = checkpoint(
        tmp_path / "odd",
        odd,
        config={"vocab_size": 12, "layer_types": ["full_attention"], "use_cache": False},
        stages=["convert"],
    )
    plain = checkpoint(tmp_path / "plain", tensors(4), stages=None)
    with pytest.raises(MergeError) as raised:
        merge([experts[0], odd, plain], tmp_path / "out")
    assert str(raised.value) == "; ".join(
        [
            "8 mismatches: config layer_types: ['hybrid_sliding'] in math, ['full_attention'] in odd",
            "config vocab_size: 11 in math, 12 in odd",
            "start: math and odd do not come from the same checkpoint (their stages before the last one differ)",
            "tensor embed.weight: F32 [11, 6] in math, F32 [12, 6] in odd",
            "tensor extra: missing in math",
            "tensor layer.0.weight: F32 [6, 6] in math, BF16 [6, 6] in odd",
            "tensor norm.bias: missing in odd",
            "start: only math of math and plain has a provenance.json. Merge checkpoints of one start and one shape only",
        ]
    )
    assert not (tmp_path / "out").exists()


def test_experts_without_any_record_are_merged_only_by_those_who_know_their_start(tmp_path):
    folders = [checkpoint(tmp_path / n, tensors(j), stages=None) for j, n in enumerate("ab")]
    with pytest.raises(
        MergeError, match="1 mismatches: start: no expert has a provenance.json, .* pass unrecorded=True"
    ):
        merge(folders, tmp_path / "out")
    merge(folders, tmp_path / "out", unrecorded=True)
    assert [s["stage"] for s in read_provenance(tmp_path / "out")] == ["merge"]


def test_a_base_must_be_the_start_of_the_experts(experts, tmp_path):
    with pytest.raises(MergeError, match="start: math and code do not come from the same checkpoint"):
        merge(experts[:1], tmp_path / "out", method="task_arithmetic", base=experts[1])


@pytest.mark.parametrize(
    "weights", [[0.5, 0.6, -0.1], [0.5, 0.3, 0.1], [0.5, 0.5], [0.5, 0.5, float("nan")], [1.0, 1.0, 1.0], [0.33333] * 3]
)
def test_weights_off_the_simplex_are_refused(weights, experts, tmp_path):
    with pytest.raises(
        MergeError, match=re.escape(f"weights {weights}: expected 3 shares of at least 0 whose sum is 1")
    ):
        merge(experts, tmp_path / "out", weights=weights)


def test_shares_may_miss_one_by_their_rounding(experts, tmp_path):
    merge(experts, tmp_path / "out", weights=[0.3333333, 0.3333333, 0.3333333])
    assert len(stored(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "breadcrumbs"}, r"method='breadcrumbs': expected one of \['dare', .*'ties'\]"),
        ({"method": "slerp"}, "method='slerp': expected two experts, got 3"),
        (
            {"method": "fisher"},
            "method='fisher': 0 files of statistics, expected one file of `measure_statistics` per expert",
        ),
        ({"statistics": ["f", "g", "h"]}, "method='linear': 3 files of statistics, expected none"),
        ({"options": {"density": 0.5}}, "density: it takes no options"),
        (
            {"group_weights": {"mouth": [1, 0, 0]}},
            r"group_weights: \['mouth'\] are no module groups, expected some of \['feature_maps', 'gates'",
        ),
        ({"group_weights": {"gates": [1, 1, 0]}}, "expected 3 shares of at least 0 whose sum is 1"),
        ({"method": "task_arithmetic"}, "method='task_arithmetic' needs base"),
        ({"base": "x"}, "method='linear' takes no base"),
        ({"experts": []}, "experts: expected at least one"),
    ],
)
def test_arguments_that_describe_no_merge_are_refused(arguments, message, experts, tmp_path):
    with pytest.raises(MergeError, match=message):
        merge(arguments.pop("experts", experts), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_expert_that_is_not_finite_is_named_and_nothing_is_left(value, experts, tmp_path):
    spoilt = tensors(1)
    spoilt["layer.1.weight"][2, 3] = value
    save_file(spoilt, experts[1] / "model.safetensors")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(MergeError, match="code: tensor layer.1.weight holds values that are not finite"):
        merge(experts, tmp_path / "out", weights=[1, 0, 0])  # even with no share in the result
    worse = tensors(2) | {"embed.weight": torch.full((11, 6), value)}
    save_file(worse, experts[2] / "model.safetensors")
    with pytest.raises(
        MergeError, match="chat: tensor embed.weight holds .*; code: tensor layer.1.weight holds|code: .*; chat: "
    ):
        merge(experts, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_result_out_of_range_is_named(tmp_path):
    big, base = {"w": torch.full((2,), 6e4).half()}, {"w": torch.full((2,), -6e4).half()}
    folders = [checkpoint(tmp_path / n, w, stages=None) for n, w in (("a", big), ("base", base))]
    assert torch.isinf(task_arithmetic([big["w"]], [2.0], base["w"])).all()
    monkey = {"task_arithmetic": lambda experts, weights, base: task_arithmetic(experts, [2.0], base)}
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(MergeError, match="tensor w: the result leaves the range of torch.float16"),
    ):
        patch.setattr(xlstm_hybrid.merging.merge, "MERGES", monkey)
        merge(folders[:1], tmp_path / "out", method="task_arithmetic", base=folders[1])
    assert not (tmp_path / "out").exists()


def test_integers_are_carried_where_they_agree_and_refused_where_they_do_not(tmp_path):
    folders = [
        checkpoint(tmp_path / name, {"w": torch.ones(2), "ids": torch.tensor([1, last])}, stages=None)
        for name, last in (("a", 2), ("b", 2), ("c", 3))
    ]
    merge(folders[:2], tmp_path / "out", unrecorded=True)
    assert stored(tmp_path / "out")["ids"].tolist() == [1, 2]
    with pytest.raises(MergeError, match="tensor ids: torch.int64 values differ between experts"):
        merge(folders, tmp_path / "out", overwrite=True, unrecorded=True)
    assert stored(tmp_path / "out")["ids"].tolist() == [1, 2]


def test_a_quantised_tensor_is_named(tmp_path):
    folder = checkpoint(tmp_path / "a", {"w": torch.ones(2).to(torch.float8_e4m3fn)}, stages=None)
    with pytest.raises(MergeError, match="a: tensor w is F8_E4M3, expected one of F64, .*merge before quantising"):
        merge([folder], tmp_path / "out")


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)


DAMAGE = {
    "a flipped bit": (
        lambda d: (write_manifest(d), flip(d / "model.safetensors", -5)),
        "code: model.safetensors has SHA-256",
    ),
    "truncated": (lambda d: os.truncate(d / "model.safetensors", 400), "code: model.safetensors or .* is damaged"),
    "no config": (lambda d: (d / "config.json").unlink(), "code: config.json cannot be read"),
    "an index that lies": (
        lambda d: (
            (d / "model.safetensors").rename(d / "part.safetensors"),
            (d / "model.safetensors.index.json").write_text('{"weight_map": {"nowhere": "part.safetensors"}}'),
        ),
        "code: part.safetensors is damaged or lacks nowhere",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "code: expected model.safetensors"),
    "a link out": (
        lambda d: (d / "vocab.json").symlink_to("/etc/hostname"),
        "code/vocab.json: links to a file outside",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_expert_is_named_and_nothing_is_left(case, experts, tmp_path):
    spoil, message = DAMAGE[case]
    spoil(experts[1])
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        merge([experts[1], experts[0]], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_failure_between_shards_leaves_the_previous_result(experts, tmp_path, monkeypatch):
    merge(experts, tmp_path / "out")
    before, written = stored(tmp_path / "out"), []

    def full(path, mode):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        return open(path, mode)

    monkeypatch.setattr(xlstm_hybrid.merging.merge, "open", full, raising=False)
    with pytest.raises(CheckpointWriteError, match="could not write out .No space left on device."):
        merge(experts, tmp_path / "out", weights=[1, 0, 0], overwrite=True, shard_bytes=1)
    assert len(written) == 2 and sorted(p.name for p in tmp_path.iterdir()) == ["experts", "out"]
    assert same_bits(stored(tmp_path / "out"), before)
    verify_files(tmp_path / "out")


def test_the_result_never_replaces_what_it_is_made_of(experts, tmp_path):
    for place in (experts[0], tmp_path / "experts", tmp_path):
        with pytest.raises(CheckpointWriteError, match=r"holds what is to be merged \(math"):
            merge(experts, place, overwrite=True)
    assert same_bits(stored(experts[0]), tensors(0))


def test_an_existing_result_is_kept_unless_asked(experts, tmp_path):
    merge(experts, tmp_path / "out")
    with pytest.raises(CheckpointError, match="out exists already"):
        merge(experts[:1], tmp_path / "out")
    assert len(read_provenance(tmp_path / "out")) == 6
