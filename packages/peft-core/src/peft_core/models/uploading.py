"""Adapters to the Hub. Nothing else in core writes to the network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import did_you_mean

OF_UPLOAD = ("repo_id", "private", "token", "revision", "commit_message")
#: of transformers' saving of whole models: scripts pass them to whatever they save
OF_WHOLE_MODELS = ("save_function", "max_shard_size", "variant", "save_peft_format", "save_original_format")


def hub_options(given: Mapping[str, Any], push: bool, directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the arguments of `upload_folder` among the keywords of a call that saves; None if nothing is to be uploaded.

    Raises:
        TypeError: there is a keyword that neither saving nor uploading has.
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
    """Create a repository if it does not exist, and upload a folder; returns what `huggingface_hub.HfApi.upload_folder` does."""
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    repo = hub.create_repo(repo_id, private=private, exist_ok=True)
    return hub.upload_folder(repo_id=getattr(repo, "repo_id", repo_id), folder_path=Path(folder), revision=revision, commit_message=commit_message)
