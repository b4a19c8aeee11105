"""Telling program code from prose, so that cleaning made for text from the web leaves code as it is."""

from __future__ import annotations

import re

EXAMINED = 10_000  # characters from the beginning
SHARE = 0.25  # of the lines that are not blank
SYMBOLS = "=;{}()[]<>_#/"  # one in a hundred characters of prose, one in twenty of code
FEWEST = 0.015
LINE = re.compile(
    r"""^[ \t]*(?:
        (?:from\ [\w.]+\ )?import\ [\w.*{]                       # Python, Java, JavaScript, Go, Haskell
      | (?:async\ )?def\ \w+ | class\ \w+\s*[(:{<] | (?:pub\ )?fn\ \w+ | func(?:tion)?\b[^.]*\(
      | (?:public|private|protected|static|const|let|var|typedef|namespace|using|package|struct|enum|extern)\ [\w<:*&]+
      | \#\s*(?:include|define|ifdef|ifndef|endif|pragma)\b | \#!/ | @\w+(?:[\w.]*\(|\s*$)
      | (?:return|raise|yield|assert|throw|await|del|global|nonlocal)\b(?=[^,.!?]*(?:[()\[\]{};:='"]|$))
      | (?:if|elif|else|for|while|try|except|finally|with|match|case)\b[^\n]*:[ \t]*(?:\#.*)?$
      | [\w.\[\]'"*&, ]{1,80}[ \t]*(?:[-+*/%|&^:]|<<|>>|//|\*\*)?=[ \t]*[^\s=>][^\n]*
      | [\w.]+\([^\n]*\)[;,]?[ \t]*$ | [)\]}]+[;,)]*[ \t]*$ | </?\w+[^\n]*>[ \t]*$
      | //.* | /\*.* | \*/[ \t]*$ | (?:pass|continue|break|do|then|fi|done|end|else)[ \t]*;?$
      | [^\n]*(?:[;{}] | \)[ \t]*(?:->[^\n]*)?:)[ \t]*$
    )""",
    re.M | re.X,
)


def looks_like_code(text: str) -> bool:
    """Whether at least a quarter of the lines could hardly be anything but program code."""
    head = text[:EXAMINED]
    if sum(map(head.count, SYMBOLS)) < FEWEST * len(head):
        return False
    lines = sum(not line.isspace() for line in head.splitlines() if line)
    return lines > 0 and len(LINE.findall(head)) >= SHARE * lines
