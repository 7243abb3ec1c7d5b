"""A merge is the weighted mean of its experts, the same bits in any order, and nothing at all where the experts do not belong together."""
import json
import os
import re
import weakref

import pytest
import torch
from conftest import tiny_student, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import xlstm_hybrid.merging
import xlstm_hybrid.weights
from xlstm_hybrid.artifacts import add_provenance, read_provenance, verify, weight_files, write_manifest
from xlstm_hybrid.errors import CheckpointError, CheckpointWriteError, MergeError
from xlstm_hybrid.merging import MERGES, linear, merge, task_arithmetic


def tensors(seed, dtype=torch.float32):
    """Weights of one expert: values whose float32 sums depend on the order."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 10 ** torch.randn(shape, generator=generator)).to(dtype)
            for name, shape in (("embed.weight", (11, 6)), ("layer.0.weight", (6, 6)), ("layer.1.weight", (6, 6)), ("norm.bias", (6,)))}


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
    return [checkpoint(tmp_path / "experts" / name, tensors(j), last=f"distill:{name}") for j, name in enumerate(("math", "code", "chat"))]


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


@pytest.mark.parametrize("method", MERGES)
def test_low_precision_is_accumulated_in_float32(method):
    one, two = torch.tensor([1.0, 256.0]).bfloat16(), torch.tensor([1.0078125, 2.0]).bfloat16()
    result = MERGES[method]([one, two, two], [0.5, 0.25, 0.25], one)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, (one.double() * 0.5 + two.double() * 0.5).bfloat16())


def test_double_precision_is_kept():
    one, third = torch.ones(1, dtype=torch.float64), torch.full((1,), 1 / 3, dtype=torch.float64)
    assert linear([one, third], [0.5, 0.5]).item() == task_arithmetic([one, third], [0.5, 0.5], one).item() == 0.5 + 0.5 / 3


def test_a_merge_function_leaves_its_inputs_alone():
    for method in MERGES.values():
        given = [torch.ones(3), torch.full((3,), 2.0), torch.zeros(3)]
        method(given[:2], [0.5, 0.5], given[2])
        assert [x[0].item() for x in given] == [1, 2, 0]


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
    assert same_bits(stored(tmp_path / "one"), stored(tmp_path / "many")) and same_bits(stored(tmp_path / "one"), stored(tmp_path / "again"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (66 + 36 + 36 + 6)


def test_one_tensor_of_each_expert_is_in_memory_at_a_time(experts, tmp_path, monkeypatch):
    alive, peak, load = [], [], xlstm_hybrid.merging.Checkpoint.tensor

    def watched(self, name):
        value = load(self, name)
        alive.append(weakref.ref(value.untyped_storage()))
        peak.append(sum(r() is not None for r in alive))
        return value

    monkeypatch.setattr(xlstm_hybrid.merging.Checkpoint, "tensor", watched)
    merge(experts, tmp_path / "out", shard_bytes=1)
    assert len(peak) == 12 and max(peak) <= 3


def test_the_result_is_listed_and_knows_where_it_comes_from(experts, tmp_path):
    merge(experts, tmp_path / "out", weights=[0.5, 0.3, 0.2])
    verify(tmp_path / "out")
    stages = read_provenance(tmp_path / "out")
    assert [s["stage"] for s in stages] == ["convert", "align", "distill:math", "distill:code", "distill:chat", "merge"]
    assert stages[-1]["config"] == {"method": "linear", "experts": [{"name": "math", "weight": 0.5}, {"name": "code", "weight": 0.3},
                                                                    {"name": "chat", "weight": 0.2}]}
    assert str(tmp_path) not in (tmp_path / "out" / "provenance.json").read_text()


def test_tokenizer_and_settings_of_the_first_come_along_and_pickles_do_not(experts, tmp_path):
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "training_args.bin", "optimizer.pt", "modeling.py", "notes.txt"):
        (experts[0] / name).write_text("{}")
    settings = {"eos_token": "e", "name_or_path": "/home/x", "auto_map": {}, "vocab_file": "/etc/y"}
    (experts[0] / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((experts[0] / "config.json").read_text()) | {"auto_map": {"AutoConfig": "modeling.Evil"}, "_name_or_path": "/home/x"}
    (experts[0] / "config.json").write_text(json.dumps(config))
    (experts[1] / "vocab.json").write_text("{}")
    merge(experts, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
        "provenance.json", "manifest.json"}
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"eos_token": "e"}
    assert not {"auto_map", "_name_or_path"} & set(json.loads((tmp_path / "out" / "config.json").read_text()))


def test_merged_students_load_and_a_student_merged_with_itself_is_itself(tmp_path):
    for seed, name in enumerate("ab"):
        student = tiny_student(torch.bfloat16)
        with torch.no_grad():
            student.model.embed_tokens.weight += seed
        student.save_pretrained(tmp_path / name)
    merge([tmp_path / "a", tmp_path / "a"], tmp_path / "same")
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "mixed", shard_bytes=20_000)
    a, same, mixed = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("a", "same", "mixed"))
    ids = token_ids(2, 20)
    assert torch.equal(a(ids).logits, same(ids).logits)
    shift = mixed.model.embed_tokens.weight.float() - a.model.embed_tokens.weight.float()
    torch.testing.assert_close(shift, torch.full_like(shift, 0.5), atol=0.02, rtol=0)  # half an ulp of bfloat16 below 4
    assert {p.dtype for p in mixed.parameters()} == {p.dtype for p in a.parameters()} == {torch.bfloat16, torch.float32}  # gates stay float32


# --- refusals --------------------------------------------------------------------------------------------------


def test_every_mismatch_is_listed_at_once(experts, tmp_path):
    odd = tensors(3)
    odd["extra"] = odd.pop("norm.bias")
    odd["embed.weight"], odd["layer.0.weight"] = torch.zeros(12, 6), odd["layer.0.weight"].bfloat16()
    odd = checkpoint(tmp_path / "odd", odd, config={"vocab_size": 12, "layer_types": ["full_attention"], "use_cache": False}, stages=["convert"])
    plain = checkpoint(tmp_path / "plain", tensors(4), stages=None)
    with pytest.raises(MergeError) as raised:
        merge([experts[0], odd, plain], tmp_path / "out")
    assert str(raised.value) == "; ".join([
        "8 mismatches: config layer_types: ['hybrid_sliding'] in math, ['full_attention'] in odd",
        "config vocab_size: 11 in math, 12 in odd",
        "start: math and odd do not come from the same checkpoint (their stages before the last one differ)",
        "tensor embed.weight: F32 [11, 6] in math, F32 [12, 6] in odd",
        "tensor extra: missing in math",
        "tensor layer.0.weight: F32 [6, 6] in math, BF16 [6, 6] in odd",
        "tensor norm.bias: missing in odd",
        "start: only math of math and plain has a provenance.json. Merge checkpoints of one start and one shape only",
    ])
    assert not (tmp_path / "out").exists()


def test_experts_without_any_record_may_be_merged(tmp_path):
    folders = [checkpoint(tmp_path / n, tensors(j), stages=None) for j, n in enumerate("ab")]
    merge(folders, tmp_path / "out")
    assert [s["stage"] for s in read_provenance(tmp_path / "out")] == ["merge"]


def test_a_base_must_be_the_start_of_the_experts(experts, tmp_path):
    with pytest.raises(MergeError, match="start: math and code do not come from the same checkpoint"):
        merge(experts[:1], tmp_path / "out", method="task_arithmetic", base=experts[1])


@pytest.mark.parametrize("weights", [[0.5, 0.6, -0.1], [0.5, 0.3, 0.1], [0.5, 0.5], [0.5, 0.5, float("nan")], [1.0, 1.0, 1.0], [0.33333] * 3])
def test_weights_off_the_simplex_are_refused(weights, experts, tmp_path):
    with pytest.raises(MergeError, match=re.escape(f"weights {weights}: expected 3 shares of at least 0 whose sum is 1")):
        merge(experts, tmp_path / "out", weights=weights)


def test_shares_may_miss_one_by_their_rounding(experts, tmp_path):
    merge(experts, tmp_path / "out", weights=[0.3333333, 0.3333333, 0.3333333])
    assert len(stored(tmp_path / "out")) == 4


@pytest.mark.parametrize(("arguments", "message"), [
    ({"method": "ties"}, r"method='ties': expected one of \['linear', 'task_arithmetic'\]"),
    ({"method": "task_arithmetic"}, "method='task_arithmetic' needs base"),
    ({"base": "x"}, "method='linear' takes no base"),
    ({"experts": []}, "experts: expected at least one"),
])
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
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_result_out_of_range_is_named(tmp_path):
    big, base = {"w": torch.full((2,), 6e4).half()}, {"w": torch.full((2,), -6e4).half()}
    folders = [checkpoint(tmp_path / n, w, stages=None) for n, w in (("a", big), ("base", base))]
    assert torch.isinf(task_arithmetic([big["w"]], [2.0], base["w"])).all()
    monkey = {"task_arithmetic": lambda experts, weights, base: task_arithmetic(experts, [2.0], base)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MergeError, match="tensor w: the result leaves the range of torch.float16"):
        patch.setattr(xlstm_hybrid.merging, "MERGES", monkey)
        merge(folders[:1], tmp_path / "out", method="task_arithmetic", base=folders[1])
    assert not (tmp_path / "out").exists()


def test_integers_are_carried_where_they_agree_and_refused_where_they_do_not(tmp_path):
    folders = [checkpoint(tmp_path / name, {"w": torch.ones(2), "ids": torch.tensor([1, last])}, stages=None)
               for name, last in (("a", 2), ("b", 2), ("c", 3))]
    merge(folders[:2], tmp_path / "out")
    assert stored(tmp_path / "out")["ids"].tolist() == [1, 2]
    with pytest.raises(MergeError, match="tensor ids: torch.int64 values differ between experts"):
        merge(folders, tmp_path / "out", overwrite=True)
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
    "a flipped bit": (lambda d: (write_manifest(d), flip(d / "model.safetensors", -5)), "code: model.safetensors has SHA-256"),
    "truncated": (lambda d: os.truncate(d / "model.safetensors", 400), "code: model.safetensors or .* is damaged"),
    "no config": (lambda d: (d / "config.json").unlink(), "code: config.json cannot be read"),
    "an index that lies": (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"nowhere": "model.safetensors"}}'),
                           "code: model.safetensors is damaged or lacks nowhere"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "code: expected model.safetensors"),
    "a link out": (lambda d: (d / "vocab.json").symlink_to("/etc/hostname"), "code/vocab.json: links to a file outside"),
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

    def full(weights, path, metadata):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(weights, path, metadata)

    monkeypatch.setattr(xlstm_hybrid.weights, "save_file", full)
    with pytest.raises(CheckpointWriteError, match="could not write out .No space left on device."):
        merge(experts, tmp_path / "out", weights=[1, 0, 0], overwrite=True, shard_bytes=1)
    assert len(written) == 2 and sorted(p.name for p in tmp_path.iterdir()) == ["experts", "out"]
    assert same_bits(stored(tmp_path / "out"), before)
    verify(tmp_path / "out")


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
