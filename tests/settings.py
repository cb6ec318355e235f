"""The tables of settings in `docs/configuration.md`, from the declarations: `python -m tests.settings` writes them."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import SETTINGS, Key

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
BEGIN = "## Keys\n\n"
END = "\n## Variables that are not settings\n"
HEAD = "| key | option | environment | value | default | meaning |\n|---|---|---|---|---|---|"


def tables() -> str:
    """All settings in Markdown, a table for each section."""
    lines: list[str] = []
    for key in SETTINGS.values():
        if key.setting.section:
            lines += ["", f"### {key.setting.section}", "", *HEAD.splitlines()]
        lines.append(row(key))
    return "\n".join(lines).lstrip() + "\n"


def row(key: Key) -> str:
    value = key.kind.phrase.removeprefix("a ").removeprefix("an ").removeprefix("the ")
    default = key.written_default if key.default is None else f"`{key.written_default}`"
    meaning = f"{key.setting.help[0].upper()}{key.setting.help[1:]}. {key.setting.more}".rstrip()
    return f"| `{key.name}` | `{key.option}` | `{key.variable}` | {value} | {default} | {meaning} |"


def written(page: str) -> str:
    """The tables that a page holds."""
    return page.partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(BEGIN + written(text) + END, BEGIN + tables() + END), encoding="utf-8")
