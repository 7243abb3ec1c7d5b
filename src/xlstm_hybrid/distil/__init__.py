"""Distil-xLSTM: a small, fully recurrent student of sLSTM and mLSTM blocks that keeps its teacher's embeddings (METHOD 3)."""

from xlstm_hybrid.distil.configuration import DistilXLSTMConfig
from xlstm_hybrid.distil.modeling import DistilXLSTMForCausalLM, DistilXLSTMModel
from xlstm_hybrid.distil.teacher import DistilReport, convert, share_frozen

__all__ = ["DistilReport", "DistilXLSTMConfig", "DistilXLSTMForCausalLM", "DistilXLSTMModel", "convert", "share_frozen"]
