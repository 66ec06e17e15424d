"""Build the kernel for the installed torch, without nix, into the layout that the `kernels` library loads.

    python kernel/dev_build.py                     # build/<variant>/ for the CPU
    python kernel/dev_build.py --backend cuda      # the same for CUDA; needs nvcc, but no GPU
    python kernel/dev_build.py --sanitize          # CPU with the address and undefined-behavior sanitizers

What to compile is read from build.toml, which is also what kernel-builder uses for the builds published on the Hub. A
build whose sources, flags and torch are unchanged is kept. The build directory appears whole or not at all.
Environment: CXX, NVCC, MAX_JOBS.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


KERNEL_DIR = Path(__file__).resolve().parent
COMMON_FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-DPy_LIMITED_API=0x03090000"]
# Some toolchains link the C++ library statically. If a part of that copy were replaced with torch's C++ library of another version,
# formatting a message would end the process.
EXPORTS = "{ global: PyInit_*; local: *; };\n"
SANITIZER_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]

# kernel-builder generates these two files; here they are ours.
REGISTRATION_H = """\
#pragma once
#include <Python.h>
#include <torch/library.h>

// TORCH_LIBRARY pastes its first argument; one more level of macros lets that argument be TORCH_EXTENSION_NAME.
#define TORCH_LIBRARY_EXPAND(NAME, MODULE) TORCH_LIBRARY(NAME, MODULE)
#define TORCH_LIBRARY_IMPL_EXPAND(NAME, DEVICE, MODULE) TORCH_LIBRARY_IMPL(NAME, DEVICE, MODULE)

// An importable, empty Python module: importing it runs the registrations above.
#define MODULE_INIT_(NAME) PyInit_##NAME
#define MODULE_INIT(NAME) MODULE_INIT_(NAME)
#define MODULE_STRING_(NAME) #NAME
#define MODULE_STRING(NAME) MODULE_STRING_(NAME)
#define REGISTER_EXTENSION(NAME)                                                           \\
  PyMODINIT_FUNC MODULE_INIT(NAME)() {                                                     \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, MODULE_STRING(NAME), nullptr, 0,   \\
                                 nullptr, nullptr, nullptr, nullptr, nullptr};             \\
    return PyModule_Create(&module);                                                       \\
  }
"""
OPS_PY = """\
import torch

from . import {identifier}


ops = torch.ops.{identifier}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{identifier}::{{op_name}}"
"""


def variant_name(backend: str) -> str:
    """The name under which `kernels` looks for this torch, e.g. `torch215-cxx11-cpu-x86_64-linux`."""
    torch_version = "".join(torch.__version__.split(".")[:2])
    backend_tag = "cpu" if backend == "cpu" else "cu" + torch.version.cuda.replace(".", "")
    return f"torch{torch_version}-cxx11-{backend_tag}-{platform.machine()}-{platform.system().lower()}"


def read_build_config() -> dict:
    with open(KERNEL_DIR / "build.toml", "rb") as file:
        return tomllib.load(file)


def sources_of(config: dict, backend: str) -> tuple[list[Path], list[str], list[str]]:
    """Every file the backend's kernels list, the CUDA capabilities and the C++ flags they ask for."""
    kernels = [kernel for kernel in config["kernel"].values() if kernel["backend"] == backend]
    files = [KERNEL_DIR / name for name in config["torch"]["src"]]
    files += [KERNEL_DIR / name for kernel in kernels for name in kernel["src"]]
    capabilities = [capability for kernel in kernels for capability in kernel.get("cuda-capabilities", [])]
    flags = [flag for kernel in kernels for flag in kernel.get("cxx-flags", [])]
    return files, capabilities, flags


def package_files(config: dict) -> list[Path]:
    package = config["general"]["name"].replace("-", "_")
    return sorted((KERNEL_DIR / "torch-ext" / package).glob("*.py"))


