"""The commands of the command line: `xlstm-hybrid plan-layers` is the function `plan_layers` of `plan_layers.py`, listed in `cli.COMMANDS`.

A module here is imported when its command is called, so its imports stand at its top. The first line of a docstring is the command's line in the
help of the whole; its last paragraph is an example.
"""
