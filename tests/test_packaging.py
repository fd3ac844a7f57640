"""The wheel works in an empty environment, from another folder, and together with another package `kernels`."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.whole_process

ROOT = Path(__file__).resolve().parent.parent

MAPPED = {("bimedix_jax", "kernels"), ("bimedix_jax", "models")}  # the symlinks: their targets count


def output_of(*command: str | Path, cwd: Path) -> str:
    """Output of a command that must succeed, in an environment without paths to the source tree."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the source files, so that files of an old build/ folder are not included."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "bimedix_jax", "kernels", "models"):
        if (ROOT / name).exists():
            output_of(
                "cp", "-R", "-P", ROOT / name, source / name if (ROOT / name).is_file() else source, cwd=mkdir(source)
            )
    build = ("wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", folder, source)
    output_of(sys.executable, "-m", "pip", *build, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def mkdir(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The `bin` of an environment with the wheel and the libraries of this environment, but not its bimedix_jax."""
    home = wheel.parent / "environment"
    venv.create(home, symlinks=True, with_pip=False)
    python = home / "bin" / "python"
    output_of(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", wheel, cwd=home)
    site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(home)}))
    # a plain path entry: .pth files in that folder, such as the one of an editable install, are not read
    (site / "libraries_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def test_the_wheel_has_each_file_once_in_our_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {"bimedix_jax", f"bimedix_jax-{version()}.dist-info"}

    tree = {path for top in ("bimedix_jax", "kernels", "models") for path in (ROOT / top).rglob("*.py")}
    tree = {path for path in tree if path.relative_to(ROOT).parts[:2] not in MAPPED}
    expected = {str(path.relative_to(ROOT)) for path in tree}
    expected = {f"bimedix_jax/{name}" if name.startswith(("kernels/", "models/")) else name for name in expected}
    assert {name for name in names if name.endswith(".py")} == expected


def test_the_wheel_has_the_assets(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assets = {str(path.relative_to(ROOT)) for path in (ROOT / "bimedix_jax/assets").rglob("*") if path.is_file()}
    assert assets
    assert not assets - names


def test_the_wheel_has_the_kernels_in_c(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    kernels = [path for path in (ROOT / "kernels").rglob("*") if path.suffix in (".cc", ".h")]
    assert {path.suffix for path in kernels} == {".cc", ".h"}
    assert not {f"bimedix_jax/{path.relative_to(ROOT)}" for path in kernels} - names


def version() -> str:
    return metadata.version("bimedix_jax")


def test_the_installed_wheel_runs_from_elsewhere(installed, tmp_path):
    assert "usage: bimedix" in output_of(installed / "bimedix", "--help", cwd=tmp_path)
    assert output_of(installed / "bimedix", "--version", cwd=tmp_path) == f"bimedix_jax {version()}\n"
    code = """
import bimedix_jax, bimedix_jax.kernels.nf4, bimedix_jax.models.config, importlib, pkgutil
for module in (bimedix_jax, bimedix_jax.kernels.nf4, bimedix_jax.models.config):
    print(module.__file__)
for found in pkgutil.walk_packages(bimedix_jax.__path__, "bimedix_jax."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
"""
    for file in output_of(installed / "python", "-W", "error", "-c", code, cwd=tmp_path).split():
        assert Path(file).is_relative_to(installed.parent)


def test_the_wheel_does_not_affect_the_package_named_kernels(installed, tmp_path):
    """Hugging Face's `kernels` (in the extra `dev`) is unchanged, before and after ours is imported."""
    code = """
import kernels, bimedix_jax.kernels.nf4, bimedix_jax.kernels as ours
print(kernels.get_kernel.__module__, kernels.__file__ != ours.__file__)
"""
    module, differs = output_of(installed / "python", "-c", code, cwd=tmp_path).split()
    assert module.startswith("kernels.")
    assert differs == "True"
    theirs = {str(file) for file in metadata.files("kernels") or ()}
    assert theirs
    assert not [name for name in theirs if name.startswith("bimedix_jax/")]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_tested_versions_are_within_the_bounds(python):
    """Every package that setup.py asks for has one exact version in the file of constraints/, within the bounds."""
    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / f"constraints/py{min(python, '3.12')}.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "==", f"{line}: not an exact version"
            assert "+" not in specifier.version, f"{line}: a local version exists on one machine only"
            pins[canonical(pin.name)] = specifier.version
    for text in metadata.requires("bimedix_jax") or ():
        wanted = Requirement(text)
        places = [{"extra": extra, "python_version": python} for extra in TESTED_EXTRAS]
        needed = wanted.marker is None or any(wanted.marker.evaluate(place) for place in places)
        if needed:
            assert pins[canonical(wanted.name)] in wanted.specifier, text


TESTED_EXTRAS = ("", "dev", "data", "serve", "aot")  # cuda12 and tpu bring what constraints/ leaves to them


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def test_the_build_backend_is_declared():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]["build-backend"] == (
        "setuptools.build_meta"
    )
