"""What pydantic says of a configuration, in one line for the person who wrote it."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, tree: Any, root: type[BaseModel]) -> str:
    """In one line what is wrong first; where a value may be of several types, what each of them wants."""
    errors = error.errors()
    loc, kind = errors[0]["loc"], errors[0]["type"]
    if kind == "extra_forbidden":
        return _explain_unknown(loc, root)
    places = [_written(each["loc"], tree) for each in errors]
    same = [i for i, each in enumerate(errors) if each["loc"][: len(places[0])] == loc[: len(places[0])]]
    at = max(same, key=lambda i: len(places[i]))
    key, value = ".".join(map(str, places[at])), f"={errors[at]['input']}"
    if loc[-1] == "[key]":
        value = ""
    elif kind == "missing":
        key, value = (f"{key}.{loc[-1]}", "") if isinstance(loc[-1], str) else (key, value)
    messages = [errors[i]["msg"].removeprefix("Value error, ").lower() for i in same if places[i] == places[at]]
    return f"{key}{value}: {', or '.join(dict.fromkeys(messages))}"


def _written(loc: tuple[int | str, ...], tree: Any) -> tuple[int | str, ...]:
    """As much of a place as the user wrote: pydantic adds [key], or which type of several it tried."""
    for depth, part in enumerate(loc):
        if part in (tree if isinstance(tree, dict) else range(len(tree) if isinstance(tree, list | tuple) else 0)):
            tree = tree[part]
        elif depth + 1 < len(loc):
            return loc[:depth] + _written(loc[depth + 1 :], tree)
        else:
            return loc[:depth]
    return loc


def _explain_unknown(loc: tuple[int | str, ...], root: Any) -> str:
    section = root
    for part in loc[:-1]:
        if hasattr(section, "model_fields"):
            section = section.model_fields[part].annotation
        else:
            section = get_args(section)[-1]  # of a dict or a list
    allowed = list(section.model_fields)
    near = difflib.get_close_matches(str(loc[-1]), allowed, n=1)
    hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(allowed)}"
    return f"{'.'.join(map(str, loc))}: there is no such key; {hint}"
