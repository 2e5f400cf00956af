"""docs/configuration.md, every key of the configuration from the code that checks it:

python -m pipelines.reference > docs/configuration.md
"""

import json
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from pipelines.config import Config

HEAD = """# Every key of the configuration

A configuration is a YAML file (`--config`), then `key=value` behind the command: `cache.stride=4`. What is said on the
command line stands in place of what the file has there. A key that is not here, a value of another kind and what
cannot be together are refused in one line, with exit code 2, before anything starts. The whole configuration stands
beside every artifact as `config.json`, so it may hold no password (docs/safety.md). Places are local paths or `s3://`
addresses.

This page is made from `pipelines/config.py` by `python -m pipelines.reference > docs/configuration.md`."""
SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
PLAIN = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}


def page() -> str:
    plain = [name for name, field in Config.model_fields.items() if not isinstance(field.default, BaseModel)]
    lines = [HEAD, "", "## Above all sections", "", *_table("", Config, plain)]
    for name, field in Config.model_fields.items():
        if isinstance(field.default, BaseModel):
            lines += [*_section(name, type(field.default), "##")]
    return "\n".join(lines) + "\n"


def _section(prefix: str, section: type[BaseModel], mark: str, without: type[BaseModel] | None = None) -> Iterator[str]:
    """Its own keys, then the sections in it."""
    known = without.model_fields if without else {}
    yield from ("", f"{mark} {prefix}", "", (section.__doc__ or "").strip())
    if without:
        yield f"Each takes the keys of `{prefix.partition('.')[0]}` that say how it is sampled, and has besides:"
    yield ""
    fields = {name: field for name, field in section.model_fields.items() if name not in known}
    yield from _table(f"{prefix}.", section, [n for n, f in fields.items() if not isinstance(f.default, BaseModel)])
    for name, field in fields.items():
        if isinstance(field.default, BaseModel):
            yield from _section(f"{prefix}.{name}", type(field.default), "###")
        for inner in get_args(field.annotation):  # a table or a list of sections
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                bases = (base for base in inner.__mro__[1:] if issubclass(base, BaseModel) and base.model_fields)
                shared = next((base for base in bases if issubclass(section, base)), None)
                place = "NAME" if isinstance(field.default, dict) else "each"
                yield from _section(f"{prefix}.{name}.{place}", inner, "###", shared)


def _table(prefix: str, section: type[BaseModel], names: list[str]) -> Iterator[str]:
    schema = section.model_json_schema()
    yield "| key | may be | default | meaning |"
    yield "|---|---|---|---|"
    for name in names:
        field = section.model_fields[name]
        default = "-" if field.is_required() else f"`{_default(field.default)}`"
        told = schema["properties"][name]
        cells = (f"`{prefix}{name}`", _kind(told, schema.get("$defs", {})), default, field.description or "")
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(value: Any) -> str:
    return "null" if value is None else value if isinstance(value, str) and value else json.dumps(value)


def _kind(schema: dict[str, Any], known: dict[str, Any]) -> str:
    if "$ref" in schema:
        named = known[schema["$ref"].rpartition("/")[2]]
        return "section" if "properties" in named else _kind(named, known)
    if "anyOf" in schema:
        return ", or ".join(dict.fromkeys(_kind(each, known) for each in schema["anyOf"]))
    if words := schema.get("enum", [schema["const"]] if "const" in schema else None):
        return ", ".join(f"`{word}`" for word in words)
    if schema.get("type") == "array":
        inner = schema.get("prefixItems")
        if inner:
            return f"[{', '.join(_kind(each, known) for each in inner)}]"
        return f"list of {_kind(schema.get('items', {}), known)}"
    if schema.get("type") == "object":
        return (
            f"NAME: {_kind(inner, known)}" if isinstance(inner := schema.get("additionalProperties"), dict) else "keys"
        )
    kind = schema.get("format") or PLAIN.get(schema.get("type", ""), "any value")
    limits = [f"{sign} {schema[word]:g}" for word, sign in SIGNS.items() if word in schema]
    limits += [f"a multiple of {schema['multipleOf']}"] if "multipleOf" in schema else []
    return f"{kind} {', '.join(limits)}".strip()


if __name__ == "__main__":
    print(page(), end="")
