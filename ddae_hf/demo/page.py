"""The page: a Gradio app on which one network generates and classifies images."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any

import gradio as gr
import numpy as np

from ..networks import network_of
from ..noise import family_of
from .pictures import CSS
from .views import NO_CLASS, OWN_SAMPLER, Demo, pair_figures

# How the page answers: without gradio's own progress; to whatever changes, of many changes to the last.
QUIET: dict[str, Any] = {"show_progress": "hidden"}
LIVE = {"trigger_mode": "always_last", **QUIET}


def show(demo: Demo, host: str | None = None, port: int | None = None) -> None:
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
        css=CSS,
        run_history=False,
        max_file_size="20mb",
        ssr_mode=False,
    )


def build(demo: Demo) -> gr.Blocks:
    """Return the page."""
    layer, sigma = demo.tap
    parameters = sum(p.numel() for p in demo.pipeline.denoiser.parameters())
    what = "an image" if demo.pipeline.vae is None else "an image's latents"
    title = "One network generates and classifies" if demo.one_network else "One network generates, another classifies"
    with gr.Blocks(title="DDAE", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(
            f"# {title}\nA denoiser of {parameters / 1e6:.2g} million parameters. Started from noise, it draws images; "
            f"its hidden states at `{layer}`, with noise of sigma {sigma:g} on {what}, are what a linear classifier "
            "reads."
        )
        for title, lay_out in (
            ("Generate", generate_tab),
            ("Classify", classify_tab),
            ("Layers and noise", sweep_tab),
            ("Neighbours", neighbours_tab),
        ):
            with gr.Tab(title, elem_id=lay_out.__name__):
                lay_out(demo)
    return page


def image_field(demo: Demo) -> gr.Image:
    """Return a field for an image, with a test image of each class below it to click on."""
    field: Any = gr.Image(type="filepath", format="png", label="Image", height=230, elem_classes="upload")
    # gradio would open the file itself, and show a trace where it holds no image.
    field.preprocess = lambda payload: payload and payload.path
    labels = demo.test.labels
    images = demo.test.pil([np.flatnonzero(labels == k)[0] for k in np.unique(labels)[:10]])
    gr.Examples([[image] for image in images], [field], label="Test images", examples_per_page=10)
    return field


def generate_tab(demo: Demo) -> None:
    """Lay out the tab that generates."""
    pipeline = demo.pipeline
    names = demo.class_names
    labels = range(network_of(pipeline.denoiser).num_labels(pipeline.denoiser.config))
    classes = [(names.get(k, str(k)), k) for k in labels if k != pipeline.null_class]
    has_null = pipeline.null_class is not None
    choices = [("any", NO_CLASS)] * has_null + classes if classes else [("any", NO_CLASS)]
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            count = gr.Slider(1, 64, 16, step=1, label="Images")
            steps = gr.Slider(1, 250, 50, step=1, label="Steps")
            seed = gr.Number(0, precision=0, minimum=0, maximum=2**31, label="Seed")
            others = family_of(pipeline.scheduler).samplers
            sampler = gr.Radio([OWN_SAMPLER, *others], value=OWN_SAMPLER, label="Sampler", visible=bool(others))
            label = gr.Dropdown(choices, value=choices[0][1], label="Class", visible=bool(classes))
            guidance = gr.Slider(1, 6, 1, step=0.1, label="Guidance", visible=bool(classes) and has_null)
            with gr.Row():
                start = gr.Button("Generate", variant="primary", elem_id="start")
                stop = gr.Button("Stop", variant="stop", elem_id="stop")
        with gr.Column(scale=3, min_width=320):
            bar = gr.HTML("Press Generate: noise becomes images, step by step.", elem_id="bar")
            images = gr.HTML(elem_id="images")
            gr.Markdown("**The first image on its way**: as it is (above), what the network takes it for (below)")
            way = gr.HTML(elem_id="way")
    given = [count, steps, seed, sampler, label, guidance]
    event = start.click(demo.generate, given, [bar, images, way], concurrency_limit=2, api_name="generate", **QUIET)
    stop.click(None, cancels=[event], api_visibility="private")


def classify_tab(demo: Demo) -> None:
    """Lay out the tab that classifies."""
    layer, sigma = demo.tap
    lowest, highest = family_of(demo.model.ddae.scheduler).sigma_range()
    low = min(math.ceil(1000 * lowest) / 1000, sigma)
    high = min(highest, max(3.0, sigma))
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = image_field(demo)
            level = gr.Slider(low, high, sigma, step=0.001, label="Noise level sigma")
            gr.Markdown(f"The classifier was fitted at sigma {sigma:g}: at others its features are not those it knows.")
        with gr.Column(scale=2, min_width=320):
            probabilities = gr.Label(num_top_classes=5, label="Class probabilities", elem_id="probabilities")
            gr.Markdown("**What the network sees**")
            seen = gr.HTML(elem_id="seen")
            pooling = demo.model.config.pooling
            gr.Markdown(f"**What it makes of it**: hidden states at `{layer}`, whose {pooling} the classifier reads")
            maps = gr.HTML(elem_id="maps")
    changes = [image.change, level.change]
    gr.on(changes, demo.classify, [image, level], [probabilities, seen, maps], api_name="classify", **LIVE)


def sweep_tab(demo: Demo) -> None:
    """Lay out the tab of layers and noise levels."""
    report = demo.sweep
    if report is None:
        gr.Markdown(f"{demo.sweep_missing} This makes one:\n\n```bash\n{demo.sweep_command()}\n```")
        return
    best = report.best
    images = report.images
    test = 100 * next(iter(report.test_accuracies.values()))
    gr.Markdown(
        f"Accuracy (%) of a linear probe on {images['held_out']:,} held-out training images, for every layer and noise "
        "level; colours follow the logarithm of the error. Click a pair for its figures. The best, "
        f"`{best.layer}` at sigma {best.sigma:g}, was fitted again on all training images and then tested on "
        f"{images['test']:,} others: **{test:.2f} %**."
    )
    figures_of = partial(pair_figures, report.pairs)
    table, text = figures_of(best.layer, best.sigma)
    told = "element.addEventListener('click', e => { const b = e.target.closest('[data-pair]');"
    told += " if (b) trigger('select', {pair: b.dataset.pair}); });"
    heat = gr.HTML(table, js_on_load=told)
    with gr.Row():
        layers = list(dict.fromkeys(pair.layer for pair in report.pairs))
        layer = gr.Dropdown(layers, value=best.layer, label="Layer", min_width=260)
        sigmas = sorted({pair.sigma for pair in report.pairs})
        sigma = gr.Dropdown([(f"{s:g}", s) for s in sigmas], value=best.sigma, label="Noise level sigma", min_width=260)
    shown = gr.Markdown(text, elem_id="pair")

    def clicked_pair(event: gr.EventData) -> tuple[str, float, str, str]:
        pair = report.pairs[int(event.pair)]
        return pair.layer, pair.sigma, *figures_of(pair.layer, pair.sigma)

    heat.select(clicked_pair, None, [layer, sigma, heat, shown], api_visibility="private", **QUIET)
    chosen = [layer, sigma]
    gr.on([layer.input, sigma.input], figures_of, chosen, [heat, shown], api_visibility="private", **QUIET)


def neighbours_tab(demo: Demo) -> None:
    """Lay out the tab of nearest neighbours."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = image_field(demo)
            count = gr.Slider(1, 48, 12, step=1, label="Neighbours")
        with gr.Column(scale=2, min_width=320):
            total = f"{len(demo.features):,}"
            gr.Markdown(f"**The most similar of {total} training images**, by the cosine of their features")
            found = gr.HTML(elem_id="found")
    gr.on([image.change, count.change], demo.neighbours, [image, count], found, api_name="neighbours", **LIVE)
