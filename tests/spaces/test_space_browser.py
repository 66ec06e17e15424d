"""The Space in a real browser: every tab, on a laptop and a phone, light and dark. Pictures go to `outputs/space`."""

import re

import pytest

from .browsing import LAPTOP, PATIENCE, PHONE, fits_its_width
from .conftest import ROOT, SPACE


sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
expect = sync_api.expect

SCREENSHOTS = ROOT / "outputs" / "space"


@pytest.fixture
def visit(browser, space):
    """Opens the page in a fresh browser profile; at the end no script may have failed."""
    contexts, errors = [], []

    def open_page(link: str = "?seed=1", **settings):
        context = browser.new_context(**{**LAPTOP, "permissions": ["clipboard-read", "clipboard-write"], **settings})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(space.url + link)
        expect(page.get_by_role("button", name="Generate", exact=True)).to_be_visible(timeout=PATIENCE)
        if seed := re.search(r"seed=(\d+)", link):  # the form follows the link only after it is shown
            expect(page.get_by_label("Seed").first).to_have_value(seed[1], timeout=PATIENCE)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def show_tab(page, name):
    page.get_by_role("tab", name=name).click()


def visible(page, selector):
    return page.locator(selector).filter(visible=True)


def settings_of(page) -> dict[str, str]:
    panel = page.get_by_role("tabpanel").filter(visible=True)
    return {
        "label": panel.get_by_label("Class").input_value(),
        "seed": panel.get_by_label("Seed").input_value(),
        "images": panel.get_by_label("number input for Pictures").input_value(),
        "guidance": panel.get_by_label("number input for Guidance").input_value(),
    }


def photograph(page, name):
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True, animations="disabled")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("device", "settings"), [("laptop", LAPTOP), ("phone", PHONE)], ids=["laptop", "phone"])
def test_every_tab_shows_its_result_within_the_page(device, settings, scheme, visit):
    page = visit("?label=heart&seed=8", **settings, color_scheme=scheme)
    press(page, "Generate")
    expect(page.locator(".vt-generation a[download]")).to_have_count(4, timeout=PATIENCE)
    expect(page.locator(".vt-generated .thumbnail-item")).to_have_count(4)
    assert fits_its_width(page)
    photograph(page, f"{device}-{scheme}-generate")

    show_tab(page, "Guidance")
    press(page, "Generate both")
    expect(page.locator(".vt-side img")).to_have_count(2, timeout=PATIENCE)
    assert fits_its_width(page)
    photograph(page, f"{device}-{scheme}-guidance")

    show_tab(page, "Inside")
    expect(page.locator(".vt-ids button")).to_have_count(144, timeout=PATIENCE)
    expect(page.locator("[data-text=quality]")).to_contain_text("dB")
    assert fits_its_width(page)
    photograph(page, f"{device}-{scheme}-inside")

    show_tab(page, "Nearest")
    expect(visible(page, ".vt-row img")).to_have_count(12, timeout=PATIENCE)
    assert fits_its_width(page)
    photograph(page, f"{device}-{scheme}-nearest")


def test_guidance_starts_off_and_classes_are_found_by_name(visit):
    page = visit()
    assert settings_of(page)["guidance"] == "1"
    picker = page.get_by_role("tabpanel").filter(visible=True).get_by_label("Class")
    picker.click()
    page.keyboard.press("Control+A")
    page.keyboard.type("vehic")
    expect(page.get_by_role("option")).to_have_count(1)  # until then the list is the whole one
    page.get_by_role("option", name="car, vehicle, automobile").click()
    press(page, "Generate")
    expect(page.locator(".vt-generation img").first).to_have_attribute("alt", "car 1", timeout=PATIENCE)


def test_a_picture_grows_and_can_be_stopped(visit):
    page = visit("?images=8&seed=1")
    press(page, "Generate")
    progress = page.get_by_role("progressbar")
    expect(progress).to_be_attached(timeout=PATIENCE)
    press(page, "Stop")
    page.wait_for_timeout(1000)
    stopped_at = progress.get_attribute("aria-valuenow")
    assert int(stopped_at) < 100
    page.wait_for_timeout(1000)
    assert progress.get_attribute("aria-valuenow") == stopped_at
    press(page, "Generate")
    expect(progress).to_have_attribute("aria-valuenow", "100", timeout=PATIENCE)


def test_a_picture_downloads(visit):
    page = visit("?label=clock&images=1&seed=4")
    press(page, "Generate")
    with page.expect_download() as download:
        page.get_by_label("Download clock 4").click()
    assert download.value.suggested_filename == "clock-4.png"
    assert download.value.path().read_bytes().startswith(b"\x89PNG")


