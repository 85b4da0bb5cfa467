"""`ddae demo` on a tiny checkpoint: a Space's folder served as it is, in a real browser; the page and its views."""

import base64
import contextlib
import io
import json
import os
import re
import runpy
import shlex
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
from datasets import ClassLabel, Dataset
from diffusers import DDIMScheduler, EDMEulerScheduler
from PIL import Image, ImageDraw, ImageOps
from sklearn.datasets import load_sample_images

from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEPipeline
from ddae_hf.commands import main
from ddae_hf.commands.parsing import parse
from ddae_hf.experiments.digits import digits, write_digits

from . import commands
from .conftest import make_unet

pytest.importorskip("gradio")

from ddae_hf.commands import demo as command  # noqa: E402
from ddae_hf.demo import page as page_of_demo  # noqa: E402
from ddae_hf.demo import space as laying  # noqa: E402
from ddae_hf.demo import views  # noqa: E402
from ddae_hf.demo.uploads import as_mnist  # noqa: E402

ROOT = Path(__file__).parent.parent
GREY = {"in_channels": 1, "out_channels": 1, "block_out_channels": (32, 32)}


def pictures_in(text):
    """The images that a piece of HTML holds."""
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([\w+/=]+)", text)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What `ddae quickstart` and `ddae sweep` write, at tiny size."""
    folder = tmp_path_factory.mktemp("run")
    write_digits(folder / "digits", digits())
    DDAEPipeline.for_denoiser(make_unet(**GREY), DDIMScheduler()).save_pretrained(folder / "checkpoint")
    options = ["--model_name_or_path", folder / "checkpoint", "--dataset_name", folder / "digits"]
    options += ["--output_dir", folder / "sweep", "--sigmas", "0.1", "1", "--num_noise_seeds", "1", "--l2", "1e-3"]
    options += ["--layers", "mid_block", "up_blocks.1.resnets.0"]
    commands.run("sweep", *options, "--max_train_samples", "200", "--max_test_samples", "50")
    (folder / "sweep" / "classifier").rename(folder / "classifier")
    return folder


def options_of(folder):
    names = {"model_name_or_path": "checkpoint", "classifier": "classifier", "sweep": "sweep", "dataset_name": "digits"}
    return [*(f"--{name}={folder / part}" for name, part in names.items()), f"--features_dir={folder / 'features'}"]


WHITE = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw=="
SMALL = ["--max_train_samples=100", "--max_test_samples=100"]


def open_demo(folder, *changes):
    """Return what the page shows."""
    data, options = parse(command.KINDS, None, [*options_of(folder), *SMALL, *map(str, changes)])
    return views.Demo(options, data.open())


