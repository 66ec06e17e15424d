"""
The page: generate images from class labels, compare with guidance, look inside the image tokenizer, and repaint parts of
images.

Run it with `python app.py`. `VFMTOK_MODEL` selects another pipeline, a folder or a repository on the Hub.
"""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import gradio as gr
import PIL.Image

import inpainting
from inspection import decode_tokens, inspect, to_url
from model import CAN_INPAINT, GRID_SIZE, SAMPLING, gpu
from neighbors import EXAMPLES, nearest
from pictures import picture_upload, pixel_values_of
from sampling import generate_at_once, generate_stepwise
from settings import DEFAULT_LABEL, RANGES, Settings, class_choices, random_seed
from theme import STYLE, THEME, template
from views import class_thumbnails, comparison_view, generation_view, image_captions, neighbors_view, page_facts


HISTORY = 48
# Above this number of classes, the picker has a search field.
SEARCHABLE = 40
# Two visitors at a time; others wait in a queue of limited length.
MODEL_EVENT = {"concurrency_id": "model", "concurrency_limit": 2}
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# A RAR generator increases guidance from token to token, unless its checkpoint makes it constant.
GUIDANCE_NOTE = " Guidance increases to this scale gradually." if getattr(SAMPLING, "guidance_scale_pow", 0) else ""
# The first example of each class.
FEW_EXAMPLES = list({path.stem.split("_")[0]: path for path in reversed(EXAMPLES)}.values())[::-1]
FIRST_EXAMPLE = FEW_EXAMPLES[-3:][0]
LINK = """(...values) => {
  const link = new URL(window.location.origin + window.location.pathname);
  %s.forEach((name, index) => link.searchParams.set(name, values[index]));
  window.history.replaceState(null, "", link);
  navigator.clipboard?.writeText(link.href).catch(() => {});
  return link.href;
}""" % ["label", *RANGES]
# Updating `gr.Tabs(selected=...)` from Python shows tabs twice.
SHOW_TAB = """() => {
  [...document.querySelectorAll("[role=tab]")].find((tab) => tab.textContent.trim() === "%s").click();
}"""
# On a narrow page, results are below the form.
SHOW_RESULT = """() => {
  if (window.innerWidth < 720) document.getElementById("%s").scrollIntoView({ behavior: "smooth" });
}"""


# ---------------------------------------------------------------------------------------------------------------
# Functions of the page and of its API


@gpu
def generate(
    label: str,
    images: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    guidance: float,
    history: list,
) -> Iterator[tuple]:
    """
    Generate images of a class. Yields the images while they grow; at the end also the earlier images of the session,
    newest first.
    """
    settings = Settings.checked(
        label, images=images, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance
    )
    for generation in generate_stepwise(settings):
        yield generation_view(settings, generation), history, history
    finished = list(zip(generation.images, image_captions(settings), strict=True))
    yield generation_view(settings, generation), history, (finished + history)[:HISTORY]


@cache
def default_images() -> tuple:
    """The images that the page opens with, and the session's history that contains them."""
    settings = Settings(DEFAULT_LABEL)
    generation = generate_at_once(settings)
    return generation_view(settings, generation), list(zip(generation.images, image_captions(settings), strict=True))


@gpu
def open_images(*values) -> Iterator[tuple]:
    """The images of the form's values: the default ones from a cache, those of a link generated."""
    if Settings(*values) == Settings(DEFAULT_LABEL):
        view, history = default_images()
        yield view, [], history
    else:
        yield from generate(*values, [])


@gpu
def compare(label: str, images: int, seed: int, guidance: float) -> dict:
    """Generate images of the same class and seeds without and with guidance."""
    plain = Settings.checked(label, images=images, seed=seed)
    guided = Settings.checked(label, images=images, seed=seed, guidance=guidance)
    return comparison_view(plain, generate_at_once(plain), guided, generate_at_once(guided))


@gpu
def look_inside(image: PIL.Image.Image | None) -> dict | None:
    """The tokens of an image, the sampling locations of each token, and the reconstruction."""
    return None if image is None else inspect(image)


