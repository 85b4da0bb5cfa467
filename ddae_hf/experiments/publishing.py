"""Publishing what an experiment leaves: its model card, and a push to the Hub.

A card says what the checkpoint's own configuration and the reports beside it say (`results`): a fact that no file holds
is not in it. Its words are in `model_card_template.md`, which asks a `_Card` for the facts.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, HfApi, ModelCard, constants, eval_result_entries_to_yaml, get_token
from huggingface_hub.repocard_data import EvalResult, ModelCardData
from huggingface_hub.utils import validate_repo_id

from ..checkpoints import build_scheduler, read_checkpoint
from ..configuration_ddae import DDAEConfig
from ..networks import network_of, skeleton
from ..noise import family_of
from ..prompts import embeds
from .arrays import StrPath
from .models import Model, stock_pipeline_of
from .options import Options, option
from .report import Figure, Report, markdown
from .results import PretrainingReport, ProbeReport
from .run_folder import OF_DATA, OF_PLACES

TEMPLATE = Path(__file__).with_name("model_card_template.md")
OTHER_TASKS = {"generation": "unconditional-image-generation", "segmentation": "image-segmentation"}  # of reports
TAGS = ["ddae_hf", "ddae", "diffusion", "self-supervised-learning"]
# The files that experiments write for others, as patterns of `Path.glob`. All else in a folder is not pushed: what only
# this machine needs, and what users keep beside it.
PUBLISHED = (
    "README.md", ".eval_results/*.yaml", "model_index.json", "config.json", "preprocessor_config.json",
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "head.safetensors",
    "adapters/adapter_config.json", "adapters/adapter_model.safetensors",
    "scheduler/scheduler_config.json", "training_options.yaml", "train_results.json", "eval_results.json",
    "heat_map.png", "accuracy_over_sigma.png", "confusion.png", "reliability.png", "masks.png", "test_predictions.npy",
    "test_labels.npy",
    "samples/step-*.png", "images/*-step-*.png",
    *(f"{part}/config.json" for part in ("unet", "transformer", "vae")),
    *(f"{part}/diffusion_pytorch_model*.safetensors*" for part in ("unet", "transformer", "vae")),
)  # fmt: skip


@dataclass(kw_only=True)
class HubOptions(Options):
    """Where a result is published."""

    push_to_hub: bool = option(False, "Push the result and its card at the end.")
    hub_model_id: str | None = option(None, "Repository; by default one of yours, named after the output folder.")
    hub_private: bool = option(False, "Make the repository private.")
    license: str | None = option(None, "Licence that the card names, such as apache-2.0.")

    def check(self) -> None:
        """Refuse a repository that nothing would be pushed to."""
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_private):
            name = "hub_private" if self.hub_model_id is None else "hub_model_id"
            raise ValueError(f"{name} is given without push_to_hub: give both or neither.")


def prepare(hub: HubOptions, output_dir: StrPath, model: Model | None = None) -> str | None:
    """Create the repository that is pushed to, before any long work, and return its full id, OWNER/NAME.

    `hub.hub_model_id` is that id afterwards. Without `push_to_hub` this does nothing. A `ValueError` says that there is
    no token, no such owner or no connection, that the repository is public and is to be private, or that others could
    not open what is pushed: a head on the `model`, a pipeline in a folder of this machine.
    """
    if not hub.push_to_hub:
        return None
    here = isinstance(model, (str, os.PathLike)) and Path(model).is_dir()
    if here and (pipeline := stock_pipeline_of(model)) is not None and Path(pipeline.path).is_dir():
        raise ValueError(
            f"push_to_hub: the classifier would stand on {pipeline.path}, which only this machine has: give the Hub id "
            "of that pipeline as model_name_or_path."
        )
    if constants.HF_HUB_OFFLINE:
        raise ValueError("push_to_hub needs the Hub, and HF_HUB_OFFLINE is set: unset one of them.")
    if get_token() is None:
        how = f"log in with `hf auth login`, or set HF_TOKEN to one from {constants.ENDPOINT}/settings/tokens."
        raise ValueError(f"push_to_hub needs a token that may write: {how}")
    name = hub.hub_model_id or Path(output_dir).resolve().name
    api = HfApi()
    try:
        repository = api.create_repo(name, private=hub.hub_private or None, exist_ok=True).repo_id
        private = api.model_info(repository).private
    except Exception as error:  # the client raises a dozen kinds of errors
        raise ValueError(f"push_to_hub: the repository {name} cannot be written to: {error}") from error
    if hub.hub_private and not private:
        how = "Make it private on the Hub, or give another hub_model_id."
        raise ValueError(f"hub_private: {repository} exists already, and is public. {how}")
    hub.hub_model_id = repository
    return repository


def publish(hub: HubOptions, folder: StrPath, message: str, generator: StrPath | None = None) -> str | None:
    """Write a complete folder's card, push both if asked to, and return a sentence that says where they are.

    What matches `PUBLISHED` is pushed. The card also shows the pretraining of `generator`, from which the network is.

    Raises:
        ValueError: A folder without a checkpoint, or a push that failed; the error says how to push by hand.
    """
    pretraining = [Path(generator)] if generator and Path(generator, PretrainingReport.file).is_file() else []
    try:
        save_card(folder, repo_id=hub.hub_model_id, results=pretraining, license=hub.license)
    except ValueError as error:
        raise ValueError(f"{folder} is complete, except for its card: {error}") from error
    if not hub.push_to_hub or hub.hub_model_id is None:
        return None
    files = sorted(str(path.relative_to(folder)) for kind in PUBLISHED for path in Path(folder).glob(kind))
    try:
        commit = HfApi().upload_folder(
            repo_id=hub.hub_model_id, folder_path=str(folder), allow_patterns=files, commit_message=message
        )
    except Exception as error:  # the client raises a dozen kinds
        chosen = [word for file in files for word in ("--include", file)]
        command = shlex.join(["hf", "upload", hub.hub_model_id, str(folder), ".", *chosen])
        text = f"{folder} is complete, but it was not pushed: {error}\nNothing is lost; to push it:\n\n    {command}"
        raise ValueError(text) from error
    return f"Pushed {folder} to {commit.repo_url}, commit {commit.oid[:8]}."


def make_card(folder: StrPath, *, repo_id: str | None = None, **options: Any) -> ModelCard:
    """Return a checkpoint's card. `save_card` also puts its pictures where the card looks for them.

    Args:
        folder: The checkpoint, in any layout.
        repo_id: The Hub repository that the card's code opens; by default the code opens `folder`, as it is given.
        **options: `results`, other folders with results of this checkpoint; `model_name`, by default the repository's
            or the folder's; `dataset_name` and `dataset_id` (on the Hub), in place of what the reports say of data;
            `base_model`, the Hub repository that this checkpoint was trained from; `license`, by the Hub's name of it.

    Raises:
        ValueError: A folder without a checkpoint, a file that is no report, or an id that no repository can have.
    """
    return _Card(Path(folder), repo_id, **options).render()


def save_card(folder: StrPath, *, repo_id: str | None = None, **options: Any) -> Path:
    """Write a checkpoint's card, `README.md`, and return its path: see `make_card`.

    Its accuracies on the Hub's data sets are in `.eval_results/*.yaml`. Those of an earlier card are replaced. Pictures
    of other folders are copied into `images`.
    """
    card = _Card(Path(folder), repo_id, **options)
    rendered = card.render()
    for picture in card.pictures:
        target = card.folder / card.link(picture)
        if target != picture:
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(picture, target)
    for kind in ("sweep", *(report.kind for report in Report.kinds)):  # a sweep's name before it was a probe's
        path = card.folder / ".eval_results" / f"{kind}.yaml"
        path.unlink(missing_ok=True)
        if entries := card.eval_result_entries(kind):
            path.parent.mkdir(exist_ok=True)
            path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
    rendered.save(card.folder / "README.md")
    return card.folder / "README.md"


def read_reports(folders: Iterable[Path]) -> tuple[PretrainingReport | None, list[Report]]:
    """Return the pretraining, of the first folder that has it, and every evaluation and fine-tuning."""
    training: PretrainingReport | None = None
    reports: list[Report] = []
    names = dict.fromkeys(kind.file for kind in Report.kinds)
    for path in (folder / name for folder in folders for name in names if (folder / name).is_file()):
        report = Report.read(path)
        if isinstance(report, PretrainingReport):
            training = training or report
        elif report not in reports:  # a copy beside another checkpoint is no second run
            reports.append(report)
    return training, reports


class _Card:
    """A checkpoint and the results that its card shows."""

    def __init__(
        self, folder: Path, repo_id: str | None, *, results: Iterable[StrPath] = (),
        model_name: str | None = None, dataset_name: str | None = None, dataset_id: str | None = None,
        base_model: str | None = None, license: str | None = None,
    ):  # fmt: skip
        folders: dict[Path, Path] = {}
        for path in (folder, *map(Path, results)):
            folders.setdefault(path.resolve(), path)
            if not path.is_dir():
                raise ValueError(f"{path} is not a folder: give a checkpoint's folder, and folders of results.")
        for repository in filter(None, (repo_id, dataset_id, base_model)):
            validate_repo_id(repository)
        self.folder, self.path = folder, repo_id or folder.as_posix()
        self.checkpoint = read_checkpoint(folder)
        saved_as = self.checkpoint.config.get("architectures") or ()
        self.is_classifier = "DDAEForImageClassification" in saved_as
        self.is_segmenter = "DDAEForSemanticSegmentation" in saved_as
        self.config = DDAEConfig.from_dict(self.checkpoint.config)
        self.training, self.reports = read_reports(folders.values())
        self.all_reports = [*([self.training] if self.training else []), *self.reports]
        self.kinds = {report.kind for report in self.reports}
        # The grid of samples from the end of pretraining.
        samples = self.training and Path(self.training.folder or "", "samples")
        self.samples = max(samples.glob("step-*.png"), default=None) if samples else None
        self.pictures = [self.samples] if self.samples else []
        self.pictures += [picture for report in self.reports for picture in report.pictures_there()]
        self.name = model_name or (repo_id or folder.resolve().name).split("/")[-1]
        given = {"id": dataset_id, "name": dataset_name or (dataset_id and Path(dataset_id).name)}
        self.given_dataset = {name: value for name, value in given.items() if value is not None}
        self.base_model = base_model or self._fact("base_model")
        before = folder / "README.md"  # only this may name the licence
        self.license = license or self._fact("license")
        if self.license is None and before.is_file():
            self.license = ModelCard.load(before).data.license
        links = [self.link(picture) for picture in self.pictures]
        if double := {link for link in links if links.count(link) > 1}:
            raise ValueError(f"Two folders of results have the same name ({', '.join(double)}): rename one of them.")

    def _fact(self, name: str) -> Any:
        """Return a fact from the reports of the run that made this checkpoint, not of runs before or after it."""
        own = [report for report in self.all_reports if report.folder == self.folder]
        if name == "base_model":  # a run that began with random weights took only the network's shape from it
            own = [report for report in own if not report.options.get("from_scratch")]
        places = (place for report in own for place in (vars(report), report.options))
        return next((place[name] for place in places if place.get(name)), None)

    def dataset(self, report: Report) -> dict[str, Any]:
        return {**report.dataset, **self.given_dataset}

    def link(self, picture: Path) -> str:
        """Return a picture's path relative to the checkpoint; those of other folders have theirs in `images`."""
        if picture.is_relative_to(self.folder):
            return picture.relative_to(self.folder).as_posix()
        parent = picture.parent.parent if picture.parent.name == "samples" else picture.parent
        return f"images/{parent.name}-{picture.name}"

    def figures(self, report: Report) -> list[EvalResult]:
        """Return a report's main figures as the Hub knows them; a classifier's own accuracy comes first."""
        known, generated, section = self.dataset(report), report.kind == "generation", report.section()
        figures = list(section.figures)
        if self.is_classifier and section.saved is not None:
            tap = ("layer", "sigma") if self.config.taps is None else ("taps",)
            own = {name: getattr(self.config, name) for name in (*tap, "noise_seed")}
            figures.insert(0, Figure("accuracy", "Test accuracy, with the model's fixed noise", section.saved, own))
        task = OTHER_TASKS.get(report.kind, "image-classification")
        # Figures that agree in task, type, configuration and split are taken for those of one data set.
        config = known.get("config") or (None if "id" in known else known.get("name"))
        return [
            EvalResult(
                task_type=task, dataset_type=known.get("id", "local"),  # the Hub asks for a word here
                dataset_name=known.get("name", "local"), dataset_config=config,
                dataset_split=known.get("train_split" if generated else "test_split"), metric_type=figure.metric,
                metric_name=figure.name, metric_value=figure.value, metric_args=figure.conditions,
            )
            for figure in figures
        ]  # fmt: skip

    def eval_result_entries(self, kind: str) -> list[EvalResultEntry]:
        """Return the main accuracy of every report of a kind, on data that the Hub has."""
        entries = []
        for report in self.reports:
            first = next((f for f in self.figures(report) if f.metric_type == "accuracy"), None)
            if report.kind == kind and first is not None and "id" in self.dataset(report):
                details = ", ".join(f"{name} {value}" for name, value in (first.metric_args or {}).items())
                notes = f"{first.metric_name}, a fraction ({details})"
                entries.append(EvalResultEntry(first.dataset_type, "default", first.metric_value, notes=notes))
        return entries

    def metadata(self) -> ModelCardData:
        figures = [figure for report in self.reports for figure in self.figures(report)]
        of_transformers = self.checkpoint.holds_model
        task = "image-classification" if self.is_classifier else "image-feature-extraction"
        task = "image-segmentation" if self.is_segmenter else task
        ids = {known["id"] for report in self.all_reports if "id" in (known := self.dataset(report))}
        return ModelCardData(
            library_name="transformers" if of_transformers else "diffusers", tags=TAGS, license=self.license,
            pipeline_tag=task if of_transformers else "unconditional-image-generation", base_model=self.base_model,
            base_model_relation="finetune" if self.base_model else None, datasets=sorted(ids) or None,
            metrics=list(dict.fromkeys(figure.metric_type for figure in figures)) or None,
            model_name=self.name if figures else None, eval_results=figures or None,
        )  # fmt: skip

    def description(self) -> dict[str, Any]:
        """Return what the checkpoint is, and how it is used."""
        config, scheduler, own = self.config, self.checkpoint.scheduler, self.checkpoint.holds_model
        probes = [report for report in self.reports if isinstance(report, ProbeReport)]
        best = max(probes, key=lambda report: len(report.pairs)).best if probes else None
        network, complete = network_of(config.denoiser), skeleton(config.denoiser).config
        count, own_null = network.num_labels(complete), network.default_null_class(complete)
        family = family_of(build_scheduler(scheduler)) if scheduler else None
        sampler = next(iter(family.samplers), None) if family else None
        return {
            "family": family,
            "own_network": bool(network.own_module),
            "layer": config.layer if own or best is None else best.layer,
            "sigma": config.sigma if own or best is None else best.sigma,
            "tap_is_measured": best is not None,
            "conditional": count > 0 and own_null != 0,
            "labels_needed": count > 0 and config.null_class is None and own_null is None,
            **self.text(),
            "sampler": sampler,
            "steps": 18 if sampler else self.training and self.training.options.get("num_inference_steps"),
        }

    def text(self) -> dict[str, Any]:
        """Return what is to be said of a text that the denoiser is told, and of the pipeline that generates with it."""
        network, first = network_of(self.config.denoiser), self.checkpoint.chain()[-1]
        told = bool(network.stock_pipelines)
        pipelines = network.stock_pipelines
        path = None
        if told and first.index is not None:  # it is such a pipeline, or a head on one
            pipelines = (first.index["_class_name"],)
            path = self.path if first is self.checkpoint else first.path
        return {
            "told_text": told,
            "text_needed": told and self.config.condition_shapes is None and not embeds(first),
            "stock_pipelines": pipelines,
            "stock_path": path,
        }

    def render(self) -> ModelCard:
        template, environment = TEMPLATE.read_text(encoding="utf-8"), _environment_rows(self.all_reports)
        card = ModelCard.from_template(
            self.metadata(), template_str=template, card=self, **self.description(), environment=environment,
            option_rows=_option_rows, table=markdown,
        )  # fmt: skip
        return ModelCard(re.sub(r"\n{3,}", "\n\n", card.content).rstrip() + "\n")


