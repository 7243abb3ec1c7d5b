"""Kernels of the hybrid layer: one public function per operation, every backend proven against a plain definition."""

from xlstm_kernels.decode import hybrid_step, mlstm_step, window_step
from xlstm_kernels.delta import delta, delta_hybrid_step, delta_step
from xlstm_kernels.head_loss import HeadLoss, head_loss
from xlstm_kernels.mix import mix
from xlstm_kernels.mlstm import BACKENDS, mlstm
from xlstm_kernels.reference import MLSTMState, fresh_state, mlstm_chunkwise, mlstm_parallel, mlstm_recurrent
from xlstm_kernels.slstm import SLSTMState, slstm
from xlstm_kernels.window import window_attention

__all__ = ["BACKENDS", "HeadLoss", "MLSTMState", "SLSTMState", "delta", "delta_hybrid_step", "delta_step", "fresh_state", "head_loss",
           "hybrid_step", "mix", "mlstm", "mlstm_chunkwise", "mlstm_parallel", "mlstm_recurrent", "mlstm_step", "slstm",
           "window_attention", "window_step"]  # fmt: skip
