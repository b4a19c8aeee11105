"""HTML to text by resiliparse."""

from __future__ import annotations

import re

PAGE = re.compile(
    r"\ufeff?\s*(?:<\?xml[^>]{0,200}\?>\s*)?(?:<!--.{0,2000}?-->\s*)*<(?:!doctype\s+html|html)[\s>]", re.I | re.S
)


def is_page(text: str) -> bool:
    """Whether the text is a whole HTML page: it starts as one."""
    return PAGE.match(text) is not None


def page_text(html: str) -> str:
    """The main content of a page: without navigation, headers, footers, advertisements and comments."""
    return _text(html, main_content=True)


def piece_text(html: str) -> str:
    """All the text of a piece of HTML."""
    return _text(html, main_content=False)


def _text(html: str, *, main_content: bool) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    text: str = extract_plain_text(
        html,
        preserve_formatting=True,
        main_content=main_content,
        list_bullets=True,
        alt_texts=False,
        links=False,
        form_fields=False,
        noscript=False,
        comments=False,
    )
    return text
