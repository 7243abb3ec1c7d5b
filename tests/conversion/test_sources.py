"""One directory is one thing to every command: read as transformers reads it, or refused with what it is and what turns
it into a checkpoint.
"""

import json
import re
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from conftest import assert_same_model
from safetensors.torch import load_file, save_file
from tiny_teachers import edit_config, rewrite, stored, teacher, teacher_config, tokens
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification

from xlstm_hybrid import XLSTMHybridForCausalLM
from xlstm_hybrid.checkpoint.files import weight_files
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.conversion.load import load_model
from xlstm_hybrid.conversion.source import download
from xlstm_hybrid.errors import CheckpointError, ConfigError, UnsupportedTeacherError
from xlstm_hybrid.merging.merge import merge
from xlstm_hybrid.planning.run import read_config


@pytest.fixture
def llama(tmp_path):
    teacher("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def only(directory, *names):
    """A directory of one config.json and these empty files or, with a slash behind, folders."""
    for path in directory.glob("*.safetensors"):
        path.unlink()
    for name in names:
        (directory / name).mkdir() if name.endswith("/") else (directory / name).write_bytes(b"")


def without_config(directory, *names):
    only(directory, *names)
    (directory / "config.json").unlink()


def renamed(directory, pattern, new):
    rewrite(directory, lambda weights: {re.sub(pattern, new, name, count=1): x for name, x in weights.items()})


def nameless_adapter(directory):
    adapter(directory)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "None"}))


def adapter(directory, beside=False):
    base = directory.with_name("base")
    shutil.copytree(directory, base)
    if not beside:
        shutil.rmtree(directory)
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(directory)


def variant(directory):
    shutil.rmtree(directory)
    teacher("llama").save_pretrained(directory, variant="fp16")


def sharded_variant(directory):
    shutil.rmtree(directory)
    teacher("llama").save_pretrained(directory, variant="fp16", max_shard_size="20KB")


def classifier(directory):
    shutil.rmtree(directory)
    LlamaForSequenceClassification(teacher_config("llama", pad_token_id=0)).save_pretrained(directory)


