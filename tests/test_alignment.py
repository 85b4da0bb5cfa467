"""Alignment with a frozen network: the formula in float64, what each kind of network gives, gradients, whole runs."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from diffusers import DDIMScheduler
from PIL import Image
from safetensors import safe_open
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ddae_hf import DDAEModel, DDAEPipeline
from ddae_hf.experiments import Images, encode
from ddae_hf.experiments.auxiliary import WEIGHTS, Seen, Setting, Terms
from ddae_hf.experiments.latent_folder import LatentFolder
from ddae_hf.experiments.pretraining import Pretraining, PretrainingOptions, pretrain
from ddae_hf.experiments.pretraining_data import training_data
from ddae_hf.experiments.teachers import Preparation, on_patches, open_teacher, resized
from ddae_hf.hidden_states import learning_parameters

from .conftest import assert_equal, files_of, make_dit, make_unet, make_vae

UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [16, 32], "layers_per_block": 1}
UNET |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
UNET |= {"norm_num_groups": 8, "attention_head_dim": 8}
DIT = {"_class_name": "DiTTransformer2DModel", "sample_size": 8, "in_channels": 1, "num_layers": 3}
DIT |= {"num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 2}
EARLY = "down_blocks.1.attentions.0"
TOKENS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TOKENS |= {"image_size": 16, "patch_size": 4}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"vocab_size": 10, "bos_token_id": 0, "eos_token_id": 1}
MAPS = {"num_channels": 3, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
SIZE = {"height": 16, "width": 16}


def made_model(name, **options):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return kind(kind.config_class(**options)).eval()


TO_SIZE, CUT_TO_SIZE = (
    ViTImageProcessorPil(size=SIZE),
    CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=SIZE),
)
SQUARE = ConvNextImageProcessorPil(size={"shortest_edge": 16})


class Written:
    """An image processor as its file, of a class that cannot be made without torchvision."""

    def to_dict(self):
        return {**TO_SIZE.to_dict(), "image_processor_type": "DINOv3ViTImageProcessorFast"}

    def save_pretrained(self, path):
        (path / "preprocessor_config.json").write_text(json.dumps(self.to_dict()))


REGISTERS = {**TOKENS, "num_register_tokens": 3}
# Vision models by name: their class and options, the image processor, and how many tokens come before the patches.
VISION = {
    "ViT": ("ViTModel", TOKENS, TO_SIZE, 1),
    "DINOv2": ("Dinov2Model", TOKENS, CUT_TO_SIZE, 1),
    "registers": ("Dinov2WithRegistersModel", REGISTERS, TO_SIZE, 4),
    "DINOv3": ("DINOv3ViTModel", REGISTERS, Written(), 4),
    "CLIP's vision": ("CLIPVisionModel", TOKENS, CUT_TO_SIZE, 1),
    "CLIP": ("CLIPModel", {"text_config": TEXT, "vision_config": TOKENS}, CUT_TO_SIZE, 1),
    "SigLIP": ("SiglipVisionModel", TOKENS, TO_SIZE, 0),
    "DeiT": ("DeiTModel", TOKENS, TO_SIZE, 2),
    "ResNet": ("ResNetModel", MAPS, SQUARE, None),
    "ConvNeXt": ("ConvNextModel", {**MAPS, "patch_size": 2}, SQUARE, None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What gives the folder of a vision model by its name, or of a denoiser's checkpoint, and makes each once."""
    root = tmp_path_factory.mktemp("encoders")
    makers = {"denoiser": lambda path: save_denoiser(path, make_unet(**UNET))}

    def find(name):
        path = root / name
        if not path.exists():
            if name in makers:
                makers[name](path)
            else:
                kind, options, processor, _ = VISION[name]
                save_vision(path, kind, options, processor)
        return str(path)

    return find


def save_vision(path, kind, options, processor=TO_SIZE):
    made_model(kind, **options).save_pretrained(path)
    processor.save_pretrained(path)


def save_denoiser(path, network, **more):
    DDAEPipeline.for_denoiser(network, DDIMScheduler(), **more).save_pretrained(path)
    return str(path)


def setting(network=None, latents=None):
    return Setting(make_unet(**UNET) if network is None else network, latents, torch.device("cpu"), 0)


def drawn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0.5, 1.0, shape)).float()


