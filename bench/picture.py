"""Runs `headrace demo`, and writes the picture in the README: `python -m bench.picture [--seconds S] [OPTION ...]`.

The picture has the tables at the height of the overload, and the summary. Other options go to `headrace up`.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console, RenderableType
from rich.terminal_theme import SVG_EXPORT_THEME

from bench.running import ROOT
from pipeline.commands.demo import demo
from pipeline.commands.demo_view import Levels, View
from pipeline.commands.ledger import Ledger
from pipeline.wire.messages import Load

_WIDTH = 104
_FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"


class Pictured(View):
    """The view, which also keeps the tables of the moment at which most requests wait."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = Console(record=True, width=_WIDTH, force_terminal=True, highlight=False, file=io.StringIO())
        self._height: RenderableType = ""
        self._most = -1

    def update(
        self, ledger: Ledger, loads: Mapping[str, Load], levels: Levels, elapsed_s: float, seconds: float
    ) -> None:
        """As `View.update`."""
        super().update(ledger, loads, levels, elapsed_s, seconds)
        if ledger.outstanding() >= self._most:
            self._most = ledger.outstanding()
            self._height = self._tables(ledger, loads, levels, elapsed_s, seconds)

    def summary(self, ledger: Ledger, levels: Levels, seconds: float) -> None:
        """As `View.summary`."""
        super().summary(ledger, levels, seconds)
        self.drawn.print("$ make demo\n")
        self.drawn.print(self._height)
        View(self.drawn).summary(ledger, levels, seconds)

    def write(self, path: Path) -> None:
        """Write the picture, without the fonts that rich would load from the network."""
        picture = self.drawn.export_svg(title="headrace demo", theme=SVG_EXPORT_THEME, unique_id="demo")
        picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL).replace("Fira Code, monospace", _FONTS)
        path.write_text(re.sub(r"<!--.*?-->\s*", "", picture, flags=re.DOTALL))


def main() -> int:
    """Returns what `headrace demo` returns."""
    parser = argparse.ArgumentParser(prog="python -m bench.picture", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S", help="how long to send (default: 30)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "demo.svg", metavar="FILE")
    given, options = parser.parse_known_args()
    view = Pictured()
    code = demo(seconds=given.seconds, options=options, view=view)
    view.write(given.output)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
