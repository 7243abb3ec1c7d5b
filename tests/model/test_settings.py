"""Settings that a teacher brings along: a student has them, generates as its teacher does with them, and is saved
wherever transformers would save the teacher; scores are of the model, not of its settings.
"""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_teachers import edit_config, teacher
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from xlstm_hybrid import DistilXLSTMForCausalLM, XLSTMHybridConfig, XLSTMHybridForCausalLM, XLSTMHybridModel
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.evaluation.scores import exact_match
from xlstm_hybrid.hub.export import export
from xlstm_hybrid.merging.merge import merge

IDS = torch.tensor([[5, 6, 7, 8]])
INVALID = {  # each loads with a warning, and `GenerationConfig.save_pretrained` refuses it
    "sampling flags without sampling": {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
    "flags of beams without beams": {"num_beams": 1, "length_penalty": 0.5, "early_stopping": True},
    "with use_cache": {"do_sample": False, "top_k": 7, "use_cache": False},
}


def save_teacher(folder, **settings):
    teacher("llama").save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def settings_of(folder):
    values = json.loads((Path(folder) / "generation_config.json").read_text())
    return {key: value for key, value in values.items() if key not in ("transformers_version", "_from_model_config")}


def tokenizer():
    made = Tokenizer(models.WordLevel({f"w{n}": n for n in range(101)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", bos_token="w2", eos_token="w1")


@pytest.mark.parametrize("settings", INVALID.values(), ids=INVALID)
def test_settings_that_transformers_calls_invalid_stop_nothing(settings, tmp_path):
    source, kept = (
        save_teacher(tmp_path / "teacher", **settings),
        {k: x for k, x in settings.items() if k != "use_cache"},
    )
    stock = AutoModelForCausalLM.from_pretrained(source)
    with pytest.raises(ValueError):
        GenerationConfig(**settings).save_pretrained(tmp_path)
    for name, of in ("a", source), ("b", source), ("memory", stock):
        convert(of, tmp_path / name, sliding_window=7)
        found = settings_of(tmp_path / name)
        assert kept.items() <= found.items() and found.get("use_cache") is not False
    for name, of in ("direct", source), ("of_model", stock):
        XLSTMHybridForCausalLM.from_teacher(of, sliding_window=7).save_pretrained(tmp_path / name)
    DistilXLSTMForCausalLM.from_teacher(source).save_pretrained(tmp_path / "distil")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "again")
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    export(tmp_path / "merged", tmp_path / "exported")
    for name in ("direct", "of_model", "distil", "again", "merged", "exported"):
        assert kept.items() <= settings_of(tmp_path / name).items()
        assert not list((tmp_path / name).glob(".tmp*"))


def test_a_run_whose_trainer_aligns_the_special_tokens_of_such_settings_is_saved(tmp_path):
    source = save_teacher(tmp_path / "teacher", do_sample=False, temperature=0.6)
    student = XLSTMHybridForCausalLM.from_teacher(source, sliding_window=7)
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8]}] * 2)
    args = {"max_steps": 1, "use_cpu": True, "report_to": "none", "bf16": False, "save_steps": 1, "disable_tqdm": True}
    trainer = SFTTrainer(
        student, SFTConfig(str(tmp_path / "run"), **args), train_dataset=rows, processing_class=tokenizer()
    )
    trainer.train()
    assert student.generation_config.temperature == 0.6
    saved = settings_of(tmp_path / "run" / "checkpoint-1")
    assert (saved["do_sample"], saved["temperature"], saved["pad_token_id"]) == (False, 0.6, 0)


def same_tokens(source, **options):
    """Whether teacher and a student with nothing but the teacher's attention generate the same by their own settings."""
    student = XLSTMHybridForCausalLM.from_teacher(source, layer_types="teacher")
    models = student, AutoModelForCausalLM.from_pretrained(source)
    ours, theirs = (model.eval().generate(IDS, **options) for model in models)
    return torch.equal(ours, theirs), ours.shape[1] - IDS.shape[1]


def test_a_student_generates_by_its_teachers_settings(tmp_path):
    first = teacher("llama").generate(IDS, max_new_tokens=1, do_sample=False)[0, -1].item()
    cases = [
        ({"max_new_tokens": 5, "repetition_penalty": 3.0}, 5),
        ({"max_new_tokens": 6, "eos_token_id": [99, first]}, 1),
        ({"max_new_tokens": 6, "eos_token_id": first, "min_new_tokens": 4}, None),
        ({"max_new_tokens": 3, "suppress_tokens": [first], "no_repeat_ngram_size": 2}, 3),
    ]
    for n, (settings, length) in enumerate(cases):
        equal, new = same_tokens(save_teacher(tmp_path / str(n), **settings))
        assert equal and new == length or (length is None and equal and new >= 4)


def test_settings_that_stand_in_config_json_are_the_students_as_well(tmp_path):
    teacher("llama").save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "generation_config.json").unlink()
    edit_config(tmp_path / "old", repetition_penalty=3.0, max_new_tokens=5)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "old").generation_config
    convert(tmp_path / "old", tmp_path / "out", sliding_window=7)
    direct = XLSTMHybridForCausalLM.from_teacher(tmp_path / "old", sliding_window=7).generation_config
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert stock.repetition_penalty == direct.repetition_penalty == converted.repetition_penalty
    assert stock.max_new_tokens == direct.max_new_tokens == converted.max_new_tokens


def test_scores_are_greedy_whatever_the_checkpoint_says(tmp_path):
    class Task:
        prompt, answer = "w5 w6 w7", "w8 w9"

    plain = XLSTMHybridForCausalLM.from_teacher(teacher("llama"), sliding_window=7)
    wanted = exact_match(plain, tokenizer(), [Task]).samples
    odd = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "min_new_tokens": 3, "stop_strings": ["w"]}
    odd |= {"no_repeat_ngram_size": 1, "suppress_tokens": list(range(3, 90)), "num_beams": 3, "forced_eos_token_id": 1}
    model = XLSTMHybridForCausalLM.from_teacher(save_teacher(tmp_path / "teacher", **odd), sliding_window=7)
    assert exact_match(model, tokenizer(), [Task]).samples == wanted
    assert model.generation_config.repetition_penalty == 5.0


# --- what is asked of the wrong class --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "olmo2"])
@pytest.mark.parametrize("cls", [XLSTMHybridForCausalLM, XLSTMHybridModel, DistilXLSTMForCausalLM])
def test_a_teacher_is_no_student(cls, family, tmp_path):
    teacher(family).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"model_type is '{family}', expected '\w*xlstm\w*': .*from_teacher\(TEACHER\), or"
    ):
        cls.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="AutoModelForCausalLM.from_pretrained"):
        XLSTMHybridConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("cls", [XLSTMHybridForCausalLM, DistilXLSTMForCausalLM])
def test_arguments_of_transformers_are_taken_or_named(cls):
    assert {cls.from_teacher(teacher("llama"), **how).dtype for how in ({"dtype": "auto"}, {})} == {torch.float32}
    for how in ({"torch_dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}):
        assert cls.from_teacher(teacher("llama"), **how).dtype == torch.bfloat16
    for name, way in {
        "device_map": r"move it with .to\(device\)",
        "attn_implementation": "set_attn_implementation",
        "quantization_config": "save it and load it with from_pretrained",
        "trust_remote_code": "pass the model",
    }.items():
        with pytest.raises(ConfigError, match=f"{name}: .*{way}"):
            cls.from_teacher(teacher("llama"), **{name: "auto"})