# Options that say where things are and how a run is watched, not how a network is trained.
AROUND = (OF_DATA - {"max_train_samples"} | OF_PLACES).union(
    """base checkpoints_total_limit config dataset_revision gradient_checkpointing hub_model_id hub_private init_from
    license model_name_or_path num_inference_steps grid_images push_to_hub sample_steps sampler shuffle_buffer
    streaming test_split torch_compile vae""".split()
)


def _option_rows(options: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Return the options that a training depends on, without those that are off; nested ones by dotted names."""
    rows = []
    without_effect = {
        "num_train_epochs": bool(options.get("max_train_steps")),
        "label_dropout": not options.get("class_conditional"),
        "low_resolution_share": not options.get("low_resolution"),
    }
    for name, value in options.items():
        off = value is None or value is False or (isinstance(value, float) and value == 0)
        if off or without_effect.get(name) or (not prefix and name in AROUND):
            continue
        if isinstance(value, Mapping):
            rows += _option_rows(value, f"{prefix}{name}.")
        else:
            rows.append([f"`{prefix}{name}`", f"`{value if isinstance(value, str) else json.dumps(value)}`"])
    return rows


def _environment_rows(reports: Iterable[Report]) -> list[list[str]]:
    """Return what reports say of the machine, the time and the versions."""
    rows = []
    for report in reports:
        seconds = report.seconds_this_run if report.seconds is None else report.seconds
        seconds = seconds.get("in_all") if isinstance(seconds, Mapping) else seconds
        last = "" if report.seconds is not None else " (its last run)"
        time = None if seconds is None else f"{seconds:,.0f} s, {seconds / 3600:.2f} h{last}"
        found = {"hardware": report.hardware, "processes": report.processes, "threads": report.threads, "time": time}
        found |= {"images/s": report.images_per_second, "versions": report.versions}
        title = report.section().title.lower()
        rows += [[title, name, words] for name, value in found.items() if (words := _words(value))]
    return rows


def _words(value: Any) -> str:
    """Return a value of a file as text, names and values of a mapping one after the other."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(inner)}" for name, inner in value.items())
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
