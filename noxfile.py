"""What can be run here. `nox -l` is the table of contents: each session has its one line."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests"]
nox.options.default_venv_backend = "virtualenv"  # pip only: nothing else has to be installed
nox.options.reuse_venv = "yes"

PACKAGES = ("core", "lora", "loha", "prompt", "tokens")
OUTSIDE = ("examples/plugins/peft-audit-log", "examples/plugins/peft-ia3", "examples/plugins/peft-vera")
# Named in every install that could touch torch: an open range takes gigabytes of CUDA.
PINS = ("torch==2.13.0", "transformers==5.23.0", "safetensors==0.8.0")
PEER = ("peft==0.21.2", "accelerate==1.15.0", "psutil==7.2.2", "attrs==26.1.0")  # the last it imports and does not declare
IMPORT_LINTER = "import-linter==2.16"
QUANTISERS = ("bitsandbytes==0.50.2", "torchao==0.18.0", "optimum-quanto==0.2.7", "ninja==1.13.2")
CONSUMERS = ("accelerate==1.15.0", "datasets==5.2.0", "scikit-learn==1.9.1", "scipy", "pillow", "requests", "importlib-metadata")
#: the oldest, and of the others the last patch release of the minor versions between which transformers' use of the module `peft` changed
TRANSFORMERS = ("4.56.2", "4.57.6", "5.0.0", "5.3.0", "5.6.2", "5.12.1", "5.17.0", "5.20.2", "5.23.0", "5.24.0")
CONSUMERS_ALONE = ("trl==1.16.0", "diffusers==0.42.1", "sentence-transformers==6.2.0")
PYTEST = ("pytest==9.2.0", "pytest-xdist==3.8.0", "hypothesis==6.170.15")  # what the conformance suite needs, too
SITE = (
    "mkdocs==1.6.1",
    "mkdocs-material==9.8.2",
    "mkdocstrings==1.0.8",
    "mkdocstrings-python==2.0.11",
    "griffelib==2.4.1",
    "pymdown-extensions==13.1.2",
    "ruff==0.17.6",  # lays out the signatures
)
CLI = ("-e", "packages/peft-core[cli]", "typer==0.29.2", "rich==15.0.0")

OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ONE_THREAD = {**OFFLINE, "OMP_NUM_THREADS": "1"}


def editable(*packages: str) -> list[str]:
    return [part for package in packages for part in ("-e", f"packages/peft-{package}")]


def install_peer(session: nox.Session) -> None:
    """The upstream package, for comparisons only; --no-deps keeps its dependencies from deciding ours."""
    peft, *dependencies = PEER
    session.install(*PINS, *dependencies)
    session.install("--no-deps", peft)


def install_peer_apart(session: nox.Session, away: Path) -> Path:
    """The upstream package in a folder of its own, which takes the place of ours when it stands first on PYTHONPATH."""
    session.install("--target", str(away / "peer"), "--no-deps", PEER[0], "attrs==26.1.0", "psutil==7.2.2")
    if not (away / "peer" / "peft").is_dir():  # ours would be compared with itself
        session.error("the peer was not installed: this session can't run with --no-install or -R")
    return away / "peer"


def run_on_both(session: nox.Session, script: Path, peer: Path, away: Path) -> None:
    """Run a script of examples/compat on either package, and compare what it wrote."""
    script, compare = script.resolve(), Path("scripts/compare_runs.py").resolve()
    path = [str(peer)]
    if script.stem == "loftq_nf4":  # the peer's LoftQ asks for CUDA by name
        path.insert(0, str(Path("scripts/peer_without_cuda").resolve()))
    for name, environment in (("on-ours", ONE_THREAD), ("on-peer", {**ONE_THREAD, "PYTHONPATH": os.pathsep.join(path)})):
        (away / name).mkdir(exist_ok=True)
        with session.chdir(away / name):  # results have the same paths in them
            session.run("python", str(script), script.stem, env=environment, silent=True)
    session.run("python", str(compare), str(away / "on-ours" / script.stem), str(away / "on-peer" / script.stem))


@nox.session
def quickstart(session: nox.Session) -> None:
    """Fine-tune a real encoder on real labelled sentences; `-- --all` compares all tuners."""
    session.install(*PINS, *editable(*PACKAGES), "tqdm")
    session.install("--no-deps", "--require-hashes", "-r", "examples/requirements-quickstart.txt")
    session.run("python", "examples/quickstart.py", *session.posargs, env=OFFLINE)


@nox.session(name="demo-lm")
def demo_lm(session: nox.Session) -> None:
    """Adapt a real 135M-parameter Llama to a real text: perplexity and generation before and after."""
    session.install(*PINS, *editable(*PACKAGES), "tqdm", "gguf==0.19.0", "accelerate==1.15.0")
    session.install("--no-deps", "--require-hashes", "-r", "examples/requirements-demo-lm.txt")
    session.run("python", "examples/demo_lm.py", *session.posargs, env=OFFLINE)


@nox.session(name="demo-vision")
def demo_vision(session: nox.Session) -> None:
    """Adapt a real convolutional network to digits: its convolutions are a class of its own; accuracy before and after."""
    session.install(*PINS, *editable("core", "lora"), "tqdm", "scikit-learn==1.9.1")
    session.install("--no-deps", "--require-hashes", "-r", "examples/requirements-demo-vision.txt")
    session.run("python", "examples/demo_vision.py", *session.posargs, env=OFFLINE)


@nox.session(venv_backend="none")
def dev(session: nox.Session) -> None:
    """An environment for an editor, in .venv: all packages editable, test tools, ruff, mypy, and the hooks of pre-commit."""
    session.run(sys.executable, "-m", "venv", ".venv", external=True)  # some systems have no `python`
    python = Path(".venv") / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    tools = (*PYTEST, IMPORT_LINTER, "ruff==0.17.6", "mypy==2.4.1", "pre-commit==4.6.0", "nox")
    session.run(str(python), "-m", "pip", "install", *PINS, *editable(*PACKAGES), *CLI, *tools, external=True)
    session.run(str(python), "-m", "pre_commit", "install", external=True)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that need neither the peer nor the docs."""
    session.install(*PINS, *editable(*PACKAGES), *CLI, *PYTEST, IMPORT_LINTER)
    apart = ("--ignore=tests/interop", "--ignore=tests/docs", "--ignore=tests/quantised", "--ignore=tests/compat")  # sessions of their own
    session.run("pytest", "-n", "2", *apart, *session.posargs, env=ONE_THREAD)


