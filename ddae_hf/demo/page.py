"""The page: a Gradio app on which one network generates and classifies images, one section below the other.

Of a network that is told a text it shows what it makes of an image and of the words of a prompt.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from torch import Tensor

from ..networks import network_of
from ..noise import family_of
from .maps import Maps
from .pictures import choices, heat_map, notice, pad
from .uploads import MAX_BYTES
from .views import (
    FIRST,
    MAX_IMAGES,
    MAX_NEIGHBOURS,
    MAX_SEED,
    MAX_STEPS,
    NO_CLASS,
    OWN_SAMPLER,
    STEPS,
    Demo,
    Reading,
    pair_figures,
)
from .words import PROMPT, TextDemo

HERE = Path(__file__).parent
# How the page answers: without gradio's own progress; to whatever changes, of many changes to the last.
QUIET: dict[str, Any] = {"show_progress": "hidden"}
PRIVATE: dict[str, Any] = {"api_visibility": "private", **QUIET}
LIVE: dict[str, Any] = {"trigger_mode": "always_last", **PRIVATE}
EACH: dict[str, Any] = {"trigger_mode": "multiple", **PRIVATE}  # what a click says is not kept for the last of many
CHOSEN = 3  # the example that is classified at first
BESIDE = 8  # the one that it is compared with


def show(demo: Demo | TextDemo, host: str | None = None, port: int | None = None) -> None:
    """Serve the page until it is interrupted, or raise `OSError` for a port that is not free.

    By default only this machine is listened to, on the first free port from 7860 on.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    # Fonts of the system: none is fetched.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    build(demo).queue(max_size=32).launch(
        server_name=host,
        server_port=port,
        theme=theme,
        css_paths=HERE / "page.css",
        run_history=False,
        max_file_size="20mb",
        show_error=True,  # what was not foreseen is said too
        ssr_mode=False,
    )


