"""Options of llama.cpp's converter, and what ``hf-to-gguf`` has instead of each."""

from __future__ import annotations

# Option of convert_hf_to_gguf.py -> what to do instead. Those that hf-to-gguf has too stand in its own table.
LLAMA_CPP_OPTIONS = {
    "--outfile": "pass the output after the source: dsv4convert hf-to-gguf SOURCE OUT.gguf",
    "--outtype": "use --dense for the linear layers and --experts for the routed experts",
    "--fp8-as-q8": "FP8 weights become Q8_0 by default; use --dense and --experts for another type",
    "--model-name": "use --name",
    "--metadata": "use --name; license, tags and authors come from the README.md in the source folder",
    "--remote": "pass the repository as the source: dsv4convert hf-to-gguf deepseek-ai/DeepSeek-V4-Flash OUT.gguf",
    "--target-model-dir": "use --draft split or --draft only on the folder that holds both model and draft",
    "--no-mtp": "use --draft drop, which is the default",
    "--no-nextn": "use --draft drop, which is the default",
    "--dspark": "use --draft only",
    "--vocab-only": "leave it out: hf-to-gguf writes the vocabulary together with the tensors",
    "--bigendian": "leave it out: GGUF files are written for little-endian machines",
    "--use-temp-file": "leave it out: memory is bounded whatever the size of the model",
    "--no-lazy": "leave it out: memory is bounded whatever the size of the model",
    "--verbose": "leave it out: use --json for every detail, or dsv4convert --debug for a traceback",
    "--print-supported-models": "see dsv4convert inspect SOURCE for the variant of a checkpoint",
    "--fuse-gate-up-exps": "leave it out: the experts' tensors are written one by one",
    "--fuse-qkv": "leave it out: DeepSeek-V4 has no separate Q, K and V to fuse",
    "--mistral-format": "leave it out: only DeepSeek-V4 checkpoints are converted",
    "--disable-mistral-community-chat-template": "leave it out: only DeepSeek-V4 checkpoints are converted",
    "--sentence-transformers-dense-modules": "leave it out: only DeepSeek-V4 checkpoints are converted",
}