def pictures(count=3, channels=1, side=8):
    return drawn(count, channels, side, side).mul(0.5).clamp(-1, 1)


# What the networks give


@pytest.mark.parametrize("name", VISION)
def test_a_vision_model_gives_the_map_of_its_patches(folder, name):
    kind, options, processor, before = VISION[name]
    clean = pictures(channels=3, side=16)
    teacher, blank = open_teacher(folder(name), None, None, setting(make_unet(**UNET | {"in_channels": 3})))
    known = processor.to_dict()
    pixels = (clean.double().numpy() + 1) / 2
    mean, std = (np.array(known[each])[:, None, None] for each in ("image_mean", "image_std"))
    network = made_model(kind, **options)
    network = getattr(network, "vision_model", network) if name == "CLIP" else network
    with torch.no_grad():
        found = teacher.maps(clean)
        hidden = network(pixel_values=torch.from_numpy((pixels - mean) / std).float()).last_hidden_state
    if before is not None:
        assert hidden.shape == (3, before + 16, 16)
        hidden = hidden[:, before:].reshape(3, 4, 4, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, hidden, rtol=1e-4, atol=1e-5)
    assert blank.shape[1:] == found.shape[1:] and not found.requires_grad
    assert not teacher.network.training and not any(weight.requires_grad for weight in teacher.network.parameters())


def test_each_token_of_a_map_is_at_the_place_of_its_patch(folder):
    """A token is its patch's embedding where attention and mixing are off."""
    teacher, _ = open_teacher(folder("registers"), None, None, setting())
    for layer in teacher.network.encoder.layer:
        for scale in (layer.layer_scale1, layer.layer_scale2):
            torch.nn.init.zeros_(scale.lambda1)
    torch.nn.init.zeros_(teacher.network.embeddings.position_embeddings)
    clean = torch.zeros(1, 3, 16, 16)
    with torch.no_grad():
        before = teacher.maps(clean)
        clean[:, :, 4:8, 12:16] = 1
        changed = (teacher.maps(clean) - before).abs().amax((0, 1))
    assert [tuple(place) for place in (changed > 1e-4).nonzero().tolist()] == [(1, 3)]


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (32, 32)])
def test_images_are_prepared_as_the_networks_own_processor_does(size):
    """The processor rounds to integers, after resizing rows and again after resizing columns."""
    pixels = np.random.default_rng(0).integers(60, 200, (*size, 3), dtype=np.uint8)
    for processor in (
        ViTImageProcessorPil(size=SIZE, image_mean=[0.2, 0.3, 0.4], image_std=[0.5, 0.6, 0.7]),
        CLIPImageProcessorPil(size=SIZE, crop_size=SIZE),
        ViTImageProcessorPil(size=SIZE, do_normalize=False, rescale_factor=1 / 128),
        ViTImageProcessorPil(size=SIZE, do_rescale=False, do_normalize=False),
    ):
        known = Preparation.of(processor.to_dict())
        expected = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"].float()
        found = known(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)
        assert found.shape == expected.shape == (1, 3, 16, 16)
        levels = (found - expected) * torch.tensor(known.std)[:, None, None] / known.factor
        assert levels.abs().max() < (1e-3 if size == (16, 16) else 1.5)


def test_bicubic_edges_stay_within_the_range_of_images():
    sharp = torch.ones(1, 1, 8, 8)
    sharp[..., :4] = -1
    assert resized(sharp, (20, 20)).abs().max() == 1