def compile_commands(
    files: list[Path], backend: str, capabilities: list[str], extra: list[str], objects: Path
) -> list[tuple[list[str], Path]]:
    includes = [objects, *cpp_extension.include_paths(device_type=backend), sysconfig.get_paths()["include"]]
    defines = [f"-DTORCH_EXTENSION_NAME={objects.name}", f"-D{backend.upper()}_KERNEL"]
    common = [*COMMON_FLAGS, *extra, *defines, *(flag for path in includes for flag in ("-isystem", str(path)))]
    commands = []
    for source in files:
        target = objects / f"{source.parent.name}-{source.stem}.o"
        if source.suffix == ".cpp":
            compiler = [os.environ.get("CXX", "g++"), "-fPIC", "-Wall", "-fvisibility=hidden"]
        elif source.suffix == ".cu":
            architectures = [capability.replace(".", "") for capability in capabilities]
            compiler = [os.environ.get("NVCC", "nvcc"), "-Xcompiler", "-fPIC,-fvisibility=hidden"]
            compiler += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
        else:
            continue
        commands.append(([*compiler, *common, "-c", str(source), "-o", str(target)], target))
    return commands


def link_command(objects: list[Path], backend: str, extra: list[str], exports: Path, target: Path) -> list[str]:
    libraries = ["-lc10", "-ltorch", "-ltorch_cpu"]
    if backend == "cuda":
        libraries += ["-lc10_cuda", "-ltorch_cuda"]
    paths = [f"-L{path}" for path in cpp_extension.library_paths(device_type="cpu")]
    visibility = [f"-Wl,--version-script={exports}"] if platform.system() == "Linux" else []
    link = [os.environ.get("CXX", "g++"), "-shared", *visibility, *extra]
    return [*link, *map(str, objects), *paths, *libraries, "-o", str(target)]


def run(command: list[str]) -> None:
    completed = subprocess.run(command, capture_output=True, text=True)
    if completed.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{completed.stdout}{completed.stderr}")
    if completed.stderr:
        print(completed.stderr, file=sys.stderr)


def digest(files: list[Path], settings: list[str]) -> str:
    sha = hashlib.sha256("\0".join(settings).encode())
    for file in files:
        sha.update(file.read_bytes())
    return sha.hexdigest()[:12]


def metadata(config: dict, identifier: str, backend: str, capabilities: list[str]) -> dict:
    backend_info: dict = {"type": backend}
    if capabilities:
        backend_info["archs"] = capabilities
    return {
        "name": config["general"]["name"],
        "id": identifier,
        "version": config["general"]["version"],
        "license": config["general"]["license"],
        "python-depends": [],
        "backend": backend_info,
    }


def build(backend: str, *, sanitize: bool = False, output: Path | None = None) -> Path:
    """Build one variant and return its folder, `<output>/<variant>` (default output: kernel/build)."""
    config = read_build_config()
    files, capabilities, flags = sources_of(config, backend)
    extra = SANITIZER_FLAGS if sanitize else []
    python_files = package_files(config)
    settings = [torch.__version__, backend, *capabilities, *flags, *extra, REGISTRATION_H, OPS_PY]
    unique = digest([Path(__file__), *files, *python_files], settings)
    package = config["general"]["name"].replace("-", "_")
    identifier = f"_{package}_{backend}_{unique}"

    output = output or KERNEL_DIR / "build"
    variant = output / variant_name(backend)
    library_name = f"{identifier}.abi3.so"
    if (variant / library_name).exists():
        return variant

    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".building-") as temporary:
        objects = Path(temporary) / identifier
        staged = Path(temporary) / variant.name
        objects.mkdir()
        staged.mkdir()
        (objects / "registration.h").write_text(REGISTRATION_H)
        commands = compile_commands(files, backend, capabilities, [*flags, *extra], objects)
        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, (command for command, _ in commands)))
        # Not linked with -fopenmp: a second OpenMP runtime beside torch's own would bring its own threads.
        exports = objects / "exports.map"
        exports.write_text(EXPORTS)
        run(link_command([target for _, target in commands], backend, extra, exports, staged / library_name))
        for file in python_files:
            shutil.copy(file, staged)
        (staged / "_ops.py").write_text(OPS_PY.format(identifier=identifier))
        (staged / "metadata.json").write_text(
            json.dumps(metadata(config, identifier, backend, capabilities), indent=2)
        )
        shutil.rmtree(variant, ignore_errors=True)
        staged.rename(variant)
    return variant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sanitize", action="store_true", help="address and undefined-behavior sanitizers, CPU only")
    parser.add_argument("--output", type=Path, help="folder that receives <variant>/ (default: kernel/build)")
    arguments = parser.parse_args()
    print(build(arguments.backend, sanitize=arguments.sanitize, output=arguments.output))


if __name__ == "__main__":
    main()
