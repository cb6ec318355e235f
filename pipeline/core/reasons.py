"""An error of an engine as a reason for clients: one line, without the folders of the machine that it runs on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_MOST_CHARS: Final = 240
# An absolute path of at least two parts. That of a URL follows a colon or a host.
_PATH: Final = re.compile(r"""(?<![\w:/.-])~?/(?:[^\s/'"`,;:()]+/)+([^\s/'"`,;:()]*)""")


def one_line(text: str, places: Mapping[str, str]) -> str:
    """The text in one line of bounded length. Of each absolute path, the last part stays.

    Args:
        text: what an engine says.
        places: known folders, with what stands for each in the line.
    """
    for place in sorted(filter(None, places), key=len, reverse=True):
        text = text.replace(place, places[place])
    line = " ".join(_PATH.sub(r"\1", text).split())
    for name in places.values():
        # The line follows a sentence that says as much.
        before, after = f"The model {name} cannot be loaded (", ")."
        if line.startswith(before) and line.endswith(after):
            line = line[len(before) : -len(after)].rstrip(".") + "."
    return line if len(line) <= _MOST_CHARS else f"{line[:_MOST_CHARS]}..."