def test_grey_images_are_seen_as_rgb(folder):
    teacher, _ = open_teacher(folder("ViT"), None, None, setting())
    clean = pictures()
    assert torch.equal(teacher.maps(clean), teacher.maps(clean.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("kind", ["U-Net", "DiT", "of latents", "of other size"])
def test_a_denoiser_gives_a_layer_at_a_level_under_fixed_noise(kind, tmp_path):
    layer = "transformer_blocks.1" if kind == "DiT" else "up_blocks.1.resnets.0"
    if kind == "of latents":
        vae = make_vae(in_channels=1, out_channels=1, latent_channels=2)
        save_denoiser(tmp_path, make_unet(**UNET | {"in_channels": 2, "out_channels": 2}), vae=vae)
    else:
        side = 16 if kind == "of other size" else 8
        network = make_dit(in_channels=1) if kind == "DiT" else make_unet(**UNET | {"sample_size": side})
        save_denoiser(tmp_path, network, **({"null_class": 5} if kind == "DiT" else {}))
    teacher, blank = open_teacher(str(tmp_path), layer, 0.3, setting())
    clean = pictures(side=8 if kind in ("U-Net", "DiT") else 16)
    found = teacher.maps(clean)
    model = DDAEModel.from_pretrained(tmp_path, layer=layer, sigma=0.3).eval()
    with torch.no_grad():
        expected = model(clean).last_hidden_state
    if kind == "DiT":
        expected = expected.reshape(3, 4, 4, 32).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, teacher.maps(clean)) and blank.shape[1:] == found.shape[1:]
    assert not teacher.model.training and not any(weight.requires_grad for weight in teacher.model.parameters())


def test_a_denoiser_is_read_at_its_checkpoints_layer_and_level_by_default(folder):
    teacher, _ = open_teacher(folder("denoiser"), None, None, setting())
    model = DDAEModel.from_pretrained(folder("denoiser"))
    assert (teacher.model.config.layer, teacher.model.config.sigma) == (model.config.layer, model.config.sigma)


# The formula


def layers_of(projection):
    return [value.detach().double().numpy() for value in projection.parameters()]


def mlp(weights, maps):
    """Three linear layers with SiLU between, on maps (B, C, H, W) in float64."""
    found = maps
    for number in range(3):
        weight, bias = weights[2 * number][:, :, 0, 0], weights[2 * number + 1]
        found = np.einsum("oc,bchw->bohw", weight, found) + bias[:, None, None]
        if number < 2:
            found = found / (1 + np.exp(-found))
    return found


def convolved(weights, maps):
    """A convolution of 3x3 with zeros around the map, in float64."""
    weight, bias = weights
    height, width = maps.shape[2:]
    around = np.pad(maps, [(0, 0), (0, 0), (1, 1), (1, 1)])
    found = np.zeros((len(maps), len(weight), height, width))
    for row in range(3):
        for column in range(3):
            seen = around[:, :, row : row + height, column : column + width]
            found += np.einsum("oc,bchw->bohw", weight[:, :, row, column], seen)
    return found + bias[:, None, None]


def averaged(maps, side):
    count, channels, height, width = maps.shape
    return maps.reshape(count, channels, side, height // side, side, width // side).mean((3, 5))


# The layer and its map, and a layer of the frozen U-Net, whose maps have sides of 4 and 8.
PAIRS = {
    "equal": (EARLY, (32, 4, 4), "mid_block"),
    "larger": ("down_blocks.0.resnets.0", (16, 8, 8), "mid_block"),
    "smaller": ("mid_block", (32, 4, 4), "up_blocks.1.resnets.0"),
    "DiT": ("transformer_blocks.1", (16, 16), "up_blocks.1.resnets.0"),
}


@pytest.mark.parametrize(
    "projection, normalised", [("mlp", {}), ("mlp", {"mean_share": 1.0}), ("convolution", {}),
                               ("convolution", {"mean_share": 0.6})],
)  # fmt: skip
@pytest.mark.parametrize("pair", PAIRS)
def test_the_term_is_minus_the_mean_cosine_of_projected_maps(folder, pair, projection, normalised):
    layer, shape, encoder_layer = PAIRS[pair]
    network = make_dit(**DIT, num_embeds_ada_norm=1) if pair == "DiT" else make_unet(**UNET)
    given = {"term": "representation_alignment", "layer": layer, "encoder": folder("denoiser"), "weight": 3.0}
    given |= {"encoder_layer": encoder_layer, "encoder_sigma": 0.2, "projection": projection, "hidden_size": 12}
    terms = Terms([{**given, "normalise": bool(normalised), **normalised}], setting(network))
    term = terms.terms["representation_alignment"]
    clean, state = pictures(), drawn(3, *shape)
    seen = Seen(clean, clean, torch.ones(3), {layer: state}, {}, None)
    found = terms(seen, ["representation_alignment"])["representation_alignment"].item()

    own, wanted = state.double().numpy(), term.teacher.maps(clean).double().numpy()
    if pair == "DiT":
        own = own.reshape(3, 4, 4, 16).transpose(0, 3, 1, 2)
    own, wanted = averaged(own, 4), averaged(wanted, 4)
    own = (mlp if projection == "mlp" else convolved)(layers_of(term.projection), own)
    if normalised:
        mean, deviation = (each((2, 3), keepdims=True) for each in (wanted.mean, wanted.std))
        wanted = (wanted - normalised["mean_share"] * mean) / (deviation + 1e-6)
    cosines = (own * wanted).sum(1) / np.linalg.norm(own, axis=1) / np.linalg.norm(wanted, axis=1)
    assert found == pytest.approx(-3.0 * cosines.mean(), rel=1e-4, abs=1e-6)


def test_the_papers_projection_has_three_layers_of_2048(folder):
    given = {"term": "representation_alignment", "layer": EARLY, "encoder": folder("ViT")}
    term = Terms([given], setting()).terms["representation_alignment"]
    assert [tuple(weight.shape[:2]) for weight in term.parameters() if weight.ndim == 4] == [
        (2048, 32), (2048, 2048), (16, 2048),
    ]  # fmt: skip
    assert term.options.weight == 0.5 and not term.options.normalise
    assert all(name.startswith("projection.") for name in term.state_dict())


# Gradients


@pytest.fixture(scope="module")
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    return Images.open([Image.fromarray(image) for image in pixels], labels=np.arange(40) % 4)


def aligned(encoder, layer=EARLY, **more):
    return {"term": "representation_alignment", "layer": layer, "encoder": encoder, "hidden_size": 24, **more}


def small(**changes):
    """Options of a small training."""
    given = {"denoiser": UNET, "total_batch_size": 8, "max_train_steps": 4, "sample_steps": 0, "learning_rate": 1e-3}
    return {**given, "lr_warmup_steps": 0, "mixed_precision": "no", "seed": 1, **changes}


def first_losses(images, **changes):
    """A run, and the parts of the loss of its first batch."""
    options = PretrainingOptions(**small(**changes))
    with options.accelerated() as accelerator:
        run = Pretraining(options, accelerator, training_data(images, options), None)
        return run, run.loss(next(run.loop.batches()), run.loop.draws(8))


@pytest.mark.parametrize("encoder", ["registers", "denoiser", "ResNet"])
@pytest.mark.parametrize("network", ["U-Net", "DiT"])
def test_gradients_reach_the_projection_and_what_is_before_the_layer_and_nothing_else(images, folder, network, encoder):
    denoiser, layer = (UNET, EARLY) if network == "U-Net" else (DIT, "transformer_blocks.1")
    projection = "mlp" if encoder == "registers" else "convolution"
    run, parts = first_losses(
        images, denoiser=denoiser, auxiliary=[aligned(folder(encoder), layer, projection=projection)]
    )
    assert list(parts) == ["denoising", "representation_alignment"]
    parts["representation_alignment"].backward()
    config = json.dumps(dict(run.loop.module.config) | {"_class_name": type(run.loop.module).__name__})
    reached = {name for name, weight in run.loop.module.named_parameters() if weight.grad is not None}
    assert reached == learning_parameters(config, (layer,)) < {name for name, _ in run.loop.module.named_parameters()}
    assert all(weight.grad.abs().max() > 0 for weight in run.terms.parameters())
    teacher = run.terms.terms["representation_alignment"].teacher
    frozen = teacher.model if encoder == "denoiser" else teacher.network
    assert all(weight.grad is None and not weight.requires_grad for weight in frozen.parameters())
    assert not any(module is frozen for module in run.terms.modules())


def test_the_network_stays_as_it_is_in_training(images, folder):
    """Also a network with batch normalisation, whose statistics would follow the images."""
    result = pretrain(images, **small(auxiliary=[aligned(folder("ResNet"))]))
    terms = result.run.terms
    network = terms.terms["representation_alignment"].teacher.network
    assert terms.training and not any(module.training for module in network.modules())
    expected = transformers.ResNetModel.from_pretrained(folder("ResNet")).state_dict()
    assert_equal(dict(network.state_dict()), dict(expected))


@pytest.mark.parametrize("encoder", ["registers", "denoiser"])
def test_in_bfloat16_the_term_is_close(images, folder, encoder):
    term = aligned(folder(encoder), normalise=True)
    (_, exact), (_, close) = (
        first_losses(images, auxiliary=[term], mixed_precision=precision) for precision in ("no", "bf16")
    )
    found, expected = close["representation_alignment"], exact["representation_alignment"]
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), abs=5e-3)
    assert found.item() != expected.item()


