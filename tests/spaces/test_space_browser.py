"""The Space in a real browser: every tab, on a laptop and a phone, light and dark. Screenshots go to `outputs/space`."""

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

    def open_page(link: str = "?seed=1", url: str = space.url, **settings):
        context = browser.new_context(**{**LAPTOP, "permissions": ["clipboard-read", "clipboard-write"], **settings})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url + link)
        expect(page.get_by_role("button", name="Generate", exact=True)).to_be_visible(timeout=PATIENCE)
        expect(page.locator(".vt-generation a[download]").first).to_be_visible(
            timeout=PATIENCE
        )  # it opens with images
        if seed := re.search(r"seed=(\d+)", link):  # the form follows the link only after it is shown
            expect(page.get_by_label("Seed", exact=True).first).to_have_value(seed[1], timeout=PATIENCE)
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
        "label": chosen_class(page).inner_text(),
        "seed": panel.get_by_label("Seed", exact=True).input_value(),
        "images": panel.get_by_label("number input for Images").input_value(),
        "guidance": panel.get_by_label("number input for Guidance scale").input_value(),
    }


def chosen_class(page):
    return page.get_by_role("tabpanel").filter(visible=True).get_by_role("radio", checked=True)


def photograph(page, name):
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True, animations="disabled")


# The color below a text, through transparent elements, and its WCAG contrast; elements that are disabled are exempt.
LOW_CONTRAST = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => channels(color).slice(0, 3).map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  }).reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const background = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor, [, , , alpha = 1] = channels(color);
      if (alpha === 1) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (!text || !element.checkVisibility({ visibilityProperty: true }) || element.closest("[disabled], [aria-hidden=true], style, script")) continue;
    const box = element.getBoundingClientRect();
    if (!box.width || !box.height) continue;
    const [light, dark] = [luminance(getComputedStyle(element).color), luminance(background(element))].sort((a, b) => b - a);
    const contrast = (light + 0.05) / (dark + 0.05);
    if (contrast < 4.5) found.push(`${text.slice(0, 30)}: ${contrast.toFixed(2)}`);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("device", "settings"), [("laptop", LAPTOP), ("phone", PHONE)], ids=["laptop", "phone"])
def test_every_tab_shows_its_result_within_the_page(device, settings, scheme, visit):
    page = visit("?label=heart&seed=8", **settings, color_scheme=scheme)

    def check(name):
        assert fits_its_width(page)
        assert page.evaluate(LOW_CONTRAST) == []
        photograph(page, f"{device}-{scheme}-{name}")

    press(page, "Generate")
    expect(page.locator(".vt-generated .thumbnail-item")).to_have_count(4, timeout=PATIENCE)
    expect(page.locator(".vt-generation a[download]")).to_have_count(4, timeout=PATIENCE)
    check("generate")

    show_tab(page, "Guidance")
    press(page, "Generate both")
    expect(page.locator(".vt-side img")).to_have_count(8, timeout=PATIENCE)
    check("guidance")

    show_tab(page, "Inside")
    expect(page.locator(".vt-ids button")).to_have_count(144, timeout=PATIENCE)
    expect(page.locator("[data-text=quality]")).to_contain_text("dB")
    check("inside")

    show_tab(page, "Nearest")
    expect(visible(page, ".vt-row img")).to_have_count(12, timeout=PATIENCE)
    check("nearest")


def test_the_page_opens_with_images_and_without_guidance(visit):
    page = visit("")
    expect(page.locator(".vt-generation img").first).to_have_attribute("alt", re.compile("heart, seed"))
    assert settings_of(page)["guidance"] == "1"
    expect(page.locator(".vt-generated")).to_be_hidden()
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def test_a_link_opens_with_its_images(visit):
    page = visit("?label=moon&images=2&seed=4")
    expect(page.locator(".vt-generation img").last).to_have_attribute("alt", "moon, seed 5")