@pytest.fixture(scope="module")
def space(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    commands.run("demo", *options_of(run), "--max_test_samples", "90", "--space_dir", folder)
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
        field = self.wait(lambda: self.find(f"input[type=number][aria-label*='{label}']"))[0]
        self.driver.execute_script("arguments[0].select()", field)
        field.send_keys(f"{value}\t")

    def click(self, selector, text=None):
        """Click the first visible element of a selector, with this text if one is given."""
        self.wait(lambda: [e for e in self.find(selector) if text in (None, e.text)])[0].click()

    def upload(self, path):
        (field,) = self.driver.find_elements("css selector", ".pad input[type=file]")
        field.send_keys(str(path))

    def text(self, selector):
        return "\n".join(element.text for element in self.find(selector))

    def draw(self, selector, *points):
        """Press a button at a place from the centre of an element, draw a line to others, and let go."""
        from selenium.webdriver import ActionChains

        (element,) = self.find(selector)
        (x, y), *rest = points
        moves = ActionChains(self.driver, duration=20).move_to_element_with_offset(element, x, y).click_and_hold()
        for point in rest:
            moves.move_to_element_with_offset(element, *point)
        moves.release().perform()

    def pictures(self, selector):
        return [image.get_attribute("src") for image in self.find(f"{selector} figure img")]


@contextlib.contextmanager
def browser(folder):
    """A browser without a window, whose files are in a folder; tests are skipped where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not (chromium and shutil.which("chromedriver")):
        pytest.skip("needs Chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    flags += f"disable-component-update disable-sync window-size=1200,1000 user-data-dir={folder}"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def page(server, space, tmp_path_factory):
    with browser(tmp_path_factory.mktemp("b")) as driver:
        process, address = server
        while not answers(address):
            assert process.poll() is None, (space / "log.txt").read_text()
            time.sleep(0.1)
        driver.get(address)
        yield Page(driver)


def test_images_are_there_when_the_page_opens(page, space):
    """Drawn, classified, looked at in a layer and compared, without a click."""
    page.wait(lambda: "Step 50 of 50: done" in page.text("#bar"))
    page.wait(lambda: page.pictures("#found") and page.pictures("#pair-maps") and page.pictures("#compared"))
    assert len(page.pictures("#images")) == 16 and len(page.pictures("#seen")) == 3
    assert page.text("[data-testid='label-output-value']") in [str(digit) for digit in range(10)]


def test_generating_shows_steps_and_ends_with_the_pipelines_images(page, space):
    page.set_number("Images", 3)
    page.set_number("Steps", 12)
    page.click("#start")
    page.wait(lambda: "Step 12 of 12: done" in page.text("#bar"))
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


def test_a_number_that_cannot_be_is_answered_in_words(page):
    field = "input[type=number][aria-label*='Seed']"

    def still():  # a late answer to an earlier click would take the place of the next one
        text = page.text("#bar")
        time.sleep(0.5)
        return text == page.text("#bar")

    page.wait(still)
    page.set_number("Seed", -5)
    page.wait(lambda: page.find(field)[0].get_attribute("value") == "-5")
    page.click("#start")
    page.wait(lambda: "Seed is -5: give a whole number from 0 to 2147483648." in page.text("#bar"))
    page.set_number("Seed", 0)


def read_by_hand(space, image):
    """What the checkpoint of a Space says of an image: its name, and the probability in %."""
    model = DDAEForImageClassification.from_pretrained(space / "classifier")
    inputs = DDAEImageProcessor.from_pretrained(space / "classifier")(image, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits.softmax(-1)[0]
    name = model.config.id2label[probabilities.argmax().item()]
    return inputs["pixel_values"][0, 0], name, f"{100 * probabilities.max():.0f}%"


def test_an_uploaded_image_is_classified_and_a_bad_file_gets_a_message(page, run, space, tmp_path):
    bad = {"text.png": b"no image", "empty.png": b"", "cut.png": (run / "sweep" / "heat_map.png").read_bytes()[:999]}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    (tmp_path / "large.png").write_bytes(bytes(16_000_000))
    said = {"huge.png": "81 million pixels", "large.png": "16 MB: send one of at most 15 MB"}
    for name in [*bad, *said]:
        page.click("[data-example]")
        page.wait(lambda: page.pictures("#found") and page.pictures("#compared"))
        page.upload(tmp_path / name)
        message = said.get(name, "holds no image that can be read")
        page.wait(lambda message=message: message in page.text(".notice"))
    digit = Image.open(run / "sweep" / "heat_map.png").convert("RGBA").rotate(90, expand=True)
    digit.save(tmp_path / "photo.png")
    page.upload(tmp_path / "photo.png")
    pixels, name, share = read_by_hand(space, digit)

    def sent():  # an answer to an earlier image may still come first
        seen = page.pictures("#seen")
        clean = np.asarray(pictures_in(seen[0])[0], float) if seen else np.zeros((8, 8))
        return np.allclose(clean / 127.5 - 1, pixels, atol=0.01) and seen

    seen = page.wait(sent)
    page.wait(lambda: page.text("[data-testid='label-output-value']") == name)
    assert share in page.text("#probabilities") and len(page.pictures("#maps")) == 7
    clean, noisy, _ = (np.asarray(image, float) for image in pictures_in("".join(seen)))
    assert clean.shape == noisy.shape == (8, 8) and not np.allclose(clean, noisy, atol=5)


def test_a_drawing_is_classified_while_it_is_drawn(page, space):
    page.click("[data-example]")
    page.wait(lambda: page.pictures("#found"))
    before = page.wait(lambda: page.pictures("#seen"))
    page.draw(".pad canvas", (-60, -80), (0, -70), (50, -80), (40, -20), (10, 40), (-10, 90), (20, 95), (60, 80))
    page.wait(lambda: page.pictures("#seen") != before)
    drawn = page.driver.execute_script("return document.querySelector('.pad canvas').toDataURL()")
    [paper] = pictures_in(drawn)
    pixels, name, share = read_by_hand(space, as_mnist(paper, 8))
    expected = np.asarray(pixels) * 127.5 + 127.5
    page.wait(lambda: np.allclose(np.asarray(pictures_in(page.pictures("#seen")[0])[0]), expected, atol=1))
    page.wait(lambda: page.text("[data-testid='label-output-value']") == name)
    assert share in page.text("#probabilities")
    page.wait(lambda: np.allclose(np.asarray(pictures_in(page.pictures("#compared")[0])[0]), expected, atol=1))
    page.click("[data-clear]")
    [cleared] = pictures_in(page.driver.execute_script("return document.querySelector('.pad canvas').toDataURL()"))
    assert cleared.convert("L").getextrema() == (255, 255)


def test_a_click_on_the_map_shows_a_pairs_figures_and_the_image_there(page, run):
    pairs = json.loads((run / "sweep" / "eval_results.json").read_text())["pairs"]
    assert len(page.wait(lambda: page.find(".map button"))) == len(pairs)
    looks = set()
    for number, example in ((0, 2), (len(pairs) - 1, 6)):
        pair = pairs[number]
        figure = f"{100 * pair['validation_accuracy']:.2f} %"
        assert figure in page.find(f".map [data-pair='{number}']")[0].get_attribute("title")
        page.click(f".map [data-pair='{number}']")
        title = f"{pair['layer']}, sigma {pair['sigma']:g}"
        page.wait(lambda title=title: title in page.text("#pair"))
        assert figure in page.text("#pair")
        (marked,) = page.find(".map [aria-pressed=true]")
        assert marked.get_attribute("data-pair") == str(number)
        looks.add(tuple(page.pictures("#pair-maps")))
        page.click(f"#classify [data-example='{example}']")
        page.wait(lambda: tuple(page.pictures("#pair-maps")) not in looks)
    assert len(looks) == 2


def test_a_click_on_a_point_looks_it_up_in_the_other_image(page):
    def rings():
        return [element.get_attribute("style") for element in page.find("#compared i")]

    page.click("#classify [data-example='4']")
    page.click("#dense [data-example='4']")  # the same image
    page.wait(lambda: len(page.find("#dense [data-example='4'][aria-pressed=true]")) == 1)
    before = rings()
    page.draw("#compared [data-clicked]", (10, 10))  # in the pixel below its middle and right of it
    page.wait(lambda: rings() != before)
    assert rings()[0] == "left: 56.25%; top: 56.25%;"


def test_a_training_image_is_its_own_nearest_neighbour(page, run, tmp_path):
    images = open_demo(run).images["train"].take(200)
    [image] = images.pil([7])
    image.resize((80, 80), Image.Resampling.NEAREST).save(tmp_path / "digit.png")
    page.wait(lambda: page.pictures("#found"))  # those of what is drawn, which may come late
    page.upload(tmp_path / "digit.png")

    def nearest():
        found = page.pictures("#found")
        return found if len(found) == 8 and np.array_equal(pictures_in(found[0])[0], image) else None

    page.wait(nearest)
    captions = [element.text for element in page.find("#found figcaption")]
    assert captions[0].startswith(images.names[images.labels[7]] + ",")
    values = [float(text.rpartition(" ")[2]) for text in captions]
    assert values == sorted(values)


def test_on_a_phone_nothing_is_beside_the_page_and_answers_follow_their_questions(page):
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        page.wait(lambda: page.driver.execute_script("return innerWidth") == 390)
        assert page.driver.execute_script("return document.documentElement.scrollWidth") == 390
        parts = ["#start", "#images", ".pad", "#probabilities", "#seen", "#found", "#heat", "#pair-maps", "#compared"]
        tops = [page.find(part)[0].location["y"] for part in parts]
        assert tops == sorted(tops)
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_takes_nothing_from_elsewhere_and_breaks_nowhere(page, server, space):
    names = page.driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(names) > 10 and [name for name in names if not name.startswith((server[1], "data:", "blob:"))] == []
    assert [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert "Traceback" not in (space / "log.txt").read_text()


@pytest.fixture(scope="module")
def conditional(run, tmp_path_factory):
    """A demo of a class-conditional EDM checkpoint, without a sweep."""
    folder = tmp_path_factory.mktemp("conditional")
    # Groups of one channel would take away what a class adds to it.
    denoiser = make_unet(**GREY, num_class_embeds=11, norm_num_groups=8)
    denoiser.conv_out.weight.data *= 10  # a class's part in a random network's answer is small beside 8 bits
    DDAEPipeline.for_denoiser(denoiser, EDMEulerScheduler(), null_class=10).save_pretrained(folder)
    return open_demo(run, f"--model_name_or_path={folder}", f"--sweep={folder}")


def test_only_what_a_checkpoint_takes_is_offered(run, conditional):
    def offered(demo):
        fields = page_of_demo.build(demo).config["components"]
        return {field["props"].get("label") for field in fields if field["props"].get("visible")}

    special = {"Sampler", "Class", "Guidance"}
    assert special < offered(conditional)
    assert special.isdisjoint(offered(open_demo(run)))


def test_samplers_classes_and_guidance_change_the_images_and_what_cannot_work_is_told(conditional):
    def final(*options):
        return list(conditional.generate(2, 3, 0, *options))[-1]

    plain, none = final(views.OWN_SAMPLER, 3, 1), views.NO_CLASS
    assert "Step 3 of 3: done" in plain[0] and len(pictures_in(plain[1])) == 2
    for other in ((views.OWN_SAMPLER, none, 1), (views.OWN_SAMPLER, 4, 1), (views.OWN_SAMPLER, 3, 4), ("heun", 3, 1)):
        assert final(*other)[1] != plain[1]
    assert "guidance needs" in final(views.OWN_SAMPLER, none, 2)[0]
    for changed, message in (
        ({"seed": None}, "Seed is empty"),
        ({"count": 65}, "Images is 65"),
        ({"steps": 1.5}, "1.5"),
        ({"steps": float("nan")}, "Steps is nan"),
        ({"count": float("inf")}, "Images is inf"),
    ):
        given = {"count": 2, "steps": 3, "seed": 0} | changed
        assert message in next(conditional.generate(**given, sampler=views.OWN_SAMPLER, label=none, guidance=1))[0]


def test_numbers_and_pictures_that_cannot_be_are_answered_in_words(conditional):
    pixels = conditional.pick({"example": "1"})
    for sigma, count, message in (
        (-1, 8, "sigma"),
        (1e9, 8, "sigma"),
        (0.1, 0, "Neighbours is 0"),
        (0.1, None, "Neighbours is empty"),
        (None, 8, "noise level is empty"),
        ("x", 8, "noise level is x"),
    ):
        [reading] = conditional.read(pixels, sigma, count)
        assert message in reading.warning and reading.probabilities is None
    for sigma, example, message in ((1e9, 0, "sigma"), (None, 0, "empty"), (0.1, 99, "no test image 99")):
        assert message in conditional.compare(pixels, example, "mid_block", sigma, None)
    for given, message in (({}, "No image came"), ({"example": "-1"}, "no test image -1")):
        with pytest.raises(ValueError, match=message):
            conditional.pick(given)
    with pytest.raises(ValueError, match="Nothing is drawn"):
        conditional.pick({"drawing": WHITE})


def test_the_answer_comes_before_what_takes_longer(run):
    demo = open_demo(run, f"--features_dir={run / 'other features'}")
    first, last = demo.read(demo.pick({"example": 0}), 0.1, 8)
    assert first.probabilities == last.probabilities and not first.neighbours and len(pictures_in(last.neighbours)) == 8
    assert len(list(demo.read(demo.pick({"example": 1}), 0.1, 8))) == 1


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


def texts_of(demo):
    """The texts that the page of a demo holds."""
    return " ".join(str(field["props"].get("value")) for field in page_of_demo.build(demo).config["components"])


def test_without_a_sweep_the_page_names_the_command(run, conditional):
    texts = texts_of(conditional)
    assert "There is no sweep" in texts and "ddae sweep --model_name_or_path" in texts
    assert f"--dataset_name {run / 'digits'} --knn --output_dir {conditional.options.sweep}" in texts


def test_a_sweep_is_shown_of_this_very_network_alone(run, tmp_path):
    shown = open_demo(run)
    assert shown.sweep_missing == "" and "Click a pair" in texts_of(shown)
    DDAEPipeline.for_denoiser(make_unet(seed=1, **GREY), DDIMScheduler()).save_pretrained(tmp_path / "checkpoint")
    retrained = open_demo(run, f"--model_name_or_path={tmp_path / 'checkpoint'}")
    assert retrained.sweep is None and "Click a pair" not in texts_of(retrained)
    assert f"The sweep in `{run / 'sweep'}` is of another network than this one." in texts_of(retrained)
    assert f"ddae sweep --model_name_or_path {tmp_path / 'checkpoint'}" in texts_of(retrained)
    report = json.loads((run / "sweep" / "eval_results.json").read_text())
    del report["fingerprint"]  # as earlier versions wrote it
    (tmp_path / "eval_results.json").write_text(json.dumps(report))
    old = open_demo(run, f"--sweep={tmp_path}")
    assert old.sweep is None and "does not say of which network it is" in texts_of(old)
    report = json.loads((run / "sweep" / "eval_results.json").read_text())
    report["pairs"] = report["pairs"][:1]
    (tmp_path / "eval_results.json").write_text(json.dumps(report))
    assert "makes no map" in texts_of(open_demo(run, f"--sweep={tmp_path}"))


def test_the_command_that_the_page_names_makes_the_sweep(run, tmp_path):
    small = ["--layers", "mid_block", "up_blocks.1.resnets.0", "--sigmas", "1", "2", "--num_noise_seeds", "1"]
    small += ["--l2", "1e-3"]
    missing = open_demo(run, f"--sweep={tmp_path / 'a sweep'}")
    program, *words = shlex.split(missing.sweep_command())
    assert program == "ddae" and missing.sweep is None
    commands.run(*words, *small)
    assert len(open_demo(run, f"--sweep={tmp_path / 'a sweep'}").sweep.pairs) == 4


def test_a_space_is_laid_without_the_sweep_of_another_network(run, tmp_path, capsys):
    DDAEPipeline.for_denoiser(make_unet(seed=1, **GREY), DDIMScheduler()).save_pretrained(tmp_path / "checkpoint")
    space = tmp_path / "space"
    other = ["--model_name_or_path", tmp_path / "checkpoint", "--space_dir", space]
    commands.run("demo", *options_of(run), *other)
    assert f"It has no sweep. The sweep in `{run / 'sweep'}` is of another network" in capsys.readouterr().out
    assert not (space / "sweep").exists() and (space / "checkpoint").is_dir()


def test_a_space_names_no_place_of_this_machine(run, space):
    said = yaml.safe_load((space / "demo.yaml").read_text())
    assert said == {**laying.PLACES, "max_test_samples": 90}
    for path in (space / "demo.yaml", *space.glob("sweep/*.json")):
        assert str(run) not in path.read_text()


def rename_classes(folder, *names):
    """Give the digits of a folder these classes, of which they have the numbers."""
    for path in folder.glob("*.parquet"):
        dataset = Dataset.from_parquet(str(path))
        features = dataset.features.copy()
        features["label"] = ClassLabel(names=list(names))
        Dataset.from_dict(dataset.to_dict(), features).to_parquet(path)


def test_options_that_cannot_work_are_refused(run, tmp_path, capsys):
    def refuse(message, *options):
        with pytest.raises(SystemExit) as refusal:
            commands.run("demo", *options_of(run), *options)
        assert message in str(refusal.value) + capsys.readouterr().err

    refuse("has no classifier: `ddae probe --model_name_or_path", f"--classifier={run / 'checkpoint'}")
    taps = [("mid_block", 0.1), ("mid_block", 0.4)]
    several = DDAEForImageClassification.from_pretrained(run / "checkpoint", num_labels=10, taps=taps)
    several.save_pretrained(tmp_path / "several")
    refuse("has a classifier of 2 taps, but the page reads one layer", f"--classifier={tmp_path / 'several'}")
    images = tmp_path / "images"
    write_digits(images, {name: (some[0], some[1] % 2) for name, some in digits().items()})
    rename_classes(images, "even", "odd")
    refuse("name the images that it was fitted on, with --dataset_name", f"--dataset_name={images}")
    refuse("batch_size is 0: it must be at least 1", "--batch_size", "0")
    space = ["--space_dir", tmp_path / "space"]
    refuse("which is no folder", *space, f"--dataset_name={tmp_path / 'no'}")
    refuse("not empty", "--space_dir", run)
    refuse("no split 'other'", *space, "--test_split", "other")
    assert not (tmp_path / "space").exists()
    (tmp_path / "eval_results.json").write_text("{}")
    refuse("eval_results.json holds nothing: allowed are the results of", *SMALL, f"--sweep={tmp_path}")


def words_of(script, monkeypatch, *words):
    """The words of the program that a script runs."""
    given = []
    monkeypatch.setattr(main, "main", given.append)
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    monkeypatch.chdir(script.parent)
    runpy.run_path(str(script), run_name="__main__")
    return given[0]


def test_variables_name_what_a_space_shows(monkeypatch, space):
    for name in ("CHECKPOINT", "CLASSIFIER", "DATASET_NAME"):
        monkeypatch.setenv(f"DDAE_{name}", f"someone/{name}")
    name, *words = words_of(space / "app.py", monkeypatch, "--port", "7")
    data, options = parse(command.KINDS, None, words)
    shown = options.model_name_or_path, options.classifier, data.dataset_name
    assert name == "demo" and shown == ("someone/CHECKPOINT", "someone/CLASSIFIER", "someone/DATASET_NAME")
    assert (options.sweep, options.port) == ("sweep", 7)


def test_the_example_opens_the_page(run, monkeypatch):
    opened = []
    monkeypatch.setattr(page_of_demo, "show", lambda *given: opened.append(given))
    monkeypatch.setattr(sys, "argv", ["app.py", *options_of(run), *SMALL, "--port", "7"])
    runpy.run_path(str(ROOT / "examples" / "demo" / "app.py"), run_name="__main__")
    ((demo, host, port),) = opened
    assert demo.sweep is not None and (host, port) == (None, 7)


def address_of(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_without_options_the_page_shows_the_packages_own_network_and_says_what_it_does_not_know(tmp_path, monkeypatch):
    opened = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page_of_demo, "show", lambda *given: opened.append(given))
    commands.run("demo", "--max_train_samples", "1000", "--max_test_samples", "500")
    ((demo, _, _),) = opened
    assert demo.one_network and demo.sweep is not None and demo.sketched

    def last(given):
        *_, reading = demo.read(demo.pick(given), demo.tap[1], 5)
        return reading

    readings = [last({"example": digit}) for digit in range(10)]
    best = [max(reading.probabilities, key=reading.probabilities.get) for reading in readings]
    assert sum(name == str(digit) for digit, name in enumerate(best)) >= 7
    assert sum(views.UNKNOWN in reading.warning for reading in readings) <= 1
    noise = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    strange = [Image.fromarray(noise), *map(Image.fromarray, load_sample_images().images)]
    for image in [*strange, *map(ImageOps.invert, demo.examples)]:
        assert views.UNKNOWN in last({"file": address_of(image)}).warning
    paper = Image.new("L", (280, 280), 255)
    ImageDraw.Draw(paper).line([(90, 60), (190, 60), (130, 220)], fill=0, width=22, joint="curve")
    drawn = last({"drawing": address_of(paper)})
    assert max(drawn.probabilities, key=drawn.probabilities.get) == "7" and drawn.warning == ""


def test_a_space_asks_for_what_the_project_asks_for():
    template = ROOT / "ddae_hf" / "demo" / "template"
    lines = (template / "requirements.txt").read_text().split()
    known = (ROOT / "setup.py").read_text()
    versions = yaml.safe_load((template / "README.md").read_text().split("---")[1])
    assert [line for line in lines if f'"{line}"' not in known] == [f"gradio=={versions['sdk_version']}"]
    assert versions["sdk"] == "gradio" and (template / versions["app_file"]).exists()
    assert len(versions["short_description"]) <= 60
