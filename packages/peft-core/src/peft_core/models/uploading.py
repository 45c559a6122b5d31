"""Uploads adapters to the Hub. This is the only module of peft-core that uploads anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import did_you_mean

OF_UPLOAD = ("repo_id", "private", "token", "revision", "commit_message")
#: options with which transformers saves whole models; accepted and ignored, because scripts pass them for any model
OF_WHOLE_MODELS = ("save_function", "max_shard_size", "variant", "save_peft_format", "save_original_format")


def hub_options(given: Mapping[str, Any], push: bool, directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the keywords in `given` (the extra keywords of `save_pretrained`) for `upload_folder`; None if `push` is False.

    Without a `repo_id` in `given`, it is the name of the folder `directory`.

    Raises:
        TypeError: `given` has a keyword that is neither an option of saving nor of uploading.
    """
    known = (*OF_UPLOAD, *OF_WHOLE_MODELS)
    unknown = [name for name in given if name not in known]
    if unknown:
        near = did_you_mean(unknown[0], known)
        raise TypeError(f"save_pretrained() got unexpected keyword argument(s) {', '.join(map(repr, unknown))}{f'; {near}' if near else ''}")
    if not push:
        return None
    return {"repo_id": Path(directory).name, **{name: value for name, value in given.items() if name in OF_UPLOAD}}


def upload_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
) -> Any:
    """Create a repository on the Hub if it does not exist, and upload a folder. Return the result of `huggingface_hub.HfApi.upload_folder`."""
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    repo = hub.create_repo(repo_id, private=private, exist_ok=True)
    return hub.upload_folder(repo_id=getattr(repo, "repo_id", repo_id), folder_path=Path(folder), revision=revision, commit_message=commit_message)
