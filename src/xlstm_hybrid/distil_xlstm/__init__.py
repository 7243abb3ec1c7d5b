"""Distil-xLSTM: a small, fully recurrent student of sLSTM and mLSTM blocks that keeps its teacher's embeddings
(Thiombiano et al. 2025).
"""

from xlstm_hybrid.distil_xlstm.configuration import DistilXLSTMConfig
from xlstm_hybrid.distil_xlstm.convert import convert, share_frozen
from xlstm_hybrid.distil_xlstm.modeling import DistilXLSTMForCausalLM, DistilXLSTMModel
from xlstm_hybrid.distil_xlstm.transfer import DistilReport

__all__ = ["DistilReport", "DistilXLSTMConfig", "DistilXLSTMForCausalLM", "DistilXLSTMModel", "convert", "share_frozen"]