def build(demo: Demo | TextDemo) -> gr.Blocks:
    """Return the page."""
    with gr.Blocks(title="DDAE", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(introduction(demo) if isinstance(demo, Demo) else introduction_of_texts(demo))
        image = gr.State(demo.pick({"example": CHOSEN % len(demo.examples)}))
        if isinstance(demo, Demo):
            with section("generate", "From noise to images"):
                generate_section(demo, page)
            with section("classify", "From an image to its class"):
                picked = classify_section(demo, page, image)
            with section("sweep", "Which layer, which noise level?"):
                sweep_section(demo, page, image, picked)
        else:
            with section("look", "What the network makes of an image"):
                picked = look_section(demo, page, image)
            with section("words", "Where it looks for each word"):
                words_section(demo, page, image, picked)
        with section("dense", "What the features say of every point"):
            dense_section(demo, page, image, picked)
    return page


def introduction(demo: Demo) -> str:
    """Return what the page begins with."""
    layer, sigma = demo.tap
    parameters = sum(p.numel() for p in demo.pipeline.denoiser.parameters())
    what = "an image" if demo.pipeline.vae is None else "an image's latents"
    title = "One network generates and classifies" if demo.one_network else "One network generates, another classifies"
    return (
        f"# {title}\nA denoiser of {parameters / 1e6:.2g} million parameters, trained to remove noise from images, "
        f"without labels. Started from noise, it draws. Its hidden states at `{layer}`, with noise of sigma "
        f"{sigma:g} on {what}, are all that a linear classifier reads."
    )


def introduction_of_texts(demo: TextDemo) -> str:
    """Return what the page of a network that is told a text begins with."""
    denoiser = demo.network.denoiser
    parameters = sum(p.numel() for p in denoiser.parameters())
    pipelines = " or ".join(network_of(denoiser).stock_pipelines)
    return (
        f"# What a network that draws by words sees\nA denoiser of {parameters / 1e6:.2g} million parameters, trained "
        "to remove noise from images while it is told what they show. Here it draws nothing, which diffusers' "
        f"{pipelines} does: it is given an image with noise, and its hidden states and attention are looked at."
    )


def section(name: str, title: str) -> gr.Column:
    """Return a part of the page under a heading."""
    column = gr.Column(elem_id=name, elem_classes="section")
    with column:
        gr.Markdown(f"## {title}")
    return column


def script(name: str) -> str:
    """Return the script of an element."""
    return (HERE / f"{name}.js").read_text(encoding="utf-8")


def unchecked(field: Any) -> Any:
    """Return a field of numbers whose values the views check: gradio would answer with an error of its own."""
    field.preprocess = lambda value: value
    return field


def generate_section(demo: Demo, page: gr.Blocks) -> None:
    """Lay out what generates."""
    pipeline = demo.pipeline
    names = demo.class_names
    labels = range(network_of(pipeline.denoiser).num_labels(pipeline.denoiser.config))
    classes = [(names.get(k, str(k)), k) for k in labels if k != pipeline.null_class]
    has_null = pipeline.null_class is not None
    offered = [("any", NO_CLASS)] * has_null + classes if classes else [("any", NO_CLASS)]
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            count = unchecked(gr.Slider(1, MAX_IMAGES, FIRST, step=1, label="Images"))
            steps = unchecked(gr.Slider(1, MAX_STEPS, STEPS, step=1, label="Steps"))
            seed = unchecked(gr.Number(0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed"))
            others = family_of(pipeline.scheduler).samplers
            sampler = gr.Radio([OWN_SAMPLER, *others], value=OWN_SAMPLER, label="Sampler", visible=bool(others))
            label = gr.Dropdown(offered, value=offered[0][1], label="Class", visible=bool(classes))
            guidance = gr.Slider(1, 6, 1, step=0.1, label="Guidance", visible=bool(classes) and has_null)
            with gr.Row():
                start = gr.Button("Generate", variant="primary", elem_id="start", min_width=100)
                stop = gr.Button("Stop", elem_id="stop", min_width=100)
        with gr.Column(scale=3, min_width=320):
            bar = gr.HTML("Drawing the first images …", elem_id="bar")
            images = gr.HTML(elem_id="images")
            gr.Markdown("**The first image on its way**: as it is (above), what the network takes it for (below)")
            way = gr.HTML(elem_id="way")
    given = [count, steps, seed, sampler, label, guidance]
    shown = [bar, images, way]
    event = start.click(demo.generate, given, shown, concurrency_limit=2, api_name="generate", **QUIET)
    stop.click(None, cancels=[event], api_visibility="private")
    page.load(lambda: demo.first_samples, None, shown, **PRIVATE)


def sigma_field(demo: Maps) -> gr.Slider:
    """Return a field for a noise level, from the lowest that the scheduler has on."""
    _, sigma = demo.tap
    lowest, highest = family_of(demo.network.scheduler).sigma_range()
    low = min(math.ceil(1000 * lowest) / 1000, sigma)
    return unchecked(gr.Slider(low, min(highest, max(3.0, sigma)), sigma, step=0.001, label="Noise level sigma"))


def classify_section(demo: Demo, page: gr.Blocks, image: gr.State) -> Any:
    """Lay out what classifies, and return the event of another image."""
    layer, sigma = demo.tap
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            paper = pad(demo.examples, CHOSEN % len(demo.examples), demo.sketched, MAX_BYTES)
            drawn = gr.HTML(html_template=paper, js_on_load=script("pad"))
        with gr.Column(scale=3, min_width=320):
            warning = gr.HTML(elem_id="warning")
            with gr.Row():
                with gr.Column(scale=2, min_width=260):
                    probabilities = gr.Label(num_top_classes=5, label="Class probabilities", elem_id="probabilities")
                with gr.Column(scale=3, min_width=320):
                    gr.Markdown("**What the network sees**, and what it takes that for")
                    seen = gr.HTML(elem_id="seen")
                    level = sigma_field(demo)
            pooling = demo.model.config.pooling
            gr.Markdown(f"**What it makes of it**: hidden states at `{layer}`, pooled (`{pooling}`) for the classifier")
            maps = gr.HTML(elem_id="maps")
            gr.Markdown(f"**The nearest of {len(demo.train):,} training images**, by the distance of their features")
            found = gr.HTML(elem_id="found")
            count = unchecked(gr.Slider(1, MAX_NEIGHBOURS, 8, step=1, label="Neighbours"))
            gr.Markdown(
                f"The classifier was fitted at sigma {sigma:g}: at other levels the features are not those it knows. "
                "The warning and the neighbours are always by the features at that level."
            )
    shown = [probabilities, warning, seen, maps, found]

    def read(pixels: Tensor | None, *numbers: Any) -> Iterator[Reading]:
        if pixels is None:
            yield Reading(warning=notice("No image yet: draw one, open a file, or click on a test image."))
            return
        yield from demo.read(pixels, *numbers)

    def pick(given: str, level: Any, count: Any) -> Iterator[tuple[Any, ...]]:
        try:
            pixels = demo.pick(json.loads(given))
        except ValueError as error:
            yield None, *Reading(warning=notice(str(error)))
            return
        for reading in demo.read(pixels, level, count):
            yield pixels, *reading

    numbers = [level, count]
    gr.on([page.load, level.input, count.input], read, [image, *numbers], shown, **LIVE)
    return drawn.input(pick, [drawn, *numbers], [image, *shown], **LIVE)


def look_section(demo: TextDemo, page: gr.Blocks, image: gr.State) -> Any:
    """Lay out an image and its feature maps, and return the event of another image."""
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            paper = pad(demo.examples, CHOSEN % len(demo.examples), demo.sketched, MAX_BYTES, unseen=False)
            handed = gr.HTML(html_template=paper, js_on_load=script("pad"))
        with gr.Column(scale=3, min_width=320):
            maps = gr.HTML(elem_id="maps")
            layer = gr.Dropdown(demo.network.layer_names(), value=demo.tap[0], label="Layer")
            level = sigma_field(demo)

    def look(pixels: Tensor | None, *given: Any) -> str:
        return "" if pixels is None else demo.look(pixels, *given)

    def pick(given: str, *fields: Any) -> tuple[Tensor | None, str]:
        try:
            pixels = demo.pick(json.loads(given))
        except ValueError as error:
            return None, notice(str(error))
        return pixels, demo.look(pixels, *fields)

    gr.on([page.load, layer.input, level.input], look, [image, layer, level], maps, **LIVE)
    return handed.input(pick, [handed, layer, level], [image, maps], **LIVE)


def words_section(demo: TextDemo, page: gr.Blocks, image: gr.State, picked: Any) -> None:
    """Lay out a prompt, and where the network looks for its words."""
    gr.Markdown(
        "Every place of the image shares its attention out among the tokens of the text that the network is told. "
        "Where a place glows, it gives a word more than other places do; below is how much that is. What is left goes "
        "to the tokens that begin and end the text, and to its padding."
    )
    shown = gr.HTML(elem_id="shown-words")
    prompt = gr.Textbox(PROMPT, label="Prompt, then Enter", submit_btn=True, max_length=1000, elem_id="prompt")
    level = sigma_field(demo)

    def words(pixels: Tensor | None, *given: Any) -> str:
        return "" if pixels is None else demo.words(pixels, *given)

    gr.on([prompt.submit, level.input], words, [image, prompt, level], shown, **LIVE)
    follow(page, picked, words, [image, prompt, level], [shown])


def sweep_section(demo: Demo, page: gr.Blocks, image: gr.State, picked: Any) -> None:
    """Lay out layers and noise levels."""
    report = demo.sweep
    if report is None:
        gr.Markdown(f"{demo.sweep_missing} This makes one:\n\n```bash\n{demo.sweep_command()}\n```")
        return
    best = report.best
    test = 100 * next(iter(report.test_accuracies.values()))
    gr.Markdown(
        f"Accuracy (%) of a linear probe on {report.images['held_out']:,} held-out training images, for every layer "
        "and noise level; colours follow the logarithm of the error. **Click a pair** to see your image there. The "
        f"best, `{best.layer}` at sigma {best.sigma:g}, was fitted again on all training images and then tested on "
        f"{report.images['test']:,} others: **{test:.2f} %**."
    )
    number = next(i for i, each in enumerate(report.pairs) if (each.layer, each.sigma) == (best.layer, best.sigma))
    chosen = gr.State(number)
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            heat = gr.HTML(heat_map(report.pairs, report.pairs[number]), js_on_load=script("buttons"), elem_id="heat")
        with gr.Column(scale=2, min_width=320):
            text = gr.Markdown(pair_figures(report.pairs[number]), elem_id="pair")
            gr.Markdown("**Your image in this layer at this level**")
            maps = gr.HTML(elem_id="pair-maps")

    def click(pixels: Tensor | None, event: gr.EventData) -> tuple[Any, ...]:
        pair = int(event.pair)
        return pair, *demo.pair(pair, pixels)

    heat.select(click, [image], [chosen, heat, text, maps], **EACH)
    follow(page, picked, lambda pair, pixels: demo.pair(pair, pixels)[2], [chosen, image], [maps])


def dense_section(demo: Maps, page: gr.Blocks, image: gr.State, picked: Any) -> None:
    """Lay out features at every point of two images."""
    gr.Markdown(
        "Features have a place: click a point of your image, and see which points of another have features like it. "
        "Nothing was trained for this."
    )
    other = gr.State(BESIDE % len(demo.examples))
    point = gr.State(None)
    compared = gr.HTML(elem_id="compared", js_on_load=script("spots"))
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            gr.Markdown("The other image")
            strip = gr.HTML(choices(demo.examples, BESIDE % len(demo.examples)), js_on_load=script("buttons"))
        with gr.Column(scale=1, min_width=280):
            layers = demo.network.layer_names()
            layer = gr.Dropdown(layers, value=demo.dense_layer, label="Layer")
            level = sigma_field(demo)

    def compare(pixels: Tensor | None, *rest: Any) -> str:
        return "" if pixels is None else demo.compare(pixels, *rest)

    def click(
        pixels: Tensor | None, other: int, layer: str, level: float, event: gr.EventData
    ) -> tuple[tuple[float, float], str]:
        place = (float(event.x), float(event.y))
        return place, compare(pixels, other, layer, level, place)

    def beside(
        pixels: Tensor | None, layer: str, level: float, point: tuple[float, float] | None, event: gr.EventData
    ) -> tuple[int, str, str]:
        other = int(event.example)
        return other, choices(demo.examples, other), compare(pixels, other, layer, level, point)

    gr.on([layer.input, level.input], compare, [image, other, layer, level, point], compared, **LIVE)
    compared.select(click, [image, other, layer, level], [point, compared], **EACH)
    strip.select(beside, [image, layer, level, point], [other, strip, compared], **EACH)

    def anew(*chosen: Any) -> tuple[None, str]:
        return None, compare(*chosen, None)

    follow(page, picked, anew, [image, other, layer, level], [point, compared])


def follow(page: gr.Blocks, picked: Any, answer: Callable[..., Any], given: list[Any], shown: list[Any]) -> None:
    """Answer when the page opens, and after every other image."""
    page.load(answer, given, shown, **LIVE)
    picked.then(answer, given, shown, **LIVE)
