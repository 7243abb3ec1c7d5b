"""Kernels of the hybrid layer: one public function per operation, every backend proven against a plain definition."""

from xlstm_kernels.delta_rule.op import delta, delta_hybrid_step, delta_step
from xlstm_kernels.head_loss.op import head_loss
from xlstm_kernels.head_loss.reference import HeadLoss

# of mix, mlstm, slstm and head_loss the function, not its folder, is `xlstm_kernels.NAME`
from xlstm_kernels.mix.op import mix
from xlstm_kernels.mlstm.op import BACKENDS, mlstm
from xlstm_kernels.mlstm.reference import MLSTMState, fresh_state, mlstm_chunkwise, mlstm_parallel, mlstm_recurrent
from xlstm_kernels.slstm.op import slstm
from xlstm_kernels.slstm.reference import SLSTMState
from xlstm_kernels.step.cpu import place_token
from xlstm_kernels.step.layer import layer_step, layer_step_runs
from xlstm_kernels.step.linear import linear_step, linear_step_runs
from xlstm_kernels.step.op import hybrid_step, mlstm_step, window_step
from xlstm_kernels.window.op import window_attention

__all__ = [
    "BACKENDS",
    "HeadLoss",
    "MLSTMState",
    "SLSTMState",
    "delta",
    "delta_hybrid_step",
    "delta_step",
    "fresh_state",
    "head_loss",
    "hybrid_step",
    "layer_step",
    "layer_step_runs",
    "linear_step",
    "linear_step_runs",
    "mix",
    "mlstm",
    "mlstm_chunkwise",
    "mlstm_parallel",
    "mlstm_recurrent",
    "mlstm_step",
    "place_token",
    "slstm",
    "window_attention",
    "window_step",
]
