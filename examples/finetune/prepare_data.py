"""
Write a small image folder with new classes: emoji that the shipped checkpoint knows as "heart", "hand" and "moon", divided by
color, skin tone and phase.

    python examples/finetune/prepare_data.py --emoji data/emoji128 --output data/finetune
"""

import argparse
import shutil
from pathlib import Path

from vfmtok_hf.data.output_files import check_output_folder


# New class -> class in the emoji data, and ends of the file names, which are code points.
CLASSES = {
    "blue heart": ("heart", ["1f499"]),
    "green heart": ("heart", ["1f49a"]),
    "yellow heart": ("heart", ["1f49b"]),
    "purple heart": ("heart", ["1f49c"]),
    "black heart": ("heart", ["1f5a4"]),
    "light hand": ("hand", ["1f3fb"]),
    "dark hand": ("hand", ["1f3ff"]),
    "crescent moon": ("moon", ["1f312", "1f318", "1f319", "1f31b", "1f31c"]),
    "full moon": ("moon", ["1f315", "1f31d"]),
    "clock": ("clock", [""]),  # a class that the checkpoint knows
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True, help="folder that examples/emoji/prepare_data.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="image folder to write")
    arguments = parser.parse_args()
    if not arguments.emoji.is_dir():
        parser.error(f"there is no folder {arguments.emoji}: write it with examples/emoji/prepare_data.py")
    try:
        check_output_folder(arguments.output)
    except OSError as error:
        parser.error(str(error))
    files = {
        name: [file for file in arguments.emoji.glob(f"*/{source}/*.png") if file.stem.endswith(tuple(ends))]
        for name, (source, ends) in CLASSES.items()
    }
    for name, of_class in files.items():
        if not of_class:
            parser.error(f"{arguments.emoji} has no images of {name}: write it with examples/emoji/prepare_data.py")
    for name, of_class in files.items():
        folder = arguments.output / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in of_class:
            shutil.copy(file, folder)
        print(f"{name}: {len(of_class)} images")


if __name__ == "__main__":
    main()
