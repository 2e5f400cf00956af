"""The command line that every job has: `python -m jobs.NAME [--config FILE] [key=value ...]`."""

import argparse
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from pipelines.config import Config, load
from pipelines.errors import Unfinished, UserError, shown
from pipelines.secrets import redacted
from pipelines.storage import Unfit


def command(
    name: str,
    about: str,
    sections: tuple[str, ...],
    run: Callable[[Config], None],
    file: str | None = None,
    flags: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Parse, check, run. Exit 2 for what the user must mend, 1 for what a further run may finish.

    `flags`: short for overrides, such as {"--dry-run": ["cache.dry_run=true"]}.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m jobs.{name}",
        description=about,
        epilog=_keys(sections),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", default=file, help="YAML file, e.g. jobs/configs/paper.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="what to change in it")
    for flag, overrides in (flags or {}).items():
        told = f"short for {' '.join(overrides)}".replace("%", "%%")
        parser.add_argument(flag, dest="flags", action="append_const", const=overrides, help=told)
    arguments = parser.parse_args()
    try:
        config = load(arguments.config, [*chain(*getattr(arguments, "flags", None) or []), *arguments.overrides])
        run(config)
    except UserError as error:
        print(f"{name}: {shown(error)}", file=sys.stderr)
        sys.exit(2)
    except Unfinished as error:
        print(f"{name}: {shown(error)}", file=sys.stderr)
        sys.exit(1)
    except Unfit as error:
        print(f"{name}: {shown(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{name}: {shown(error)}. If that passes, the same command goes on from here", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except Exception:  # a defect of ours, which may quote anything
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(1)


def _keys(sections: tuple[str, ...]) -> str:
    lines = ["keys that this job reads (key=default: meaning):"]
    for name, field in Config.model_fields.items():
        if name in ("seed", "out"):
            lines.append(f"  {name}={field.default}: {field.description}")
    for section in sections:
        lines += _section_keys(section, type(Config.model_fields[section].default))
    return "\n".join(lines)


def _section_keys(prefix: str, section: type[BaseModel]) -> list[str]:
    lines = [f"\n  {prefix}: {(section.__doc__ or '').strip()}"]
    inner = []
    for name, field in section.model_fields.items():
        if isinstance(field.default, BaseModel):
            inner += _section_keys(f"{prefix}.{name}", type(field.default))
            continue
        default = list(field.default) if isinstance(field.default, dict) and field.default else field.default
        required = "" if field.is_required() else f"={default}"
        words = ", ".join(_words(field.annotation))
        told = "; ".join(filter(None, [field.description, words and f"one of {words}"]))
        lines.append(f"    {prefix}.{name}{required}{f': {told}' if told else ''}")
        for value in get_args(field.annotation):  # a table or a list of sections
            if isinstance(value, type) and issubclass(value, BaseModel):
                place = ".NAME" if isinstance(field.default, dict) else "[]"
                inner += _section_keys(f"{prefix}.{name}{place}", value)
    return lines + inner


def _words(annotation: Any) -> list[str]:
    """Those that a value may be, where it may be no others, or a number."""
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    several = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    return [word for each in several for word in _words(each)]
