"""The exported web page in a real browser, against the pipeline in Python. Pictures go to `outputs/web-space`."""

import hashlib
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from urllib.parse import urlparse

import numpy as np
import PIL.Image
import pytest
import torch

from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokPipeline
from vfmtok_hf.export import export_web_page

from .browsing import LAPTOP, PATIENCE, PHONE, fits_its_width
from .conftest import ROOT, free_port, wait_for


sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
expect = sync_api.expect

SCREENSHOTS = ROOT / "outputs" / "web-space"
SMILEY = ROOT / "examples" / "images" / "smiley.png"


@pytest.fixture(scope="module")
def pipe():
    pipe = VFMTokPipeline.from_pretrained(DEFAULT_CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(browser, pipe, tmp_path_factory):
    """The page of the embedded checkpoint."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm: apt-get install npm")
    folder = tmp_path_factory.mktemp("web") / "page"
    try:
        export_web_page(pipe, folder)
    except RuntimeError as error:
        if "npm could not fetch" not in str(error):
            raise
        pytest.skip(f"needs npm's registry, or onnxruntime-web in npm's cache: {error}")
    return folder


@contextmanager
def served(folder, *command):
    """The address of a folder that another process serves."""
    port = free_port()
    log = folder.parent / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, *command, str(port)], cwd=folder, stdout=output, stderr=output)
    try:
        url = f"http://127.0.0.1:{port}/"
        wait_for(url, process, log)
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url(folder):
    with served(folder, "serve.py") as url:
        yield url


@pytest.fixture(scope="module")
def new_context(browser):
    """Opens browser profiles; at the end no script may have failed, and nothing have come from elsewhere."""
    contexts, errors, hosts = [], [], set()

    def open_context(**settings):
        context = browser.new_context(**{**LAPTOP, "permissions": ["clipboard-read", "clipboard-write"], **settings})
        context.set_default_timeout(PATIENCE)
        context.on("weberror", lambda error: errors.append(str(error.error)))
        context.on("request", lambda request: hosts.add(urlparse(request.url).hostname))
        contexts.append(context)
        return context

    yield open_context
    for context in contexts:
        context.close()
    assert errors == []
    assert hosts <= {"127.0.0.1", None}


@pytest.fixture(scope="module")
def context(new_context):
    return new_context()


def open_page(context, url, link=""):
    page = context.new_page()
    page.goto(url + link)
    expect(page.locator("#draw")).to_be_enabled(timeout=PATIENCE)
    return page


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def draw(page):
    press(page, "Generate")
    expect(page.locator("#save")).to_be_enabled(timeout=PATIENCE)


def tokens_in_cells(page) -> list[int]:
    labels = page.locator("#cells button").evaluate_all("cells => cells.map((cell) => cell.ariaLabel)")
    return [int(re.match(r"Token (\d+) in", label)[1]) for label in labels]


def pixels_of(page, canvas) -> np.ndarray:
    code = "canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
    return np.array(page.locator(canvas).evaluate(code)).reshape(128, 128, 4)[..., :3]


def photograph(page, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True, animations="disabled")


def expected_tokens(pipe, label, seed, **settings):
    """With the checkpoint's own settings, which are the page's defaults, where `settings` do not name others."""
    return pipe.transformer.generate([label], generator=torch.Generator().manual_seed(seed), **settings)


def test_tokens_are_the_packages(context, url, pipe):
    """Greedy ones of three classes, and a seed's with guidance. Other tests draw without."""
    page = context.new_page()
    page.goto(url + "package.json")  # the modules alone, without the page around them
    code = """async (asked) => {
        const { Computer } = await import("/computer.js");
        const computer = new Computer(() => {});
        await computer.request("start");
        const answers = [];
        for (const settings of asked) answers.push(await computer.request("generate", { settings, pictureEvery: 1000 }));
        computer.worker.terminate();
        return answers.map(({ tokens }) => tokens);
    }"""
    common = {"seed": 5, "temperature": 0.8, "topK": 100, "topP": 1, "doSample": True}
    asked = [{**common, "label": label, "doSample": False, "guidance": {"scale": 1}} for label in (3, 8, 11)]
    asked.append({**common, "label": 11, "guidance": {"scale": 2.5, "power": 1}})
    greedy = pipe.transformer.generate([3, 8, 11], do_sample=False)
    guided = expected_tokens(pipe, 11, 5, guidance_scale=2.5, temperature=0.8)
    assert page.evaluate(code, asked) == torch.cat([greedy, guided]).tolist()
    page.close()


def test_a_visitor_gets_the_packages_image_and_edits_it(context, url, pipe):
    page = open_page(context, url, "?label=heart&seed=8")
    draw(page)
    tokens = expected_tokens(pipe, 8, 8)
    expected = pipe.detokenize(tokens, "uint8")[0].permute(1, 2, 0).numpy()
    # Rounding may cross the border between two of the 256 levels.
    assert np.abs(pixels_of(page, "#canvas") - expected).max() <= 1
    assert fits_its_width(page)
    photograph(page, "laptop-generate")
    with page.expect_download() as download:
        press(page, "Download")
    assert download.value.suggested_filename == "heart-8.png"
    assert PIL.Image.open(download.value.path()).size == (128, 128)

    press(page, "Edit its tokens")
    expect(page.locator("#quality")).to_have_text("equal")
    assert tokens_in_cells(page) == tokens[0].tolist()
    page.close()


def test_an_image_becomes_the_packages_tokens(context, url, pipe):
    page = open_page(context, url)
    page.get_by_role("tab", name="Encode and edit").click()
    page.set_input_files("#file", SMILEY)
    expect(page.locator("#quality")).to_contain_text("dB")
    expect(page.locator("#file")).to_have_value("")  # the same file can be chosen again
    tokens = pipe.tokenize(SMILEY)[0].tolist()
    assert tokens_in_cells(page) == tokens
    whole = pixels_of(page, "#edited")

    page.locator("#cells button").nth(40).click()
    expect(page.locator("#changed")).to_have_text("1")
    assert fits_its_width(page)
    photograph(page, "laptop-edit")
    blank = pipe.tokenize(PIL.Image.new("RGB", (64, 64), "white"))[0, 40].item()
    assert tokens_in_cells(page) == [*tokens[:40], blank, *tokens[41:]]
    page.wait_for_function("document.querySelector('#edited').getContext('2d').getImageData(48, 32, 1, 1).data[2] > 0")
    press(page, "Undo")
    expect(page.locator("#changed")).to_have_text("0")

    page.get_by_label("swap it with").check()
    page.locator("#cells button").nth(0).click()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert tokens_in_cells(page)[0] == tokens[13]
    assert tokens_in_cells(page)[13] == tokens[0]
    press(page, "Restore all")
    expect(page.locator("#restore")).to_be_disabled()
    assert tokens_in_cells(page) == tokens
    expected = pipe.detokenize(pipe.tokenize(SMILEY), "uint8")[0].permute(1, 2, 0).numpy()
    assert np.abs(whole - expected).max() <= 1

    page.set_input_files("#file", {"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG and nothing"})
    expect(page.get_by_role("alert")).to_have_text("broken.png cannot be read as an image.")
    page.close()


def open_smiley(page):
    page.set_input_files("#file", SMILEY)
    expect(page.get_by_role("status")).to_have_text("smiley.png has 144 tokens.", timeout=PATIENCE)


def test_the_quality_is_that_of_the_own_tokens_whenever_they_are_edited(context, url):
    page, edited = open_page(context, url), open_page(context, url)
    open_smiley(page)
    # A token is erased while the image is decoded for the first time.
    edited.evaluate("""() => {
        const cells = document.querySelector("#cells");
        new MutationObserver(() => cells.querySelectorAll("button")[40].click()).observe(cells, { attributeFilter: ["hidden"] });
    }""")
    open_smiley(edited)
    expect(edited.locator("#changed")).to_have_text("1")
    expect(edited.locator("#quality")).to_have_text(page.locator("#quality").inner_text())
    page.close()
    edited.close()


def test_the_encoders_download_is_shown_where_it_is_needed(new_context, url):
    page = open_page(new_context(), url)
    caption = page.locator("#token-word").text_content()
    page.evaluate("""() => {
        const word = document.querySelector("#token-word");
        window.captions = [];
        new MutationObserver(() => captions.push(word.textContent)).observe(word, { childList: true });
    }""")
    open_smiley(page)
    captions = page.evaluate("captions")
    assert captions[0].startswith("Fetching encoder: ")
    assert captions[-1] == caption
    expect(page.locator("#loading")).to_have_text("Press Generate.")


def test_models_are_kept_by_the_browser(context, url):
    fetched = []
    page = context.new_page()
    page.on("request", lambda request: fetched.append(urlparse(request.url).path))
    page.goto(url)
    expect(page.locator("#draw")).to_be_enabled(timeout=PATIENCE)
    assert "/models/export.json" in fetched
    assert not [path for path in fetched if path.endswith(".onnx")]
    page.close()


def test_a_link_restores_the_settings_and_generation_stops(context, url):
    page = open_page(context, url, "?label=moon&seed=3&guidance=1.5&top_k=7&temperature=1.2")
    press(page, "Copy a link to these settings")
    link = page.evaluate("navigator.clipboard.readText()")
    restored = open_page(context, link)
    for name, value in {"label": "9", "seed": "3", "guidance": "1.5", "top_k": "7", "temperature": "1.2"}.items():
        expect(restored.locator(f"[name={name}]")).to_have_value(value)
    page.close()

    restored.evaluate("document.querySelector('#draw').click(); document.querySelector('#stop').click()")
    expect(restored.get_by_role("status")).to_have_text("Stopped.")
    expect(restored.locator("#draw")).to_be_enabled()
    expect(restored.locator("#save")).to_be_disabled()
    restored.close()


def test_a_generation_can_be_stopped_before_its_turn(new_context, url):
    page = new_context().new_page()  # without the encoder, whose download it waits for
    page.goto(url + "package.json")
    code = """async (settings) => {
        const { Computer } = await import("/computer.js");
        const computer = new Computer(() => {});
        const { info } = await computer.request("start");
        computer.request("encode", { data: new Uint8ClampedArray(4 * info.image_size ** 2) });
        const answer = computer.request("generate", { settings, pictureEvery: 1000 });
        computer.stop();
        const { stopped } = await answer;
        computer.worker.terminate();
        return stopped;
    }"""
    assert page.evaluate(code, {"label": 3, "seed": 0, "doSample": False, "guidance": {"scale": 1}})


def test_a_link_chooses_a_class_by_number_before_it_chooses_one_by_name(new_context, url):
    page = new_context().new_page()

    def number_classes_backwards(route):
        info = route.fetch().json()
        count = info["generator"]["num_classes"]
        info["generator"]["id2label"] = {str(label): str(count - 1 - label) for label in range(count)}
        route.fulfill(json=info)

    page.route("**/export.json", number_classes_backwards)
    page.goto(url + "?label=10")
    expect(page.locator("#draw")).to_be_enabled(timeout=PATIENCE)
    expect(page.locator("[name=label]")).to_have_value("10")


def test_tabs_follow_the_keyboard(context, url):
    page = open_page(context, url, "?label=nonsense")
    expect(page.get_by_role("alert")).to_contain_text("“nonsense”")
    page.get_by_role("tab", name="Generate").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Encode and edit")).to_be_focused()
    expect(page.get_by_role("tabpanel")).to_have_attribute("aria-labelledby", "edit-tab")
    page.close()


def test_the_page_fits_a_phone(new_context, url):
    page = open_page(new_context(**PHONE, color_scheme="dark"), url, "?label=heart&seed=8")
    expect(page.get_by_label("Temperature")).to_be_hidden()
    draw(page)
    assert fits_its_width(page)
    photograph(page, "phone-generate")
    press(page, "Edit its tokens")
    expect(page.locator("#quality")).to_have_text("equal")
    page.locator("#cells button").nth(64).click()
    assert fits_its_width(page)
    photograph(page, "phone-edit")


def test_without_the_headers_of_isolation_one_thread_computes(new_context, folder, pipe):
    with served(folder, "-m", "http.server", "--bind", "127.0.0.1") as url:
        page = open_page(new_context(), url, "?label=heart&seed=8")
        expect(page.locator("#machine")).to_contain_text("1 thread")
        expect(page.locator("#machine")).to_contain_text("did not send the headers")
        draw(page)
        press(page, "Edit its tokens")
        assert tokens_in_cells(page) == expected_tokens(pipe, 8, 8)[0].tolist()


def answer_with(content):
    """Breaks a page's decoder."""
    return lambda page: page.route("**/decoder.onnx*", lambda route: route.fulfill(body=content))


def claim_another_model(page):
    """The decoder is whole, as its digest says, and no model."""
    content = b"nothing"

    def fulfill(route):
        info = route.fetch().json()
        info["parts"]["decoder"]["sha256"] = hashlib.sha256(content).hexdigest()
        route.fulfill(json=info)

    page.route("**/export.json", fulfill)
    answer_with(content)(page)


@pytest.mark.parametrize(
    ("break_page", "message"),
    [
        (answer_with(b"nothing"), "decoder.onnx is damaged"),
        (claim_another_model, "decoder.onnx could not be opened"),
        (
            lambda page: page.route("**/decoder.onnx*", lambda route: route.abort()),
            "decoder.onnx could not be fetched",
        ),
        (lambda page: page.add_init_script("delete globalThis.WebAssembly"), "needs WebAssembly"),
    ],
    ids=["damaged", "no model", "missing", "no WebAssembly"],
)
def test_what_prevents_the_page_from_working_is_said(break_page, message, new_context, url):
    page = new_context().new_page()
    break_page(page)
    page.goto(url)
    expect(page.get_by_role("alert")).to_contain_text(message, timeout=PATIENCE)
    expect(page.locator("#draw")).to_be_disabled()
