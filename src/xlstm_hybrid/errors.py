"""The named errors. Each message says what failed, where, expected against found, and the next step."""


class XLSTMHybridError(ValueError):
    """Base class of every error that this package raises for bad input."""


class ConfigError(XLSTMHybridError):
    """A configuration that describes no model, or no run."""


class UnsupportedTeacherError(XLSTMHybridError):
    """The teacher's family, quantisation or layer types are not ones that we can convert."""


class CheckpointError(XLSTMHybridError):
    """A checkpoint directory lacks a file or a tensor, or holds one that does not fit."""


class CheckpointWriteError(XLSTMHybridError):
    """A checkpoint could not be written; whatever was there before is untouched."""


class WaitError(XLSTMHybridError):
    """Another process was waited for, and did not come to an end in time, or came to a bad one."""


class DataError(XLSTMHybridError):
    """Training or evaluation data that cannot be used."""


class CacheError(XLSTMHybridError):
    """A cache that does not belong to this model, or an operation that its recurrent state cannot do."""


class CompatibilityError(XLSTMHybridError):
    """The installed transformers does something that this package does not know, or does it otherwise."""


class CompatibilityWarning(UserWarning):
    """A library is not as the tested ones: a newer transformers runs unchecked, because the user says so, or a quick way is
    not taken.
    """


class ConfigWarning(UserWarning):
    """A student whose configuration is not the one that its weights were trained with."""


class MergeError(XLSTMHybridError):
    """Checkpoints that cannot be merged."""


class EvaluationError(XLSTMHybridError):
    """Results that cannot be compared."""


class StoreError(XLSTMHybridError):
    """A store of teacher targets that is damaged, incomplete, or was made for something else."""


class AdapterError(XLSTMHybridError):
    """Adapters that match nothing in the model, or cannot be used with it."""


class ShareError(XLSTMHybridError):
    """A checkpoint that must not leave this machine as it is."""
