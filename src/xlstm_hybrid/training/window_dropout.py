"""Window dropout on a schedule: in training the window is hidden from some rows, so that the mLSTM has to carry what
they need.

Source: scheduled sliding-window dropout, Benfeghoul et al. 2025 (arXiv 2510.05901).
"""

from transformers import TrainerCallback

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.model.modeling import XLSTMHybridModel


class WindowDropoutSchedule(TrainerCallback):
    """Sets the students' `window_dropout` before each step, on a line from `start` to `end`; afterwards the config
    decides again.

    The step follows from `state.global_step`, so a resumed run goes on where the other stopped. Evaluation hides
    nothing.

    Args:
        start, end: probabilities that a row does without its window, of the first step and from step `steps` on; end
            None: as at the start.
        steps: optimizer steps from start to end; None: those of the run.
    Raises:
        ConfigError: a probability that is not in [0, 1), fewer than one step, or, when training begins, a model without
            hybrid layers.
    """

    def __init__(self, start, end=None, steps=None):
        self.start, self.end, self.steps = start, start if end is None else end, steps
        for name, p in (("window_dropout", self.start), ("window_dropout_end", self.end)):
            if not 0 <= p < 1:
                raise ConfigError(f"{name}={p}: expected a probability of at least 0 and below 1")
        if steps is not None and steps < 1:
            raise ConfigError(
                f"steps={steps}: expected at least 1 step of window dropout, or None for those of the run"
            )

    def at(self, step, of):
        """Probability of a step, counted from 0, in a run of `of` steps."""
        # the last step of a run has the end itself
        share = min(step / max((self.steps or of) - (self.steps is None), 1), 1.0)
        return self.start + (self.end - self.start) * share

    def assign(self, model, p):
        students = [module for module in model.modules() if isinstance(module, XLSTMHybridModel)]
        if not students or any(s.config.mixer_branches != "both" or s.config.mixer_combine != "gate" for s in students):
            raise ConfigError(
                f"window_dropout on a {type(model).__name__}: expected a hybrid student with both branches and a gate; leave it out"
            )
        for student in students:
            student.window_dropout = p

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.assign(model, self.at(state.global_step, state.max_steps))

    on_train_begin = on_step_begin

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.assign(model, None)
