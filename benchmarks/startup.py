"""
Measure start-up times: imports, `vfmtok --help`, loading a full-size pipeline, the demo's first image.

    python benchmarks/startup.py

Each run is a separate process, and the sides take turns. Loading is compared with reading the same weight files once from start
to end. Its memory excludes the imports: the peak, and the final memory without mapped files. The pipeline has the released
sizes (DINOv2-L tokenizer and AR-L) and random weights; it is first written to a temporary folder. All files are in the page
cache.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from measuring import alternate, in_fresh_process, machine, memory, seconds_of
from random_models import generator_config, random_generator, random_tokenizer, tokenizer_config
from result_tables import show_table

from vfmtok_hf import VFMTokImageProcessor, VFMTokPipeline
from vfmtok_hf.cpu.packing import pack_weights


SPACE = Path(__file__).parents[1] / "spaces" / "vfmtok"
START = {
    "import torch": ["-c", "import torch"],
    "import vfmtok_hf": ["-c", "import vfmtok_hf"],
    "vfmtok --help": ["-m", "vfmtok_hf", "--help"],
    # The modules of both that the package imports, then the package's own.
    "import what we need of transformers and diffusers": [
        "-c",
        "from transformers import AutoImageProcessor, AutoModel, GenerationMixin, Pipeline, PreTrainedModel\n"
        "from diffusers import DiffusionPipeline",
    ],
    "from vfmtok_hf import VFMTokPipeline": ["-c", "from vfmtok_hf import VFMTokPipeline"],
}
# Build the page like `python app.py`, and run its button until an image is generated, without a browser.
DEMO = """
import app
app.build_page()
generation, *_ = app.generate_stepwise(app.Settings.checked(app.DEFAULT_LABEL, images=1))
assert generation.pictures
"""


def write_pipeline(folder: Path) -> None:
    tokenizer, generator = random_tokenizer(tokenizer_config()), random_generator(generator_config("AR-L"))
    VFMTokPipeline(tokenizer, generator, VFMTokImageProcessor()).save_pretrained(folder)


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def read_once(folder: Path) -> None:
    """Read every byte of the weights into one buffer."""
    buffer = bytearray(2**24)
    for path in weight_files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def load_and_read(folder: Path) -> VFMTokPipeline:
    """Weights are mapped when they are loaded, and read from the files when they are first used."""
    pipe = VFMTokPipeline.from_pretrained(folder)
    for model in (pipe.vq_model, pipe.transformer):
        for parameter in model.parameters():
            parameter.sum()
    return pipe


def load_and_pack(folder: Path) -> VFMTokPipeline:
    pipe = VFMTokPipeline.from_pretrained(folder)
    pack_weights(pipe.vq_model)
    pack_weights(pipe.transformer)
    return pipe


LOADING: dict[str, Callable[[Path], object]] = {
    "read the files": read_once,
    "from_pretrained": VFMTokPipeline.from_pretrained,
    "from_pretrained, every weight read": load_and_read,
    "from_pretrained, packed": load_and_pack,
}


def print_loading(folder: str, side: str) -> None:
    """Print the seconds of loading, without the imports, and the additional memory in bytes."""
    before = {field: memory(field) for field in ("VmHWM", "RssAnon")}
    start = time.perf_counter()
    loaded = LOADING[side](Path(folder))  # noqa: F841, what is loaded stays until its memory is read
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, **{field: memory(field) - bytes for field, bytes in before.items()}}))


def seconds_of_command(arguments: list[str], folder: Path | None = None) -> float:
    command = [sys.executable, *arguments]
    return seconds_of(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=folder))


def measure_start(runs: int) -> list[dict[str, object]]:
    sides = {name: partial(seconds_of_command, arguments) for name, arguments in START.items()}
    if importlib.util.find_spec("gradio"):
        sides["demo's first picture"] = partial(seconds_of_command, ["-c", DEMO], SPACE)
    seconds = alternate(sides, runs)
    return [
        {"side": name, "seconds": f"{time:.2f}", "beyond import torch": f"{time - seconds['import torch']:+.2f}"}
        for name, time in seconds.items()
    ]


def measure_loading(folder: Path, runs: int) -> list[dict[str, object]]:
    def run(side: str) -> float:
        result = in_fresh_process(__file__, "--load", folder, side)
        results[side] = result
        return result["seconds"]

    results: dict[str, dict[str, float]] = {}
    size = sum(path.stat().st_size for path in weight_files(folder))
    seconds = alternate({side: partial(run, side) for side in LOADING}, runs)
    return [
        {
            "files GB": f"{size / 1e9:.2f}",
            "side": side,
            "seconds": f"{time:.2f}",
            "GB/s": f"{size / time / 1e9:.2f}",
            "times reading": f"{time / seconds['read the files']:.2f}",
            "peak GB, mapped files included": f"{results[side]['VmHWM'] / 1e9:.2f}",
            "own GB": f"{results[side]['RssAnon'] / 1e9:.2f}",
        }
        for side, time in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--pipeline", type=Path, help="folder to load instead of a new one of random weights")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print_loading(*arguments.load)
        return
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.pipeline or Path(temporary)
        if arguments.pipeline is None:
            write_pipeline(folder)
        show_table("startup", measure_start(arguments.runs))
        show_table("loading", measure_loading(folder, arguments.runs))


if __name__ == "__main__":
    main()
