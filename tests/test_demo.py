"""The demo, on a tiny checkpoint: a Space's folder served as it is, in a real browser; its parts by themselves."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

import quickstart
from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEPipeline

from . import commands
from .conftest import make_unet
from .ideal import Ideal, closed_form

gr = pytest.importorskip("gradio")
DEMO = Path(__file__).parent.parent / "examples" / "demo"
sys.path.append(str(DEMO))

import app  # noqa: E402
import denoising  # noqa: E402
import make_space  # noqa: E402
import pictures  # noqa: E402
import views  # noqa: E402

GREY = {"in_channels": 1, "out_channels": 1, "block_out_channels": (32, 32)}
SCHEDULERS = {"ddpm": DDIMScheduler, "edm": EDMEulerScheduler, "flow": FlowMatchEulerDiscreteScheduler}


def pictures_in(text):
    """The images that a piece of HTML holds."""
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([\w+/=]+)", text)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What `make quickstart` and a sweep write, at tiny size."""
    folder = tmp_path_factory.mktemp("run")
    quickstart.write_digits(folder / "digits")
    DDAEPipeline.for_denoiser(make_unet(**GREY), DDIMScheduler()).save_pretrained(folder / "checkpoint")
    options = ["--model_name_or_path", folder / "checkpoint", "--dataset_name", folder / "digits"]
    options += ["--output_dir", folder / "sweep", "--sigmas", "0.1", "1", "--num_noise_seeds", "1", "--l2", "1e-3"]
    options += ["--layers", "mid_block", "up_blocks.1.resnets.0"]
    commands.run("sweep", *options, "--max_train_samples", "200", "--max_test_samples", "50")
    (folder / "sweep" / "classifier").rename(folder / "classifier")
    return folder


def options_of(folder, space=None):
    names = {"checkpoint": "checkpoint", "classifier": "classifier", "sweep": "sweep", "dataset_name": "digits"}
    given = [f"--{name}={folder / part}" for name, part in names.items()]
    if space:
        return [*given, f"--output_dir={space}"]
    return [*given, f"--features_dir={folder / 'features'}", "--max_train_samples=100", "--max_test_samples=100"]