@gpu
def decode(image_tokens: list[int]) -> str:
    """Decode the tokens of an image, in raster order, to a `data:` URL."""
    return decode_tokens(image_tokens)


@gpu
def decode_edit(event: gr.EventData) -> dict:
    """Decode tokens that were edited on the page."""
    return gr.update(edited=decode_tokens(event.tokens))


@gpu
def find_nearest(image: PIL.Image.Image | None) -> dict | None:
    """The nearest examples of an image, by shared tokens and by embedding."""
    return None if image is None else neighbors_view(nearest(image))


@gpu
def inpaint(image: PIL.Image.Image | None, cells: list[int], label: str, seed: int) -> dict:
    """Repaint cells of an image, numbered in raster order, for a class."""
    return inpainting.inpaint(image, cells, Settings.checked(label, images=1, seed=seed))


def image_to_mark(image: PIL.Image.Image | None) -> tuple[dict, None]:
    """An image in the editor of cells, as the model crops it. The earlier result is removed."""
    return gr.update(picture=None if image is None else to_url(pixel_values_of(image))), None


def first_example(image: PIL.Image.Image | None) -> str | dict:
    """An example if there is no image."""
    return str(FIRST_EXAMPLE) if image is None else gr.skip()


def first_example_and_class(image: PIL.Image.Image | None) -> tuple:
    """The same with its class."""
    return first_example(image), example_class(FIRST_EXAMPLE) if image is None else gr.skip()


def example_class(path: Path) -> str | dict:
    """The class that an example's file name begins with, if the model has it."""
    name = path.stem.split("_")[0]
    return name if name in dict(class_choices()).values() else gr.skip()


def class_of_chosen_example(event: gr.SelectData) -> str | dict:
    """The class of the example that was clicked."""
    return example_class(FEW_EXAMPLES[event.index])


def chosen_example(event: gr.SelectData) -> str:
    """The example that was clicked."""
    return str(EXAMPLES[event.index])


def chosen_image(history: list, event: gr.EventData) -> PIL.Image.Image:
    """The generated image whose button was clicked."""
    return history[event.index][0]


def chosen_image_and_class(history: list, event: gr.EventData) -> tuple[PIL.Image.Image, str]:
    """The same with its class."""
    return history[event.index][0], event.label


def settings_of_link(request: gr.Request) -> list:
    """The form's values from the page's address."""
    return Settings.from_link(dict(request.query_params)).values()


# ---------------------------------------------------------------------------------------------------------------
# The page


def view(name: str, description: str, script: str | None = None, **settings) -> gr.HTML:
    """An element from `page/` that shows an object. gradio's API page would call its value a string."""
    element = gr.HTML(html_template=template(name), js_on_load=script and template(script), **settings)
    element.api_info = lambda: {"type": "object", "description": description, "additionalProperties": {}}
    return element


def number_slider(name: str, label: str, **settings) -> gr.Slider:
    """A slider over the range that `settings.py` allows."""
    low, high, step = RANGES[name]
    value = getattr(Settings(DEFAULT_LABEL), name)
    return gr.Slider(low, high, **{"value": value, "step": step, "label": label, **settings})


def class_picker(name: str) -> gr.HTML:
    """Classes as thumbnails, or as names if there are no examples of them."""
    choices = class_thumbnails()
    return gr.HTML(
        DEFAULT_LABEL, label="Class", html_template=template("classes.html"), js_on_load=template("classes.js"),
        name=name, choices=choices, searchable=len(choices) > SEARCHABLE,
    )  # fmt: skip


def seed_with_dice() -> gr.Number:
    """A number and a button that draws a random one."""
    low, high, _ = RANGES["seed"]
    with gr.Row(elem_classes="vt-seed"):
        seed = gr.Number(
            Settings(DEFAULT_LABEL).seed, label="Seed", minimum=low, maximum=high, precision=0, min_width=120
        )
        dice = gr.Button("Random", elem_classes="vt-dice", min_width=84, scale=0)
    dice.click(random_seed, outputs=seed, **QUIET)
    return seed