# Whole runs


@pytest.fixture(scope="module")
def whole(images, folder, tmp_path_factory):
    """A run beside a copy of a vision model, and one beside a denoiser, in one training; its options."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(folder("registers"), root / "vision")
    shutil.copytree(folder("denoiser"), root / "denoiser")
    terms = [aligned(str(root / "vision")), aligned(str(root / "denoiser"), projection="convolution", normalise=True)]
    options = small(auxiliary=terms, random_flip=True, checkpointing_steps=2)
    return root, options, pretrain(images, **options, output_dir=str(root / "run"))


def test_each_term_is_logged_by_itself(whole):
    _, _, result = whole
    assert list(result.parts_last_100_batches) == [
        "denoising", "representation_alignment", "representation_alignment_2",
    ]  # fmt: skip


@pytest.mark.parametrize("encoder", ["registers", "denoiser"])
def test_a_hidden_state_comes_to_be_aligned(images, folder, encoder):
    term = aligned(folder(encoder), projection="convolution", normalise=True, weight=1.0)
    result = pretrain(images, **small(auxiliary=[term], max_train_steps=40, learning_rate=5e-3))
    cosines = -torch.stack(list(result.run.loop.parts["representation_alignment"]))
    assert cosines[0].abs() < 0.1 and cosines[-1] > 0.2


def go_on(images, whole, target, **changes):
    """Resume the run at its second step, in another folder."""
    root, options, _ = whole
    target.mkdir()
    (target / "checkpoint-2").symlink_to(root / "run" / "checkpoint-2")
    return pretrain(images, **{**options, **changes}, output_dir=str(target), resume_from_checkpoint="latest")


def test_a_run_goes_on_exactly(images, whole, tmp_path):
    root, _, result = whole
    found = go_on(images, whole, tmp_path / "run", checkpointing_steps=4)
    for part in ("unet", "raw/unet", "checkpoint-4"):
        assert_equal(files_of(root / "run" / part), files_of(tmp_path / "run" / part))
    assert found.parts_last_100_batches == result.parts_last_100_batches


def test_the_network_may_lie_elsewhere_when_a_run_goes_on_but_be_no_other(images, whole, folder, tmp_path):
    root, options, _ = whole
    vision, denoiser = options["auxiliary"]
    moved = [{**vision, "encoder": folder("registers")}, {**denoiser, "encoder": folder("denoiser")}]
    go_on(images, whole, tmp_path / "moved", auxiliary=moved, checkpointing_steps=4)
    assert_equal(files_of(root / "run" / "checkpoint-4"), files_of(tmp_path / "moved" / "checkpoint-4"))
    save_denoiser(tmp_path / "other", make_unet(**UNET, seed=1))
    with pytest.raises(ValueError, match="auxiliary: representation_alignment_2 had another network in .*checkpoint-2"):
        go_on(images, whole, tmp_path / "a", auxiliary=[vision, {**denoiser, "encoder": str(tmp_path / "other")}])
    with pytest.raises(ValueError, match="auxiliary: representation_alignment had another network in .*checkpoint-2"):
        go_on(images, whole, tmp_path / "wide", auxiliary=[{**vision, "encoder": folder("ResNet")}, denoiser])
    shutil.copytree(root / "vision", tmp_path / "prepared")
    ViTImageProcessorPil(size=SIZE, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "prepared")
    with pytest.raises(ValueError, match="auxiliary: representation_alignment had another network in .*checkpoint-2"):
        go_on(images, whole, tmp_path / "b", auxiliary=[{**vision, "encoder": str(tmp_path / "prepared")}, denoiser])
    with pytest.raises(ValueError, match="trained with other options: auxiliary was"):
        go_on(images, whole, tmp_path / "c", auxiliary=[vision, {**denoiser, "encoder_sigma": 0.7}])
    with pytest.raises(ValueError, match="trained with other options: auxiliary was"):
        go_on(images, whole, tmp_path / "d", auxiliary=[{**vision, "weight": 0.25}, denoiser])


def test_only_checkpoints_keep_projections_and_nothing_keeps_the_network(whole):
    root, _, result = whole
    kept = {(file, name) for file, name in files_of(root / "run") if "projection" in name}
    assert {file for file, _ in kept} == {f"checkpoint-{step}/{WEIGHTS}" for step in (2, 4)}
    with safe_open(root / "run" / "checkpoint-4" / WEIGHTS, "pt") as file:
        assert all("projection" in name for name in file.keys())  # noqa: SIM118 (not a mapping)
        assert {len(identity) for identity in file.metadata().values()} == {64}
    result.save(root / "saved")
    plain = {name for name, _ in make_unet(**UNET).named_parameters()}
    for path in (root / "run", root / "saved"):
        assert {name for file, name in files_of(path / "unet")} == plain
        DDAEPipeline.from_pretrained(path)


def test_the_term_draws_nothing(images, folder):
    """With the weight 0 a run is the plain one: batches, levels, noise and mirrors are the same."""
    term = aligned(folder("denoiser"), weight=0.0, projection="convolution")
    options = small(random_flip=True)
    plain, beside = (pretrain(images, **options, auxiliary=given) for given in ([], [term]))
    found = [loss.item() for loss in beside.run.loop.parts["denoising"]]
    assert found[0] == plain.run.loop.losses[0].item()
    assert found == pytest.approx([loss.item() for loss in plain.run.loop.losses], abs=1e-5)  # sums are others


# Latents


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A folder of latents, the checkpoint of a denoiser of them, and one of another VAE's."""
    root = tmp_path_factory.mktemp("latents")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16), dtype=np.uint8)
    found = Images.open([Image.fromarray(image) for image in pixels])
    shape = {"in_channels": 1, "out_channels": 1, "latent_channels": 2}
    network = make_unet(**UNET | {"in_channels": 2, "out_channels": 2})
    for name, seed in (("own", 0), ("other", 1)):
        save_denoiser(root / name, network, vae=make_vae(seed, **shape))
    make_vae(**shape).save_pretrained(root / "vae")
    encode(str(root / "vae"), found, resolution=16, output_dir=str(root / "encoded"))
    return root