# what it is -> how it comes about, and what the message says
OTHERS = {
    "an adapter": (adapter, r"llama: a PEFT adapter of base, not a model of its own; merge it .*merge_and_unload\(\)"),
    "an adapter of a model without a path": (
        nameless_adapter,
        r"llama: a PEFT adapter, .*does not say of which model: save that model, write its directory",
    ),
    "a model and an adapter": (
        lambda d: adapter(d, beside=True),
        r"llama: a model and a PEFT adapter of base in one directory, .* move the files adapter_\*",
    ),
    "an unmerged PEFT model": (
        lambda d: renamed(d, "^", "base_model.model."),
        r"llama: holds tensors of a PEFT model \(base_model.*merge_and_unload\(\)",
    ),
    "a compiled model": (
        lambda d: renamed(d, "^", "_orig_mod."),
        r"llama: its tensors are named by a wrapper \(_orig_mod\.model\..*replace\('_orig_mod\.', ''\)",
    ),
    "a compiled trunk": (lambda d: renamed(d, r"^model\.", "model._orig_mod."), r"by a wrapper \(model\._orig_mod\."),
    "a model of DDP": (lambda d: renamed(d, "^", "module."), r"llama: its tensors are named by a wrapper \(module\."),
    "a variant": (
        variant,
        r"only the variant 'fp16' \(model.fp16.safetensors\).*variant='fp16', dtype='auto'\)\.save_pre",
    ),
    "a variant in shards": (sharded_variant, r"only the variant 'fp16' \(model.fp16-00001-of-\d+.safetensors\)"),
    "pickles": (lambda d: only(d, "pytorch_model.bin"), r"as pickles.*M.from_pretrained\('DIR', dtype='auto'\)"),
    "pickled shards": (
        lambda d: only(d, "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"),
        "as pickles.*only safetensors is read",
    ),
    "a state dict of torch": (
        lambda d: only(d, "weights.pt"),
        r"holds weights.pt.*torch.load\('DIR/weights.pt', weights_only=True\)",
    ),
    "GGUF": (
        lambda d: only(d, "tiny.Q8_0.gguf"),
        r"GGUF \(tiny.Q8_0.gguf\); .*xlstm-hybrid convert DIR/tiny.Q8_0.gguf OUT, .*gguf_file='tiny.Q8_0.gguf'",
    ),
    "GGUF without more": (lambda d: without_config(d, "tiny.gguf"), r"xlstm-hybrid convert DIR/tiny.gguf OUT"),
    "Mistral's own layout": (
        lambda d: without_config(d, "consolidated.safetensors", "params.json"),
        "the original layout of its makers.*repository in transformers' layout",
    ),
    "Meta's own layout": (
        lambda d: without_config(d, "consolidated.00.pth", "params.json"),
        "the original layout of its makers",
    ),
    "sentence-transformers": (
        lambda d: (d / "modules.json").write_text("[]"),
        "a sentence-transformers model.*name the language model that it was made from",
    ),
    "diffusers": (lambda d: without_config(d, "model_index.json", "unet/"), "a diffusers pipeline"),
    "a run": (
        lambda d: without_config(d, "checkpoint-9/", "checkpoint-10/"),
        r"a run with checkpoints in it \(checkpoint-10, checkpoint-9\).*such as DIR/checkpoint-10$",
    ),
    "the Hub's cache": (
        lambda d: without_config(d, "snapshots/", "refs/"),
        "a folder of the Hub's cache; name the model",
    ),
    "DeepSpeed": (lambda d: only(d, "zero_to_fp32.py", "global_step2/"), "python DIR/zero_to_fp32.py DIR OUT"),
    "FSDP": (lambda d: only(d, "pytorch_model_fsdp_0/"), "accelerate merge-weights DIR/pytorch_model_fsdp_0 OUT"),
    "another framework": (lambda d: only(d, "tf_model.h5"), "found tf_model.h5, which is not read; save the model"),
    "nothing": (only, "found no weights; download the checkpoint again"),
}
# of these the layout is that of a checkpoint: what the config says is looked at where a language model is wanted
NO_TEACHERS = {
    "a classifier": (classifier, CheckpointError, "a LlamaForSequenceClassification, which has no head over tokens"),
    "GPTQ's own layout": (
        lambda d: (d / "quantize_config.json").write_text("{}"),
        CheckpointError,
        r"quantised weights \(quantize_config.json\).*start from the original checkpoint",
    ),
    "MLX": (lambda d: edit_config(d, quantization={"bits": 4, "group_size": 64}), CheckpointError, "quantised weights"),
    "two names of one tensor": (
        lambda d: rewrite(d, lambda w: w | {"norm.weight": w["model.norm.weight"].clone()}),
        CheckpointError,
        "norm.weight",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_checkpoint_is_named_with_its_step_by_every_command(case, llama, tmp_path):
    make, message = OTHERS[case]
    make(llama)
    for read in (
        lambda: convert(llama, tmp_path / "out"),
        lambda: XLSTMHybridForCausalLM.from_teacher(llama),
        lambda: load_model(llama),
        lambda: merge([llama, llama], tmp_path / "out", unrecorded=True),
        lambda: weight_files(llama),
    ):
        with pytest.raises(CheckpointError, match=message) as raised:
            read()
        assert "\n" not in str(raised.value) and str(tmp_path) not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", NO_TEACHERS)
def test_what_is_no_language_model_is_refused_as_teacher_wherever_it_is_one(case, llama, tmp_path):
    make, error, message = NO_TEACHERS[case]
    make(llama)
    for read in (lambda: convert(llama, tmp_path / "out"), lambda: load_model(llama)):
        with pytest.raises(error, match=message):
            read()


@pytest.mark.parametrize("case", ["an adapter", "diffusers", "sentence-transformers", "Mistral's own layout"])
def test_plan_refuses_what_convert_refuses(case, llama):
    make, message = OTHERS[case]
    make(llama)
    with pytest.raises(CheckpointError, match=message):
        read_config(llama)


def test_plan_needs_no_weights(llama):
    only(llama)
    assert read_config(llama).hidden_size == 42


@pytest.mark.parametrize(
    "case",
    [
        *("an adapter", "a compiled model", "a state dict of torch"),
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("a variant", "pickles")),
    ],
)
def test_the_command_of_the_message_makes_the_checkpoint(case, llama, tmp_path):
    want = {name: x.clone() for name, x in teacher("llama").state_dict().items() if name != "lm_head.weight"}
    if case in ("pickles", "a state dict of torch"):
        only(llama)
        torch.save(want, llama / ("pytorch_model.bin" if case == "pickles" else "weights.pt"))
    else:
        OTHERS[case][0](llama)
    with pytest.raises(CheckpointError) as raised:
        convert(llama, tmp_path / "out")
    code = re.search(r'python -c "(.*?)"(,|$| )', str(raised.value))[1]
    (tmp_path / "made").mkdir()
    code = code.replace("'DIR", f"'{llama}").replace("'OUT", f"'{tmp_path / 'made'}")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    if case == "a compiled model":
        shutil.copy(llama / "config.json", tmp_path / "made")
    if case == "an adapter":
        q = "model.layers.1.self_attn.q_proj.weight"
        lora = load_file(llama / "adapter_model.safetensors")
        a, b = (next(x for name, x in lora.items() if "layers.1." in name and f"lora_{ab}." in name) for ab in "AB")
        assert torch.allclose(stored(tmp_path / "made")[q], want[q] + b @ a)  # alpha / rank is 1
        want = {name: x for name, x in want.items() if "q_proj.weight" not in name}
    made = llama if case == "a state dict of torch" else tmp_path / "made"
    assert all(torch.equal(stored(made)[name], x) for name, x in want.items())
    assert convert(made, tmp_path / "out").parameters["student"] > 0


# --- read as transformers reads it -----------------------------------------------------------------------------


def test_a_trunk_is_read_as_the_whole_model(tmp_path):
    teacher("llama").model.save_pretrained(tmp_path / "trunk")
    teacher("llama").save_pretrained(tmp_path / "whole")
    assert "norm.weight" in stored(tmp_path / "trunk") and "model.norm.weight" in stored(tmp_path / "whole")
    convert(tmp_path / "trunk", tmp_path / "a")
    convert(tmp_path / "whole", tmp_path / "b")
    found, want = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert found.keys() == want.keys() and all(torch.equal(found[name], x) for name, x in want.items())
    for source in (tmp_path / "trunk", teacher("llama").model):
        student = XLSTMHybridForCausalLM.from_teacher(source, layer_types="teacher")
        assert torch.allclose(student(tokens()).logits, teacher("llama")(tokens()).logits, atol=1e-4)
    assert_same_model(load_model(tmp_path / "trunk", device="cpu"), teacher("llama"), tokens())


def test_a_trunk_without_the_head_that_its_model_has_is_refused_and_no_head_made_up(tmp_path):
    teacher("mistral").model.save_pretrained(tmp_path / "trunk")
    with pytest.raises(CheckpointError, match=r"1 missing \(lm_head.weight\)"):
        convert(tmp_path / "trunk", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"trunk: .*1 missing \(the first lm_head.weight\)"):
        load_model(tmp_path / "trunk")


def test_what_the_model_has_no_place_for_is_refused_by_loading_as_by_converting(llama):
    rewrite(llama, lambda weights: weights | {"model.layers.0.extra.weight": torch.ones(2)})
    for read in (load_model, XLSTMHybridForCausalLM.from_teacher):
        with pytest.raises(
            CheckpointError, match=r"1 without a place in the \w+ \((the first )?model.layers.0.extra.weight"
        ):
            read(llama)


def test_of_a_file_and_an_index_the_file_is_read_as_in_transformers(llama, tmp_path):
    teacher("llama").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for path in (tmp_path / "shards").glob("model-*"):
        zeros = {name: torch.zeros_like(x) for name, x in load_file(path).items()}
        save_file(zeros, llama / path.name, {"format": "pt"})
    shutil.copy(tmp_path / "shards/model.safetensors.index.json", llama)
    want = teacher("llama").model.norm.weight
    assert torch.equal(AutoModelForCausalLM.from_pretrained(llama).model.norm.weight, want)
    assert torch.equal(XLSTMHybridForCausalLM.from_teacher(llama).model.norm.weight, want)
    assert set(weight_files(llama).values()) == {llama / "model.safetensors"}


def test_a_student_is_no_teacher_to_convert_and_says_what_to_do(llama, tmp_path):
    convert(llama, tmp_path / "student")
    for read in (lambda: convert(tmp_path / "student", tmp_path / "out"), lambda: read_config(tmp_path / "student")):
        with pytest.raises(
            UnsupportedTeacherError, match=r"is a student.*align, distill\), or convert the Transformer"
        ):
            read()
    assert load_model(tmp_path / "student", device="cpu").config.model_type == "xlstm_hybrid"


@pytest.mark.parametrize(
    ("method", "step"),
    [
        ("gptq", "start from the original checkpoint$"),
        ("awq", "start from the original checkpoint$"),
        ("bitsandbytes", r"or dequantise it .*\.dequantize\(\)\.save_pretrained"),
        ("fp8", r"FineGrainedFP8Config\(dequantize=True\)"),
        ("gguf", r"from_teacher\('DIR', gguf_file="),
    ],
)
def test_a_quantised_teacher_is_named_by_its_method(method, step, llama):
    edit_config(llama, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UnsupportedTeacherError, match=rf"\(llama\): {method}, quantization_config is set.*{step}"):
        XLSTMHybridForCausalLM.from_teacher(llama)


def test_a_file_is_no_directory(llama, tmp_path):
    for read in (convert, lambda source, out: load_model(source)):
        with pytest.raises(CheckpointError, match=r"model.safetensors: is a file.*name the directory that holds it"):
            read(llama / "model.safetensors", tmp_path / "out")


def test_of_a_hub_repository_without_safetensors_its_list_of_files_says_what_it_is(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(AutoConfig.for_model("llama").to_dict()))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    files = ["config.json", "model-Q4_K_M.gguf"]
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: files)
    with pytest.raises(CheckpointError, match="someone/tiny: holds weights as GGUF .*convert DIR/model-Q4_K_M.gguf"):
        download("someone/tiny", None)
    files[1:] = ["pytorch_model.bin"]
    with pytest.raises(CheckpointError, match="someone/tiny: holds its weights as pickles"):
        download("someone/tiny", "main")


def test_a_wrapped_model_in_memory_says_what_is_inside():
    for wrapped in (torch.compile(teacher("llama")), torch.nn.DataParallel(teacher("llama"))):
        with pytest.raises(ConfigError, match=r"a compiled one with \._orig_mod, a wrapped one with \.module"):
            XLSTMHybridForCausalLM.from_teacher(wrapped)