def generate_tab(page: gr.Blocks) -> tuple[gr.HTML, gr.State]:
    """Form, growing images and history. The page's address fills the form. Returns the images and their state."""
    with gr.Tab("Generate"), gr.Row():
        with gr.Column(scale=2, min_width=300):
            label = class_picker("class")
            with gr.Row():
                start = gr.Button("Generate", variant="primary", scale=2, min_width=120)
                stop = gr.Button("Stop", min_width=80, visible=False)
            images = number_slider("images", "Images")
            seed = seed_with_dice()
            guidance = number_slider(
                "guidance", "Guidance scale", info=f"1 is off: one forward pass per token.{GUIDANCE_NOTE}"
            )
            with gr.Accordion("Sampling", open=False):
                temperature = number_slider("temperature", "Temperature")
                top_k = number_slider("top_k", "Top-k", info="0 is off.")
                top_p = number_slider("top_p", "Top-p", info="1 is off.")
            link = gr.Textbox(
                label="Link to these settings", buttons=["copy"], interactive=False, visible=False, elem_id="link"
            )
            share = gr.Button("Copy a link to these settings", size="sm")
        with gr.Column(scale=5, min_width=300):
            sheet = view("generation.html", "images, tokens, speed", "generation.js", elem_id="generation")
            with gr.Column(elem_classes="vt-history"):
                gr.Markdown("### Earlier images")
                gallery = gr.Gallery(
                    label="Earlier images", show_label=False, container=False, format="png", height="auto",
                    object_fit="contain", buttons=["download", "fullscreen"], interactive=False,
                    elem_classes="vt-gallery vt-generated",
                )  # fmt: skip
    history = gr.State([], time_to_live=3600)
    form = [label, images, seed, temperature, top_k, top_p, guidance]
    results = [sheet, gallery, history]
    # In the queue, because warnings reach the page only from there.
    loaded = page.load(settings_of_link, outputs=form, show_progress="hidden", api_visibility="private")
    opening = loaded.then(open_images, form, results, show_progress="hidden", api_visibility="private", **MODEL_EVENT)
    pressed = start.click(
        lambda: gr.update(visible=True), outputs=stop, cancels=opening, js=SHOW_RESULT % "generation", **QUIET
    )
    generation = pressed.then(generate, [*form, history], results, show_progress="hidden", **MODEL_EVENT)
    generation.then(lambda: gr.update(visible=False), outputs=stop, **QUIET)
    stop.click(lambda: gr.update(visible=False), outputs=stop, cancels=generation, **QUIET)
    share.click(None, form, link, js=LINK).then(lambda: gr.update(visible=True), outputs=link, **QUIET)
    return sheet, history


def guidance_tab() -> None:
    """The same seeds without and with guidance, side by side."""
    with gr.Tab("Guidance"), gr.Row():
        with gr.Column(scale=2, min_width=300):
            label = class_picker("guided-class")
            start = gr.Button("Generate both", variant="primary")
            guidance = number_slider("guidance", "Guidance scale", value=2, info=f"For the right side.{GUIDANCE_NOTE}")
            images = number_slider("images", "Images")
            seed = seed_with_dice()
        with gr.Column(scale=5, min_width=300):
            sides = view("comparison.html", "images and speed without and with guidance", elem_id="comparison")
    start.click(compare, [label, images, seed, guidance], sides, show_progress="minimal", **MODEL_EVENT)
    start.click(None, js=SHOW_RESULT % "comparison", **QUIET)


def few_examples(image: gr.Image) -> gr.Dataset:
    """One example of each class; a click puts it into `image`."""
    with gr.Column(elem_classes="vt-examples"):
        return gr.Examples(
            [[str(path)] for path in FEW_EXAMPLES], image, label="Examples", examples_per_page=20
        ).dataset


def inspector_tab() -> gr.Image:
    """An upload and the view in `page/inspector.js`, which edits tokens and has them decoded here. Returns the upload."""
    with gr.Tab("Inside") as tab, gr.Row(elem_classes="vt-tool"):
        image = picture_upload(height=240, elem_classes="vt-upload", elem_id="inspected")
        with gr.Column(elem_classes="vt-result"):
            inspector = view("inspector.html", "tokens, sampling locations, images", "inspector.js", edited=None)
        few_examples(image)
    tab.select(first_example, image, image, **QUIET)
    image.change(look_inside, image, inspector, show_progress="minimal", **MODEL_EVENT)
    inspector.input(
        decode_edit, outputs=inspector, show_progress="hidden", trigger_mode="always_last", api_visibility="private",
        **MODEL_EVENT,
    )  # fmt: skip
    return image


