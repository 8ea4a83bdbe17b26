"""A finished folder -> a repository of a hub, through huggingface_hub, which transformers brings along.

    FOLDER ─create repository─> ─upload of large files─> ─one commit─> HF_ENDPOINT/REPO

The token is read where huggingface_hub reads it: HF_TOKEN, or what `hf auth login` kept. Whatever goes wrong, the
folder stays.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from castalia.errors import UserError


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Upload a folder as one commit, making the repository if it is not there.

    Args:
        folder: as `export_run` wrote it.
        repo: NAME or OWNER/NAME.
        private: of a repository that is made now.

    Returns:
        Where it is.

    Raises:
        UserError: the package is missing, or the hub refuses.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("--push needs a package: pip install huggingface_hub") from None
    huggingface_hub.utils.disable_progress_bars()  # type: ignore[attr-defined]
    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        api = huggingface_hub.HfApi(endpoint=endpoint)
        made: Any = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Upload a model of Castalia")
    except Exception as error:  # of whatever library speaks to the network
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{repo}: was not uploaded ({said}): {folder} is whole and stays; set HF_TOKEN to a token that may write "
            "there, and upload it again with `hf upload`"
        ) from None
    return str(made.repo_url if hasattr(made, "repo_url") else made)
