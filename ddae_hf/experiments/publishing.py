"""Pushing what a script leaves to the Hub, with its card."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token

from .model_card import save_card

# What only this machine needs: training states, their unfinished copies, raw weights, features, locks.
PRIVATE = ("checkpoint-*", "partial-*", "*.partial", "raw/*", "features/*", "levels/*", "*.lock")


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the result is published."""
    group, flag = parser.add_argument_group("Hub"), argparse.BooleanOptionalAction
    group.add_argument("--push_to_hub", action=flag, default=False, help="Push the result and its card at the end.")
    group.add_argument("--hub_model_id", help="Repository, by default yours of the output folder's name.")
    group.add_argument("--hub_private", action=flag, default=False, help="Make the repository private.")
    group.add_argument("--license", help="Licence that the card names, such as apache-2.0.")


def prepare(args: argparse.Namespace) -> None:
    """Create the repository that is pushed to, or stop, before any long work, if that cannot be.

    Afterwards `args.hub_model_id` is its full id, OWNER/NAME.
    """
    if not args.push_to_hub:
        if args.hub_model_id is not None or args.hub_private:
            option = "--hub_private" if args.hub_model_id is None else "--hub_model_id"
            raise SystemExit(f"{option} is given without --push_to_hub: give both or neither.")
        return
    if constants.HF_HUB_OFFLINE:
        raise SystemExit("--push_to_hub needs the Hub, and HF_HUB_OFFLINE is set: unset one of them.")
    if get_token() is None:
        raise SystemExit(
            "--push_to_hub needs a token that may write: log in with `hf auth login`, or set HF_TOKEN to one of "
            f"{constants.ENDPOINT}/settings/tokens."
        )
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    api = HfApi()
    try:
        repository = api.create_repo(name, private=args.hub_private or None, exist_ok=True).repo_id
        private = api.model_info(repository).private
    except Exception as error:  # the client raises a dozen kinds
        raise SystemExit(f"--push_to_hub: the repository {name} cannot be written to: {error}") from error
    if args.hub_private and not private:
        raise SystemExit(
            f"--hub_private: {repository} is there already, and public. Make it private on the Hub, or give another "
            "--hub_model_id."
        )
    args.hub_model_id = repository


def publish(
    args: argparse.Namespace,
    folder: Path,
    message: str,
    ignore: Sequence[str] = PRIVATE,
    generator: str | None = None,
) -> None:
    """Write a complete folder's card, and with --push_to_hub push both, but for files that match `ignore`.

    Where `generator`, the checkpoint that the network is of, is a folder with the results of its pretraining, the card
    has them too.
    """
    pretraining = [Path(generator)] if generator and Path(generator, "train_results.json").is_file() else []
    try:
        save_card(folder, repo_id=args.hub_model_id, results=pretraining)
    except ValueError as error:
        raise SystemExit(f"{folder} is complete, but for its card: {error}") from error
    if not args.push_to_hub:
        return
    what = {"repo_id": args.hub_model_id, "folder_path": folder, "ignore_patterns": list(ignore)}
    try:
        commit = HfApi().upload_folder(**what, commit_message=message)
    except Exception as error:  # the client raises a dozen kinds
        excluded = [word for pattern in ignore for word in ("--exclude", pattern)]
        command = shlex.join(["hf", "upload", args.hub_model_id, str(folder), ".", *excluded])
        how = f"Nothing is lost; to push it:\n\n    {command}"
        raise SystemExit(f"{folder} is complete, but it was not pushed: {error}\n{how}") from error
    print(f"Pushed {folder} to {commit.repo_url}, commit {commit.oid[:8]}.")
