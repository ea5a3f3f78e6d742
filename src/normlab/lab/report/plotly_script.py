"""Plotly's own script, made ready to stand inside a page: the only file that imports plotly."""

from __future__ import annotations

import re

from plotly.offline import get_plotlyjs

_HEAD, _EAGER_HEAD = 'this, () => {\n"use strict"', 'this, (() => {\n"use strict"'
_TAIL, _EAGER_TAIL = "return Plotly;\n}));", "return Plotly;\n})));"


def plotly_script() -> str:
    """Return plotly's script, safe inside a script element.

    A browser first skims a function and reads it properly only when it is called; with nearly
    five megabytes in one function that is called at once, the skimming took about a seventh of the
    processor time that the script needs to start. Brackets around the function tell the browser
    to read it straight away. Where a plotly looks different inside, its script is left as it is.

    The few characters beyond ASCII, all within strings, are written as escapes: with a single one
    of them the browser keeps and reads the whole script at two bytes a character.
    """
    script = get_plotlyjs().rstrip()
    if script.count(_HEAD) == 1 and script.endswith(_TAIL):
        script = script.replace(_HEAD, _EAGER_HEAD).removesuffix(_TAIL) + _EAGER_TAIL
    script = script.replace("</script", "<\\/script")
    return re.sub(r"[^\x00-\x7f]", lambda found: f"\\u{ord(found[0]):04x}", script)
