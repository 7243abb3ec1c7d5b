"""Hybrid xLSTM students of pretrained Transformers. Importing this package registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from xlstm_hybrid.conversion.convert import TransferReport, convert, from_teacher
from xlstm_hybrid.distil_xlstm import DistilXLSTMConfig, DistilXLSTMForCausalLM, DistilXLSTMModel
from xlstm_hybrid.model.configuration import XLSTMHybridConfig
from xlstm_hybrid.model.modeling import (
    XLSTMHybridForCausalLM,
    XLSTMHybridForQuestionAnswering,
    XLSTMHybridForSequenceClassification,
    XLSTMHybridForTokenClassification,
    XLSTMHybridModel,
)

__version__ = "0.1.0"
STATE = ("fork", "load_state", "prefill", "remember", "restore", "rollback", "save_state", "snapshot")
__all__ = [
    "DistilXLSTMConfig",
    "DistilXLSTMForCausalLM",
    "DistilXLSTMModel",
    "TransferReport",
    "XLSTMHybridConfig",
    "XLSTMHybridForCausalLM",
    "XLSTMHybridForQuestionAnswering",
    "XLSTMHybridForSequenceClassification",
    "XLSTMHybridForTokenClassification",
    "XLSTMHybridModel",
    "convert",
    *STATE,
]

XLSTMHybridForCausalLM.teacher_loader = from_teacher  # what its classmethod `from_teacher` calls
AutoConfig.register(XLSTMHybridConfig.model_type, XLSTMHybridConfig, exist_ok=True)
AutoModel.register(XLSTMHybridConfig, XLSTMHybridModel, exist_ok=True)
AutoModelForCausalLM.register(XLSTMHybridConfig, XLSTMHybridForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(XLSTMHybridConfig, XLSTMHybridForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(XLSTMHybridConfig, XLSTMHybridForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(XLSTMHybridConfig, XLSTMHybridForQuestionAnswering, exist_ok=True)
AutoConfig.register(DistilXLSTMConfig.model_type, DistilXLSTMConfig, exist_ok=True)
AutoModel.register(DistilXLSTMConfig, DistilXLSTMModel, exist_ok=True)
AutoModelForCausalLM.register(DistilXLSTMConfig, DistilXLSTMForCausalLM, exist_ok=True)


def __getattr__(name):
    """What `xlstm_hybrid.state` has to offer, imported when it is asked for."""
    if name in STATE:
        from xlstm_hybrid import state

        return getattr(state, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *STATE})
