"""Damaged files of JSON: what reads them works, or says what is wrong.

It never hangs, runs nothing that a checkpoint names, and opens no file outside of the checkpoint's folder.
"""

import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ddae_hf import DDAEConfig, DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.experiments import arrays
from ddae_hf.experiments.run_folder import (
    PROGRESS,
    Progress,
    note_files,
    read_options,
    what_is_wrong,
    write_options,
)

from .conftest import make_dit, make_unet, make_vae
from .laws import (
    DEEP,
    Added,
    Flipped,
    Hung,
    Removed,
    Renamed,
    Replaced,
    Whole,
    damaged,
    damages,
    law,
    within,
    works_or_says_why,
)
from .stock import pixart, stable_diffusion, stable_diffusion_xl

SMALL = {"block_out_channels": (4, 8), "norm_num_groups": 2, "attention_head_dim": 4}
SHARDS = "diffusion_pytorch_model.safetensors.index.json"
# Every file of JSON that is read of a checkpoint, in every layout.
FILES = """pipeline/model_index.json pipeline/unet/config.json pipeline/scheduler/scheduler_config.json
    pipeline/preprocessor_config.json head/config.json head/model_index.json flat/model_index.json flat/config.json
    flat/scheduler_config.json model/config.json whole/config.json shards/config.json
    shards/model.safetensors.index.json latents/model_index.json latents/transformer/config.json latents/vae/config.json
    latents/scheduler/scheduler_config.json whole_latents/config.json edm/scheduler/scheduler_config.json
    adapted/config.json adapted/adapters/adapter_config.json whole_adapted/config.json""".split()
FILES.append(f"edm/unet/{SHARDS}")
# Those of a pipeline with text encoders, and of a model that stores what it is told.
TEXT_FILES = """stock/model_index.json stock/unet/config.json stock/vae/config.json stock/text_encoder/config.json
    stock/tokenizer/tokenizer_config.json stock/tokenizer/tokenizer.json words/tokenizer/vocab.json
    words/tokenizer/tokenizer_config.json words/text_encoder_2/config.json words/model_index.json
    sentences/text_encoder/config.json sentences/tokenizer/tokenizer_config.json sentences/tokenizer/tokenizer.json
    sentences/transformer/config.json sentences/model_index.json whole_texts/config.json""".split()
CODE = (
    "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\nclass Evil: pass\nDDAEModel = DDAEConfig = Evil\n"
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Every layout, each with modules that nobody must run; weights beside the folders, which nobody must read."""
    root = tmp_path_factory.mktemp("checkpoints")
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    unet = make_unet(num_class_embeds=3, **SMALL)
    pipeline = DDAEPipeline(unet, scheduler, null_class=2, id2label={0: "cat", 1: "dog"})
    for name in ("pipeline", "head", "adapted"):
        pipeline.save_pretrained(root / name)
    DDAEImageProcessor.for_denoiser(unet.config).save_pretrained(root / "pipeline")
    classifier = DDAEForImageClassification.from_pretrained(root / "pipeline", num_labels=3, feature_norm="batch_norm")
    classifier.save_head(root / "head")
    classifier.save_pretrained(root / "whole")
    classifier.save_pretrained(root / "shards", max_shard_size="20KB")
    classifier.add_lora(2)
    classifier.save_head(root / "adapted")
    classifier.save_pretrained(root / "whole_adapted")
    for name in ("model", "flat"):
        unet.save_pretrained(root / name)
    scheduler.save_pretrained(root / "flat")
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.1.1"}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    (root / "flat" / "model_index.json").write_text(json.dumps(index))
    parts = {"transformer": make_dit(in_channels=4, num_layers=2), "vae": make_vae()}
    DDAEPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts).save_pretrained(root / "latents")
    several = {"taps": [("transformer_blocks.0", 0.1), ("transformer_blocks.1", 0.5)], "head": "fusion"}
    several["head_width"] = 8
    whole_latents = DDAEForImageClassification.from_pretrained(root / "latents", num_labels=2, **several)
    whole_latents.save_pretrained(root / "whole_latents")
    stable_diffusion(root / "stock")
    stable_diffusion_xl(root / "words")
    for name in ("tokenizer", "tokenizer_2"):
        (root / "words" / name / "tokenizer.json").unlink()  # as they were published
    shutil.copytree(root / "words" / "tokenizer", root / "words" / "tokenizer_2", dirs_exist_ok=True)
    pixart(root / "sentences")
    DDAEModel.from_pretrained(root / "stock", prompt="a cat").save_pretrained(root / "whole_texts")
    DDAEPipeline(make_unet(**SMALL), EDMEulerScheduler()).save_pretrained(root / "edm", max_shard_size="20KB")
    for folder in sorted(root.iterdir()):
        for name in ("evil", "pipeline", "modeling_ddae", "configuration_ddae"):
            (folder / f"{name}.py").write_text(CODE)
    save_file({"conv_in.weight": torch.zeros(1)}, root / "evil.safetensors")
    return root


class Watch:
    """Notes what this process opens or runs while it is on, by the names of Python's audit events."""

    def __init__(self):
        self.folder = None
        self.found = []
        self.ours = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]), "/proc", "/sys", "/dev", "<")

    def __call__(self, event, args):
        if self.folder is None:
            return
        if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not path.startswith((str(self.folder), *self.ours)):
                self.found.append((event, path))
        elif event == "exec":
            if not args[0].co_filename.startswith(self.ours):
                self.found.append((event, args[0].co_filename))
        elif event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class"):
            self.found.append((event, args[:1]))
        elif event == "socket.connect":
            self.found.append((event, args[1:]))