@nox.session
@nox.parametrize("package", PACKAGES)
def alone(session: nox.Session, package: str) -> None:
    """One package with only what it declares: finds a missing dependency and a forbidden neighbour."""
    neighbours = ("core",) if package == "core" else ("core", package)
    session.install(*PINS, *editable(*neighbours), *PYTEST)
    session.run("pytest", f"tests/{package}", *session.posargs, env=ONE_THREAD)


@nox.session(reuse_venv=False)  # pip would keep an older build of the same version
def wheels(session: nox.Session) -> None:
    """Built packages in a bare environment, away from the checkout: find, train a step, save, load."""
    with tempfile.TemporaryDirectory() as folder:
        away = Path(folder)
        # The build tool stays out of the environment, so that its dependencies can't stand in for one we forgot.
        session.install("--target", str(away / "tools"), "build==1.6.1")
        for package in PACKAGES:  # the wheel is made from the sdist: shows that the sdist is complete
            command = ("python", "-m", "build", f"packages/peft-{package}", "--outdir", str(away / "dist"))
            session.run(*command, env={"PYTHONPATH": str(away / "tools")}, silent=True)
        built = sorted(str(wheel) for wheel in (away / "dist").glob("*.whl"))
        session.install(*PINS, *built)
        shutil.copy("scripts/wheel_smoke.py", away)
        with session.chdir(away):
            session.run("python", "-I", "wheel_smoke.py", env=OFFLINE)


