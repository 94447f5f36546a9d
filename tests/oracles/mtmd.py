"""Runs llama.cpp's multimodal library on a model and an image: the embeddings that it makes, and the next token's."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

CONTEXT = 1024
IMAGE_CHUNK = 1


class MediaRun(NamedTuple):
    """Ids of the text before and after the image, the image's embeddings [T, D], and the last position's logits."""

    before: list[int]
    after: list[int]
    embeddings: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]


def run_with_image(model: Path, tower: Path, pixels: npt.NDArray[np.uint8], before: str, after: str) -> MediaRun:
    """Return what llama.cpp makes of an image [height, width, 3] between two texts."""
    from llama_cpp import Llama, llama_cpp, mtmd_cpp

    sizes = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), CONTEXT)
    llama = Llama(str(model), **sizes, n_threads=1, n_threads_batch=1, verbose=False)
    parameters = mtmd_cpp.mtmd_context_params_default()
    parameters.use_gpu, parameters.n_threads, parameters.warmup = False, 1, False
    context = mtmd_cpp.mtmd_init_from_file(str(tower).encode(), llama._model.model, parameters)
    assert context is not None
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    height, width, _ = pixels.shape
    data = np.ascontiguousarray(pixels).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap = mtmd_cpp.mtmd_bitmap_init(width, height, data)
    prompt = before.encode() + mtmd_cpp.mtmd_default_marker() + after.encode()
    text = mtmd_cpp.mtmd_input_text(prompt, len(prompt), False, True)
    bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
    assert mtmd_cpp.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1) == 0
    texts: list[list[int]] = []
    embeddings: Any = None
    for number in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
        chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, number)
        count = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
        if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == IMAGE_CHUNK:
            assert mtmd_cpp.mtmd_encode_chunk(context, chunk) == 0
            made = mtmd_cpp.mtmd_get_output_embd(context)
            embeddings = np.ctypeslib.as_array(made, (count, llama.n_embd())).copy()
        else:
            size = ctypes.c_size_t()
            ids = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(size))
            texts.append([ids[i] for i in range(size.value)])
    end = llama_cpp.llama_pos()
    ended = mtmd_cpp.mtmd_helper_eval_chunks(context, llama._ctx.ctx, chunks, 0, 0, CONTEXT, True, ctypes.byref(end))
    assert ended == 0
    last = llama_cpp.llama_get_logits_ith(llama._ctx.ctx, -1)
    logits = np.ctypeslib.as_array(last, (llama.n_vocab(),)).copy()
    mtmd_cpp.mtmd_input_chunks_free(chunks)
    mtmd_cpp.mtmd_bitmap_free(bitmap)
    mtmd_cpp.mtmd_free(context)
    llama.close()
    return MediaRun(texts[0], texts[1], embeddings, logits)
