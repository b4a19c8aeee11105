"""Who asks: one HTTP client per process, which shows the hub, and only the hub, who the user is."""

from __future__ import annotations

import os
from functools import lru_cache

import httpx

from data.transport.retry import TIMEOUT

HUB = "https://huggingface.co"


def hub_endpoint() -> str:
    """The hub's address: `HF_ENDPOINT`, or the public one."""
    return os.environ.get("HF_ENDPOINT", HUB).rstrip("/")


def client_for(url: str) -> httpx.Client:
    """The client of this process for `url`. Requests to the hub carry the user's token, where there is one."""
    if not url.startswith(hub_endpoint() + "/"):
        return _client(None)
    from huggingface_hub import get_token

    return _client(get_token())


@lru_cache(maxsize=4)
def _client(token: str | None) -> httpx.Client:
    headers = {"User-Agent": "quern"} | ({"Authorization": f"Bearer {token}"} if token else {})
    # The client takes the token off when it is redirected to another host.
    return httpx.Client(headers=headers, timeout=TIMEOUT, follow_redirects=True)
