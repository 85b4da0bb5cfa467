"""The page of a network that is told a text: the views that need no generation, and its words."""

import re

import numpy as np
import pytest
from PIL import Image

from ddae_hf.experiments import word_maps

from . import commands, stock

gradio = pytest.importorskip("gradio")

from ddae_hf.demo import page as page_of_demo  # noqa: E402
from ddae_hf.demo import words  # noqa: E402
from ddae_hf.demo.pictures import HEAT  # noqa: E402

from .test_demo import Page, address_of, browser, pictures_in  # noqa: E402

PROMPT = "the red cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small checkpoint of Stable Diffusion."""
    found = tmp_path_factory.mktemp("sd")
    stock.stable_diffusion(found)
    return found


def open_page(monkeypatch, *options):
    """Return what `ddae demo` shows with options."""
    opened = []
    with monkeypatch.context() as changed:
        changed.setattr(page_of_demo, "show", lambda *given: opened.append(given))
        commands.run("demo", *options)
    ((demo, host, port),) = opened
    assert (host, port) == (None, None)
    return demo


@pytest.fixture
def demo(folder, monkeypatch):
    return open_page(monkeypatch, "--model_name_or_path", folder)


def captions(shown):
    return re.findall("<figcaption>(.*?)</figcaption>", shown)


def test_the_page_has_what_needs_no_generation(demo):
    parts = page_of_demo.build(demo).config["components"]
    names = {part["props"].get("elem_id") for part in parts}
    assert {"look", "words", "dense"} <= names and not {"generate", "classify", "sweep"} & names
    text = " ".join(str(part["props"].get("value")) for part in parts)
    assert "StableDiffusionPipeline or" in text and demo.tap[0] in text


def test_a_words_picture_glows_where_its_map_is_high(demo, folder):
    shown = demo.words(demo.pick({"example": 1}), f" {PROMPT} ", 0.5)
    plain, *pictures = (np.asarray(each, float) for each in pictures_in(shown))
    maps = word_maps(folder, demo.examples[1], PROMPT, sigma=0.5)
    assert len(pictures) == len(maps) == 3
    for picture, caption, (word, (each,)) in zip(pictures, captions(shown)[1:], maps.items(), strict=True):
        high, low = (np.unravel_index(place.item(), each.shape) for place in (each.argmax(), each.argmin()))
        np.testing.assert_allclose(picture[low], 0.6 * plain[low], atol=0.51)
        np.testing.assert_allclose(picture[high], 0.1 * 0.6 * plain[high] + 0.9 * HEAT, atol=0.51)
        assert caption == f"{word}: {100 * each.min():.2g} to {100 * each.max():.2g} %"


def test_text_encoders_are_opened_once_for_a_prompt(demo, monkeypatch):
    told = []
    tell = words.tell_words
    monkeypatch.setattr(words, "tell_words", lambda *given, **more: told.append(given[1]) or tell(*given, **more))
    image = demo.pick({"example": 0})
    shown = [demo.words(image, prompt, 0.5) for prompt in (PROMPT, "a dog", PROMPT)]
    assert told == [PROMPT, "a dog"] and shown[0] == shown[2] != shown[1]


def test_what_cannot_be_is_answered_in_words(demo):
    image = demo.pick({"example": 0})
    for prompt, sigma, message in (
        (PROMPT, None, "noise level is empty"),
        (PROMPT, 1e9, "sigma"),
        ("", 0.5, "There are no words"),
        ("a " * 9 + "cat", 0.5, "comes after the 9 tokens"),
    ):
        assert message in demo.words(image, prompt, sigma)
    assert "sigma" in demo.look(image, demo.tap[0], 1e9) and len(captions(demo.look(image, demo.tap[0], 0.5))) == 7


def test_images_are_those_of_a_data_set_where_one_is_named(folder, tmp_path, monkeypatch):
    (tmp_path / "test").mkdir()
    for number in range(12):
        Image.new("RGB", (20, 20), (20 * number, 0, 0)).save(tmp_path / "test" / f"{number:02}.png")
    options = ["--model_name_or_path", folder, "--train_data_dir", tmp_path, "--max_test_samples", "11"]
    demo = open_page(monkeypatch, *options)
    assert len(demo.examples) == 10 and demo.pick({"example": 9}).shape == (1, 3, 16, 16)


def test_what_is_of_networks_that_generate_is_refused(folder, tmp_path, capsys):
    for option, message in (
        ("classifier", "the page shows no classifier: leave it out"),
        ("sweep", "the page shows no sweep: leave it out"),
        ("space_dir", "is told a text: a Space is laid of networks that generate on it"),
    ):
        with pytest.raises(SystemExit) as refusal:
            commands.run("demo", "--model_name_or_path", folder, f"--{option}", tmp_path / "new")
        assert message in str(refusal.value) + capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_visitor_writes_a_prompt_and_hands_in_an_image(demo, tmp_path):
    app, address, _ = page_of_demo.build(demo).queue().launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        with browser(tmp_path / "browser") as driver:
            driver.get(address)
            page = Page(driver)
            page.wait(lambda: page.pictures("#compared") and page.pictures("#maps") and page.text("#shown-words"))
            (field,) = page.find("#prompt textarea, #prompt input")
            field.clear()
            field.send_keys(f"{PROMPT}\n")
            before = page.wait(lambda: len(page.pictures("#shown-words")) == 4 and page.pictures("#shown-words"))
            level = demo.tap[1]
            assert pictures_in("".join(before)) == pictures_in(demo.words(demo.pick({"example": 1}), PROMPT, level))
            maps = page.pictures("#maps")
            image = Image.effect_noise((50, 40), 90).convert("RGB")
            image.save(tmp_path / "photo.png")
            page.upload(tmp_path / "photo.png")
            page.wait(lambda: page.pictures("#shown-words") not in ([], before) and page.pictures("#maps") != maps)
            sent = demo.words(demo.pick({"file": address_of(image)}), PROMPT, level)
            assert pictures_in("".join(page.pictures("#shown-words"))) == pictures_in(sent)
            (tmp_path / "text.png").write_bytes(b"no image")
            page.upload(tmp_path / "text.png")
            page.wait(lambda: "holds no image that can be read" in page.text("#look .notice"))
            assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        page_of_demo.gr.close_all()
