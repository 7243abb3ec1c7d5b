"""Hybrid xLSTM students of pretrained Transformers. Importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from xlstm_hybrid.configuration import XLSTMHybridConfig
from xlstm_hybrid.conversion import TransferReport, convert
from xlstm_hybrid.modeling import XLSTMHybridForCausalLM, XLSTMHybridModel

__version__ = "0.1.0"
__all__ = ["TransferReport", "XLSTMHybridConfig", "XLSTMHybridForCausalLM", "XLSTMHybridModel", "convert"]

AutoConfig.register(XLSTMHybridConfig.model_type, XLSTMHybridConfig, exist_ok=True)
AutoModel.register(XLSTMHybridConfig, XLSTMHybridModel, exist_ok=True)
AutoModelForCausalLM.register(XLSTMHybridConfig, XLSTMHybridForCausalLM, exist_ok=True)
