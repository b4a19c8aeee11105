"""A data set's repository on the hub: its commit, licence, card and files, asked for with the hub's own client."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import tenacity

from config.errors import UserError
from data.transport.clients import hub_endpoint
from data.transport.retry import LONGEST_WAIT, PASSING, retry_after

CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps a Parquet copy of many data sets, as `subset/split/0000.parquet`."""

TRIES = 4

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class HubFile:
    """One file of a repository. `checksum` is its SHA-256 where it lies in large-file storage, else its git SHA-1."""

    path: str
    size: int
    checksum: tuple[str, str]


@dataclass(frozen=True)
class Repository:
    """One state of a data set's repository."""

    name: str
    commit: str
    licence: str
    configs: list[dict[str, Any]]
    """The subsets that the data set's card declares, each with `config_name` and `data_files`."""
    files: list[HubFile]


class Hub:
    """The hub at `HF_ENDPOINT`, or huggingface.co, as the user who is logged in or named by `HF_TOKEN`."""

    def __init__(self) -> None:
        # Read when the client is imported. Its other protocol needs a server of its own, and the bytes come by ours.
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
        from huggingface_hub import HfApi

        self.endpoint = hub_endpoint()
        self._api = HfApi(endpoint=self.endpoint)

    def repository(self, name: str, revision: str) -> Repository:
        """What `name` holds at `revision`. Raises `UserError` where it is missing, private, gated or out of reach."""
        from huggingface_hub.hf_api import RepoFile

        info = self._ask(name, revision, lambda: self._api.dataset_info(name, revision=revision))
        tree = self._ask(
            name,
            revision,
            lambda: list(self._api.list_repo_tree(name, recursive=True, revision=info.sha, repo_type="dataset")),
        )
        card: dict[str, Any] = vars(info.card_data) if info.card_data is not None else {}
        licence = card.get("license") or "not stated"
        files = [
            HubFile(
                entry.path,
                entry.size,
                ("sha256", entry.lfs.sha256) if entry.lfs is not None else ("git-sha1", entry.blob_id),
            )
            for entry in tree
            if isinstance(entry, RepoFile)
        ]
        for file in files:
            if file.path.startswith("/") or ".." in file.path.split("/"):
                raise UserError(
                    f"{name} has a file named {file.path}, which leads out of its folder. Nothing is fetched."
                )
        configs = card.get("configs") or []
        return Repository(
            name=name,
            commit=str(info.sha),
            licence=", ".join(licence) if isinstance(licence, list) else str(licence),
            configs=[config for config in configs if isinstance(config, dict)],
            files=sorted(files, key=lambda file: file.path),
        )

    def converted(self, name: str) -> Repository | None:
        """The hub's own Parquet copy of the data set, or None where it has none."""
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            return self.repository(name, CONVERTED)
        except UserError as error:
            if isinstance(error.__cause__, RevisionNotFoundError):
                return None
            raise

    def url(self, repository: Repository, path: str) -> str:
        """The address of one file in exactly this state of the repository."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(
            repository.name, path, repo_type="dataset", revision=repository.commit, endpoint=self.endpoint
        )

    def _ask(self, name: str, revision: str, question: Callable[[], Answer]) -> Answer:
        """The hub's answer; what may pass is tried again, the rest becomes a sentence for the user."""
        import httpx2  # the HTTP library of the hub's client
        from huggingface_hub import errors

        def passing(error: BaseException) -> bool:
            if isinstance(error, errors.HfHubHTTPError):
                return error.response.status_code in PASSING
            return isinstance(error, httpx2.TransportError)

        try:
            return tenacity.retry(
                retry=tenacity.retry_if_exception(passing),
                stop=tenacity.stop_after_attempt(TRIES),
                wait=_wait,
                reraise=True,
            )(question)()
        except errors.GatedRepoError as error:
            raise UserError(
                f"{name} is gated: accept its conditions at {self.endpoint}/datasets/{name}, then set HF_TOKEN to a "
                "token of the same account (or run `hf auth login`)."
            ) from error
        except errors.RevisionNotFoundError as error:
            raise UserError(f"{name} has no revision {revision!r} on {self.endpoint}.") from error
        except errors.RepositoryNotFoundError as error:
            raise UserError(
                f"There is no data set {name} on {self.endpoint}, or it is private. Check the name (owner/name); for a "
                "private one set HF_TOKEN to a token that may read it (or run `hf auth login`)."
            ) from error
        except errors.HFValidationError as error:
            raise UserError(
                f"{name!r} is no name of a data set: write owner/name, as its page on the hub does."
            ) from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            hint = " Check HF_TOKEN." if status in (401, 403) else " Try again later."
            raise UserError(f"{self.endpoint} answered {status} when asked for {name}.{hint}") from error
        except httpx2.TransportError as error:
            raise UserError(
                f"{self.endpoint} cannot be reached ({str(error) or type(error).__name__}). Check the network, or "
                "HF_ENDPOINT if you use a mirror. The built-in source `sample` and your own files need no network."
            ) from error


def _wait(state: Any) -> float:
    """Seconds that the server's answer asks to stay away, else longer each time."""
    response = getattr(state.outcome.exception(), "response", None)
    wait = retry_after(httpx.Headers(dict(response.headers))) if response is not None else None
    return min(0.5 * 2.0**state.attempt_number if wait is None else wait, LONGEST_WAIT)
