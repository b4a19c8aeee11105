"""Models of the hub: the files of one that are asked for, by the hub's own client and in its own cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from config.errors import UserError
from data.transport.clients import hub_endpoint


def download_model(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder with those files of the model `name` (owner/name) that fit `patterns`.

    `HF_ENDPOINT` and `HF_TOKEN` are respected. Raises `UserError` where the model is missing, private, gated or out of
    reach.
    """
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    import httpx2  # the HTTP library of the hub's client
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    endpoint = hub_endpoint()
    disable_progress_bars()
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), endpoint=endpoint, max_workers=4)
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} is gated: accept its conditions at {endpoint}/{name}, then set HF_TOKEN to a token of the same "
            "account (or run `hf auth login`)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {revision!r} on {endpoint}.") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"There is no model {name} on {endpoint}, or it is private. Check the name (owner/name), or give a folder."
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"{name!r} is neither a folder nor the name of a model (owner/name).") from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, httpx2.TransportError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:160]
        raise UserError(f"{endpoint} could not be asked for {name}: {reason}") from error