WATCH = Watch()


@pytest.fixture(scope="module", autouse=True)
def watch(checkpoints):
    """Look on, once all that opens checkpoints has been imported."""
    for verbose in (transformers.logging, diffusers.logging):
        verbose.set_verbosity(50)
    for layout in sorted({file.split("/")[0] for file in FILES}):
        for kind in (DDAEConfig, DDAEImageProcessor, DDAEForImageClassification, DDAEModel, DDAEPipeline):
            kind.from_pretrained(checkpoints / layout)
    for layout in sorted({file.split("/")[0] for file in TEXT_FILES}):
        DDAEModel.from_pretrained(checkpoints / layout)
    sys.addaudithook(WATCH)  # which stays as long as the process, and is off most of the time
    yield
    for verbose in (transformers.logging, diffusers.logging):
        verbose.set_verbosity_warning()


def opens_or_says_why(checkpoints, file, damage, kinds):
    folder = checkpoints / file.split("/")[0]
    with damaged(checkpoints / file, damage), warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.syspath_prepend(folder)  # as where a program is started in it
        patch.chdir(folder)
        WATCH.folder = folder.resolve()
        try:
            for kind in kinds:
                works_or_says_why(kind.from_pretrained, folder)
        finally:
            WATCH.folder = None
    assert not WATCH.found and not (folder / "ran").exists()


def found(*cases):
    """Cases that the tests once failed at, which are tried in every run."""

    def decorate(test):
        for file, damage in cases:
            test = example(file, damage)(test)
        return test

    return decorate


