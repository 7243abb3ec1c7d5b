"""Arguments and options that several commands share, and how they are read."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from xlstm_hybrid.errors import ConfigError
from xlstm_hybrid.pipeline import parse_overrides

Student = Annotated[Path, Argument(help="Student: checkpoint directory.")]
Teacher = Annotated[str, Argument(help="Teacher: checkpoint directory, hub id or GGUF file.")]
Out = Annotated[Path, Argument(help="Directory of the student, made new.")]
Recipe = Annotated[Path, Option("--recipe", help="Recipe with the settings and the data of the stage.")]
Expert = Annotated[str | None, Option("--expert", help="Expert of the recipe; its only one by default.")]
Revision = Annotated[str | None, Option("--revision", help="Commit, tag or branch of a hub id.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace what is at OUT, once the new one is complete.")]
TINY = Path("recipes/tiny.yaml")


def overrides_of(context, config, *arguments):
    """The options of a trainer's config that stand behind a command's own, as `{name: value}`."""
    if misplaced := next((str(a) for a in arguments if str(a).startswith("-")), None):
        raise ConfigError(
            f"{misplaced}: options of {config.__name__} come behind the positional arguments: move them there"
        )
    return parse_overrides(config, context.args)
