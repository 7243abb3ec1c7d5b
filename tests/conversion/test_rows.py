"""A token without a row in the embedding is named before a model reads it: at conversion, by every trainer and in
evaluation, with its id, the number of rows and the two ways out.
"""

import warnings
from types import SimpleNamespace as Example

import pytest
import torch
from datasets import Dataset
from test_alignment import collate
from tiny_teachers import teacher
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from xlstm_hybrid import XLSTMHybridForCausalLM
from xlstm_hybrid.checkpoint.tokenizer import check_rows
from xlstm_hybrid.conversion.convert import convert
from xlstm_hybrid.distil_xlstm.modeling import DistilXLSTMForCausalLM
from xlstm_hybrid.distil_xlstm.trainer import DeltaKDConfig, DeltaKDTrainer
from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.evaluation.scores import exact_match, perplexity
from xlstm_hybrid.training.alignment import AlignmentConfig, AlignmentTrainer
from xlstm_hybrid.training.alignment_by_groups import align_streamed
from xlstm_hybrid.training.distillation import SparseKDConfig, SparseKDTrainer, document_dataset
from xlstm_hybrid.training.on_policy import OnPolicyKDConfig, OnPolicyKDTrainer

ROWS = 101  # of the small teachers
WAYS_OUT = r"has id 101, but the embedding has 101 rows \(ids 0 to 100\): call model.resize_token_embeddings.*; or "
PAD, DATA = (
    rf"student: the pad_token '\[PAD\]' {WAYS_OUT}set another one",
    rf"the token of the data '<tool>' {WAYS_OUT}leave it",
)


def tokenizer(words=ROWS, **special):
    vocabulary = {f"w{n}": n for n in range(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, **{"pad_token": "w0", "eos_token": "w1"} | special)


def padded_beyond():
    """As many shared fine-tunes: a padding token was added, a row for it was not."""
    made = tokenizer()
    made.add_special_tokens({"pad_token": "[PAD]"})
    return made


def with_a_tool():
    made = tokenizer()
    made.add_special_tokens({"extra_special_tokens": ["<tool>"]})
    return made


def rows_of(ids):
    return Dataset.from_list([{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}] * 4)


def student():
    return XLSTMHybridForCausalLM.from_teacher(teacher("llama"), sliding_window=7)


SHARED = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "bf16": False}
SHARED |= {"save_strategy": "no", "disable_tqdm": True, "remove_unused_columns": False}
PACKED = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}


def aligning(out, tokenizer, ids):
    args = AlignmentConfig(out, **SHARED, **PACKED)
    return AlignmentTrainer(
        student(), args, train_dataset=rows_of(ids), data_collator=collate, processing_class=tokenizer
    )


def distilling(out, tokenizer, ids):
    data = document_dataset([(ids, ids)] * 4)
    args = SparseKDConfig(out, top_k=8, **SHARED, **PACKED)
    return SparseKDTrainer(student(), teacher("llama"), args, train_dataset=data, processing_class=tokenizer)


def recurrent(out, tokenizer, ids):
    data, args = document_dataset([(ids, ids)] * 4), DeltaKDConfig(out, **SHARED, **PACKED)
    made = DistilXLSTMForCausalLM.from_teacher(teacher("llama"))
    return DeltaKDTrainer(made, teacher("llama"), args, train_dataset=data, processing_class=tokenizer)


def sampling(out, tokenizer, ids):
    data = Dataset.from_dict({"prompt": [tokenizer.decode(ids)] * 4})
    args = OnPolicyKDConfig(out, max_completion_length=2, **SHARED)
    return OnPolicyKDTrainer(student(), teacher("llama"), args=args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("make", [aligning, distilling, recurrent, sampling])
def test_every_trainer_names_padding_without_a_row_when_it_is_made_and_other_tokens_where_data_has_them(make, tmp_path):
    with pytest.raises(ConfigError, match=PAD):
        make(str(tmp_path), padded_beyond(), [5, 6, 7])
    make(str(tmp_path), with_a_tool(), [5, 6, 7])  # a token that never occurs does no harm
    with pytest.raises(ConfigError, match=DATA):
        make(str(tmp_path), with_a_tool(), [5, 101, 7]).train()


def test_alignment_by_groups_names_them_as_well(tmp_path):
    convert(teacher("llama"), tmp_path / "student", sliding_window=7)
    args = AlignmentConfig(str(tmp_path / "run"), layers_at_a_time=2, **SHARED, **PACKED)
    for made, ids, message in (padded_beyond(), [5, 6, 7], PAD), (with_a_tool(), [5, 101, 7], DATA):
        with pytest.raises(ConfigError, match=message):
            align_streamed(tmp_path / "student", tmp_path / "out", args, rows_of(ids), collate, made)


def test_conversion_refuses_a_special_token_without_a_row_and_notes_others(tmp_path):
    for name, made in ("pad", padded_beyond()), ("tool", with_a_tool()), ("whole", tokenizer()):
        teacher("llama").save_pretrained(tmp_path / name)
        made.save_pretrained(tmp_path / name)
    with pytest.raises(ConfigError, match=PAD.replace("student", "pad")):
        convert(tmp_path / "pad", tmp_path / "out", sliding_window=7)
    assert not (tmp_path / "out").exists()
    with pytest.warns(
        UserWarning, match="tool: 1 tokens of its tokenizer have no embedding row, the first '<tool>' with id 101"
    ):
        convert(tmp_path / "tool", tmp_path / "out", sliding_window=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        convert(tmp_path / "whole", tmp_path / "whole_out", sliding_window=7)


def test_evaluation_names_them_for_student_and_teacher():
    for model in student(), teacher("llama"):
        for made, prompt, message in (
            (padded_beyond(), "w5", "pad_token '\\[PAD\\]'"),
            (with_a_tool(), "w5 <tool>", "'<tool>'"),
        ):
            with pytest.raises(ConfigError, match=f"{message} {WAYS_OUT}"):
                exact_match(model, made, [Example(prompt=prompt, answer="w6")])
        row = [5, 101, 6]
        with pytest.raises(ConfigError, match=f"'<tool>' {WAYS_OUT}"):
            perplexity(model, [(row, row)], tokenizer=with_a_tool())
        with pytest.raises(ConfigError, match=f"token of the data {WAYS_OUT}"):
            perplexity(model, [(row, row)])
        assert not model.get_input_embeddings()._forward_pre_hooks


def test_both_ways_out_lead_out():
    made, model = padded_beyond(), student()
    model.resize_token_embeddings(len(made))
    check_rows(made, len(model.get_input_embeddings().weight), "student")
    assert exact_match(model, made, [Example(prompt="w5", answer="w6")]).score in (0.0, 1.0)
    made.pad_token = made.eos_token
    check_rows(made, ROWS, "student")


def test_an_end_that_cannot_be_generated_is_no_padding_of_prompts():
    model = student()
    model.generation_config.eos_token_id = [500, 1]
    assert (
        len(
            exact_match(
                model, tokenizer(), [Example(prompt="w5", answer="w6"), Example(prompt="w5 w6 w7", answer="w8")]
            ).samples
        )
        == 2
    )
    assert torch.equal(torch.tensor(model.generation_config.eos_token_id), torch.tensor([500, 1]))