@law(250)
@given(st.sampled_from(FILES), damages)
@found(
    ("pipeline/unet/config.json", Whole(b"")),
    ("whole/config.json", Whole(DEEP)),
    ("pipeline/preprocessor_config.json", Whole(b"NaN")),
    ("model/config.json", Flipped(0.5, 0xB0)),
    ("flat/model_index.json", Whole(b"false")),
    ("latents/model_index.json", Replaced(("transformer", 1), [[]])),
    ("latents/vae/config.json", Replaced(("down_block_types", 1), [2, 4])),
    ("latents/vae/config.json", Removed(("block_out_channels", 0))),
    ("latents/vae/config.json", Replaced(("latent_channels",), 10**30)),
    ("latents/transformer/config.json", Replaced(("norm_type",), "/etc/passwd")),
    ("latents/scheduler/scheduler_config.json", Replaced(("shift",), 10**30)),
    ("flat/config.json", Replaced(("block_out_channels", 1), 10**12)),
    ("flat/scheduler_config.json", Replaced(("num_train_timesteps",), 10**9)),
    ("model/config.json", Replaced(("layers_per_block",), 10**6)),
    ("model/config.json", Replaced(("layers_per_block",), -1)),
    ("model/config.json", Replaced(("sample_size",), float("inf"))),
    ("model/config.json", Replaced(("sample_size",), 10**6)),
    ("latents/transformer/config.json", Replaced(("sample_size",), 10**6)),
    ("edm/scheduler/scheduler_config.json", Replaced(("sigma_data",), "../../x")),
    ("whole/config.json", Replaced(("denoiser",), [1])),
    ("whole_latents/config.json", Replaced(("vae",), float("nan"))),
    ("whole/config.json", Replaced(("noise_seed",), ["diffusers", "DDIMScheduler"])),
    ("whole/config.json", Replaced(("num_noise_samples",), 10**12)),
    ("whole/config.json", Replaced(("sigma",), [10**9, 0.5])),
    ("whole/config.json", Replaced(("id2label",), 3)),
    ("whole/config.json", Replaced(("scheduler", "trained_betas"), {"dtype": []})),
    ("whole/config.json", Renamed(("transformers_version",), "dtype")),
    ("model/config.json", Replaced(("act_fn",), [-4, 8])),
    ("head/config.json", Added(("sigma",), "num_labels", 10**9)),
    ("pipeline/preprocessor_config.json", Replaced(("do_center_crop",), 3)),
    ("pipeline/preprocessor_config.json", Renamed(("num_channels",), "self")),
)
def test_damaged_configurations_are_opened_or_refused_in_a_sentence(checkpoints, file, damage):
    opens_or_says_why(checkpoints, file, damage, [DDAEConfig, DDAEImageProcessor])


@law(50)
@given(st.sampled_from(FILES), damages)
@found(
    ("pipeline/model_index.json", Renamed(("id2label",), "vae")),
    ("pipeline/model_index.json", Renamed(("_class_name",), "")),
    ("pipeline/model_index.json", Replaced(("scheduler",), False)),
    ("flat/model_index.json", Replaced(("scheduler",), None)),
    ("pipeline/model_index.json", Replaced(("scheduler", 0), "evil")),
    ("pipeline/model_index.json", Replaced(("id2label",), "text")),
    ("head/model_index.json", Replaced(("id2label", "0"), [])),
    ("head/model_index.json", Replaced(("null_class",), "x")),
    ("pipeline/model_index.json", Replaced(("null_class",), {})),
    ("pipeline/unet/config.json", Added(("sample_size",), "quantization_config", [])),
    ("whole/config.json", Added(("sigma",), "quantization_config", {"quant_method": "evil"})),
    ("pipeline/model_index.json", Replaced(("id2label",), {})),
    ("pipeline/scheduler/scheduler_config.json", Replaced(("num_train_timesteps",), 10**30)),
    ("pipeline/scheduler/scheduler_config.json", Replaced(("beta_schedule",), "x")),
    ("pipeline/scheduler/scheduler_config.json", Renamed(("beta_end",), "self")),
    ("latents/scheduler/scheduler_config.json", Replaced(("num_train_timesteps",), False)),
    ("edm/scheduler/scheduler_config.json", Replaced(("sigma_min",), ["os", "system"])),
    ("latents/transformer/config.json", Replaced(("norm_eps",), {"a": 1})),
    ("model/config.json", Replaced(("downsample_padding",), float("nan"))),
    ("whole_latents/config.json", Renamed(("denoiser", "attention_head_dim"), "torch_dtype")),
    ("whole_latents/config.json", Replaced(("architectures",), 10**9)),
    ("head/config.json", Replaced(("denoiser", "time_embedding_dim"), 1)),
    ("whole/config.json", Added(("sigma",), "num_labels", 7)),
    ("whole/config.json", Replaced(("pooling",), "mean_2x2")),
    (f"edm/unet/{SHARDS}", Replaced(("metadata",), 10**12)),
    (f"edm/unet/{SHARDS}", Replaced(("weight_map", "conv_in.weight"), "../../evil.safetensors")),
    ("shards/model.safetensors.index.json", Replaced(("weight_map", "classifier.bias"), "../evil.safetensors")),
    ("shards/model.safetensors.index.json", Replaced(("weight_map",), [])),
    ("shards/model.safetensors.index.json", Removed(("metadata",))),
)
def test_models_of_damaged_checkpoints_are_opened_or_refused_in_a_sentence(checkpoints, file, damage):
    opens_or_says_why(checkpoints, file, damage, [DDAEModel, DDAEForImageClassification, DDAEPipeline])