def test_guidance_starts_where_the_images_are_good(visit):
    page = visit()
    show_tab(page, "Guidance")
    slider = page.get_by_role("tabpanel").filter(visible=True).get_by_label("range slider for Guidance scale")
    assert slider.input_value() == "2"
    expect(visible(page, ":text('increases to this scale')").first).to_be_visible()


def test_a_class_is_chosen_by_click_or_by_keyboard(visit):
    page = visit()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.get_by_role("radio", name="car").click()
    assert settings_of(page)["label"] == "car"
    page.keyboard.press("ArrowRight")
    expect(panel.get_by_role("radio", name="cat")).to_be_focused()
    assert settings_of(page)["label"] == "cat"
    page.keyboard.press("Tab")
    expect(panel.get_by_role("button", name="Generate", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".vt-generation img").first).to_have_attribute("alt", "cat, seed 1", timeout=PATIENCE)


def test_the_keyboard_reaches_what_a_search_for_classes_finds(browser):
    page = browser.new_page()
    classes = "".join(
        f'<button role="radio" data-value="{name}" data-names="{name}">{name}</button>'
        for name in ("car", "cat", "sun")
    )
    page.set_content(f'<div><input type="search"><div role="radiogroup">{classes}</div></div>')
    script = (SPACE / "page" / "classes.js").read_text()
    page.evaluate(
        "(script) => new Function('element', 'props', 'watch', script)(document.querySelector('div'), { value: 'car' }, () => {})",
        script,
    )

    def reached() -> list[str]:
        return page.locator("[role=radio][tabindex='0']").all_inner_texts()

    assert reached() == ["car"]
    page.get_by_role("searchbox").fill("cat")
    assert reached() == ["cat"]
    page.get_by_role("searchbox").fill("")
    assert reached() == ["car"]
    page.close()


def test_images_grow_and_can_be_stopped(visit):
    page = visit("?images=8&seed=1")
    press(page, "Generate")
    expect(page.locator(".vt-growing svg")).to_have_count(8, timeout=PATIENCE)
    press(page, "Stop")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    page.wait_for_timeout(1000)
    progress = page.get_by_role("progressbar")
    stopped_at = progress.get_attribute("aria-valuenow")
    assert int(stopped_at) < 100
    page.wait_for_timeout(1000)
    assert progress.get_attribute("aria-valuenow") == stopped_at
    press(page, "Generate")
    expect(progress).to_have_attribute("aria-valuenow", "100", timeout=PATIENCE)
    expect(page.locator(".vt-growing")).to_have_count(0)
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def test_earlier_images_are_a_history_that_does_not_repeat_the_current_ones(visit):
    page = visit("?label=heart&images=1&seed=3")
    expect(page.get_by_role("heading", name="Earlier images")).to_be_hidden()
    page.get_by_role("radio", name="clock").first.click()
    press(page, "Generate")
    expect(page.locator(".vt-generation img")).to_have_attribute("alt", "clock, seed 3", timeout=PATIENCE)
    expect(page.get_by_role("heading", name="Earlier images")).to_be_visible()
    expect(page.locator(".vt-generated .caption-label")).to_have_text(["heart, seed 3"])
    page.locator(".vt-generated .thumbnail-item").click()
    expect(page.locator(".vt-generated .preview")).to_be_visible()


