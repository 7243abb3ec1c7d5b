"""The verbs of the command line, one file per stage. Each module lists its functions in `VERBS`; `cli` finds them. Imports inside functions only,
so that `--help` stays quick."""
