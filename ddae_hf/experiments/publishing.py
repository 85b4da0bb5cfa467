"""Pushing what an experiment leaves to the Hub, with its card."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token

from .model_card import save_card
from .options import Options, option
from .results import PretrainingReport

# What only this machine needs: training states, their unfinished copies, raw weights, features, locks.
PRIVATE = ("checkpoint-*", "partial-*", "*.partial", "raw/*", "features/*", "levels/*", "*.lock")


@dataclass(kw_only=True)
class HubOptions(Options):
    """Where a result is published."""

    push_to_hub: bool = option(False, "Push the result and its card at the end.")
    hub_model_id: str | None = option(None, "Repository, by default yours of the output folder's name.")
    hub_private: bool = option(False, "Make the repository private.")
    license: str | None = option(None, "Licence that the card names, such as apache-2.0.")

    def check(self) -> None:
        """Refuse a repository that nothing would be pushed to."""
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_private):
            name = "hub_private" if self.hub_model_id is None else "hub_model_id"
            raise ValueError(f"{name} is given without push_to_hub: give both or neither.")


def prepare(hub: HubOptions, output_dir: str | os.PathLike[str]) -> str | None:
    """Create the repository that is pushed to, before any long work, and return its full id, OWNER/NAME.

    `hub.hub_model_id` is that id afterwards. Nothing is asked for, and None returned, without `push_to_hub`.

    Raises:
        ValueError: No token, no such owner, no connection, or a public repository that is to be private.
    """
    if not hub.push_to_hub:
        return None
    if constants.HF_HUB_OFFLINE:
        raise ValueError("push_to_hub needs the Hub, and HF_HUB_OFFLINE is set: unset one of them.")
    if get_token() is None:
        how = f"log in with `hf auth login`, or set HF_TOKEN to one of {constants.ENDPOINT}/settings/tokens."
        raise ValueError(f"push_to_hub needs a token that may write: {how}")
    name = hub.hub_model_id or Path(output_dir).resolve().name
    api = HfApi()
    try:
        repository = api.create_repo(name, private=hub.hub_private or None, exist_ok=True).repo_id
        private = api.model_info(repository).private
    except Exception as error:  # the client raises a dozen kinds
        raise ValueError(f"push_to_hub: the repository {name} cannot be written to: {error}") from error
    if hub.hub_private and not private:
        how = "Make it private on the Hub, or give another hub_model_id."
        raise ValueError(f"hub_private: {repository} is there already, and public. {how}")
    hub.hub_model_id = repository
    return repository


def publish(
    hub: HubOptions, folder: str | os.PathLike[str], message: str, ignore: Sequence[str] = PRIVATE,
    generator: str | os.PathLike[str] | None = None,
) -> str | None:  # fmt: skip
    """Write a complete folder's card, push both if asked to, and return a sentence of where they are on the Hub.

    Args:
        hub: Where to push, as `prepare` left it.
        folder: What is published.
        message: Of the commit.
        ignore: Patterns of files that stay here.
        generator: The checkpoint that the network is of, the report of whose pretraining the card shows too.

    Raises:
        ValueError: A folder without a checkpoint, or a push that failed; the error says how to push by hand.
    """
    pretraining = [Path(generator)] if generator and Path(generator, PretrainingReport.file).is_file() else []
    try:
        save_card(folder, repo_id=hub.hub_model_id, results=pretraining, license=hub.license)
    except ValueError as error:
        raise ValueError(f"{folder} is complete, but for its card: {error}") from error
    if not hub.push_to_hub or hub.hub_model_id is None:
        return None
    try:
        commit = HfApi().upload_folder(
            repo_id=hub.hub_model_id, folder_path=str(folder), ignore_patterns=list(ignore), commit_message=message
        )
    except Exception as error:  # the client raises a dozen kinds
        excluded = [word for pattern in ignore for word in ("--exclude", pattern)]
        command = shlex.join(["hf", "upload", hub.hub_model_id, str(folder), ".", *excluded])
        text = f"{folder} is complete, but it was not pushed: {error}\nNothing is lost; to push it:\n\n    {command}"
        raise ValueError(text) from error
    return f"Pushed {folder} to {commit.repo_url}, commit {commit.oid[:8]}."
