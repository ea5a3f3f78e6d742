"""Plotly's own script, made ready to stand inside a page.

It is the project's basic bundle, kept unchanged in ``plotly/`` beside its licence. The Python
package ships the full one only, which is four times as large and takes as much longer to start,
for kinds of plots that a report has no use for.
"""

from __future__ import annotations

import re
from importlib import resources

_HEAD, _EAGER_HEAD = 'this, () => {\n"use strict"', 'this, (() => {\n"use strict"'
_TAIL, _EAGER_TAIL = "return Plotly;\n}));", "return Plotly;\n})));"


def plotly_script() -> str:
    """Return plotly's script, safe inside a script element.

    A browser first skims a function and reads it properly only when it is called; brackets around
    the function tell it to read at once, since the whole script is one function that is called at
    once. Where a plotly looks different inside, its script is left as it is.

    The few characters beyond ASCII, all within strings, are written as escapes: with a single one
    of them the browser keeps and reads the whole script at two bytes a character.
    """
    bundle = resources.files("normlab.lab.report").joinpath("plotly", "plotly-basic.min.js")
    script = bundle.read_text(encoding="utf-8").rstrip()
    if script.count(_HEAD) == 1 and script.endswith(_TAIL):
        script = script.replace(_HEAD, _EAGER_HEAD).removesuffix(_TAIL) + _EAGER_TAIL
    script = script.replace("</script", "<\\/script")
    return re.sub(r"[^\x00-\x7f]", lambda found: f"\\u{ord(found[0]):04x}", script)