def test_a_denoiser_of_the_same_latents_reads_them(latents):
    folder = LatentFolder(latents / "encoded")
    network = make_unet(**UNET | {"in_channels": 2, "out_channels": 2})
    teacher, _ = open_teacher(str(latents / "own"), "mid_block", 0.4, setting(network, folder))
    clean = drawn(3, 2, 8, 8)
    model = DDAEModel.from_pretrained(latents / "own", layer="mid_block", sigma=0.4).eval()
    with torch.no_grad():
        torch.testing.assert_close(teacher.maps(clean), model.read_layers(clean, ["mid_block"])["mid_block"])
    term = aligned(str(latents / "own"), encoder_layer="mid_block")
    options = small(denoiser={name: value for name, value in UNET.items() if "channels" not in name or "block" in name})
    result = pretrain(folder, **{**options, "auxiliary": [term], "max_train_steps": 2})
    assert result.parts_last_100_batches["representation_alignment"] < 0.5


def test_what_cannot_read_latents_is_refused(latents, folder):
    found = LatentFolder(latents / "encoded")
    network = make_unet(**UNET | {"in_channels": 2, "out_channels": 2})
    for encoder, message in (
        (folder("ViT"), "it sees images, and the denoiser is trained on latents: give a checkpoint"),
        (folder("denoiser"), "it sees images, and the denoiser is trained on latents"),
        (str(latents / "other"), "were made by another VAE"),
    ):
        with pytest.raises(ValueError, match=f"cannot be used: .*{message}"):
            open_teacher(encoder, None, None, setting(network, found))


