"""Push a checkpoint or an adapter to the model hub, after a check of name and token."""

from __future__ import annotations

import shlex
from pathlib import Path

from neurons.errors import BrocaError, UsageError, first_line

# A model directory has one of these.
CONFIGS = ("config.json", "adapter_config.json")
# Files of an earlier push that engines would load instead of, or with, those of this one.
REPLACED = ("*.safetensors", "*.safetensors.index.json", *CONFIGS, "broca/*")
_BAD_NAME = "{}: not a valid repository name: write it as owner/name"
_OFFLINE = "{}: HF_HUB_OFFLINE is set: unset it to push"
_NO_TOKEN = "{}: there is no token: run `hf auth login` or set HF_TOKEN"


def require_pushable(repo: str) -> None:
    """Check locally, before any work, that a push is possible.

    Raises:
        UsageError: not a valid repository name.
        BrocaError: no token, or offline mode.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(_BAD_NAME.format(repo)) from error
    if constants.HF_HUB_OFFLINE:
        raise BrocaError(_OFFLINE.format(repo))
    if get_token() is None:
        raise BrocaError(_NO_TOKEN.format(repo))


def upload_command(path: Path, repo: str) -> str:
    """What pushes again by the hub's own command line, with the same files removed."""
    removed = (word for pattern in REPLACED for word in ("--delete", pattern))
    return shlex.join(["hf", "upload", repo, str(path), ".", *removed])


def push(path: Path, repo: str, private: bool = False) -> str:
    """Upload a directory to a model repository, which is created if needed.

    Weights, configs and Broca's files of an earlier push are removed; other files of the repository are kept.
    The token is that of ``hf auth login`` or ``HF_TOKEN``.

    Args:
        path: directory with a ``config.json`` or an ``adapter_config.json``.
        repo: "name" or "owner/name".
        private: create a new repository as private; an existing one keeps its visibility.

    Returns:
        The repository's address.

    Raises:
        UsageError: neither a checkpoint nor an adapter, or not a valid repository name.
        BrocaError: no token, no write permission, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # of the HTTP library under the hub's client
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    if not any((path / name).is_file() for name in CONFIGS):
        raise UsageError(f"{path}: not a directory with {' or '.join(CONFIGS)}, so there is nothing to push")
    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=path,
            commit_message="Steered by Broca",
            repo_type="model",
            delete_patterns=list(REPLACED),
        )
    except HFValidationError as error:
        raise UsageError(_BAD_NAME.format(repo)) from error
    except OfflineModeIsEnabled as error:
        raise BrocaError(_OFFLINE.format(repo)) from error
    except LocalTokenNotFoundError as error:
        raise BrocaError(_NO_TOKEN.format(repo)) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise BrocaError(
                f"{repo}: the hub refuses the token ({status}): run `hf auth login` with one that has write permission"
            ) from error
        raise BrocaError(f"{repo}: the hub says: {first_line(error)}") from error
    except (HTTPError, OSError) as error:
        raise BrocaError(f"{repo}: the hub cannot be reached ({first_line(error)}): try again") from error
    return str(made)