@nox.session(reuse_venv=False)  # pip would keep an older build of the same version
def outside(session: nox.Session) -> None:
    """The packages of examples/plugins as strangers: wheels only, each beside core alone, their own tests away from the checkout."""
    with tempfile.TemporaryDirectory() as folder:
        away = Path(folder)
        session.install("--target", str(away / "tools"), "build==1.6.1")
        for package in ("packages/peft-core", *OUTSIDE):
            command = ("python", "-m", "build", package, "--outdir", str(away / "dist"))
            session.run(*command, env={"PYTHONPATH": str(away / "tools")}, silent=True)
        core = next((away / "dist").glob("peft_core-*.whl"))
        session.install(*PINS, *PYTEST, f"{core}[testing]")
        for package in OUTSIDE:
            name = Path(package).name
            session.install("--no-deps", *(str(wheel) for wheel in (away / "dist").glob(f"{name.replace('-', '_')}-*.whl")))
            shutil.copytree(Path(package) / "tests", away / name / "tests")
            shutil.copy(Path(package) / "pyproject.toml", away / name)  # pytest's settings
            with session.chdir(away / name):
                session.run("python", "-I", "-m", "pytest", "-q", "-W", "error", *session.posargs, env=ONE_THREAD)


@nox.session(reuse_venv=False)  # pip would keep an older build of the same version
def conformance(session: nox.Session) -> None:
    """The conformance suite on every tuner, ours and those of examples/plugins, as wheels and without a test file; writes a report."""
    report = Path(session.create_tmp()).resolve() / "conformance"
    with tempfile.TemporaryDirectory() as folder:
        away = Path(folder)
        session.install("--target", str(away / "tools"), "build==1.6.1")
        for package in (*(f"packages/peft-{package}" for package in PACKAGES), *OUTSIDE):
            command = ("python", "-m", "build", package, "--outdir", str(away / "dist"))
            session.run(*command, env={"PYTHONPATH": str(away / "tools")}, silent=True)
        session.install(*PINS, *PYTEST, *(str(wheel) for wheel in (away / "dist").glob("*.whl")))
        (away / "empty").mkdir()
        with session.chdir(away / "empty"):
            command = ("python", "-I", "-m", "pytest", "-q", "-n", "2", "-W", "error", "--peft-tuner", "all", "--peft-report", str(report))
            session.run(*command, *session.posargs, env=ONE_THREAD)


@nox.session(reuse_venv=False)  # pip would keep an older build of the same version
def walkthrough(session: nox.Session) -> None:
    """docs/write-a-tuner.md to the letter: from an empty folder, with a wheel of core and nothing else of ours, to a wheel elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        away = Path(folder)
        session.install("--target", str(away / "tools"), "build==1.6.1")
        command = ("python", "-m", "build", "packages/peft-core", "--outdir", str(away / "dist"))
        session.run(*command, env={"PYTHONPATH": str(away / "tools")}, silent=True)
        core = next((away / "dist").glob("peft_core-*.whl"))
        # what the page's own pip commands are to choose: our wheel (as a link, since older pips mix up a URL with extras), and no CUDA
        ours = (f"--find-links {core.parent.as_uri()}", f"peft-core=={core.name.split('-')[1]}")
        pins = away / "pins.txt"
        pins.write_text("\n".join([*ours, *PINS, *PYTEST, "build==1.6.1"]))
        runner = Path("tests/docs/walkthrough.py").resolve()
        (away / "empty").mkdir()
        with session.chdir(away / "empty"):
            environment = {**ONE_THREAD, "PIP_CONSTRAINT": str(pins)}
            session.run("python", str(runner), "docs/write-a-tuner.md", env=environment)


@nox.session(name="new-tuner", reuse_venv=False)  # the clock starts at nothing
def new_tuner(session: nox.Session) -> None:
    """From an empty folder to tuner packages that pass their own tests, with wheels only, in under 5 minutes."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        away = Path(folder)
        session.install(*PINS, *PYTEST, "build==1.6.1")
        session.run("python", "-m", "build", "packages/peft-core", "--outdir", str(away / "dist"), silent=True)
        session.install(*PINS, *(str(wheel) for wheel in (away / "dist").glob("*.whl")))
        with session.chdir(away):
            for name, kind in (("outer-try", "layer"), ("cue-try", "prompt")):
                session.run("python", "-I", "-c", f"from peft_core.cli.new_tuner import create; create({name!r}, {kind!r})")
                session.install(*PINS, f"./peft-{name}[test]")
                with session.chdir(f"peft-{name}"):
                    session.run("pytest", "-q", env=ONE_THREAD)
    taken = time.monotonic() - begun
    if taken > 300:
        session.error(f"{taken:.0f} s, more than 5 minutes")
    session.log(f"{taken:.0f} s")


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format, and which room may import which."""
    session.install("ruff==0.17.6", IMPORT_LINTER)
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    sources = os.pathsep.join(str(Path(f"packages/peft-{package}/src").resolve()) for package in PACKAGES)
    session.run("lint-imports", env={"PYTHONPATH": sources})  # it reads the sources, so nothing need be installed


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict on all packages."""
    session.install(*PINS, *editable(*PACKAGES), *CLI, *PYTEST, "mypy==2.4.1")
    session.run("mypy", "--strict", *(f"packages/peft-{package}/src" for package in (*PACKAGES, "compat")))


