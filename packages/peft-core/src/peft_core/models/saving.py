"""What wrapped models share of saving: into a folder, and to the Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoint import save as saving
from .tuner_model import AdapterOperations
from .uploading import hub_options, upload_folder


class Saving(AdapterOperations):
    """Operations that write a model's adapters."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        *,
        state_dict: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the adapters: ``default`` into the directory, every other one into a folder of its name; and a model card.

        All files appear together or not at all, and the network is asked only with `push_to_hub`.

        Args:
            save_directory: created if missing.
            safe_serialization: safetensors; False: a pickled dict of tensors.
            selected_adapters: which; default all.
            save_embedding_layers: also write the base's embeddings: True, False, or ``"auto"`` (if targeted or resized).
            is_main_process: False: only make the folders.
            path_initial_model_for_weight_conversion: folder of the adapter as it was saved when it had just been created. An adapter that took
                its first values out of the base (PiSSA, ...) is then written as one for the original base; this model stays as it is.
            state_dict: take the tensors from here (names of this model) instead of from the model.
            push_to_hub: upload the folder afterwards, to `repo_id` or a repository that is called as the folder.
            **kwargs: of the upload (`repo_id`, `private`, `token`, `revision`, `commit_message`); what only saving a whole model needs
                (`save_function`, `max_shard_size`, `variant`) has no effect.

        Raises:
            TypeError: another keyword.
            AdapterFileError: `save_directory` is a file.
            AdapterNotFoundError: `selected_adapters` names one that the model lacks.
            CapabilityError: there is nothing to convert in adapters of this method.
        """
        upload = hub_options(kwargs, push_to_hub, save_directory)
        saving.save_adapters(
            self._peft_index,
            save_directory,
            model=self,  # type: ignore[arg-type]
            safe_serialization=safe_serialization,
            selected_adapters=[selected_adapters] if isinstance(selected_adapters, str) else selected_adapters,
            save_embedding_layers=save_embedding_layers,
            is_main_process=is_main_process,
            state_dict=state_dict,
            initial=path_initial_model_for_weight_conversion,
        )
        if upload is not None and is_main_process:
            upload_folder(save_directory, **upload)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload adapter",
        **save_options: Any,
    ) -> Any:
        """Save the adapters (never the base) and upload the folder to the Hub.

        Args:
            repo_id: the repository; created if it does not exist.
            private, token, revision, commit_message: as in huggingface_hub.
            **save_options: as `save_pretrained`.

        Returns:
            What `huggingface_hub.HfApi.upload_folder` returns.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_options)
            return upload_folder(folder, repo_id, private=private, token=token, revision=revision, commit_message=commit_message)
