"""Write the generated pages: configuration, commands and architectures in docs, and the tables of cluster/README.md.

They come from the configuration models, from the command line and from `ppcl plan`. Run `python docs/generate.py` after
a change of one; `tests/docs/test_reference.py` and `tests/ppcl/sizing/test_table.py` compare.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
import yaml
from pydantic.fields import FieldInfo

from jobs.cli.main import app
from jobs.cli.plan import default_config
from ppcl.config.loading import Section
from ppcl.config.location import Location
from ppcl.config.plan_defaults import BATCH, GPUS, INTERVAL, PROMPTS
from ppcl.config.schema import Config
from ppcl.models.architectures import COLUMNS, LEFT_OUT, architectures, cells
from ppcl.sizing import Device, layouts
from ppcl.sizing.fit import laid_out
from ppcl.sizing.job import job_size
from ppcl.sizing.memory import intervals
from ppcl.sizing.model import TeacherSize, model_of
from ppcl.sizing.stages import worker_sizes
from ppcl.sizing.table import JOB_COLUMNS, LAYOUT_COLUMNS, job_rows, rows_of
from serve.config import Served

DOCS = Path(__file__).parent

CONFIGURATION = """# Configuration reference

*Generated from `ppcl/config/schema.py`, `ppcl/config/sections/` and `serve/config.py` by `python docs/generate.py`.*

A job is one YAML file. `ppcl config` prints its keys with their defaults, `ppcl config --serve` those of serving.
`--set section.key=VALUE` overrides one key with a YAML value. For an unknown key or a value out of range, the error
names the key, the value seen and the valid values. Paths in a file are relative to the file. `output` is relative to
the working directory.
"""

COMMANDS = """# Command-line reference

*Generated from `jobs/cli` by `python docs/generate.py`.*

A command that fails because of its input prints one sentence and ends with exit code 2. Ctrl-C ends a command with exit
code 130.
"""


def configuration_page() -> str:
    """The page of all configuration keys, those of a job first."""
    parts = [CONFIGURATION, "\n## Jobs\n"]
    parts += _sections(Config)
    parts.append("\n## Serving { #serving }\n")
    parts += _sections(Served)
    return "".join(parts)


def _sections(model: type[Section]) -> Iterator[str]:
    """The tables of a model: its own keys, then one a section."""
    own = {k: f for k, f in model.model_fields.items() if not isinstance(f.default, Section)}
    yield "\n" + _table(own)
    for name, field in model.model_fields.items():
        if isinstance(field.default, Section):
            yield f"\n### `{name}`\n\n{_one_line(type(field.default).__doc__ or '')}\n\n"
            yield _table(type(field.default).model_fields)
    for nested in _nested(model):
        yield f"\n### `{nested.__name__}` {{ #{nested.__name__.lower()} }}\n\n{_one_line(nested.__doc__ or '')}\n\n"
        yield _table(nested.model_fields)
    old = {f"{name}.{k}": f"{name}.{v}" for name, section in _named(model) for k, v in _renamed(section).items()}
    old |= _renamed(model)
    if old:
        yield "\n### Old names\n\nThese still work in this version, with a warning.\n\n| old | now |\n|---|---|\n"
        yield "".join(f"| `{before}` | `{now}` |\n" for before, now in old.items())


def _named(model: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    for name, field in model.model_fields.items():
        if isinstance(field.default, Section):
            yield name, type(field.default)


def _renamed(model: type[Section]) -> dict[str, str]:
    return dict(getattr(model, "renamed", {}))


def _nested(model: type[Section]) -> list[type[Section]]:
    """Models inside a value, such as a target of `variants.targets`."""
    found: dict[str, type[Section]] = {}
    for _, section in _named(model):
        for field in section.model_fields.values():
            for argument in get_args(field.annotation):
                if isinstance(argument, type) and issubclass(argument, Section):
                    found[argument.__name__] = argument
    return list(found.values())


def _table(fields: dict[str, FieldInfo]) -> str:
    rows = ["| key | default | values | meaning |\n|---|---|---|---|\n"]
    rows += [
        f"| `{name}` | {_default(f)} | {_cell(_type(f))} | {_cell(f.description or '')} |\n"
        for name, f in fields.items()
    ]
    return "".join(rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    value = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    value = value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
    return f"`{text}`"


def _type(field: FieldInfo) -> str:
    """The field's type and bounds, in the terms of YAML."""
    bounds = []
    for bound, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
        bounds += [f"{sign} {getattr(m, bound):g}" for m in field.metadata if getattr(m, bound, None) is not None]
    return ", ".join([_type_text(field.annotation), *bounds])