def test_a_link_restores_the_settings_in_another_browser(visit):
    page = visit("?label=moon&images=2&guidance=1.5&seed=1")
    before = settings_of(page)
    press(page, "🎲")
    expect(page.get_by_role("tabpanel").filter(visible=True).get_by_label("Seed")).not_to_have_value(before["seed"])
    press(page, "Copy a link to these settings")
    expect(page.locator("#link textarea, #link input")).to_be_visible()
    link = page.locator("#link textarea, #link input").input_value()
    assert page.evaluate("navigator.clipboard.readText()") == link == page.url
    restored = visit("?" + link.split("?")[1])
    assert settings_of(restored) == settings_of(page) | {"label": "moon, moon phase"}


def test_a_hostile_link_warns_and_runs_nothing(visit):
    page = visit("?label=<img src=x onerror=window.hacked=1>&images=1e9&seed=-1&temperature=nan")
    expect(page.get_by_test_id("toast-body")).to_contain_text("(4)", timeout=PATIENCE)
    photograph(page, "laptop-light-hostile-link")
    assert page.evaluate("window.hacked") is None
    assert settings_of(page) == {"label": "animal, animal face", "seed": "0", "images": "4", "guidance": "1"}


def test_an_unknown_class_gets_a_suggestion(visit):
    page = visit()
    page.get_by_label("Class").first.fill("hart")
    page.keyboard.press("Enter")
    press(page, "Generate")
    expect(page.get_by_test_id("toast-body")).to_contain_text("Did you mean 'heart'?", timeout=PATIENCE)


def test_tokens_can_be_looked_at_erased_and_swapped(visit):
    page = visit()
    show_tab(page, "Inside")
    ids, quality = page.locator(".vt-ids button"), page.locator("[data-text=quality]")
    expect(ids).to_have_count(144, timeout=PATIENCE)
    original = ids.all_text_contents()
    decoded = page.locator("canvas[data-panel=decoded]")
    untouched = decoded.evaluate("canvas => canvas.toDataURL()")

    looked_at = page.locator("canvas[data-panel=input]").evaluate("canvas => canvas.toDataURL()")
    ids.nth(30).hover()
    expect(page.locator("[data-text=token]")).to_have_text("row 3, column 7")
    expect(page.locator("[data-text=ids]")).to_contain_text(f"token {original[30]} ")
    assert page.locator("canvas[data-panel=input]").evaluate("canvas => canvas.toDataURL()") != looked_at

    press(page, "Erase")
    ids.nth(65).hover()
    page.mouse.down()
    ids.nth(67).hover()
    page.mouse.up()
    expect(quality).to_have_text("3 of 144 tokens changed")
    page.mouse.move(0, 0)
    page.wait_for_function(
        "before => document.querySelector('canvas[data-panel=decoded]').toDataURL() != before", arg=untouched
    )
    photograph(page, "laptop-light-erased")
    press(page, "Undo")
    expect(quality).to_contain_text("PSNR")

    press(page, "Swap")
    ids.nth(40).click()
    ids.nth(100).click()
    expect(quality).to_have_text("2 of 144 tokens changed")
    assert [ids.nth(cell).text_content() for cell in (40, 100)] == [original[100], original[40]]
    press(page, "Reset")
    page.mouse.move(0, 0)
    expect(quality).to_contain_text("PSNR")
    assert ids.all_text_contents() == original


def test_uploads_are_inspected_and_damaged_ones_explained(visit, tmp_path):
    page = visit()
    show_tab(page, "Inside")
    expect(page.locator("[data-text=quality]")).to_contain_text("dB", timeout=PATIENCE)
    ids = page.locator(".vt-ids")
    before = ids.text_content()
    visible(page, "[aria-label='Remove Image']").click()
    expect(visible(page, ".vt-empty")).to_have_count(1, timeout=PATIENCE)
    page.locator("#inspected input[type=file]").set_input_files(SPACE / "examples" / "zodiac_noto_264f.png")
    expect(ids).not_to_have_text(before, timeout=PATIENCE)
    visible(page, "[aria-label='Remove Image']").click()
    (tmp_path / "damaged.png").write_bytes((SPACE / "examples" / "zodiac_noto_264f.png").read_bytes()[:700])
    page.locator("#inspected input[type=file]").set_input_files(tmp_path / "damaged.png")
    expect(page.get_by_test_id("toast-body")).to_contain_text("cannot be read as a picture", timeout=PATIENCE)


def test_an_example_can_be_chosen_for_its_neighbors(visit):
    page = visit()
    show_tab(page, "Nearest")
    expect(visible(page, ".vt-row img")).to_have_count(12, timeout=PATIENCE)
    heart = [path.stem.split("_")[0] for path in sorted((SPACE / "examples").glob("*.png"))].index("heart")
    page.locator(".vt-pool .thumbnail-item").nth(heart).click()
    expect(visible(page, ".vt-row").first.locator("b").first).to_have_text("heart", timeout=PATIENCE)