@law(120)
@given(st.sampled_from(TEXT_FILES), damages)
@found(
    ("stock/tokenizer/tokenizer.json", Whole(b"\xff\xfe{\x00}\x00")),
    ("stock/tokenizer/tokenizer.json", Whole(b"")),
    ("words/tokenizer/vocab.json", Whole(DEEP)),
    ("words/tokenizer/tokenizer_config.json", Replaced(("model_max_length",), 10**9)),
    ("words/tokenizer/tokenizer_config.json", Added(("model_max_length",), "vocab_file", "/etc/passwd")),
    (
        "stock/tokenizer/tokenizer_config.json",
        Added(("eos_token",), "auto_map", {"AutoTokenizer": ["evil.Evil"]}),
    ),
    ("stock/tokenizer/tokenizer_config.json", Replaced(("tokenizer_class",), "evil")),
    ("stock/text_encoder/config.json", Added(("hidden_size",), "attn_implementation", "kernels/evil")),
    ("stock/text_encoder/config.json", Added(("hidden_size",), "auto_map", {"AutoModel": "evil.Evil"})),
    ("stock/text_encoder/config.json", Replaced(("num_hidden_layers",), 10**6)),
    ("stock/text_encoder/config.json", Replaced(("dtype",), "load")),
    ("words/text_encoder_2/config.json", Replaced(("projection_dim",), 10**12)),
    ("words/model_index.json", Replaced(("text_encoder_2", 0), "evil")),
    ("words/model_index.json", Replaced(("tokenizer", 1), "Evil")),
    ("words/model_index.json", Replaced(("force_zeros_for_empty_prompt",), [])),
    ("stock/model_index.json", Replaced(("_class_name",), "OnnxStableDiffusionPipeline")),
    ("stock/unet/config.json", Replaced(("down_block_types", 0), "")),
    ("sentences/transformer/config.json", Replaced(("caption_channels",), 7)),
    ("whole_texts/config.json", Replaced(("condition_shapes", "encoder_hidden_states"), [10**6, 10**6])),
)
def test_models_that_are_told_texts_are_opened_or_refused_in_a_sentence(checkpoints, file, damage):
    opens_or_says_why(checkpoints, file, damage, [DDAEModel, DDAEPipeline])


@pytest.mark.parametrize(
    ("file", "place", "kind"),
    [
        (f"edm/unet/{SHARDS}", "conv_in.weight", DDAEPipeline),
        (f"edm/unet/{SHARDS}", "conv_in.weight", DDAEModel),
        ("shards/model.safetensors.index.json", "classifier.bias", DDAEForImageClassification),
    ],
)
def test_an_index_of_weights_names_no_file_elsewhere(checkpoints, file, place, kind):
    """Which is there, and could be read."""
    elsewhere = os.path.relpath(checkpoints / "evil.safetensors", (checkpoints / file).parent)
    for name in (elsewhere, str(checkpoints / "evil.safetensors")):
        with damaged(checkpoints / file, Replaced(("weight_map", place), name)):
            with pytest.raises(ValueError, match="It must name safetensors files beside itself"):
                kind.from_pretrained(checkpoints / file.split("/")[0])


