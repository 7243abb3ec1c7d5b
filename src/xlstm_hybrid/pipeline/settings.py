"""From a recipe's section, and options of the command line under the same names, to a trainer's config."""

import argparse
import difflib
import os
from dataclasses import fields

import torch

from xlstm_hybrid.errors import ConfigError, XLSTMHybridError

SEQUENCES = "sequences_per_step"  # ours: rows per optimiser step over all processes; the accumulation follows from it
SHARED = {  # of every training stage; a recipe may say otherwise, and bf16 is what the machine does well
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 10,
    "remove_unused_columns": False,
    "gradient_checkpointing": False,
    "packing": False,
    "max_length": None,
    "dataset_kwargs": {"skip_prepare_dataset": True},
}


def processes():
    """Number of training processes, as torchrun and `accelerate launch` tell it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main():
    return int(os.environ.get("RANK", 0)) == 0


class Parser:
    """Options of a trainer's config: their names, and how text becomes their values, both from its dataclass."""

    def __init__(self, config):
        from transformers import HfArgumentParser

        silent = {"allow_abbrev": False, "add_help": False, "argument_default": argparse.SUPPRESS}
        self.parser, self.name = HfArgumentParser(config, **silent), config.__name__
        self.parser.error = self.refuse
        known = {f.name for f in fields(config) if f.init}
        self.options = {a.dest: a for a in self.parser._actions if a.dest in known}
        for action in self.parser._actions:
            action.default, action.required = argparse.SUPPRESS, False
        self.parser.add_argument(f"--{SEQUENCES}", type=int)

    def refuse(self, message):
        raise ConfigError(f"{self.name}: {message}")

    def parse(self, arguments):
        """`{name: value}` of the options that are given, and of no others."""
        found, rest = self.parser.parse_known_args(list(arguments))
        if rest:
            self.check([rest[0].split("=")[0].lstrip("-")], "the command line")
            self.refuse(
                f"{rest[0]!r} belongs to no option; give options as --name value, behind the positional arguments"
            )
        return vars(found)

    def check(self, names, where):
        """Raise ConfigError for a name that the config does not have."""
        for name in names:
            if name not in self.options and name != SEQUENCES:
                close = difflib.get_close_matches(name, [*self.options, SEQUENCES], n=3)
                hint = f"; did you mean {' or '.join(close)}?" if close else ": docs/recipes.md lists them"
                raise ConfigError(f"{where}: {self.name} has no setting {name!r}{hint}")

    def typed(self, settings, where):
        """The settings with numbers for text where a number is wanted: YAML reads 1e-5 as text."""
        result = dict(settings)
        for name, value in settings.items():
            kind = getattr(self.options.get(name), "type", None)
            if isinstance(value, str) and kind in (int, float):
                try:
                    result[name] = kind(value)
                except ValueError as error:
                    raise ConfigError(f"{where}.{name}={value!r}: expected a number of type {kind.__name__}") from error
        return result


def parse_overrides(config, arguments):
    """Settings from the command line, `["--learning_rate", "1e-5"]` -> `{"learning_rate": 1e-5}`; ConfigError for an
    option that the config does not have, or a value of a wrong type.
    """
    return Parser(config).parse(arguments)


def batch_of(settings, where, world=None):
    """`(rows per process and micro-step, accumulation)` of a section.

    Raises:
        ConfigError: sequences_per_step beside an accumulation, or no multiple of what the processes take at a time.
    """
    world, sequences = world or processes(), settings.get(SEQUENCES)
    micro = settings.get("per_device_train_batch_size", 8 if sequences is None else 1)
    if sequences is None:
        return micro, settings.get("gradient_accumulation_steps", 1)
    if "gradient_accumulation_steps" in settings:
        raise ConfigError(
            f"{where}: {SEQUENCES} and gradient_accumulation_steps; the one follows from the other, give one of them"
        )
    if sequences % (micro * world):
        raise ConfigError(
            f"{where}: {SEQUENCES}={sequences} is no multiple of {micro} rows (per_device_train_batch_size) x {world} processes; "
            "change one of the three"
        )
    return micro, sequences // (micro * world)


def row_count(settings, where):
    """Rows that a section reads in all, over all processes.

    Raises:
        ConfigError: none, as the recipe has no stage I.
    """
    if not settings["max_steps"]:
        raise ConfigError(f"{where}.max_steps=0: the recipe has no such stage; set it, or go on with the next one")
    micro, accumulation = batch_of(settings, where)
    return settings["max_steps"] * micro * accumulation * processes()


def trainer_config(config, settings, where, work, seed):
    """A trainer's config: the recipe's settings over what every stage shares.

    Args:
        config: class of the config.
        settings: the recipe's section with what the command line says otherwise.
        where: name of the section, for errors.
        work: directory for what the trainer leaves while it runs.
    Raises:
        ConfigError: a setting that the config does not have, or refuses.
    """
    parser = Parser(config)
    parser.check(settings, where)
    if "output_dir" in settings:
        raise ConfigError(
            f"{where}.output_dir={settings['output_dir']!r}: a stage writes where its command or the recipe's `out` says, and looks there "
            "when it goes on; leave it out"
        )
    settings = parser.typed(settings, where)
    micro, accumulation = batch_of(settings, where)
    settings.pop(SEQUENCES, None)
    settings |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
    ours = {**SHARED, "output_dir": str(work), "seed": seed, "use_cpu": not torch.cuda.is_available()}
    ours = {name: value for name, value in ours.items() if name in parser.options}
    try:
        return config(**{**ours, **settings})
    except XLSTMHybridError:
        raise
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: {config.__name__} refuses its settings ({reason})") from error