def _type_text(annotation: Any) -> str:
    """A type without what only Python knows: validators, modules, addresses in memory."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(arguments[0])
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (Union, UnionType):
        # Null last, whatever the order.
        texts = [_type_text(argument) for argument in arguments if argument is not NoneType]
        return " or ".join([*texts, "null"] if NoneType in arguments else texts)
    if origin is not None:
        inner = ", ".join(_type_text(argument) for argument in arguments if argument is not Ellipsis)
        return f"{origin.__name__}[{inner}]"
    if annotation is Location:
        return "path or s3:// URL"
    return {Path: "path", Any: "any value"}.get(annotation, getattr(annotation, "__name__", str(annotation)))


def commands_page() -> str:
    """The page of all commands, with their arguments and options."""
    root: Any = typer.main.get_command(app)
    parts = [COMMANDS, "\n```text\nppcl [--version] COMMAND ...\n```\n\n| command | what it does |\n|---|---|\n"]
    commands = [(name, command) for name, command in root.commands.items() if not command.hidden]
    parts += [f"| [`ppcl {name}`](#ppcl-{name}) | {_cell(_summary(command))} |\n" for name, command in commands]
    for name, command in commands:
        parts.append(_command(name, command))
    return "".join(parts)


def _command(name: str, command: Any) -> str:
    parameters = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    usage = " ".join([f"ppcl {name}", *(_metavar(p) for p in arguments), "[OPTIONS]"])
    lines = [f"\n## `ppcl {name}` {{ #ppcl-{name} }}\n\n{_one_line(command.help or '')}\n\n```text\n{usage}\n```\n"]
    if parameters:
        lines.append("\n| argument or option | default | meaning |\n|---|---|---|\n")
    for parameter in parameters:
        shown = _metavar(parameter) if parameter in arguments else ", ".join(parameter.opts)
        lines.append(f"| `{shown}` | {_option_default(parameter)} | {_cell(parameter.help or '')} |\n")
    return "".join(lines)


def _metavar(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name).upper()
    return name if parameter.required else f"[{name}]"


def _option_default(parameter: Any) -> str:
    if parameter.required:
        return "**required**"
    value = parameter.default
    return "" if value in (None, False, ()) or callable(value) else f"`{value}`"


def _summary(command: Any) -> str:
    return _one_line(command.help or "").split(". ")[0].removesuffix(".")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


SIZING = DOCS.parent / "cluster" / "README.md"


def sizing_page(text: str) -> str:
    """The page of sizes with its tables anew: each stands between a comment that says which one it is and an `end`."""

    def table(match: re.Match) -> str:
        kind, name, gpus = match[1], match[2], match[3]
        columns, rows = _layouts(name) if kind == "layouts" else _stages(name, int(gpus))
        lines = [columns, ["--:" if kind == "layouts" else "---"] * len(columns), *rows]
        return "\n".join([match[0].split("\n")[0], *("| " + " | ".join(line) + " |" for line in lines), "<!-- end -->"])

    return re.sub(r"<!-- (layouts|stages): (\S+) ?(\d*) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def _layouts(name: str) -> tuple[list[str], list[list[str]]]:
    model = model_of(name, 1024, 1024)
    return list(LAYOUT_COLUMNS), rows_of(list(layouts(model, intervals(model, INTERVAL), BATCH, GPUS)))


def _stages(name: str, gpus: int) -> tuple[list[str], list[list[str]]]:
    """What `ppcl plan NAME --stages --gpus GPUS` prints."""
    teacher = TeacherSize.named(name, 1024, 1024)
    config = laid_out(default_config([], (1024, 1024)), teacher, gpus, INTERVAL)
    return list(JOB_COLUMNS), job_rows(worker_sizes(job_size(config, teacher, PROMPTS, INTERVAL, Device())))


ARCHITECTURES = """# Architectures

*Generated from the records in `ppcl/models` by `python docs/generate.py`. `ppcl architectures` prints the same, with
`--json` for programs.*

Every family below has depth: intervals of blocks become students, and blocks are removed. Widths need parts of blocks
that a record names. `jobs` are the pipelines that `ppcl compress` can calibrate; with the others the library works
alone. Tests use tiny random models of the family's own classes (`tests/ppcl/models/test_every_architecture.py`): they
show that the parts fit together, and nothing of quality. What was measured with trained weights is in
[results](results.md).

"""


def architectures_page() -> str:
    """The page of all families."""
    lines = [" | ".join(COLUMNS), " | ".join(["---"] * len(COLUMNS))]
    for row in architectures():
        family, transformer, *others = map(_cell, cells(row))
        lines.append(" | ".join([family, f"`{transformer}`", *others]))
    left_out = [f"- `{transformer}`: {why}.\n" for transformer, why in LEFT_OUT.items()]
    table = "".join(f"| {line} |\n" for line in lines)
    return f"{ARCHITECTURES}{table}\n## Left out {'{'} #left-out {'}'}\n\n{''.join(left_out)}"


PAGES = {
    "configuration.md": configuration_page,
    "commands.md": commands_page,
    "architectures.md": architectures_page,
}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
    SIZING.write_text(sizing_page(SIZING.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