def test_a_pipelines_index_names_no_other_library(checkpoints, monkeypatch):
    """diffusers would import it."""
    monkeypatch.syspath_prepend(checkpoints / "pipeline")
    with damaged(checkpoints / "pipeline/model_index.json", Replaced(("scheduler",), ["evil", "DDIMScheduler"])):
        for kind in (DDAEPipeline, DDAEModel, DDAEConfig):
            with pytest.raises(ValueError, match="takes its scheduler from 'evil': allowed is diffusers"):
                kind.from_pretrained(checkpoints / "pipeline")
    assert not (checkpoints / "pipeline" / "ran").exists() and "evil" not in sys.modules


def test_the_watch_sees_what_it_is_there_for(checkpoints):
    WATCH.folder = checkpoints / "whole"
    try:
        (checkpoints / "evil.safetensors").read_bytes()
        exec(compile("1", str(checkpoints / "whole" / "evil.py"), "exec"))
        assert [event for event, _ in WATCH.found] == ["open", "exec"]
    finally:
        WATCH.folder = None
        WATCH.found.clear()
    with pytest.raises(Hung), within(0.01):
        while True:
            pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An array, and a training's checkpoint, with the files that say what they hold."""
    root = tmp_path_factory.mktemp("folders")
    cache = arrays.described_folder(root, {"images": "a hash", "scheduler": {"_class_name": "DDPMScheduler"}})
    arrays.write_array(cache, "mid_block", np.ones((3, 2), np.float32))
    run = root / "checkpoint-5"
    arrays.write_json(run / PROGRESS, {**vars(Progress(steps=5, losses=[0.5])), "batch_images": 8})
    old = root / "checkpoint-4"
    arrays.write_json(old / PROGRESS, {"epoch": 0, "batch": 3, "batches": 3, "images": 12, "seconds": 0.5})
    for folder in (run, old):
        write_options({"train_batch_size": 4, "denoiser": {"sample_size": 8}, "seed": 1}, folder)
    note_files(run)
    return {"cache": cache, "run": run, "old": old}


READERS = {
    "cache/rows.json": lambda folder: arrays.open_array(folder, "mid_block", (3, 2), "float32"),
    "run/state/progress.json": Progress.read,
    "old/state/progress.json": Progress.read,
    "run/files.json": lambda folder: what_is_wrong(folder, ["state/progress.json"]),
}


@law(300)
@given(st.sampled_from(sorted(READERS)), damages)
@found(
    ("cache/rows.json", Replaced(("mid_block", "count"), 2.5)),
    ("cache/rows.json", Whole(DEEP)),
    ("run/state/progress.json", Whole(b"[]")),
    ("run/state/progress.json", Replaced(("steps",), "5")),
    ("old/state/progress.json", Whole(b"{")),
    ("run/files.json", Whole(b"[]")),
    ("run/files.json", Replaced(("training_options.yaml",), 3)),
    ("run/files.json", Renamed(("training_options.yaml",), "../../x")),
)
def test_damaged_notes_of_arrays_and_runs_are_read_or_refused_in_a_sentence(folders, file, damage):
    place, name = file.split("/", 1)
    with damaged(folders[place] / name, damage):
        works_or_says_why(READERS[file], folders[place])


@law(60)
@given(damages)
def test_a_damaged_identity_is_never_taken_for_that_of_its_folder(folders, damage):
    identity = {"images": "a hash", "scheduler": {"_class_name": "DDPMScheduler"}}
    file = folders["cache"] / "identity.json"
    before = file.read_bytes()
    with damaged(file, damage):
        if file.read_bytes() == before:
            return
        with pytest.raises(ValueError, match="is damaged"):
            arrays.described_folder(folders["cache"].parent, identity)


@law(200)
@given(st.binary(max_size=30), st.floats(0, 1))
@example(b"a: 2020-13-45", 1.0)
@example(b"[" * 3000, 0.0)
@example(b"- &a [x]\n- [*a, *a]", 0.0)
@example(b"{train_batch_size: x}", 0.0)
def test_damaged_options_of_a_run_are_read_or_refused_in_a_sentence(folders, garbage, share):
    file = folders["old"] / "training_options.yaml"
    with damaged(file, lambda text: text.encode()[: int(share * len(text))] + garbage):
        works_or_says_why(read_options, folders["old"])
        works_or_says_why(Progress.read, folders["old"])
