"""The command line that every job has: `python -m jobs.NAME [--config FILE] [key=value ...]`."""

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

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
    """Parse, check, run; the last line and the exit code say what came of it.

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
    parser.add_argument("--check", action="store_true", help="only check the configuration, and print it whole")
    arguments = parser.parse_intermixed_args()  # flags may stand between keys
    with ending(name):
        config = load(arguments.config, [*chain(*getattr(arguments, "flags", None) or []), *arguments.overrides])
        if arguments.check:
            print(config.model_dump_json(indent=1))
        else:
            run(config)


@contextmanager
def ending(name: str) -> Iterator[None]:
    """However a command ends, its exit code and its last line say how (docs/submitting.md lists both)."""
    stop = _Stop(name)
    try:
        yield
    except UserError as error:
        end(2, f"{name}: {shown(error)}")
    except Unfinished as error:
        end(1, f"{name}: {shown(error)}")
    except Unfit as error:
        end(2, f"{name}: {shown(error)}")
    except OSError as error:
        end(1, f"{name}: {shown(error)}. If that passes, the same command goes on from here")
    except KeyboardInterrupt:
        end(130, f"{name}: interrupted; the same command goes on from here")
    except (Stopped, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code != signal.SIGTERM:  # that is how Ray words it while it connects
            raise
        stop.end()
    except Exception as error:
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)  # a defect of ours, which may quote anything
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        end(1, f"{name}: stopped by what nobody expected ({shown(said)}); what is made stays")


def end(code: int, said: str) -> NoReturn:
    sys.stdout.flush()
    print(said, file=sys.stderr, flush=True)
    sys.exit(code)


STOPPED = 128 + signal.SIGTERM
GRACE = 1.5  # seconds from SIGTERM to the end: `ray job stop` kills after 3


class Stopped(BaseException):
    """SIGTERM: `ray job stop`, Kubernetes or Slurm want the job to end."""


class _Stop:
    """SIGTERM unwinds the job as Ctrl-C does. If that takes too long, a thread ends it, and nothing is lost: what a job
    has made is whole at any moment.
    """

    def __init__(self, name: str) -> None:
        self._said = threading.Lock()
        self._line = f"{name}: stopped by SIGTERM; what is made stays, and the same command goes on from there\n"
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        # Python runs a handler between two of its own instructions, which a call of a library may delay.
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._raise)
        threading.Thread(target=self._watch, args=(told,), daemon=True).start()

    def _raise(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would break off the unwinding
        raise Stopped

    def _watch(self, told: int) -> None:
        while os.read(told, 1)[0] != signal.SIGTERM:
            pass
        threading.Event().wait(GRACE)
        self._say()
        os._exit(STOPPED)

    def _say(self) -> None:
        if self._said.acquire(blocking=False):
            os.write(2, self._line.encode())

    def end(self) -> NoReturn:
        sys.stdout.flush()
        self._say()
        sys.exit(STOPPED)


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