@nox.session
def docs(session: nox.Session) -> None:
    """Execute every code block of README and docs, then build the site with every public name in it; a warning is an error."""
    session.install(*PINS, *editable(*PACKAGES), *PYTEST, *SITE)
    session.run("pytest", "-n", "2", "tests/docs", *session.posargs, env=ONE_THREAD)
    with tempfile.TemporaryDirectory() as folder:
        # its own advertisement of a successor is a warning, too
        session.run("mkdocs", "build", "--strict", "--site-dir", folder, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def interop(session: nox.Session) -> None:
    """Files and outputs against the peer (peft), both ways; opacus and accelerate on adapted models."""
    session.install(*PINS, *editable(*PACKAGES), *PYTEST, IMPORT_LINTER, "opacus==1.6.0")
    install_peer(session)
    # The peer asks transformers for a deprecated property. Ignored here only: our own code must not.
    peer_warning = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    session.run("pytest", "-n", "2", "-W", peer_warning, "tests/interop", *session.posargs, env=ONE_THREAD)


@nox.session(reuse_venv=False)  # pip would keep an older build of the same version
def compat(session: nox.Session) -> None:
    """peft-compat as a wheel: its names, what transformers, Trainer and accelerate do with it, and a script that also runs on the peer."""
    with tempfile.TemporaryDirectory() as folder:
        away = Path(folder)
        session.install("--target", str(away / "tools"), "build==1.6.1")
        for package in (*PACKAGES, "compat"):
            command = ("python", "-m", "build", "--wheel", f"packages/peft-{package}", "--outdir", str(away / "dist"))
            session.run(*command, env={"PYTHONPATH": str(away / "tools")}, silent=True)
        session.install(*PINS, *PYTEST, *CONSUMERS[:2], *(str(wheel) for wheel in (away / "dist").glob("*.whl")))
        session.run("pytest", "tests/compat", *session.posargs, env=ONE_THREAD)
        for consumer in ("transformers", "trainer", "accelerate", "fsdp2"):
            session.run("python", f"bench/accept/accept_{consumer}.py", env=ONE_THREAD)
        run_on_both(session, Path("examples/compat/lora_causal_lm.py"), install_peer_apart(session, away), away)


@nox.session(name="compat-examples")
def compat_examples(session: nox.Session) -> None:
    """The scripts of examples/compat, unchanged on both packages: losses to 1e-5, files to 1e-6; `-- dora eva` for some (minutes, so not in CI)."""
    session.install(*PINS, *editable(*PACKAGES, "compat"), "accelerate==1.15.0", "scipy")
    session.install("--no-deps", QUANTISERS[0])  # its range must not decide our torch
    with tempfile.TemporaryDirectory() as folder:
        away = Path(folder)
        peer = install_peer_apart(session, away)
        for script in sorted(Path("examples/compat").glob("*.py")):
            if not session.posargs or any(script.stem.startswith(name) for name in session.posargs):
                run_on_both(session, script, peer, away)
                if script.stem in ("eva_init", "arrow_routing"):  # where the two differ: how far each is from the formula
                    for name, limit in (("on-ours", "1e-6"), ("on-peer", "1e-2")):
                        session.run("python", "scripts/exact_examples.py", str(away / name / script.stem), limit, env=ONE_THREAD)


@nox.session
def consumers(session: nox.Session) -> None:
    """What trl, diffusers, sentence-transformers, bitsandbytes and torchao do with peft-compat (slow to install, so not in CI)."""
    session.install(*PINS, *editable(*PACKAGES, "compat"), *CONSUMERS)
    session.install("--no-deps", *CONSUMERS_ALONE, *QUANTISERS)  # their ranges must not decide our torch
    for consumer in ("diffusers", "trl", "sentence_transformers", "bnb", "torchao"):
        session.run("python", f"bench/accept/accept_{consumer}.py", env=ONE_THREAD)


@nox.session
def clients(session: nox.Session) -> None:
    """Packages that import peft, run with ours and with the peer: same numbers? `-- gliner trl` for some, `-- --write` for the docs."""
    requirements = Path("bench/clients/requirements")
    chosen = [name for name in session.posargs if not name.startswith("-")] or sorted(file.stem for file in requirements.glob("*.txt"))
    session.install(*PINS, *editable(*PACKAGES, "compat"), *CONSUMERS, "attrs==26.1.0", "psutil==7.2.2")
    overlays = Path(session.create_tmp()).resolve()
    session.install("--target", str(overlays / "peer"), "--upgrade", "--no-deps", PEER[0])
    for name in chosen:
        install_overlay(session, requirements / f"{name}.txt", overlays / name)
    where = ("--overlays", str(overlays), "--peer", str(overlays / "peer"))
    session.run("python", "bench/clients/compare.py", *where, *session.posargs, env=ONE_THREAD)


def install_overlay(session: nox.Session, requirements: Path, folder: Path) -> None:
    """Install what a file lists into a folder, without dependencies, which would decide our torch; not again while the file is as it was."""
    done = folder / requirements.name
    if not requirements.is_file() or (done.is_file() and done.read_text() == requirements.read_text()):
        return  # compare.py says which names there are
    shutil.rmtree(folder, ignore_errors=True)
    session.install("--target", str(folder), "--no-deps", "-r", str(requirements))
    shutil.copy(requirements, done)


@nox.session
def architectures(session: nox.Session) -> None:
    """Each class of transformers that a tiny config can build × each method; `-- 1/4` for a quarter (minutes), then `-- --table` for the docs."""
    session.install(*PINS, *editable(*PACKAGES), "accelerate==1.15.0")
    session.run("python", "tests/architectures/run.py", *session.posargs, env=ONE_THREAD)


@nox.session
def quantised(session: nox.Session) -> None:
    """LoRA on quantised layers, prompts under quantised caches, with the real libraries (bitsandbytes, torchao, optimum-quanto) on the CPU."""
    session.install(*PINS, *editable(*PACKAGES), *PYTEST, "accelerate==1.15.0")
    session.install("--no-deps", *QUANTISERS)  # their ranges must not decide our torch
    session.run("pytest", "tests/quantised", *session.posargs, env=ONE_THREAD)


@nox.session
@nox.parametrize("version", ["4.57.6", "5.23.0"])
def transformers(session: nox.Session, version: str) -> None:
    """Our own tests of the prompt methods, which lean on transformers the most, under an old version and the pinned one."""
    session.install("torch==2.13.0", f"transformers=={version}", "safetensors==0.8.0", *editable(*PACKAGES), *PYTEST)
    session.run("pytest", "-n", "2", "tests/prompt", *session.posargs, env=ONE_THREAD)


@nox.session(name="transformers-versions")
@nox.parametrize("version", TRANSFORMERS)
def transformers_versions(session: nox.Session, version: str) -> None:
    """What transformers' adapter methods and Trainer do with peft-compat, under each version (slow to install, so not in CI)."""
    consumers = ("accelerate==1.15.0", "datasets>=5.0.1,<5.3")  # datasets 5.2 asks for a newer hub than transformers 4 takes
    session.install("torch==2.13.0", f"transformers=={version}", "safetensors==0.8.0", *consumers, *editable(*PACKAGES, "compat"))
    for consumer in ("transformers", "trainer"):
        session.run("python", f"bench/accept/accept_{consumer}.py", env=ONE_THREAD)


@nox.session
def bench(session: nox.Session) -> None:
    """Interleaved ratios against the bare model and the peer (peft)."""
    session.install(*PINS, *editable(*PACKAGES))
    install_peer(session)
    session.run("python", "bench/run.py", *session.posargs, env=OFFLINE)