def nearest_tab() -> None:
    """An upload or an example, and its neighbors."""
    with gr.Tab("Nearest") as tab, gr.Row(elem_classes="vt-tool"):
        image = picture_upload(height=240, elem_classes="vt-upload", elem_id="query")
        with gr.Column(elem_classes="vt-result"):
            neighbors = view("neighbors.html", "nearest examples by tokens and by embedding", elem_id="neighbors")
        with gr.Column(elem_classes="vt-examples"):
            gallery = gr.Gallery(
                EXAMPLES, label="Examples", show_label=False, container=False, height="auto", allow_preview=False,
                interactive=False, object_fit="contain", buttons=[], elem_classes="vt-gallery vt-pool",
            )  # fmt: skip
    tab.select(first_example, image, image, **QUIET)
    gallery.select(chosen_example, outputs=image, **QUIET)
    image.change(find_nearest, image, neighbors, show_progress="minimal", **MODEL_EVENT)


def inpaint_tab() -> tuple[gr.Image, gr.HTML]:
    """An upload, the editor of `page/mask.js` and the repainted image. Returns the upload and the class."""
    with gr.Tab("Inpaint") as tab, gr.Row(elem_classes="vt-tool vt-inpaint"):
        image = picture_upload(height=200, elem_classes="vt-upload", elem_id="painted")
        with gr.Column(elem_classes="vt-editor"):
            mask = gr.HTML(
                [], html_template=template("mask.html"), js_on_load=template("mask.js"), grid=GRID_SIZE, picture=None
            )
            mask.api_info = lambda: {"type": "array", "items": {"type": "integer"}, "description": "cells to repaint"}
        with gr.Column():
            label = class_picker("inpainted-class")
            seed = seed_with_dice()
            start = gr.Button("Inpaint", variant="primary")
        with gr.Column(elem_classes="vt-result"):
            result = view("inpainted.html", "the repainted image", "inpainted.js", elem_id="inpainted")
        examples = few_examples(image)
    tab.select(first_example_and_class, image, [image, label], **QUIET)
    examples.select(class_of_chosen_example, outputs=label, **QUIET)
    image.change(image_to_mark, image, [mask, result], show_progress="hidden", api_visibility="private")
    start.click(inpaint, [image, mask, label, seed], result, show_progress="minimal", **MODEL_EVENT)
    start.click(None, js=SHOW_RESULT % "inpainted", **QUIET)
    return image, label


def build_page() -> gr.Blocks:
    """All tabs. Files of visitors are deleted after an hour."""
    gr.set_static_paths(EXAMPLES[0].parent)
    with gr.Blocks(title="VFMTok", delete_cache=(600, 3600), analytics_enabled=False) as page:
        gr.HTML(page_facts(), html_template=template("header.html"), js_on_load=None)
        sheet, history = generate_tab(page)
        guidance_tab()
        inspected = inspector_tab()
        nearest_tab()
        sheet.inside(chosen_image, history, inspected, **QUIET).then(None, js=SHOW_TAB % "Inside", **QUIET)
        if CAN_INPAINT:
            painted = inpaint_tab()
            sheet.inpaint(chosen_image_and_class, history, painted, **QUIET).then(
                None, js=SHOW_TAB % "Inpaint", **QUIET
            )
        gr.api(decode, **MODEL_EVENT)
    return page.queue(max_size=32)


if __name__ == "__main__":
    # Newer releases of gradio would keep the inputs of visitors in their browsers; older ones have no such argument of launch.
    os.environ.setdefault("GRADIO_RUN_HISTORY", "False")
    build_page().launch(theme=THEME, css_paths=STYLE, max_file_size="10mb", footer_links=["api", "gradio"])
