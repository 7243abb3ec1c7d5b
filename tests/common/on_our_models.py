"""transformers' own common tests for our model classes. What we refuse by design is in EXCLUDED, and has to fail."""

import unittest

import pytest
import torch
from suite import part
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

import xlstm_hybrid as ours

ConfigTester = part("test_configuration_common").ConfigTester
common = part("test_modeling_common")
TensorParallelTesterMixin = part("test_tensor_parallel_mixin").TensorParallelTesterMixin
TrainingTesterMixin = part("test_training_mixin").TrainingTesterMixin

NAMES = {  # the suite looks up here which class is the base model, and which labels a class takes
    "MODEL_MAPPING_NAMES": {"xlstm_hybrid": "XLSTMHybridModel", "distil_xlstm": "DistilXLSTMModel"},
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": {
        "xlstm_hybrid": "XLSTMHybridForCausalLM",
        "distil_xlstm": "DistilXLSTMForCausalLM",
    },
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": {"xlstm_hybrid": "XLSTMHybridForSequenceClassification"},
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": {"xlstm_hybrid": "XLSTMHybridForTokenClassification"},
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": {"xlstm_hybrid": "XLSTMHybridForQuestionAnswering"},
}
for table, names in NAMES.items():
    getattr(modeling_auto, table).update(names)

EXCLUDED = {"test_generation_tester_mixin_inheritance": "not in the distribution; ours: tests/model/test_generation.py"}


class Tiny:
    """Makes the models and inputs that the suite asks for."""

    batch_size, seq_length, is_training = 3, 7, True
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}

    def __init__(self, config_class, causal_lm_class, fields):
        self.config_class, self.causal_lm_class, self.fields = config_class, causal_lm_class, fields
        vars(self).update(self.sizes)

    def get_config(self):
        return self.config_class(pad_token_id=0, bos_token_id=1, eos_token_id=2, **self.sizes, **self.fields)

    def prepare_config_and_inputs_for_common(self):
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids, device=torch_device)}


class Suite(common.ModelTesterMixin, TrainingTesterMixin, TensorParallelTesterMixin):
    test_can_init_all_missing_weights_before_2023 = True  # our files name no year
    model_tester, fields = None, {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name, reason in EXCLUDED.items():
            setattr(cls, name, pytest.mark.xfail(strict=True, reason=reason)(getattr(cls, name)))

    def setUp(self):
        self.model_tester = Tiny(self.all_model_classes[0].config_class, self.all_model_classes[1], self.fields)

    def test_config(self):
        ConfigTester(self, config_class=self.model_tester.config_class, hidden_size=36).run_common_tests()


class HybridTest(Suite, unittest.TestCase):
    all_model_classes = (
        ours.XLSTMHybridModel,
        ours.XLSTMHybridForCausalLM,
        ours.XLSTMHybridForSequenceClassification,
        ours.XLSTMHybridForTokenClassification,
        ours.XLSTMHybridForQuestionAnswering,
    )
    fields = {
        "num_key_value_heads": 2,
        "intermediate_size": 37,
        "sliding_window": 4,
        "num_sink_tokens": 2,
        "max_position_embeddings": 64,
    }


class HybridBesideFullAttentionTest(HybridTest):
    fields = HybridTest.fields | {"layer_types": ["hybrid_sliding", "full_attention"]}


class DistilTest(Suite, unittest.TestCase):
    all_model_classes = (ours.DistilXLSTMModel, ours.DistilXLSTMForCausalLM)
    has_attentions = False
    fields = {
        "freeze_embeddings": False
    }  # the suite wants a gradient for every parameter, and hidden states that keep theirs