def test_a_generated_image_is_sent_to_the_inspector(visit):
    page = visit("?label=heart&images=2&seed=3")
    page.get_by_label("Look inside heart, seed 4").click()
    expect(page.locator("[data-text=quality]")).to_contain_text("dB", timeout=PATIENCE)
    assert page.get_by_role("tab").all_inner_texts() == ["Generate", "Guidance", "Inside", "Nearest", "Inpaint"]
    expect(page.get_by_role("tab", name="Inside")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#inspected img")).to_be_visible()


def test_a_phone_scrolls_to_the_result_and_shows_the_tool_before_its_examples(visit):
    page = visit("?label=heart&images=1&seed=3", **PHONE)
    press(page, "Generate")
    expect(page.locator("#generation")).to_be_in_viewport(timeout=PATIENCE)
    show_tab(page, "Inside")
    expect(page.locator("[data-text=quality]")).to_contain_text("dB", timeout=PATIENCE)
    tool, examples = (visible(page, selector).bounding_box() for selector in (".vt-inspector", ".vt-examples"))
    assert tool["y"] < examples["y"]


def test_the_dark_page_is_dark_to_its_edges(visit):
    page = visit(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(21, 19, 16)"


def test_an_image_downloads(visit):
    page = visit("?label=clock&images=1&seed=4")
    with page.expect_download() as download:
        page.get_by_label("Download clock, seed 4").click()
    assert download.value.suggested_filename == "clock-seed-4.png"
    assert download.value.path().read_bytes().startswith(b"\x89PNG")


def test_a_link_restores_the_settings_in_another_browser(visit):
    page = visit("?label=moon&images=2&guidance=1.5&seed=1")
    before = settings_of(page)
    press(page, "Random")
    expect(page.get_by_role("tabpanel").filter(visible=True).get_by_label("Seed", exact=True)).not_to_have_value(
        before["seed"]
    )
    drawn = settings_of(page)
    press(page, "Copy a link to these settings")
    expect(page.locator("#link textarea, #link input")).to_be_visible()
    link = page.locator("#link textarea, #link input").input_value()
    assert page.evaluate("navigator.clipboard.readText()") == link == page.url
    restored = visit("?" + link.split("?")[1])
    assert settings_of(restored) == drawn


def test_a_hostile_link_warns_and_runs_nothing(visit):
    page = visit("?label=<img src=x onerror=window.hacked=1>&images=1e9&seed=-1&temperature=nan")
    expect(page.get_by_test_id("toast-body")).to_contain_text("(4)", timeout=PATIENCE)
    photograph(page, "laptop-light-hostile-link")
    assert page.evaluate("window.hacked") is None
    assert settings_of(page) == {"label": "heart", "seed": "1", "images": "4", "guidance": "1"}


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
    expect(page.get_by_test_id("toast-body")).to_contain_text("cannot be read as an image", timeout=PATIENCE)


def test_an_example_can_be_chosen_for_its_neighbors(visit):
    page = visit()
    show_tab(page, "Nearest")
    expect(visible(page, ".vt-row img")).to_have_count(12, timeout=PATIENCE)
    heart = [path.stem.split("_")[0] for path in sorted((SPACE / "examples").glob("*.png"))].index("heart")
    page.locator(".vt-pool .thumbnail-item").nth(heart).click()
    expect(visible(page, ".vt-row").first.locator("b").first).to_have_text("heart", timeout=PATIENCE)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_a_marked_part_is_repainted(device, scheme, visit):
    page = visit(**device, color_scheme=scheme)
    show_tab(page, "Inpaint")
    cells = page.locator(".vt-marks button")
    expect(page.locator(".vt-marks img")).to_be_visible(timeout=PATIENCE)
    cells.nth(13).hover()
    page.mouse.down()
    for cell in (14, 15, 27):
        cells.nth(cell).hover()
    page.mouse.up()
    expect(page.locator(".vt-mask .vt-hint")).to_contain_text("4 of 144 tokens")
    press(page, "Inpaint")
    expect(page.locator("#inpainted img")).to_have_attribute("alt", re.compile("seed 1, repainted"), timeout=PATIENCE)
    expect(page.locator("#inpainted")).to_be_in_viewport(timeout=PATIENCE)
    assert page.locator(".vt-marks button[aria-pressed=true]").count() == 4
    expect(page.locator("[aria-live=polite] img")).to_be_visible()
    assert fits_its_width(page)
    assert page.evaluate(LOW_CONTRAST) == []
    photograph(page, f"{'phone' if device is PHONE else 'laptop'}-{scheme}-inpaint")


def test_cells_are_marked_by_keyboard_and_a_new_image_has_none(visit):
    page = visit("?label=moon&seed=1")
    page.get_by_label("Inpaint moon, seed 1").click()
    expect(page.get_by_role("tab", name="Inpaint")).to_have_attribute("aria-selected", "true")
    expect(page.locator(".vt-marks img")).to_be_visible(timeout=PATIENCE)
    expect(chosen_class(page)).to_have_text("moon")
    marked = page.locator(".vt-marks button[aria-pressed=true]")
    page.get_by_label("Row 1, column 1", exact=True).focus()
    for key in ("Space", "ArrowRight", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    expect(marked).to_have_count(2)
    last = page.get_by_label("Row 2, column 2", exact=True)
    expect(last).to_have_attribute("aria-pressed", "true")
    press(page, "Clear")
    expect(marked).to_have_count(0)
    expect(last).to_be_focused()
    page.get_by_label("Row 9, column 9", exact=True).evaluate("cell => cell.click()")  # as a screen reader does
    expect(marked).to_have_count(1)
    page.locator("#painted input[type=file]").set_input_files(SPACE / "examples" / "zodiac_noto_264f.png")
    expect(marked).to_have_count(0, timeout=PATIENCE)
    press(page, "Inpaint")
    expect(page.get_by_test_id("toast-body")).to_contain_text("Mark at least one cell", timeout=PATIENCE)


def test_an_example_to_repaint_brings_its_class_along(visit):
    page = visit()
    show_tab(page, "Inpaint")
    expect(page.locator(".vt-marks img")).to_be_visible(timeout=PATIENCE)
    expect(chosen_class(page)).to_have_text("smiley")
    before = page.locator(".vt-marks img").get_attribute("src")
    visible(page, ".vt-examples .gallery-item").nth(2).click()
    expect(page.locator(".vt-marks img")).not_to_have_attribute("src", before, timeout=PATIENCE)
    expect(chosen_class(page)).to_have_text("cat")


def test_a_generator_of_raster_order_cannot_repaint(visit, ar_space):
    page = visit(url=ar_space.url)
    assert page.get_by_role("tab").all_inner_texts() == ["Generate", "Guidance", "Inside", "Nearest"]
    expect(page.get_by_role("button", name=re.compile("^Look inside"))).to_have_count(4)
    expect(page.get_by_role("button", name=re.compile("^Inpaint"))).to_have_count(0)
    expect(page.get_by_text("increases to this scale")).to_have_count(0)


def test_a_drag_marks_cells_until_it_ends(visit):
    page = visit()
    page.evaluate("delete PointerEvent.prototype.getCoalescedEvents")  # as on a page without https
    show_tab(page, "Inpaint")
    expect(page.locator(".vt-marks img")).to_be_visible(timeout=PATIENCE)
    cells, marked = page.locator(".vt-marks button"), page.locator(".vt-marks button[aria-pressed=true]")
    cells.nth(13).click(button="right")
    expect(marked).to_have_count(0)
    cells.nth(13).hover()
    page.mouse.down()
    cells.nth(14).hover()
    expect(marked).to_have_count(2)
    page.evaluate("window.dispatchEvent(new PointerEvent('pointercancel'))")
    cells.nth(15).hover()
    page.mouse.up()
    expect(marked).to_have_count(2)
    page.mouse.down()
    expect(marked).to_have_count(3)
    page.evaluate(
        "window.addEventListener('pointerup', (event) => event.stopImmediatePropagation(), { capture: true })"
    )
    page.mouse.up()
    cells.nth(16).hover()
    expect(marked).to_have_count(3)


def test_a_phone_shows_the_inpaint_tab_in_the_order_of_its_elements(visit):
    page = visit(**PHONE)
    show_tab(page, "Inpaint")
    expect(page.locator(".vt-marks img")).to_be_visible(timeout=PATIENCE)
    used = ("#painted", ".vt-mask", "[role=radiogroup]", "#inpainted", ".vt-examples")
    for elements in (
        [page.locator(".vt-inpaint").locator(part) for part in used],
        page.locator(".vt-inpaint > *").all(),
    ):
        tops = [element.bounding_box()["y"] for element in elements]
        assert tops == sorted(tops)
        assert len(tops) == 5