# Refusals


def broken(tmp_path, name):
    """The folder of a network that cannot be aligned with."""
    if name == "masked":
        save_vision(tmp_path, "ViTMAEModel", TOKENS)
    elif name == "detecting":
        save_vision(tmp_path, "YolosModel", {**TOKENS, "image_size": [16, 16], "num_detection_tokens": 7})
    elif name == "text":
        save_vision(tmp_path, "BertModel", {**TEXT, "num_hidden_layers": 1})
    elif name == "unprepared":
        made_model("ViTModel", **TOKENS).save_pretrained(tmp_path)
    elif name == "of other size":
        save_vision(tmp_path, "ViTModel", TOKENS, ViTImageProcessorPil(size={"height": 20, "width": 20}))
    elif name == "cut":
        save_vision(tmp_path, "ViTModel", TOKENS)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
    return str(tmp_path)


BROKEN = {
    "masked": "tokens for 4 x 4 patches: those of the patches cannot be told",
    "detecting": "it gives 24 tokens for 4 x 4 patches",
    "text": "takes input_ids: give a model of images alone",
    "unprepared": "image processor|preprocessor_config",
    "of other size": "20",
    "cut": "",
    "empty": "is not a checkpoint that ddae_hf can open",
}


@pytest.mark.parametrize("name", BROKEN)
def test_networks_that_cannot_be_aligned_with_are_refused_before_any_step(images, tmp_path, name):
    term = aligned(broken(tmp_path, name))
    message = f"auxiliary: representation_alignment: encoder {tmp_path} cannot be used: .*{BROKEN[name]}"
    with pytest.raises(ValueError, match=message):
        pretrain(images, **small(auxiliary=[term]))