@pytest.fixture(scope="module")
def space(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    make_space.main(options_of(run, folder))
    return folder


@pytest.fixture(scope="module")
def server(space):
    """A Space's folder, served as it is: the process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DDAE_", "PYTHONPATH"))}
    command = [sys.executable, "app.py", "--port", str(port), "--max_train_samples", "200"]
    with open(space / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=space, env=environment, stdout=log, stderr=log)
    yield process, f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(30)


def answers(address):
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except OSError:
        return False
    return True


class Page:
    """A browser's window on the page."""

    def __init__(self, driver):
        self.driver = driver

    def find(self, selector):
        return [element for element in self.driver.find_elements("css selector", selector) if element.is_displayed()]

    def wait(self, condition, seconds=30):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := condition():
                return value
            time.sleep(0.05)
        raise AssertionError(f"The page says: {self.driver.find_element('tag name', 'body').text}")

    def set_number(self, label, value):
        (field,) = self.wait(lambda: self.find(f"input[type=number][aria-label*='{label}']"))
        self.driver.execute_script("arguments[0].select()", field)
        field.send_keys(f"{value}\t")

    def click(self, selector, text=None):
        """Click the first visible element of a selector, with this text if one is given."""
        self.wait(lambda: [e for e in self.find(selector) if text in (None, e.text)])[0].click()

    def open_tab(self, name):
        self.click("button[role=tab]", name)

    def upload(self, path):
        self.wait(lambda: self.find("button[aria-label='Upload file'], .upload button"))
        (field,) = [
            field
            for field in self.driver.find_elements("css selector", ".upload input[type=file]")
            if field.find_element("xpath", "./ancestor::*[@role='tabpanel'][1]").is_displayed()
        ]
        field.send_keys(str(path))

    def pictures(self, selector):
        return [image.get_attribute("src") for image in self.find(f"{selector} .figures img")]


@pytest.fixture(scope="module")
def page(server, space, tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not (chromium and shutil.which("chromedriver")):
        pytest.skip("needs Chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    flags += f"disable-component-update disable-sync window-size=1200,1000 user-data-dir={tmp_path_factory.mktemp('b')}"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        process, address = server
        while not answers(address):
            assert process.poll() is None, (space / "log.txt").read_text()
            time.sleep(0.1)
        driver.get(address)
        yield Page(driver)
    finally:
        driver.quit()


def test_generating_shows_steps_and_ends_with_the_pipelines_images(page, space):
    page.set_number("Images", 3)
    page.set_number("Steps", 12)
    page.click("#start")
    page.wait(lambda: "Step 12 of 12: done" in "".join(e.text for e in page.find("#bar")))
    found = pictures_in("".join(page.pictures("#images")))
    seeds = [torch.Generator().manual_seed(i) for i in range(3)]
    expected = DDAEPipeline.from_pretrained(space / "checkpoint")(3, generator=seeds, num_inference_steps=12).images
    for image, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(image, float), np.asarray(other, float), atol=1)
    way = [element.text for element in page.find("#way figcaption")]
    sigmas = [float(text.removeprefix("sigma ")) for text in way]
    assert len(sigmas) == 8 and sigmas == sorted(sigmas, reverse=True) and sigmas[-1] == 0


def stop_on_the_way(page):
    """Start sampling and stop it before its end, which a fast machine may reach first, and return what the bar says."""
    for _ in range(20):
        page.click("#start")
        page.wait(lambda: "of 250" in page.find("#bar")[0].text)
        page.click("#stop")
        time.sleep(0.5)
        stopped = page.find("#bar")[0].text
        if "of 250" in stopped and "done" not in stopped:
            return stopped
    raise AssertionError("Sampling was always done before it could be stopped.")


def test_sampling_can_be_stopped_and_started_again(page):
    page.set_number("Steps", 250)
    stopped = stop_on_the_way(page)
    time.sleep(0.5)
    assert page.find("#bar")[0].text == stopped
    page.click("#start")
    page.wait(lambda: page.find("#bar")[0].text not in ("", stopped))
    page.click("#stop")


def test_an_uploaded_image_is_classified_and_a_bad_file_gets_a_message(page, run, space, tmp_path):
    page.open_tab("Classify")
    bad = {"text.png": b"no image", "empty.png": b"", "cut.png": (run / "sweep" / "heat_map.png").read_bytes()[:999]}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    for name in [*bad, "huge.png"]:
        page.upload(tmp_path / name)
        message = "81 million pixels" if name == "huge.png" else "holds no image that can be read"
        page.wait(lambda message=message: message in "".join(e.text for e in page.find(".notice")))
        page.click("button[aria-label='Remove Image']")
        page.wait(lambda: "No image yet" in "".join(e.text for e in page.find(".notice")))
    digit = Image.open(run / "sweep" / "heat_map.png").convert("RGBA").rotate(90, expand=True)
    digit.save(tmp_path / "photo.png")
    page.upload(tmp_path / "photo.png")
    page.wait(lambda: len(page.pictures("#seen")) == 2 and len(page.pictures("#maps")) == 8)
    model = DDAEForImageClassification.from_pretrained(space / "classifier")
    inputs = DDAEImageProcessor.from_pretrained(space / "classifier")(digit, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits.softmax(-1)[0]
    best = model.config.id2label[probabilities.argmax().item()]
    shown = page.find("[data-testid='label-output-value']")[0].text
    assert shown == best and f"{100 * probabilities.max():.0f}%" in page.find("#probabilities")[0].text
    clean, noisy = (np.asarray(image, float) for image in pictures_in("".join(page.pictures("#seen"))))
    assert clean.shape == noisy.shape == (8, 8) and not np.allclose(clean, noisy, atol=5)
    np.testing.assert_allclose(clean / 127.5 - 1, inputs["pixel_values"][0, 0], atol=0.01)


def test_a_click_on_the_map_shows_a_pairs_figures(page, run):
    page.open_tab("Layers and noise")
    pairs = json.loads((run / "sweep" / "eval_results.json").read_text())["pairs"]
    assert len(page.wait(lambda: page.find(".map button"))) == len(pairs)
    for number in (0, len(pairs) - 1):
        pair = pairs[number]
        figure = f"{100 * pair['validation_accuracy']:.2f} %"
        assert figure in page.find(f".map [data-pair='{number}']")[0].get_attribute("title")
        page.click(f".map [data-pair='{number}']")
        title = f"{pair['layer']}, sigma {pair['sigma']:g}"
        page.wait(lambda title=title: title in page.find("#pair")[0].text)
        assert figure in page.find("#pair")[0].text
        (marked,) = page.find(".map [aria-pressed=true]")
        assert marked.get_attribute("data-pair") == str(number)
        assert [field.get_attribute("value") for field in page.find("[role=tabpanel] input")] == [
            pair["layer"],
            f"{pair['sigma']:g}",
        ]


def test_a_training_image_is_its_own_nearest_neighbour(page, run, tmp_path):
    page.open_tab("Neighbours")
    data, options = app.parse_arguments(options_of(run))
    images = data.open()["train"].take(options.max_train_samples)
    [image] = images.pil([7])
    image.resize((80, 80), Image.Resampling.NEAREST).save(tmp_path / "digit.png")
    page.upload(tmp_path / "digit.png")
    found = page.wait(lambda: page.pictures("#found"))
    assert len(found) == 13
    near = pictures_in("".join(found))
    assert np.array_equal(near[1], image)
    captions = [element.text for element in page.find("#found figcaption")][1:]
    assert captions[0].startswith(images.names[images.labels[7]] + ",")
    values = [float(text.rpartition(" ")[2]) for text in captions]
    assert values == sorted(values, reverse=True)


def test_the_page_takes_nothing_from_elsewhere_and_breaks_nowhere(page, server, space):
    names = page.driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(names) > 10 and [name for name in names if not name.startswith((server[1], "data:", "blob:"))] == []
    assert [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert "Traceback" not in (space / "log.txt").read_text()


@pytest.mark.parametrize("framework", SCHEDULERS)
def test_a_stream_of_steps_ends_with_the_pipelines_images(framework):
    pipeline = DDAEPipeline.for_denoiser(make_unet(**GREY), SCHEDULERS[framework]())
    pipeline.set_progress_bar_config(disable=True)
    seeded = {"batch_size": 2, "num_inference_steps": 6}
    steps = list(
        denoising.stream(denoising.own_pipeline(pipeline), 3, generator=torch.Generator().manual_seed(0), **seeded)
    )
    expected = pipeline(generator=torch.Generator().manual_seed(0), output_type="pt", **seeded).images
    torch.testing.assert_close((steps[-1].images / 2 + 0.5).clamp(0, 1), expected)
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.number for step in steps if step.estimate is not None] == [1, 4, 6]
    sigmas = [step.sigma for step in steps]
    assert sigmas == sorted(sigmas, reverse=True) and sigmas[-1] == 0
    torch.testing.assert_close(steps[-1].estimate, steps[-1].images[0])


@pytest.mark.parametrize(("framework", "sampler"), [*((name, None) for name in SCHEDULERS), ("edm", "heun")])
def test_a_perfect_networks_estimates_are_what_it_expects(framework, sampler):
    options = {"clip_sample": False, "prediction_type": "v_prediction"} if framework == "ddpm" else {}
    scheduler = SCHEDULERS[framework](**options)
    ideal = Ideal(framework, options.get("prediction_type"), getattr(scheduler, "alphas_cumprod", None))
    pipeline = denoising.own_pipeline(DDAEPipeline(ideal, scheduler))
    generator = torch.Generator().manual_seed(0)
    steps = list(denoising.stream(pipeline, 5, generator=generator, num_inference_steps=5, sampler=sampler))
    for step in steps[:-1]:
        share = {"ddpm": (1 + step.sigma**2) ** -0.5, "edm": 1, "flow": 1 / (1 + step.sigma)}[framework]
        torch.testing.assert_close(
            step.estimate.double(), closed_form(step.images[0] / share, step.sigma), atol=2e-3, rtol=0
        )


def test_the_first_of_several_classes_is_estimated():
    """At its first step, after which rounding makes batches of two sizes drift apart."""
    unet, found = make_unet(**GREY, num_class_embeds=4), []
    for options in ({"class_labels": [1, 2], "latents": LATENTS}, {"class_labels": 1, "latents": LATENTS[:1]}):
        found.append(next(denoising.stream(DDAEPipeline(unet, DDIMScheduler()), 3, **options)).estimate)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-2)


LATENTS = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_closing_a_stream_ends_the_sampling():
    pipeline = DDAEPipeline.for_denoiser(make_unet(**GREY), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    pipeline.denoiser.register_forward_hook(lambda *_: calls.append(None))
    steps = denoising.stream(pipeline, 2, num_inference_steps=300)
    assert next(steps).number == 1
    steps.close()
    assert len(calls) == 2  # a step's, and an estimate's


@pytest.fixture(scope="module")
def conditional(run, tmp_path_factory):
    """A demo of a class-conditional EDM checkpoint, without a sweep."""
    folder = tmp_path_factory.mktemp("conditional")
    # Groups of one channel would take away what a class adds to it.
    denoiser = make_unet(**GREY, num_class_embeds=11, norm_num_groups=8)
    denoiser.conv_out.weight.data *= 10  # a class's part in a random network's answer is small beside 8 bits
    DDAEPipeline.for_denoiser(denoiser, EDMEulerScheduler(), null_class=10).save_pretrained(folder)
    return app.open_demo(*app.parse_arguments([*options_of(run), f"--checkpoint={folder}", f"--sweep={folder}"]))


def test_only_what_a_checkpoint_takes_is_offered(run, conditional):
    def offered(demo):
        fields = app.build(demo).config["components"]
        return {field["props"].get("label") for field in fields if field["props"].get("visible")}

    special = {"Sampler", "Class", "Guidance"}
    assert special < offered(conditional)
    assert special.isdisjoint(offered(app.open_demo(*app.parse_arguments(options_of(run)))))


def test_samplers_classes_and_guidance_change_the_images_and_what_cannot_work_is_told(conditional):
    def final(*options):
        return list(conditional.generate(2, 3, 0, *options))[-1]

    plain, none = final(views.OWN_SAMPLER, 3, 1), views.NO_CLASS
    assert "Step 3 of 3: done" in plain[0] and len(pictures_in(plain[1])) == 2
    for other in ((views.OWN_SAMPLER, none, 1), (views.OWN_SAMPLER, 4, 1), (views.OWN_SAMPLER, 3, 4), ("heun", 3, 1)):
        assert final(*other)[1] != plain[1]
    assert "guidance needs" in final(views.OWN_SAMPLER, none, 2)[0]
    assert "Give a seed" in next(conditional.generate(2, 3, None, views.OWN_SAMPLER, none, 1))[0]


def test_two_visitors_at_once_get_what_each_would_get_alone(conditional):
    jobs = [(2, 12, 5, views.OWN_SAMPLER, 1, 1), (3, 7, 9, "heun", 2, 2)]
    alone = [list(conditional.generate(*job))[-1] for job in jobs]
    together = [None, None]

    def work(i):
        together[i] = list(conditional.generate(*jobs[i]))[-1]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_without_a_sweep_the_page_names_the_command(conditional):
    texts = " ".join(str(field["props"].get("value")) for field in app.build(conditional).config["components"])
    assert "There is no sweep" in texts and "examples/sweep.py --model_name_or_path" in texts
    assert f"--dataset_name {conditional.images.opened_with['dataset_name']}" in texts


def test_feature_maps_show_the_channels_that_vary_most():
    hidden = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0))
    maps, captions = pictures.feature_maps(hidden, 3)
    assert [image.size for image in maps] == [(4, 4)] * 5 and captions[1] == "Mean of 5 channels"
    spread = hidden.flatten(1).std(1).argsort(descending=True)[:3].tolist()
    assert captions[2:] == [f"Channel {k}" for k in spread]


def test_text_from_outside_is_no_markup():
    text = pictures.figures([Image.new("L", (2, 2))], ['<b>"'], 50) + pictures.notice("<b>")
    assert "<b>" not in text and text.count("&lt;b&gt;") == 3


def test_options_that_cannot_work_are_refused(run, tmp_path, capsys):
    def refuse(message, call, options):
        with pytest.raises(SystemExit) as refusal:
            call(options)
        assert message in str(refusal.value) + capsys.readouterr().err

    given = options_of(run)
    refuse("make quickstart", app.parse_arguments, [*given, f"--checkpoint={app.RUN / 'nothing'}"])
    refuse("batch_size is 0: it must be at least 1", app.parse_arguments, ["--batch_size", "0"])
    space = options_of(run, tmp_path / "space")
    refuse("There is no folder", make_space.main, [*space, f"--dataset_name={tmp_path / 'no'}"])
    refuse("not empty", make_space.main, [*space, f"--output_dir={run}"])
    (tmp_path / "eval_results.json").write_text("{}")
    with pytest.raises(ValueError, match="eval_results.json holds nothing: allowed are the results of"):
        app.open_demo(*app.parse_arguments([*given, f"--sweep={tmp_path}"]))


def test_variables_name_what_a_space_shows(monkeypatch, run):
    for name in ("CHECKPOINT", "CLASSIFIER", "DATASET_NAME"):
        monkeypatch.setenv(f"DDAE_{name}", f"someone/{name}")
    data, options = app.parse_arguments([])
    assert (options.checkpoint, options.classifier) == ("someone/CHECKPOINT", "someone/CLASSIFIER")
    assert data.dataset_name == "someone/DATASET_NAME"


def test_a_space_asks_for_what_the_project_asks_for():
    lines = (DEMO / "requirements.txt").read_text().split()
    known = (DEMO.parent.parent / "setup.py").read_text()
    versions = yaml.safe_load((DEMO / "README.md").read_text().split("---")[1])
    assert [line for line in lines if f'"{line}"' not in known] == [f"gradio=={versions['sdk_version']}"]
    assert versions["sdk"] == "gradio" and (DEMO / versions["app_file"]).exists()
    assert len(versions["short_description"]) <= 60
