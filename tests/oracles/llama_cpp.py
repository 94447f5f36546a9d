"""Runs llama.cpp's own converter, as the reference for the bytes of a GGUF.

It lies in the source archive of llama-cpp-python, which is fetched once into a cache folder. The
converter knows tokenizers by a fingerprint of their output; for synthetic ones that question is
answered here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from .server import Server

LLAMA_CPP_PYTHON = "0.3.36"
FOLDER_VARIABLE = "DSV4CONVERT_LLAMA_CPP"

# Run with llama.cpp's folder as first argument, the rest goes to its converter.
PREPARE = """
import sys
from pathlib import Path
root = Path(sys.argv.pop(1))
sys.path.insert(0, str(root))
sys.path.insert(0, str(root / "gguf-py"))
sys.argv[0] = "convert_hf_to_gguf.py"
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "joyai-llm"
"""
DRIVER = PREPARE + "convert_hf_to_gguf.main()"
# Imports take nine tenths of a small conversion's time. So they are done once, in a process without threads, which then
# forks for every list of arguments, and answers with the exit code and what the converter said.
SERVER = f"""
import os, tempfile, traceback
from tests.oracles.server import serve  # first: llama.cpp has a folder of that name
{PREPARE}
import torch._dynamo  # which torch imports when it is first used

def convert(arguments):
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            code = 1
            try:
                sys.argv[1:] = arguments
                convert_hf_to_gguf.main()
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return code, said.read().decode(errors="replace")

serve(convert)
"""


def llama_cpp_folder() -> Path:
    """Return the folder of llama.cpp's sources, fetching them if they are not there."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dsv4convert"
    root = cache / f"llama_cpp_python-{LLAMA_CPP_PYTHON}" / "vendor" / "llama.cpp"
    if not (root / "convert_hf_to_gguf.py").is_file():
        _fetch(cache)
    return root


def _fetch(cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python",
             "--dest", folder, f"llama-cpp-python=={LLAMA_CPP_PYTHON}"],
            check=True,
        )  # fmt: skip
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        name = f"llama_cpp_python-{LLAMA_CPP_PYTHON}"
        try:
            (Path(folder) / name).rename(cache / name)
        except OSError:
            if not (cache / name).is_dir():  # it is there where another process was first
                raise


@cache
def _server() -> Server:
    return Server("-c", SERVER, str(llama_cpp_folder()))


def convert(source: Path, out: Path, *options: str) -> Path:
    """Convert ``source`` with llama.cpp's converter and return the file that it wrote."""
    code, said = _server().ask([str(source), "--outfile", str(out), *options])
    assert code == 0, said
    return out


if __name__ == "__main__":  # the converter in this very process, for a benchmark to time
    sys.argv[1:1] = [str(llama_cpp_folder())]
    exec(DRIVER)
