"""The hybrid xLSTM student: configuration, model, mixer, cache."""