def test_other_channels_are_refused_and_grey_ones_repeated(images, tmp_path):
    save_denoiser(tmp_path / "RGB", make_unet(**UNET | {"in_channels": 3, "out_channels": 3}))
    pretrain(images, **small(auxiliary=[aligned(str(tmp_path / "RGB"))], max_train_steps=1))
    save_denoiser(tmp_path / "grey", make_unet(**UNET))
    network = make_unet(**UNET | {"in_channels": 3, "out_channels": 3})
    with pytest.raises(ValueError, match="it reads images of 1 channels, and those here have 3"):
        open_teacher(str(tmp_path / "grey"), None, None, setting(network))


def test_options_that_do_not_go_together_are_refused(folder):
    for encoder, more, message in (
        ("nobody/nothing", {}, "encoder nobody/nothing cannot be used: "),
        (folder("ViT"), {"encoder_layer": "mid_block"}, "encoder_layer and encoder_sigma are for a checkpoint"),
        (folder("ViT"), {"encoder_sigma": 0.1}, "encoder_layer and encoder_sigma are for a checkpoint"),
        (folder("denoiser"), {"encoder_layer": "mid_blok"}, "There is no layer 'mid_blok'.* mid_block"),
        (folder("denoiser"), {"encoder_sigma": 1e9}, "outside the schedule"),
        (folder("ViT"), {"projection": "linear"}, "projection is 'linear': allowed are mlp, convolution"),
        (folder("denoiser"), {"encoder_sigma": -1.0}, "encoder_sigma is -1.0: it must be at least 0"),
        (folder("denoiser"), {"mean_share": 0.6}, "mean_share is 0.6, and nothing is subtracted without normalise"),
        (folder("denoiser"), {"normalise": True, "mean_share": 1.2}, "mean_share is 1.2: it must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=f"auxiliary: representation_alignment: .*{message}"):
            Terms([aligned(encoder, **more)], setting())
    with pytest.raises(ValueError, match="auxiliary: representation_alignment: encoder is not given"):
        Terms([{"term": "representation_alignment", "layer": EARLY}], setting())


def test_a_map_of_one_position_cannot_be_normalised(tmp_path, folder):
    save_vision(tmp_path, "ResNetModel", MAPS, ConvNextImageProcessorPil(size={"shortest_edge": 8}))
    Terms([aligned(str(tmp_path))], setting())
    with pytest.raises(ValueError, match="normalise needs maps of several positions"):
        Terms([aligned(str(tmp_path), normalise=True)], setting())


def test_processors_that_do_not_say_enough_are_refused():
    for known, message in (
        ({"size": {"longest_edge": 16}}, "its image processor says no size of images"),
        ({"size": SIZE, "image_mean": [0.5] * 3}, "its image processor says no image_mean and image_std"),
    ):
        with pytest.raises(ValueError, match=message):
            Preparation.of(known)
    assert Preparation.of({"size": SIZE, "do_normalize": False}).std == (1.0, 1.0, 1.0)


def test_tokens_of_other_numbers_are_refused():
    assert on_patches(torch.zeros(1, 6, 2), (2, 2)).shape == (1, 2, 2, 2)
    assert on_patches(torch.zeros(1, 9, 2), (2, 2), registers=4).shape == (1, 2, 2, 2)
    for count, registers in ((3, 0), (7, 0), (8, 4)):
        with pytest.raises(ValueError, match=f"it gives {count} tokens for 2 x 2 patches"):
            on_patches(torch.zeros(1, count, 2), (2, 2), registers)
